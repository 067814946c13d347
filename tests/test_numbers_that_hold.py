"""Properties of the objectives for any batch: equal cases give equal numbers, and large log-ratios give finite ones."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpgd import ALGORITHMS, LossSettings
from minicpgd.algorithms import AGGREGATIONS, LEVELS, WEIGHTS

DRIFT_COEF, BETA = 0.7, 0.3
some = settings(max_examples=5, deadline=None, derandomize=True)
every_row = pytest.mark.parametrize("name", ALGORITHMS)


@dataclass
class Batch:
    """N groups of G responses of up to T tokens, in float64. Some responses have no token at all."""

    rewards: torch.Tensor  # (N, G)
    lengths: torch.Tensor  # (B,)
    old: torch.Tensor  # (B, T), and so are d and ref
    d: torch.Tensor
    ref: torch.Tensor
    advantages: torch.Tensor  # (B,)

    @property
    def mask(self):
        return torch.arange(self.old.shape[1]) < self.lengths[:, None]

    def rows(self, rows):
        per_row = (value[rows] for value in (self.lengths, self.old, self.d, self.ref, self.advantages))
        return Batch(self.rewards, *per_row)


@st.composite
def batches(draw, shortest=0, longest=12, spread=(0.0, 0.1, 1.0, 5.0)):
    """Hypothesis chooses the shape, how far the policy moved, and the kind of reward. A generator draws the rest."""
    n, g, t = draw(st.integers(1, 4)), draw(st.integers(2, 6)), draw(st.integers(1, longest))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape, wide = (n * g, t), draw(st.sampled_from(spread))

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    rewards = normal(n, g) if draw(st.booleans()) else torch.randint(0, 2, (n, g), generator=generator).double()
    lengths = torch.randint(shortest, t + 1, (n * g,), generator=generator)
    old = -normal(*shape).exp()
    return Batch(rewards, lengths, old, wide * normal(*shape), old + 0.3 * normal(*shape), 2 * normal(n * g))


def loss_and_gradient(name, batch, *, token_weights=None, max_completion_length=None, beta=BETA, **columns):
    """The loss of a batch and its gradient, with other `columns` of the row, such as `aggregation`."""
    row = ALGORITHMS[name].override(**columns)
    if token_weights is None:
        token_weights = row.token_weights(batch.mask, max_completion_length or batch.old.shape[1])
    logp = (batch.old + batch.d).requires_grad_()
    settings = LossSettings(drift_coef=DRIFT_COEF, beta=beta)
    output = row.loss(
        logp, batch.old, batch.advantages, batch.mask, settings, ref_logp=batch.ref, token_weights=token_weights
    )
    return output.loss.detach(), torch.autograd.grad(output.loss, logp)[0]


def same(ours, wanted):
    # The weights of tokens are float32, and they add up in another order.
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-7 * max(1.0, wanted.abs().max().item()))


@every_row
@some
@given(batch=batches(), data=st.data())
def test_the_order_of_responses_does_not_matter(name, batch, data):
    order = torch.tensor(data.draw(st.permutations(range(len(batch.lengths)))))
    loss, gradient = loss_and_gradient(name, batch)
    shuffled_loss, shuffled_gradient = loss_and_gradient(name, batch.rows(order))
    same(shuffled_loss, loss)
    same(shuffled_gradient, gradient[order])


@every_row
@some
@given(batch=batches(), data=st.data(), cuts=st.lists(st.integers(0, 24), max_size=5))
def test_micro_batches_of_any_rows_add_up(name, batch, data, cuts):
    rows = torch.tensor(data.draw(st.permutations(range(len(batch.lengths)))))
    weights = ALGORITHMS[name].token_weights(batch.mask, batch.old.shape[1])
    loss, gradient = loss_and_gradient(name, batch)
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    total, parts = torch.zeros_like(loss), torch.full_like(gradient, math.nan)
    for start, stop in zip(edges, edges[1:], strict=False):
        if part := rows[start:stop].tolist():
            part_loss, parts[part] = loss_and_gradient(name, batch.rows(part), token_weights=weights[part])
            total += part_loss
    same(total, loss)
    same(parts, gradient)


@every_row
@some
@given(batch=batches(), extra=st.integers(1, 9), junk=st.sampled_from([0.0, -1e30, math.inf, math.nan]))
def test_more_padding_changes_nothing(name, batch, extra, junk):
    loss, gradient = loss_and_gradient(name, batch)
    wide = torch.full((len(batch.old), extra), junk, dtype=torch.float64)
    old, d, ref = (torch.cat([value, wide], dim=1) for value in (batch.old, batch.d, batch.ref))
    padded = Batch(batch.rewards, batch.lengths, old, d, ref, batch.advantages)
    padded_loss, padded_gradient = loss_and_gradient(name, padded, max_completion_length=batch.old.shape[1])
    same(padded_loss, loss)
    same(padded_gradient[:, :-extra], gradient)
    assert (padded_gradient[:, -extra:] == 0).all()


@every_row
@some
@given(batch=batches(spread=(0.1, 1.0)))
def test_float32_and_float64_agree(name, batch):
    values = (batch.old, batch.d, batch.ref, batch.advantages)
    single = Batch(batch.rewards, batch.lengths, *(value.float() for value in values))
    double = Batch(batch.rewards, batch.lengths, *(value.float().double() for value in values))
    ours, wanted = loss_and_gradient(name, single), loss_and_gradient(name, double)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4 * max(1.0, b.abs().max().item()))


@every_row
@pytest.mark.parametrize("level", [None, *LEVELS])
@some
@given(batch=batches(), dtype=st.sampled_from([torch.float32, torch.float64]), signs=st.integers(0, 2**32))
def test_log_ratios_of_100_stay_finite(name, level, batch, dtype, signs):
    """Log-probabilities of a real model do not differ by more. The clip acts at a hundredth of this."""
    coin = torch.randint(0, 2, batch.d.shape, generator=torch.Generator().manual_seed(signs))
    values = (batch.old, 200.0 * coin - 100.0, batch.ref, batch.advantages)
    far = Batch(batch.rewards, batch.lengths, *(value.to(dtype) for value in values))
    loss, gradient = loss_and_gradient(name, far, importance_level=level, beta=0.0)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@every_row
@some
@given(batch=batches(longest=4))
def test_a_response_without_tokens_has_no_gradient(name, batch):
    batch.lengths[0] = 0
    loss, gradient = loss_and_gradient(name, batch)
    assert loss.isfinite()
    assert (gradient[~batch.mask] == 0).all()
    batch.lengths[:] = 0
    loss, gradient = loss_and_gradient(name, batch)
    assert loss == 0
    assert (gradient == 0).all()


@every_row
@some
@given(batch=batches(shortest=1, longest=1))
def test_for_responses_of_one_token_all_levels_and_aggregations_agree(name, batch):
    loss, gradient = loss_and_gradient(name, batch)
    for level in LEVELS:
        for aggregation in AGGREGATIONS:
            ours = loss_and_gradient(name, batch, importance_level=level, aggregation=aggregation)
            same(ours[0], loss)
            same(ours[1], gradient)


@every_row
def test_a_response_of_32768_tokens_has_the_loss_of_as_many_responses_of_one_token(name):
    """So no error grows with the length."""
    generator, shape = torch.Generator().manual_seed(0), (2, 2**15)
    old, d, ref = (torch.randn(shape, generator=generator, dtype=torch.float64) * wide for wide in (1, 0.3, 1))
    advantages = torch.tensor([1.3, -0.4], dtype=torch.float64)
    long = Batch(torch.zeros(1, 2), torch.tensor([shape[1]] * 2), old, d, ref, advantages)
    columns = (value.reshape(-1, 1) for value in (old, d, ref))
    short = Batch(long.rewards, torch.ones(2 * shape[1]), *columns, advantages.repeat_interleave(shape[1]))
    loss, gradient = loss_and_gradient(name, long, importance_level="token")
    wanted_loss, wanted_gradient = loss_and_gradient(name, short, importance_level="token")
    assert loss.item() == pytest.approx(wanted_loss.item(), rel=1e-6)
    torch.testing.assert_close(gradient, wanted_gradient.view(shape), rtol=1e-6, atol=1e-12)


# Advantages ----------------------------------------------------------------------------------------------------------


def advantages_of(name, rewards, lengths, weight=None):
    return ALGORITHMS[name].advantages(rewards, lengths.view(rewards.shape), advantage_weight=weight)


def nearly(ours, wanted):
    torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9 * max(1.0, wanted.abs().max().item()))


every_weight = pytest.mark.parametrize("weight", [None, *WEIGHTS])


@every_row
@every_weight
@some
@given(batch=batches(shortest=1), data=st.data())
def test_advantages_follow_their_responses(name, weight, batch, data):
    """They do so if the responses of a group, and the prompts, come in another order."""
    n, g = batch.rewards.shape
    prompts, places = data.draw(st.permutations(range(n))), data.draw(st.permutations(range(g)))
    lengths = batch.lengths.view(n, g)
    plain = advantages_of(name, batch.rewards, lengths, weight)
    nearly(
        advantages_of(name, batch.rewards[prompts][:, places], lengths[prompts][:, places], weight),
        plain[prompts][:, places],
    )


@every_row
@every_weight
@some
@given(batch=batches(shortest=1), shift=st.floats(-1e3, 1e3))
def test_a_shift_of_all_rewards_changes_nothing(name, weight, batch, shift):
    rewards = batch.rewards.mul(2**20).round().div(2**20)  # The sum with the shift is then exact.
    shift = round(shift * 2**20) / 2**20
    plain = advantages_of(name, rewards, batch.lengths, weight)
    assert torch.equal(advantages_of(name, rewards + shift, batch.lengths, weight), plain)


@every_row
@every_weight
@some
@given(batch=batches(shortest=1), factor=st.floats(0.01, 100))
def test_std_and_whitening_remove_the_scale_of_rewards_and_others_keep_it(name, weight, batch, factor):
    """Their small constants are the exception: they keep a little of the scale."""
    plain = advantages_of(name, batch.rewards, batch.lengths, weight)
    scaled = advantages_of(name, batch.rewards * factor, batch.lengths, weight)
    row = ALGORITHMS[name].override(advantage_weight=weight)
    by_std, by_whitening = row.weight is WEIGHTS["std"], row.centre.__name__.endswith("whitened")
    if not by_std and not by_whitening:
        nearly(scaled, plain * factor)
    elif by_std and not by_whitening:
        sigma = batch.rewards.std(dim=1, keepdim=True)
        nearly(scaled, plain * factor * (sigma + 1e-4) / (factor * sigma + 1e-4))
    else:
        # In a batch of few tokens, the advantages may be next to 0.
        spread = advantages_of(name, batch.rewards, batch.lengths, "equal")
        if not by_std and spread.abs().max() > 0.1 and batch.rewards.std() > 0.01:
            torch.testing.assert_close(scaled, plain, rtol=0.05, atol=1e-3)


@every_row
@every_weight
@some
@given(batch=batches(shortest=1))
def test_the_opposite_rewards_have_the_opposite_advantages(name, weight, batch):
    plain = advantages_of(name, batch.rewards, batch.lengths, weight)
    nearly(advantages_of(name, -batch.rewards, batch.lengths, weight), -plain)


@every_row
@pytest.mark.parametrize("better", [1.0, 1e-3, 1e3])
def test_of_two_responses_the_better_one_has_the_positive_advantage(name, better):
    rewards = torch.tensor([[better, 0.0]], dtype=torch.float64)
    first, second = advantages_of(name, rewards, torch.tensor([5, 5]))[0].tolist()
    assert first > 0
    assert first == pytest.approx(-second, rel=1e-12)
