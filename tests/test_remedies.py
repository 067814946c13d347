"""What keeps a policy near the one that sampled: the stop at a KL, the adaptive drift, the settings of Adam."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import loss_of
from transformers import get_scheduler

from minicpgd import ALGORITHMS, LossSettings, TrainConfig, train
from minicpgd.algorithms import adaptive_drift_coef, drift_warning, kept_groups, mean_kl, token_metrics
from minicpgd.algorithms.aggregation import group_token_mean, sequence_mean
from minicpgd.errors import ConfigError
from minicpgd.models.precision import learning_rate, make_optimizer, start_rollout
from minicpgd.training import Callbacks, metrics
from minicpgd.training.step import Learner, seed_step


def moments(learner):
    return copy.deepcopy(learner.optimizer.state_dict()["state"])


def weights(learner):
    return torch.cat([p.detach().flatten().clone() for p in learner.policy.model.parameters()])


def with_advantages(experience):
    """Random advantages, so that no update is skipped."""
    values = torch.randn(experience.rewards.shape, generator=torch.Generator().manual_seed(0))
    return replace(experience, advantages=values)


# The stop


def passes_of(learner, number=4):
    """Make up to `number` passes over one rollout, and return them with the learner's state after each update."""
    generators = seed_step(0, 1)
    experience = with_advantages(learner.collect(generators))
    updates, states, update = [], [weights(learner)], learner.update

    def record(*arguments):
        updates.append(update(*arguments))
        states.append(weights(learner))
        return updates[-1]

    learner.update = record
    passes = []
    while len(passes) < number and not (passes and passes[-1].was_ended):
        passes.append(learner.train_pass(experience, generators.order))
    return passes, updates, states


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_the_passes_end_before_the_first_update_whose_minibatch_has_too_large_a_kl(small, micro_batch_size):
    settings = {"num_minibatches": 4, "learning_rate": 1e-3, "micro_batch_size": micro_batch_size}
    free = Learner.from_config(small("free", **settings))
    _, updates, states = passes_of(free)
    assert len(updates) == 16
    kls = [mean_kl(update.outputs) for update in updates]
    assert kls[0] == pytest.approx(0, abs=1e-9)
    target = sorted(kls)[8]
    first = next(i for i, kl in enumerate(kls) if kl > target)
    assert 2 < first < 14

    stopped = Learner.from_config(small("stopped", target_kl=target, **settings))
    passes, updates, stopped_states = passes_of(stopped)
    assert [update.ends_passes for update in updates] == [False] * first + [True]
    assert updates[-1].grad_norm is None
    assert len(passes) == first // 4 + 1
    assert [seen.was_ended for seen in passes] == [False] * (len(passes) - 1) + [True]
    assert all(torch.equal(a, b) for a, b in zip(states[: first + 1], stopped_states, strict=False))
    assert torch.equal(stopped_states[-1], stopped_states[-2])
    assert all(p.grad is None or not p.grad.any() for p in stopped.policy.model.parameters())
    assert sum(len(seen.grad_norms) for seen in passes) == first
    assert sum(seen.skipped for seen in passes) == 0


def test_a_kl_that_equals_the_bound_ends_nothing(small):
    learner = Learner.from_config(small(num_minibatches=4, learning_rate=1e-3))
    _, updates, _ = passes_of(learner)
    kls = [mean_kl(update.outputs) for update in updates]
    again = Learner.from_config(small("again", num_minibatches=4, learning_rate=1e-3, target_kl=max(kls)))
    assert len(passes_of(again)[1]) == 16


def test_a_step_stops_counts_its_updates_and_starts_the_next_rollout_afresh(small):
    config = small(num_prompts=8, num_iterations=8, num_minibatches=4, learning_rate=1e-3, target_kl=1e-3)
    learner = Learner.from_config(config)
    for step in (1, 2, 3):
        values = learner.step(step).metrics
        assert 1 <= values["updates"] < 32
        assert values["skipped_updates"] + values["updates"] < 32
    without = Learner.from_config(replace(config, target_kl=None, num_iterations=2))
    values = without.step(1).metrics
    assert values["updates"] + values["skipped_updates"] == 8


