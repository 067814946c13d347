"""The gradient of every row of the table is tested by hand, by finite differences, and on exact expectations."""

import math
from dataclasses import FrozenInstanceError, replace

import conftest
import numpy as np
import pytest
import torch

from minicpgd import ALGORITHMS, LossSettings
from minicpgd.algorithms import AGGREGATIONS, LEVELS
from minicpgd.algorithms.surrogates import per_sequence_mean, per_token, ratio

EPS, ALPHA, BOUND = 0.2, 0.7, 2.0
RATIOS = [1e-9, 1e-3, 0.3, 0.79, 0.81, 1.0, 1.19, 1.21, 1.27, 1.29, 2.9, 3.1, 1e3, 1e9]
SIGNS = [1.7, -1.7]


def clipped_side(r, A, high=1.2):
    return (A > 0 and r > high) or (A < 0 and r < 0.8)


def drift(r):
    return ALPHA * min(r - 1, BOUND)


# The derivative of each row's objective in log pi_theta, for one token of ratio r. The objective is maximised.
BY_HAND = {
    "cpgd": lambda r, A: (0 if clipped_side(r, A) else A) - drift(r),
    "cpg": lambda r, A: 0 if clipped_side(r, A) else A,
    "pgd": lambda r, A: A - drift(r),
    "pg": lambda r, A: A,
    "grpo": lambda r, A: 0 if clipped_side(r, A) else r * A,
    "rloo": lambda r, A: 0 if clipped_side(r, A) else r * A,
    "reinforce_pp": lambda r, A: 0 if clipped_side(r, A) else r * A,
    "reinforce_pp_baseline": lambda r, A: 0 if clipped_side(r, A) else r * A,
    "dr_grpo": lambda r, A: 0 if clipped_side(r, A) else r * A,
    "gspo": lambda r, A: 0 if clipped_side(r, A) else r * A,
    "dapo": lambda r, A: 0 if clipped_side(r, A, high=1.28) else r * A,
    "grpo_unclipped": lambda r, A: r * A,
    "grpo_dual_clip": lambda r, A: 0 if clipped_side(r, A) or (A < 0 and r > 3) else r * A,
    "grpo_drift": lambda r, A: (0 if clipped_side(r, A) else r * A) - drift(r),
    "rloo_drift": lambda r, A: (0 if clipped_side(r, A) else r * A) - drift(r),
    "reinforce_pp_drift": lambda r, A: (0 if clipped_side(r, A) else r * A) - drift(r),
    "cispo": lambda r, A: min(r, 1.2) * A,
}


def loss_of(name, logp, old_logp, advantages, mask, **changes):
    settings = {"epsilon": EPS, "drift_coef": ALPHA, "drift_clip": BOUND, "max_completion_length": mask.shape[1]}
    return conftest.loss_of(name, logp, old_logp, advantages, mask, **(settings | changes))


def gradient(name, logp, *others, **changes):
    logp = logp.clone().requires_grad_()
    return torch.autograd.grad(loss_of(name, logp, *others, **changes).loss, logp)[0]


