"""Our losses, advantages and k3 agree with verl's own functions within 1e-6, except for the deviations tested here.

`cases.distance` defines "within 1e-6". The second half tests the deviations: the size of each, and that it disappears
without its cause. All facts about verl are about version 0.9.1.
"""

import math

import pytest
import torch

pytest.importorskip("verl", reason="needs verl: pip install 'minicpgd[verl]'")

from cases import REACHES, SEEDS, TOLERANCE, B, Case, T, agree, distance, loss_and_gradient, make, ours, rewards_of
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn, kl_penalty
from verl.workers.config import ActorConfig

from minicpgd import ALGORITHMS
from minicpgd.algorithms.divergence import k3

NO_DUAL_CLIP = 1e9
HORIZON = 20
PER_RESPONSE = {"loss_agg_mode": "seq-mean-token-mean"}
# For each of our rows: verl's loss, verl's settings, and our settings.
LOSSES = {
    "grpo": ("vanilla", PER_RESPONSE, {}),
    "rloo": ("vanilla", PER_RESPONSE, {}),
    "grpo_dual_clip": ("vanilla", {**PER_RESPONSE, "clip_ratio_c": 3.0}, {}),
    "gspo": ("gspo", PER_RESPONSE, {}),
    "reinforce_pp": ("vanilla", {}, {}),
    "reinforce_pp_baseline": ("vanilla", {}, {}),
    "dapo": ("vanilla", {"clip_ratio_high": 0.28}, {}),
    "cispo": ("cispo", {"clip_ratio_low": 1.0}, {}),
    "dr_grpo": (
        "vanilla",
        {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": HORIZON},
        {"max_completion_length": HORIZON},
    ),
}


def actor(**changes):
    settings = {"clip_ratio_c": NO_DUAL_CLIP, "loss_agg_mode": "token-mean"} | changes
    return ActorConfig(strategy="fsdp", rollout_n=B, ppo_micro_batch_size_per_gpu=B, **settings)


def theirs(loss, case, *, rollout_is_weights=None, global_batch_size=None, **changes):
    """Return loss and gradient as verl's worker computes them."""
    config = actor(**changes)
    config.global_batch_info.update(
        loss_scale_factor=config.loss_scale_factor, global_batch_size=global_batch_size, dp_size=1
    )
    return loss_and_gradient(
        lambda logp: get_policy_loss_fn(loss)(
            old_log_prob=case.old_logp,
            log_prob=logp,
            advantages=case.advantages[:, None] * case.mask,
            response_mask=case.mask.bool(),
            loss_agg_mode=config.loss_agg_mode,
            config=config,
            rollout_is_weights=rollout_is_weights,
        )[0],
        case.logp,
    )


def one_token(log_ratio, advantage):
    old = torch.tensor([[-1.3]])
    return Case(old + log_ratio, old, torch.tensor([advantage]), torch.ones(1, 1))


def at(value):
    """Compare relatively, because such numbers lie between 1e-11 and 1e11."""
    return pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("row", LOSSES)
def test_losses_and_gradients_agree(row, reach, seed):
    loss, their_settings, our_settings = LOSSES[row]
    case = make(seed, reach)
    expected = theirs(loss, case, **their_settings)
    assert expected[1].abs().max() > 1e-3
    assert agree(ours(row, case, **our_settings), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_cases_reach_every_branch(seed):
    far, inside = make(seed), make(seed, "inside")
    assert far.log_ratio.min() < -3
    assert far.log_ratio.max() > 3
    assert math.log(0.8) < inside.log_ratio.min() < 0 < inside.log_ratio.max() < math.log(1.2)
    assert {1, T} <= set(far.mask.sum(dim=1).tolist())
    assert far.advantages.min() < 0 < far.advantages.max()
    assert 0 in far.advantages
    assert ours("gspo", far)[1].count_nonzero() < ours("pg", far)[1].count_nonzero()


# For each of our rows: verl's estimator, and its keywords.
ESTIMATORS = {
    "grpo": ("grpo", {"epsilon": 1e-4}),
    "grpo, vectorized": ("grpo_vectorized", {"epsilon": 1e-4}),
    "dr_grpo": ("grpo", {"norm_adv_by_std_in_grpo": False}),
    "rloo": ("rloo", {}),
    "rloo, vectorized": ("rloo_vectorized", {}),
    "reinforce_pp": ("reinforce_plus_plus", {"config": AlgoConfig(gamma=1.0)}),
    "reinforce_pp_baseline": ("reinforce_plus_plus_baseline", {}),
}


def advantages(row, estimator, rewards, lengths, uids, **keywords):
    """Return ours and verl's, (B,) each, one per response, in the order of the rewards."""
    mask = (torch.arange(T) < lengths[:, None]).float()
    at_the_end = torch.zeros_like(mask).scatter(1, lengths[:, None] - 1, rewards[:, None])
    if not estimator.startswith("reinforce_plus_plus") or estimator.endswith("baseline"):
        keywords["index"] = uids
    verls, _ = get_adv_estimator_fn(estimator)(at_the_end, mask, **keywords)
    assert torch.equal(verls, verls[:, :1] * mask)
    order = torch.tensor(sorted(range(len(uids)), key=lambda i: uids[i]))
    groups = len(set(uids))
    mine = torch.empty_like(rewards)
    mine[order] = ALGORITHMS[row].advantages(rewards[order].view(groups, -1), lengths[order].view(groups, -1)).flatten()
    return mine, verls[:, 0]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["binary", "graded"])
@pytest.mark.parametrize("row", ESTIMATORS)
def test_advantages_agree(row, kind, seed):
    estimator, keywords = ESTIMATORS[row]
    rewards, lengths, uids = rewards_of(kind, seed)
    mine, verls = advantages(row.split(",")[0], estimator, rewards, lengths, uids, **keywords)
    tokens = lengths.sum().item()
    if estimator.startswith("reinforce_plus_plus"):
        verls = verls * math.sqrt(tokens / (tokens - 1))  # A test below is about this deviation.
    assert distance(mine, verls) <= TOLERANCE


@pytest.mark.parametrize("seed", SEEDS)
def test_k3_agrees(seed):
    case = make(seed, "inside")
    expected = loss_and_gradient(lambda logp: kl_penalty(logp, case.old_logp, "low_var_kl").sum(), case.old_logp + 0.3)
    mine = loss_and_gradient(lambda logp: k3(case.old_logp - logp).sum(), case.old_logp + 0.3)
    assert agree(mine, expected)


# The tests from here on are about the deviations of verl from the papers, and so from our rows.


@pytest.mark.parametrize(("row", "loss"), [("grpo", "vanilla"), ("cispo", "cispo")])
def test_log_ratios_end_at_20(row, loss):
    """Beyond 20 the gradient of PPO's loss is 0, and the weight of CISPO stays at e^20."""
    before, beyond = one_token(19.0, -1.0), one_token(25.0, -1.0)
    settings = {"clip_ratio_low": 1.0, "clip_ratio_high": 1e12}
    assert agree(ours(row, before, epsilon_high=1e12), theirs(loss, before, **settings), tolerance=1e-5)
    mine, verls = (pair[1].item() for pair in (ours(row, beyond, epsilon_high=1e12), theirs(loss, beyond, **settings)))
    assert mine == at(math.exp(25))
    assert verls == (0 if loss == "vanilla" else at(math.exp(20)))


def test_gspo_ratios_end_at_e_to_the_10():
    before, beyond = one_token(9.5, -1.0), one_token(12.0, -1.0)
    assert agree(ours("gspo", before), theirs("gspo", before), tolerance=1e-5)
    assert ours("gspo", beyond)[1].item() == at(math.exp(12))
    assert theirs("gspo", beyond)[1].item() == 0


def test_gspo_with_weights_per_token():
    """verl multiplies each token's gradient by its own weight. The derivative of that loss has their mean instead."""
    case = make(0, "inside")
    equal, unequal = torch.full((B, T), 0.7), torch.linspace(0.5, 1.5, T).expand(B, T)

    def mine(weights):
        return ours("gspo", case, token_weights=ALGORITHMS["gspo"].token_weights(case.mask) * weights)

    assert agree(mine(equal), theirs("gspo", case, rollout_is_weights=equal, **PER_RESPONSE))
    (our_loss, our_gradient), verls = mine(unequal), theirs("gspo", case, rollout_is_weights=unequal, **PER_RESPONSE)
    assert distance(our_loss, verls[0]) <= TOLERANCE
    assert distance(our_gradient, verls[1]) > 0.1
    assert distance(our_gradient.sum(dim=1), verls[1].sum(dim=1)) <= 3 * TOLERANCE


def test_k3_ends_at_10():
    """It is 10 where the reference is e^2.6 = 13.6 times as probable. Beyond, the gradient is 0."""

    def both(log_ratio):
        ref = torch.tensor([-1.0])
        return [
            loss_and_gradient(lambda logp, f=f: f(logp, ref), ref - log_ratio)
            for f in (lambda logp, ref: k3(ref - logp).sum(), lambda logp, ref: kl_penalty(logp, ref, "k3").sum())
        ]

    assert agree(*both(2.5))
    mine, verls = both(3.0)
    assert mine[0].item() == at(math.exp(3) - 4)
    assert mine[1].item() == at(1 - math.exp(3))
    assert (verls[0].item(), verls[1].item()) == (10, 0)


def test_vanilla_is_dual_clip_by_default():
    default = {"clip_ratio_c": ActorConfig.clip_ratio_c}
    inside, beyond = one_token(math.log(2.9), -1.0), one_token(math.log(50), -1.0)
    assert agree(theirs("vanilla", inside, **default), ours("grpo", inside))
    assert agree(theirs("vanilla", beyond, **default), ours("grpo_dual_clip", beyond))
    loss, gradient = theirs("vanilla", beyond, **default)
    assert (loss.item(), gradient.item()) == (3, 0)
    assert [number.item() for number in ours("grpo", beyond)] == at([50, 50])


def test_cispo_raises_small_weights():
    """The paper limits the weight from above. verl's clamp also raises it to 1 - clip_ratio_low."""
    small, large = one_token(math.log(0.1), -1.0), one_token(math.log(5), -1.0)
    assert agree(theirs("cispo", large), ours("cispo", large))
    assert theirs("cispo", small)[1].item() == at(0.8)
    assert ours("cispo", small)[1].item() == at(0.1)
    assert agree(theirs("cispo", small, clip_ratio_low=1.0), ours("cispo", small))


def test_clip_ratio_alone_has_no_effect():
    """verl reads it only if clip_ratio_low and clip_ratio_high are null, and both are 0.2 by default."""
    case = make(0)
    assert agree(theirs("vanilla", case, clip_ratio=0.4), theirs("vanilla", case))
    with_effect = theirs("vanilla", case, clip_ratio=0.4, clip_ratio_low=None, clip_ratio_high=None)
    assert agree(with_effect, ours("grpo", case, epsilon=0.4, aggregation="token_mean"))
    assert not agree(with_effect, theirs("vanilla", case))


def test_gspo_is_not_averaged_per_response_by_default():
    case = make(0)
    assert agree(theirs("gspo", case), ours("gspo", case, aggregation="token_mean"))
    assert distance(theirs("gspo", case)[0], ours("gspo", case)[0]) > 0.01


def test_empty_responses_are_not_in_the_mean():
    """Without a global batch size, one empty response of 8 multiplies the weights of the others by 8/7."""
    whole = make(0)
    mask = whole.mask.clone()
    mask[3] = 0
    case = Case(whole.logp, whole.old_logp, whole.advantages, mask)
    mine = ours("grpo", case)
    assert agree(mine, theirs("vanilla", case, global_batch_size=B, **PER_RESPONSE))
    verls = theirs("vanilla", case, **PER_RESPONSE)
    assert agree([number * B / (B - 1) for number in mine], verls)


def test_the_constant_is_the_width_of_the_batch_by_default():
    """So a response has a larger weight in a micro-batch of short ones."""
    case, mode = make(0), "seq-mean-token-sum-norm"
    assert agree(ours("dr_grpo", case, max_completion_length=T), theirs("vanilla", case, loss_agg_mode=mode))
    wide = [torch.nn.functional.pad(t, (0, T)) for t in (case.logp, case.old_logp, case.mask)]
    wider = Case(wide[0], wide[1], case.advantages, wide[2])
    loss, half = (theirs("vanilla", c, loss_agg_mode=mode)[0].item() for c in (case, wider))
    assert half == at(loss / 2)
    settings = {"loss_agg_mode": mode, "loss_scale_factor": HORIZON}
    assert theirs("vanilla", wider, **settings)[0].item() == at(theirs("vanilla", case, **settings)[0].item())


@pytest.mark.parametrize("row", ["reinforce_pp", "reinforce_pp_baseline"])
def test_whitening_divides_by_one_token_less(row):
    """Advantages are sqrt((n - 1) / n) of ours, where n is the tokens of the batch. Here n is 160, so 0.3 % less."""
    rewards, lengths, uids = rewards_of("graded", 0)
    estimator, keywords = ESTIMATORS[row]
    mine, verls = advantages(row, estimator, rewards, lengths, uids, **keywords)
    tokens = lengths.sum().item()
    assert (verls / mine).tolist() == pytest.approx([math.sqrt((tokens - 1) / tokens)] * len(mine), rel=1e-5)
    assert distance(mine, verls) > 1e-3


def test_grpo_adds_a_smaller_epsilon():
    """It adds 1e-6 to sigma. The first implementations, and we, add 1e-4. For one success of six this is 0.024 %."""
    sigma, rewards = math.sqrt(1 / 6), torch.tensor([1.0, 0, 0, 0, 0, 0])
    mine, verls = advantages("grpo", "grpo", rewards, torch.full((6,), 3), ["one"] * 6)
    assert (verls / mine - 1).tolist() == pytest.approx([(1e-4 - 1e-6) / (sigma + 1e-6)] * 6, rel=0.01)


def test_equal_rewards_have_an_advantage():
    """The mean of eight times 0.7 has a rounding error. It is divided by 1e-6, so |A| = 0.056."""
    lengths, uids = torch.full((8,), 3), ["one"] * 8
    mine, verls = advantages("grpo", "grpo", torch.full((8,), 0.7), lengths, uids)
    assert mine.tolist() == [0] * 8
    assert verls.abs().tolist() == pytest.approx([0.056] * 8, rel=0.01)
    without_rounding = advantages("grpo", "grpo", torch.ones(8), lengths, uids)[1]
    assert without_rounding.tolist() == [0] * 8


def test_a_group_of_one_keeps_its_reward():
    """verl assumes the mean 0. Our estimator refuses such a group, as tests/test_verl_paths.py tests."""
    verls, _ = get_adv_estimator_fn("rloo")(torch.tensor([[0.7]]), torch.ones(1, 1), index=["alone"])
    assert verls.item() == at(0.7)