def test_moments_do_not_change_where_an_update_is_not_made(small):
    learner = Learner.from_config(small(num_minibatches=2, learning_rate=1e-3))
    generators = seed_step(0, 1)
    experience = with_advantages(learner.collect(generators))
    learner.train_pass(experience, generators.order)
    before = moments(learner)
    learner.config = replace(learner.config, target_kl=1e-12)
    assert learner.update(experience, torch.arange(4)).ends_passes
    after = moments(learner)
    assert all(torch.equal(before[i][name], after[i][name]) for i in before for name in before[i])


def test_the_mean_kl_is_the_metric_kl_old():
    generator = torch.Generator().manual_seed(0)
    logp, old = torch.randn(2, 6, 5, generator=generator)
    mask = torch.rand(6, 5, generator=generator) > 0.3
    outputs = [loss_of("cpgd", logp[i : i + 2], old[i : i + 2], torch.ones(2), mask[i : i + 2]) for i in (0, 2, 4)]
    d = (logp - old)[mask].double()
    assert mean_kl(outputs) == pytest.approx((d.exp() - 1 - d).mean().item(), rel=1e-6)
    assert mean_kl(outputs) == token_metrics(outputs)["kl_old"]
    assert type(mean_kl(outputs)) is float
    assert mean_kl([loss_of("cpgd", logp, old, torch.ones(6), torch.zeros(6, 5))]) == 0


# The weight of the drift


def test_each_response_may_have_its_own_drift_coefficient():
    """By hand: the derivative of the loss is the token's weight times alpha * min(r - 1, c), where A is 0."""
    ratios = torch.tensor([[0.5, 1.5], [0.5, 1.5], [4.0, 9.0]], dtype=torch.float64)
    logp = ratios.log().requires_grad_()
    alphas = torch.tensor([0.0, 0.5, 3.0], dtype=torch.float64)
    rest = (torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3), torch.ones(3, 2))
    output = loss_of("cpgd", logp, *rest, drift_coef=alphas, drift_clip=5.0)
    (gradient,) = torch.autograd.grad(output.loss, logp)
    wanted = torch.tensor([[0, 0], [-0.25, 0.25], [9, 15]], dtype=torch.float64) / 6
    torch.testing.assert_close(gradient, wanted)
    parts = [
        loss_of("cpgd", logp[i : i + 1], *(value[i : i + 1] for value in rest), drift_coef=alpha, drift_clip=5.0).loss
        for i, alpha in enumerate(alphas.tolist())
    ]
    torch.testing.assert_close(output.loss, sum(parts) / 3)
    assert loss_of("cpgd", logp.float(), rest[0].float(), *rest[1:], drift_coef=alphas).loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("coefficient", "kl", "wanted"),
    [(1, 0.0151, 2), (1, 0.015, 1), (1, 0.01, 1), (1, 0.0067, 1), (1, 0.0066, 0.5), (0.25, 0, 0.125), (4, math.inf, 8),
     (2.0**20, 1, 2.0**20), (2.0**-20, 0, 2.0**-20), (2.0**19, 1, 2.0**20), (2.0**-19, 0, 2.0**-20),
     (1, 0.01 / 1.5, 1)],
)  # fmt: skip
def test_the_adaptive_coefficient_is_doubled_or_halved(coefficient, kl, wanted):
    assert adaptive_drift_coef(coefficient, kl, target_kl=0.01) == wanted


def test_an_adaptive_run_follows_the_kl_of_its_last_pass_and_ends_no_pass(small):
    config = small(drift_coef="adaptive", target_kl=1e-3, num_prompts=8, num_iterations=3, learning_rate=1e-3)
    learner, coefficient = Learner.from_config(config), 1.0
    seen = []
    for step in range(1, 6):
        values = learner.step(step).metrics
        assert values["drift_coef"] == coefficient
        assert values["updates"] + values["skipped_updates"] == 6
        coefficient = adaptive_drift_coef(coefficient, values["kl_old"], 1e-3)
        assert learner.drift_coef == coefficient
        seen.append(coefficient)
    assert len(set(seen)) > 1


def test_an_adaptive_coefficient_stays_where_nothing_was_learned(small):
    learner = Learner.from_config(small(drift_coef="adaptive", target_kl=1e-3))
    learner.reward = lambda completions, **_: [1.0] * len(completions)
    learner.drift_coef = 3.0
    assert learner.step(1).metrics["updates"] == 0
    assert learner.drift_coef == 3.0