def test_every_row_has_its_gradient_here():
    assert set(BY_HAND) == set(ALGORITHMS)
    assert {type(row.drift) for row in ALGORITHMS.values()} == {bool}


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("A", SIGNS)
@pytest.mark.parametrize("r", RATIOS)
def test_one_token_by_hand_and_by_difference(name, A, r):
    old = torch.tensor([[-1.3]], dtype=torch.float64)
    logp = old + math.log(r)
    rest = (old, torch.tensor([A], dtype=torch.float64), torch.ones(1, 1))
    ours = gradient(name, logp, *rest).item()
    assert ours == pytest.approx(-BY_HAND[name](r, A), rel=1e-9, abs=1e-12)
    if name == "cispo":
        return  # Its weight has no gradient, but a difference quotient would change it.
    h = 1e-6
    up, down = (loss_of(name, logp + s, *rest).loss.item() for s in (h, -h))
    assert ours == pytest.approx((up - down) / (2 * h), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("A", SIGNS)
def test_cispo_by_difference_with_a_constant_weight(A):
    old, h = torch.tensor([[-1.3]], dtype=torch.float64), 1e-6
    for r in RATIOS:
        logp = old + math.log(r)
        ours = gradient("cispo", logp, old, torch.tensor([A], dtype=torch.float64), torch.ones(1, 1)).item()
        up, down = (-min(r, 1.2) * A * (logp.item() + s) for s in (h, -h))
        assert ours == pytest.approx((up - down) / (2 * h), rel=1e-5)


@pytest.mark.parametrize("A", SIGNS)
@pytest.mark.parametrize("r", RATIOS)
def test_objective_values(A, r):
    """Not only the slopes are right, but also the numbers themselves."""
    old, d = torch.tensor([[-1.3]], dtype=torch.float64), math.log(r)
    rest = (old, torch.tensor([A], dtype=torch.float64), torch.ones(1, 1))

    def value(name, **changes):
        return -loss_of(name, old + d, *rest, **changes).loss.item()

    clip_d, clip_r = min(max(d, math.log(0.8)), math.log(1.2)), min(max(r, 0.8), 1.2)
    k3 = r - 1 - d if r <= 3 else (3 - 1 - math.log(3)) + 2 * (d - math.log(3))
    expected = {
        "pg": d * A,
        "cpg": min(d * A, clip_d * A),
        "pgd": d * A - ALPHA * k3,
        "cpgd": min(d * A, clip_d * A) - ALPHA * k3,
        "grpo_unclipped": r * A,
        "grpo": min(r * A, clip_r * A),
        "grpo_dual_clip": min(r * A, clip_r * A) if A > 0 else max(min(r * A, clip_r * A), 3 * A),
        "grpo_drift": min(r * A, clip_r * A) - ALPHA * k3,
        "cispo": min(r, 1.2) * A * (-1.3 + d),
    }
    for name, wanted in expected.items():
        assert value(name) == pytest.approx(wanted, rel=1e-9, abs=1e-12), name
    assert value("grpo", epsilon_high=0.5) == pytest.approx(min(r * A, min(max(r, 0.8), 1.5) * A))
    assert value("dapo", epsilon_high=0.5) == pytest.approx(min(r * A, min(max(r, 0.8), 1.5) * A))
    assert value("cpgd", drift_clip=50.0) == pytest.approx(
        min(d * A, clip_d * A) - ALPHA * (r - 1 - d if r <= 51 else 50 - math.log(51) + 50 * (d - math.log(51)))
    )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_loss_gradient_and_metrics_are_finite_at_any_ratio(name):
    old = torch.tensor([[-5.0, -5.0, -5.0, -200.0]])
    logp = torch.tensor([[-105.0, -5.0, -0.1, -100.0]])
    for A in (2.0, -2.0):
        rest = (old, torch.tensor([A]), torch.ones(1, 4))
        output = loss_of(name, logp, *rest)
        assert output.loss.isfinite()
        assert gradient(name, logp, *rest).isfinite().all()
        assert all(math.isfinite(value) for value in output.metrics.values())


def random_batch(rows=6, length=9, spread=0.6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, length, generator=generator, dtype=torch.float64) * 3
    d = torch.randn(rows, length, generator=generator, dtype=torch.float64) * spread
    lengths = torch.tensor([9, 1, 4, 9, 3, 6])[:rows]
    mask = torch.arange(length) < lengths[:, None]
    advantages = torch.tensor([1.5, -0.7, -2.0, 0.0, 0.3, -1.1], dtype=torch.float64)[:rows]
    return old + d, old, advantages, mask


def test_all_rows_agree_at_ratio_one():
    """With equal advantages and aggregation, all rows have one gradient in the first update of a rollout."""
    _, old, advantages, mask = random_batch()
    for aggregation in ("sequence_mean", "token_mean", "constant"):
        gradients = {
            name: gradient(name, old, old, advantages, mask, aggregation=aggregation)
            for name in ALGORITHMS
            if name != "gspo"
        }
        for name, value in gradients.items():
            torch.testing.assert_close(value, gradients["pg"], msg=name)
        assert gradients["pg"].abs().max() > 0.01
    # gspo gives each token of a response the same gradient, so it agrees with the others under its own aggregation.
    torch.testing.assert_close(gradient("gspo", old, old, advantages, mask), gradient("pg", old, old, advantages, mask))


def test_aggregations_by_hand():
    """Three responses of lengths 9, 1 and 4 give the weight of each token."""
    _, old, _, mask = random_batch(rows=3)
    advantages = torch.ones(3, dtype=torch.float64)
    wanted = {"sequence_mean": [1 / 27, 1 / 3, 1 / 12], "token_mean": [1 / 14] * 3, "constant": [1 / (3 * 20)] * 3}
    for aggregation, weights in wanted.items():
        g = gradient("pg", old, old, advantages, mask, aggregation=aggregation, max_completion_length=20)
        expected = -torch.tensor(weights, dtype=torch.float64)[:, None] * mask
        torch.testing.assert_close(g, expected, atol=1e-8, rtol=1e-6)
    own = {
        "reinforce_pp": "token_mean", "reinforce_pp_baseline": "token_mean", "dapo": "token_mean",
        "reinforce_pp_drift": "token_mean", "cispo": "token_mean", "dr_grpo": "constant",
    }  # fmt: skip
    for name, row in ALGORITHMS.items():
        assert row.aggregation is AGGREGATIONS[own.get(name, "sequence_mean")]
    with pytest.raises(ValueError, match="max_completion_length"):
        ALGORITHMS["dr_grpo"].loss(old, old, advantages, mask)


def test_columns_that_few_rows_set():
    """As in the papers, GSPO has a ratio per response, DAPO an upper bound, and REINFORCE++ the KL in the reward."""
    rows = ALGORITHMS.values()
    assert {row.name: row.level for row in rows if row.level is not per_token} == {"gspo": per_sequence_mean}
    assert {row.name: row.epsilon_high for row in rows if row.epsilon_high is not None} == {"dapo": 0.28}
    assert {row.name for row in rows if row.reference_kl == "reward"} == {"reinforce_pp", "reinforce_pp_drift"}
    assert {row.reference_kl for row in rows} == {"loss", "reward"}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_override_replaces_the_columns_it_names_and_keeps_the_others(name):
    row = ALGORITHMS[name]
    assert row.override() == row
    for aggregation, function in AGGREGATIONS.items():
        assert row.override(aggregation=aggregation) == replace(row, aggregation=function)
    for level, function in LEVELS.items():
        assert row.override(importance_level=level) == replace(row, level=function)
    assert row.override("equal", "token_mean", "sequence").override() != row


def test_a_row_clips_unless_its_objective_has_no_bound():
    assert {name for name, row in ALGORITHMS.items() if not row.clips} == {"pg", "pgd", "grpo_unclipped"}


@pytest.mark.parametrize("side", ["low", "high"])
def test_a_row_that_is_bounded_on_one_side_only_clips(side):
    def surrogate(d, A, logp, low, high):
        beyond = (A < 0) & (d < low) if side == "low" else (A > 0) & (d > high)
        return torch.where(beyond, 0.0, d * A), d * A

    assert replace(ALGORITHMS["cpgd"], surrogate=surrogate).clips


def test_sequence_levels_by_hand():
    """gspo takes the geometric mean of the ratios, rloo at the sequence level their product, over real tokens only."""
    logp, old, advantages, mask = random_batch(spread=0.1)
    for name, level, reduce in (("gspo", None, np.mean), ("rloo", "sequence", np.sum)):
        values = []
        for row in range(len(mask)):
            d = (logp - old)[row][mask[row]].numpy()
            s, A = math.exp(reduce(d)), advantages[row].item()
            values.append(min(s * A, min(max(s, 0.8), 1.2) * A))
        ours = loss_of(name, logp, old, advantages, mask, importance_level=level)
        assert -ours.loss.item() == pytest.approx(np.mean(values), rel=1e-6)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_padding_is_never_read(name):
    logp, old, advantages, mask = random_batch()
    clean = loss_of(name, logp, old, advantages, mask)
    for junk in (1e30, -math.inf, math.nan):
        other_logp, other_old = logp.masked_fill(~mask, junk), old.masked_fill(~mask, -junk)
        other = loss_of(name, other_logp, other_old, advantages, mask)
        assert other.loss.item() == clean.loss.item()
        assert other.metrics == clean.metrics
        g = gradient(name, other_logp, other_old, advantages, mask)
        assert (g[~mask] == 0).all()
        torch.testing.assert_close(g, gradient(name, logp, old, advantages, mask))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_masked_response_counts_as_a_response_without_tokens(name):
    logp, old, advantages, mask = random_batch()
    mask[2] = False
    output = loss_of(name, logp, old, advantages, mask)
    assert output.loss.isfinite()
    assert (gradient(name, logp, old, advantages, mask)[2] == 0).all()
    nothing = loss_of(name, logp, old, advantages, torch.zeros_like(mask))
    assert nothing.loss.item() == 0
    assert nothing.metrics == {"loss": 0.0}


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("aggregation", [None, "sequence_mean", "token_mean", "constant"])
def test_micro_batches_change_nothing(name, aggregation):
    logp, old, advantages, mask = random_batch()
    weights = ALGORITHMS[name].override(aggregation=aggregation).token_weights(mask, mask.shape[1])
    whole = gradient(name, logp, old, advantages, mask, aggregation=aggregation)
    parts = [
        gradient(name, logp[s], old[s], advantages[s], mask[s], token_weights=weights[s])
        for s in (slice(0, 1), slice(1, 5), slice(5, 6))
    ]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_advantage_no_surrogate_gradient(name):
    logp, old, advantages, mask = random_batch()
    g = gradient(name, logp, old, torch.zeros_like(advantages), mask, drift_coef=0.0)
    assert (g == 0).all()


def test_the_reference_kl():
    """beta adds k3 of KL(pi_theta || pi_ref), with the gradient 1 - exp(ref - logp). Two rows have it in the reward."""
    logp, old, advantages, mask = random_batch()
    ref = old - 0.3
    plain = gradient("grpo", logp, old, advantages, mask, aggregation="token_mean")
    with_kl = gradient("grpo", logp, old, advantages, mask, aggregation="token_mean", beta=0.5, ref_logp=ref)
    expected = 0.5 * (1 - (ref - logp).exp()) * mask / mask.sum()
    torch.testing.assert_close(with_kl - plain, expected, atol=1e-8, rtol=1e-6)
    e = (ref - logp)[mask]
    output = loss_of("grpo", logp, old, advantages, mask, beta=0.5, ref_logp=ref)
    assert output.metrics["kl_ref"] == pytest.approx((e.exp() - 1 - e).mean().item())
    start = old.float()
    far = loss_of("grpo", start - 88, start, advantages, mask, beta=0.5, ref_logp=start).metrics["kl_ref"]
    assert far == pytest.approx(math.exp(88), rel=1e-4)  # The sum of these does not fit into float32.
    assert type(far) is float
    with pytest.raises(ValueError, match="ref_logp"):
        loss_of("grpo", logp, old, advantages, mask, beta=0.5)
    in_reward = loss_of("reinforce_pp", logp, old, advantages, mask, beta=0.5)
    assert in_reward.loss.item() == loss_of("reinforce_pp", logp, old, advantages, mask).loss.item()


def test_metrics_by_hand():
    ratios = [[0.5, 1.0, 1.1, 9.9], [0.7, 1.3, 2.0, 9.9], [1.3, 0.7, 1.0, 1.15]]
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    old = torch.full((3, 4), -2.0, dtype=torch.float64)
    logp = old + torch.tensor(ratios, dtype=torch.float64).log()
    advantages = torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64)
    metrics = loss_of("cpgd", logp, old, advantages, mask).metrics
    assert {type(value) for value in metrics.values()} == {float}
    inside = [0.5, 1.0, 1.1, 0.7, 1.3, 2.0, 1.3, 0.7, 1.0, 1.15]
    assert metrics["kl_old"] == pytest.approx(np.mean([r - 1 - math.log(r) for r in inside]))
    assert metrics["ratio_min"] == pytest.approx(0.5)
    assert metrics["ratio_max"] == pytest.approx(2.0)
    assert metrics["clip_frac_neg"] == pytest.approx(2 / 10)  # 0.5 and 0.7 are below the bound.
    assert metrics["clip_frac_pos"] == pytest.approx(1 / 10)  # 1.3 is above the bound.
    dual = loss_of("grpo_dual_clip", old + math.log(3.5), old, advantages, mask).metrics
    assert dual["clip_frac_neg"] == pytest.approx(6 / 10)
    assert loss_of("pg", logp, old, advantages, mask).metrics["clip_frac_neg"] == 0
    many = torch.linspace(0.5, 2.5, 201, dtype=torch.float64)[None]
    metrics = loss_of("pg", many.log(), torch.zeros_like(many), torch.ones(1), torch.ones_like(many)).metrics
    assert metrics["ratio_p01"] == pytest.approx(0.52)
    assert metrics["ratio_p99"] == pytest.approx(2.48)


@pytest.mark.parametrize(("n", "low", "high"), [(150, 1, 148), (151, 2, 148)])
def test_percentiles_are_the_ratios_of_the_nearest_rank(n, low, high):
    """The ranks are 0.01 (n - 1) and 0.99 (n - 1), counted from 0: here 1.49 and 147.51, then 1.5 and 148.5."""
    ratios = torch.linspace(0.5, 2.0, n, dtype=torch.float64)
    one, mask = torch.ones(1), torch.ones(1, n)
    metrics = loss_of("pg", ratios.flip(0).log()[None], torch.zeros(1, n, dtype=torch.float64), one, mask).metrics
    assert metrics["ratio_p01"] == pytest.approx(ratios[low].item())
    assert metrics["ratio_p99"] == pytest.approx(ratios[high].item())


@pytest.mark.parametrize("A", SIGNS)
def test_cispo_counts_the_tokens_whose_weight_is_capped(A):
    old = torch.tensor([[-2.0, -1.5, -1.3, -0.9]], dtype=torch.float64)
    logp = old + torch.tensor([0.5, 1.1, 1.3, 2.0], dtype=torch.float64).log()
    metrics = loss_of("cispo", logp, old, torch.tensor([A], dtype=torch.float64), torch.ones(1, 4)).metrics
    assert (metrics["clip_frac_pos"], metrics["clip_frac_neg"]) == ((0.5, 0.0) if A > 0 else (0.0, 0.5))