def test_adaptive_needs_a_kl_to_aim_at():
    with pytest.raises(ConfigError, match="^drift_coef = adaptive: it needs target_kl"):
        TrainConfig(drift_coef="adaptive", target_kl=None)
    assert TrainConfig(drift_coef="adaptive", target_kl=0.01).largest_kl == math.inf
    assert TrainConfig(target_kl=0.01).largest_kl == 0.01
    assert TrainConfig(target_kl=None).largest_kl == math.inf
    assert TrainConfig().largest_kl == 0.003


def test_a_loss_takes_one_coefficient_by_default():
    assert LossSettings().drift_coef == TrainConfig().drift_coef == 0.01


# From the paper: tokens of a group share one mean, bounds that loosen, weights of later passes, groups left out


def test_all_tokens_of_a_prompts_responses_share_one_mean():
    """By hand, equation 2 of the paper: prompts count alike, and so do the tokens of a prompt."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    groups = torch.tensor([7, 3, 7, 3])
    weights = ALGORITHMS["cpgd"].override(aggregation="group_token_mean").token_weights(mask, 9, groups)
    per_row = torch.tensor([1 / 12, 1 / 2, 1 / 12, 0])
    torch.testing.assert_close(weights, mask * per_row[:, None])
    alone = group_token_mean(mask)
    torch.testing.assert_close(alone, sequence_mean(mask))
    assert group_token_mean(torch.zeros(2, 3).bool(), None, torch.zeros(2).long()).sum() == 0


def test_an_update_knows_which_responses_answer_the_same_prompt(small):
    learner = Learner.from_config(small(aggregation="group_token_mean", num_minibatches=1))
    experience = with_advantages(learner.collect(seed_step(0, 1)))
    rows = torch.tensor([0, 1, 4, 7])
    output = learner.update(experience, rows).outputs[0]
    mask = experience.rollout.mask[rows]
    group = torch.tensor([0, 0, 1, 1])
    weights = group_token_mean(mask, None, group)
    surrogate = (experience.advantages.flatten()[rows, None] * output.log_ratio * weights).sum()
    assert output.loss.item() == pytest.approx(-surrogate.item(), abs=1e-6)
    sizes = torch.stack([mask[group == i].sum() for i in (0, 1)])
    torch.testing.assert_close(weights.sum(dim=1), mask.sum(dim=1) / sizes[group] / 2)


@pytest.mark.parametrize("name", ["cpgd", "grpo", "gspo", "dapo"])
def test_the_clip_bounds_loosen_along_a_response(name):
    """By hand: at growth 3, the bounds are 1 -+ 0.2 at the first of five tokens, and 1 -+ 0.6 at the last."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [1, 0, 0, 0, 0]]).bool()
    settings = LossSettings(epsilon=0.2, clip_growth=3.0)
    like = torch.zeros(1, dtype=torch.float64)
    low, high = ALGORITHMS[name].log_bounds(mask, settings, like)
    above = 0.28 if name == "dapo" else 0.2
    factors = torch.tensor([[1, 1.5, 2, 2.5, 3], [1, 1, 2, 2, 3], [1, 1, 1, 1, 1]], dtype=torch.float64)
    torch.testing.assert_close(low.exp()[mask], (1 - 0.2 * factors)[mask])
    torch.testing.assert_close(high.exp()[mask], (1 + above * factors)[mask])
    low, high = ALGORITHMS[name].log_bounds(mask, LossSettings(epsilon=0.2), like)
    assert (low.item(), high.item()) == (math.log(0.8), math.log(1 + above))


def test_tokens_before_a_response_have_finite_bounds():
    """Else a token that is not in the response would make the loss NaN, although its weight is 0."""
    mask, settings = torch.tensor([[0, 0, 1, 1]]).bool(), LossSettings(epsilon=0.2, epsilon_high=1.0, clip_growth=4.0)
    low, high = ALGORITHMS["cpgd"].log_bounds(mask, settings, torch.zeros(1))
    assert low.isfinite().all()
    assert high.isfinite().all()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_token_is_clipped_at_its_own_bound(sign):
    ratios = torch.tensor([[1 + sign * 0.3, 1 + sign * 0.3]], dtype=torch.float64)
    logp, rest = ratios.log().requires_grad_(), (torch.zeros(1, 2), torch.tensor([float(sign)]), torch.ones(1, 2))
    for growth, wanted in [(1.0, [0, 0]), (2.0, [0, 1]), (0.5, [0, 0])]:
        output = loss_of("cpg", logp, *rest, epsilon=0.2, clip_growth=growth)
        (gradient,) = torch.autograd.grad(output.loss, logp)
        assert (gradient * -2 * sign).flatten().tolist() == pytest.approx(wanted)
        assert output.clipped.flatten().tolist() == [not value for value in wanted]