def test_a_ratio_is_limited_to_e_to_the_80():
    d = torch.tensor([-200.0, 79.5, 80.0, 80.5, 200.0], dtype=torch.float64)
    assert ratio(d).tolist() == pytest.approx([math.exp(x) for x in (-200, 79.5, 80, 80, 80)])


def test_the_mean_gradient_of_cpgd_is_the_exact_one():
    """On all actions of a policy in their exact proportions, it agrees with finite differences by numpy."""
    counts = np.array([5, 3, 1, 1])
    old = counts / counts.sum()
    A = np.array([-0.4, 0.9, -1.2, 0.5])
    theta = np.log(old) + np.array([0.3, -0.2, 0.5, -0.4])

    def exact_objective(theta):
        d = theta - np.log(np.exp(theta).sum()) - np.log(old)
        surrogate = np.minimum(d * A, np.clip(d, np.log(0.8), np.log(1.2)) * A)
        return (old * (surrogate - ALPHA * (np.exp(d) - 1 - d))).sum()

    h, exact = 1e-6, []
    for i in range(4):
        step = np.eye(4)[i] * h
        exact.append((exact_objective(theta + step) - exact_objective(theta - step)) / (2 * h))
    actions = torch.tensor(np.repeat(np.arange(4), counts))
    parameters = torch.tensor(theta, requires_grad=True)
    logp = parameters.log_softmax(-1)[actions][:, None]
    old_logp = torch.tensor(np.log(old))[actions][:, None]
    loss = loss_of("cpgd", logp, old_logp, torch.tensor(A)[actions], torch.ones(10, 1)).loss
    ours = -torch.autograd.grad(loss, parameters)[0]
    assert ours.tolist() == pytest.approx(exact, abs=1e-7)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_default_settings(name):
    """The clip is 0.2 (dapo's upper one 0.28), the drift has coefficient 0.01 and slope 2 at most, and beta is 0."""
    logp, old, advantages, mask = random_batch(spread=2.0)
    row, rest = ALGORITHMS[name], (logp, old, advantages, mask)
    weights = {"token_weights": row.token_weights(mask, 9)}
    settings = LossSettings(epsilon=0.2, epsilon_high=None, drift_coef=0.01, drift_clip=2.0, beta=0.0)
    plain = row.loss(*rest, **weights).loss.item()
    assert plain == row.loss(*rest, settings, **weights).loss.item()
    if name == "dapo":
        assert plain == row.loss(*rest, replace(settings, epsilon_high=0.28), **weights).loss.item()
    if name != "dr_grpo":  # The constant of dr_grpo has no default.
        assert plain == row.loss(*rest).loss.item()