def test_bounds_that_would_leave_no_ratio_are_refused():
    with pytest.raises(ConfigError, match="^clip_growth = 5.0: times epsilon = 0.2 it has to be below 1"):
        TrainConfig(clip_growth=5.0)
    assert TrainConfig(clip_growth=4.9).loss_settings(1.0).clip_growth == 4.9


def test_from_the_second_pass_on_advantages_are_weighed_by_the_clipped_ratio(small):
    config = small(num_minibatches=1, num_iterations=3, learning_rate=1e-2, weigh_passes=True, epsilon_high=0.3)
    learner, seen = Learner.from_config(config), []
    update = learner.update

    def record(experience, rows):
        ratio = (learner.score(experience.rollout) - experience.rollout.logp).exp()
        seen.append((ratio, experience))
        return update(experience, rows)

    learner.update = record
    collect = learner.collect
    learner.collect = lambda generators: with_advantages(collect(generators))
    learner.step(1)
    assert len(seen) == 3
    assert seen[0][1].pass_weights is None
    for ratio, experience in seen[1:]:
        assert ((ratio < 0.8) | (ratio > 1.3)).any()
        torch.testing.assert_close(experience.pass_weights, ratio.clamp(0.8, 1.3), atol=1e-4, rtol=1e-4)


def test_a_loss_takes_an_advantage_for_each_token():
    """By hand: at ratio 1 the derivative of CPGD's loss is minus the token's weight times its advantage."""
    logp = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[1.0, -2, 3], [0, 5, 7]], dtype=torch.float64)
    output = loss_of("cpgd", logp, torch.zeros(2, 3), advantages, torch.ones(2, 3))
    (gradient,) = torch.autograd.grad(output.loss, logp)
    torch.testing.assert_close(gradient, -advantages / 6)


def test_the_weights_of_a_pass_multiply_the_advantages(small):
    learner = Learner.from_config(small(num_minibatches=1))
    experience = with_advantages(learner.collect(seed_step(0, 1)))
    weights = torch.rand(experience.rollout.mask.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    output = learner.update(replace(experience, pass_weights=weights), torch.tensor([6, 1])).outputs[0]
    width = output.advantages.shape[1]
    wanted = experience.advantages.flatten()[[6, 1], None] * weights[[6, 1], :width]
    torch.testing.assert_close(output.advantages, wanted)


NAN = math.nan


@pytest.mark.parametrize(
    ("least", "most", "kept"),
    [(None, None, [1, 1, 1, 1, 1]), (0.1, None, [0, 1, 1, 1, 1]), (None, 0.9, [1, 1, 1, 0, 1]),
     (0.25, 0.75, [0, 1, 1, 0, 1]), (0.3, 0.7, [0, 0, 0, 0, 1])],
)  # fmt: skip
def test_groups_whose_mean_reward_lies_outside_are_left_out(least, most, kept):
    rewards = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, NAN, NAN]])
    assert kept_groups(rewards, least, most).tolist() == [bool(value) for value in kept]


def test_a_group_that_is_left_out_has_no_gradient_and_no_drift(small):
    config = small(num_prompts=3, num_minibatches=1, drift_coef=1.0, learning_rate=1e-2, group_reward_max=0.9)
    learner = Learner.from_config(config)
    rewards = [1.0] * 4 + [1.0, 0.0, 0.0, 1.0] + [0.0, 1.0, 1.0, 1.0]
    learner.reward = lambda completions, **_: rewards
    generators = seed_step(0, 1)
    experience = learner.collect(generators)
    assert experience.used.tolist() == [False] * 4 + [True] * 8
    learner.train_pass(experience, generators.order)
    (output,) = learner.train_pass(experience, generators.order).outputs
    assert output.mask.any(dim=1).sum() == 8
    assert learner.update(experience, torch.arange(4)).grad_norm is None


def test_truncated_responses_and_groups_are_left_out_together(small):
    config = small(max_completion_length=3, mask_truncated_completions=True, group_reward_min=0.5)
    learner = Learner.from_config(config)
    learner.reward = lambda completions, **_: [0.0] * 4 + [1.0] * 4
    experience = learner.collect(seed_step(0, 1))
    assert experience.rollout.truncated.any()
    assert experience.used.tolist() == [False] * 4 + [not end for end in experience.rollout.truncated[4:].tolist()]


# The optimizer


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_the_learning_rate_is_that_of_transformers(kind, warmup):
    config = TrainConfig(learning_rate=0.4, lr_scheduler_type=kind, warmup_steps=warmup, max_steps=11)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=11)
    for step in range(1, 12):
        assert learning_rate(config, step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_a_warm_up_may_be_longer_than_the_run():
    config = TrainConfig(learning_rate=1.0, lr_scheduler_type="linear", warmup_steps=8, max_steps=4)
    assert [learning_rate(config, step) for step in (1, 2, 4)] == [0, 0.125, 0.375]


def test_the_optimizer_has_the_settings_of_the_config(policy):
    config = TrainConfig(learning_rate=0.3, adam_beta1=0.5, adam_beta2=0.6, adam_epsilon=0.1, weight_decay=0.2)
    (group,) = make_optimizer(config, policy.model).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.3, (0.5, 0.6), 0.1, 0.2)
    (group,) = make_optimizer(TrainConfig(), policy.model).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-4, (0.9, 0.999), 1e-8, 0)


def test_moments_in_pages_cannot_be_forgotten(policy):
    with pytest.raises(ConfigError, match="^reset_optimizer: paged_adamw_8bit would keep"):
        make_optimizer(TrainConfig(reset_optimizer=True, optim="paged_adamw_8bit"), policy.model)


@pytest.mark.parametrize("reset", [True, False])
def test_a_rollout_starts_with_its_rate_and_perhaps_without_moments(small, reset):
    config = small(reset_optimizer=reset, lr_scheduler_type="linear", max_steps=4, learning_rate=0.004)
    learner = Learner.from_config(config)
    learner.update(with_advantages(learner.collect(seed_step(0, 1))), torch.arange(8))
    assert len(learner.optimizer.state) > 0
    assert start_rollout(learner.optimizer, config, 2) == pytest.approx(0.003)
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(0.003)
    assert (len(learner.optimizer.state) == 0) == reset


def test_a_step_logs_and_uses_its_learning_rate(small):
    learner = Learner.from_config(small(lr_scheduler_type="linear", warmup_steps=1, max_steps=3, num_prompts=8))
    before = weights(learner)
    assert learner.step(1).metrics["learning_rate"] == 0
    assert torch.equal(before, weights(learner))
    assert learner.step(2).metrics["learning_rate"] == 1e-4
    assert not torch.equal(before, weights(learner))
    assert learner.step(3).metrics["learning_rate"] == pytest.approx(5e-5)


def test_a_pass_that_was_stopped_is_no_pass_that_skipped():
    seen = metrics.Pass([], [0.0, 0.0, 0.0], [1.0], was_ended=True)
    assert (seen.skipped, seen._replace(was_ended=False).skipped) == (1, 2)


# Where runs decayed


@pytest.mark.parametrize(
    ("drift_coef", "updates", "warns"),
    [(1.0, 4, True), (2.5, 63, True), (1.0, 2, True), ("max_advantage", 4, True), (0.99, 4, False), (0.01, 4, False)]
    + [("adaptive", 4, False), (1.0, 1, False), ("max_advantage", 64, False)],
)
def test_a_line_warns_where_runs_decayed(drift_coef, updates, warns):
    line = drift_warning(drift_coef, updates)
    assert (line is not None) == warns
    if warns:
        found = "at K = 4 such runs decayed within 50 to 400 rollouts, and with 0.01 they did not (docs/default.md)"
        assert line == f"drift_coef = {drift_coef} and K = {updates} updates per rollout: {found}"


@pytest.mark.parametrize(("name", "count"), [("cpgd", 1), ("pgd", 1), ("cpg", 0)])
def test_a_run_warns_once_and_only_with_a_drift(small, name, count):
    settings = {"drift_coef": "max_advantage"} if count else {}
    lines = []
    train(small(algorithm=name, max_steps=1, **settings), callbacks=Callbacks(on_warning=lines.append))
    assert len(lines) == count
    assert all("drift_coef = max_advantage and K = 2" in line for line in lines)