def test_only_the_loss_of_an_output_has_a_graph_and_all_have_the_dtype_of_the_log_probabilities():
    logp, old, advantages, mask = random_batch()
    logp, advantages = logp.float().requires_grad_(), advantages.requires_grad_()
    output = loss_of("cpgd", logp, old.float(), advantages, mask, beta=0.5, ref_logp=old.float())
    assert output.loss.requires_grad
    for tensor in (output.log_ratio, output.clipped, output.advantages, output.mask, output.ref_kl):
        assert not tensor.requires_grad
        assert tensor.shape == mask.shape
    assert output.loss.dtype == output.advantages.dtype == torch.float32
    assert (output.log_ratio[~mask] == 0).all()
    assert (output.ref_kl[~mask] == 0).all()


def test_rows_settings_and_outputs_cannot_be_changed():
    output = loss_of("cpgd", *random_batch())
    for frozen, name in ((ALGORITHMS["cpgd"], "drift"), (LossSettings(), "epsilon"), (output, "loss")):
        with pytest.raises(FrozenInstanceError):
            setattr(frozen, name, None)


TWINS = {"cpg": "cpgd", "pg": "pgd", "grpo": "grpo_drift", "rloo": "rloo_drift", "reinforce_pp": "reinforce_pp_drift"}


@pytest.mark.parametrize(("without", "with_drift"), TWINS.items())
def test_a_row_with_drift_differs_from_its_twin_in_the_drift_alone(without, with_drift):
    """So the drift causes every difference between the two."""
    row = ALGORITHMS[with_drift]
    assert replace(ALGORITHMS[without], name=row.name, label=row.label, drift=True, shows=row.shows) == row
