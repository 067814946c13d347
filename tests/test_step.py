"""One step is taken apart: its generators, its experience, its passes, and the figures of them."""

import copy
from dataclasses import replace

import pytest
import torch

from minicpgd import ALGORITHMS, load_run, train
from minicpgd.errors import NonFiniteError
from minicpgd.models.policy import load_policy
from minicpgd.plots import token_text
from minicpgd.plots.objectives import objective_and_weight
from minicpgd.training import metrics
from minicpgd.training.step import Learner, seed_step


def draw(generators):
    order = torch.randperm(50, generator=generators.order)
    tokens = torch.rand(3, generator=generators.tokens)
    return generators.problems.random(), tokens.tolist(), order.tolist(), torch.rand(3).tolist()


def test_seed_and_step_alone_decide_what_is_drawn():
    """This includes torch's global generator, which dropout uses."""
    first = draw(seed_step(3, 5))
    assert draw(seed_step(3, 5)) == first
    for other in (seed_step(3, 6), seed_step(4, 5)):
        assert all(a != b for a, b in zip(draw(other), first, strict=True))


def test_max_advantage_is_the_largest_advantage_of_each_rollout(small):
    settings = {"num_prompts": 8, "drift_coef": "max_advantage"}
    learner = Learner.from_config(small(**settings))
    coefficients = []
    for step in (1, 2):
        experience = learner.collect(seed_step(0, step))
        assert experience.drift_coef == experience.advantages.abs().max().item() > 0
        assert learner.drift_coef == 1  # Collecting does not change the learner.
        coefficients.append(experience.drift_coef)
    for step in (1, 2):
        learner = Learner.from_config(small(f"step-{step}", **settings))
        learner.step(step)
        assert learner.drift_coef == coefficients[step - 1]
    learner = Learner.from_config(small("constant", drift_coef=0.7))
    assert learner.collect(seed_step(0, 1)).drift_coef == learner.drift_coef == 0.7


def test_collecting_changes_no_weight(small):
    learner = Learner.from_config(small())
    before = [p.detach().clone() for p in learner.policy.model.parameters()]
    rollout = learner.collect(seed_step(0, 1)).rollout
    assert all(torch.equal(a, b) for a, b in zip(before, learner.policy.model.parameters(), strict=True))
    torch.testing.assert_close(learner.score(rollout), rollout.logp, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("num_minibatches", [1, 2, 4])
def test_a_pass_uses_every_response_once_in_a_new_order(small, num_minibatches):
    learner = Learner.from_config(small(num_iterations=2, num_minibatches=num_minibatches, learning_rate=1e-3))
    generators = seed_step(0, 1)
    experience = learner.collect(generators)
    experience = replace(
        experience, advantages=torch.arange(1.0, 9.0).view(2, 4)
    )  # Without an advantage an update would be skipped.
    norms, update = [], learner.update

    def record_norm(*arguments):
        made = update(*arguments)
        norms.append(made.grad_norm)
        return made

    learner.update = record_norm
    orders = []
    for number in (1, 2):
        result = learner.train_pass(experience, generators.order)
        assert len(norms) == number * num_minibatches
        assert len(result.losses) == len(result.grad_norms) == num_minibatches
        assert sum(int(output.mask.sum()) for output in result.outputs) == int(experience.rollout.mask.sum())
        assert result.grad_norms == norms[-num_minibatches:]
        assert result.losses == pytest.approx([output.loss.item() for output in result.outputs])
        assert (learner.score(experience.rollout) - experience.rollout.logp).abs().max() > 1e-4
        orders.append(torch.cat([output.advantages[:, 0] for output in result.outputs]).tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(experience.advantages.flatten().tolist())
    assert orders[0] != orders[1]


@pytest.mark.parametrize(("threads", "wanted"), [(3, 1), (1, 1)])
def test_an_update_of_the_embedded_model_computes_on_one_thread(small, record_threads, threads, wanted):
    """This holds for the forward pass, the gradients and the optimizer. The caller's number is restored."""
    learner = Learner.from_config(small())
    experience = learner.collect(seed_step(0, 1))
    torch.set_num_threads(threads)
    used = record_threads(learner.policy.model)
    for parameter in learner.policy.model.parameters():
        parameter.register_hook(lambda gradient: used.append(torch.get_num_threads()))
    learner.optimizer.register_step_pre_hook(lambda *_: used.append(torch.get_num_threads()))
    learner.update(experience, torch.arange(4))
    assert len(used) > 1 + len(list(learner.policy.model.parameters()))
    assert set(used) == {wanted}
    assert torch.get_num_threads() == threads


def test_an_update_that_fails_restores_the_number_of_threads(small, record_threads):
    learner = Learner.from_config(small(drift_coef=1.0))
    experience = learner.collect(seed_step(0, 1))
    used = record_threads(learner.policy.model)
    with torch.no_grad():
        experience.advantages.fill_(float("nan"))
    torch.set_num_threads(3)
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        learner.update(experience, torch.arange(4))
    assert set(used) == {1}
    assert torch.get_num_threads() == 3


def test_tokens_join_to_the_response(policy):
    text = "7+5=2,2*3=6#6"
    ids = torch.tensor(policy.tokenizer(text)["input_ids"] + [1, 0, 0])[None]
    length = torch.tensor([len(text) + 1])
    tokens = policy.tokens(ids, length)[0]
    assert "".join(tokens[:-1]) == text
    assert len(tokens) == length


def test_a_token_beyond_a_bound_has_a_triangle():
    figure = token_text([["#", "4"], ["7", "+", "7"]], [[-0.5, 0.1, 9], [0.9, 0.0, -0.1]], low=-0.2, high=0.2, unit="d")
    axis = figure.axes[0]
    marks = [(line.get_marker(), float(line.get_xdata()[0]), int(line.get_ydata()[0])) for line in axis.lines]
    assert marks == [("v", 0.5, 0), ("^", 0.5, 1)]  # The 9 lies beyond the length of its row, so it has none.
    shades = {text.get_text(): box.get_facecolor() for text, box in zip(axis.texts[1:3], axis.patches[:2], strict=True)}
    assert shades["#"][2] > shades["#"][1]  # A negative value is violet.
    assert shades["4"][0] > shades["4"][2]  # A positive value is orange.


@pytest.mark.parametrize(
    ("name", "r", "A", "weight", "clipped"),
    [
        *(("grpo", 0.7, -1.0, 0.0, True), ("grpo", 1.3, -1.0, -1.3, False), ("grpo", 5.0, -1.0, -5.0, False)),
        *(("cpg", 1.3, 1.0, 0.0, True), ("cpg", 0.7, 1.0, 1.0, False), ("cpgd", 1.3, 1.0, -0.6, True)),
        ("grpo_dual_clip", 5.0, -1.0, 0.0, True),
    ],
)
def test_the_weight_of_a_token_by_hand(name, r, A, weight, clipped):
    """The weight is the derivative of one token's J. CPGD's drift adds -2 (r - 1) with alpha = 2, clipped or not."""
    objective, slope, is_clipped = objective_and_weight(ALGORITHMS[name], [r], A, drift_coef=2.0)
    assert slope.item() == pytest.approx(weight)
    assert is_clipped.item() == clipped
    if name == "grpo" and not clipped:
        assert objective.item() == pytest.approx(r * A)


def state_of(learner):
    """Copies of all weights, and of the optimizer's moments."""
    weights = {name: p.detach().clone() for name, p in learner.policy.model.named_parameters()}
    return weights, copy.deepcopy(learner.optimizer.state_dict()["state"])


def equal_states(one, other):
    same_weights = all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    values = [(one[1][i][name], other[1][i][name]) for i in one[1] for name in one[1][i]]
    return same_weights and one[1].keys() == other[1].keys() and all(torch.equal(a, b) for a, b in values)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_update_without_an_advantage_changes_nothing(small, name):
    """The policy has moved before, so the drift has a gradient and the moments are not 0. Only metrics change."""
    learner = Learner.from_config(small(algorithm=name, num_iterations=2, learning_rate=1e-3))
    generators = seed_step(0, 1)
    experience = learner.collect(generators)
    moved = replace(experience, advantages=torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    learner.train_pass(moved, generators.order)
    before = state_of(learner)
    none = replace(experience, advantages=torch.zeros(2, 4))
    passes = [learner.train_pass(none, generators.order) for _ in range(2)]
    assert equal_states(before, state_of(learner))
    values = metrics.step_metrics(none, passes, learner.task, learner.config)
    assert values["skipped_updates"] == 4
    assert values["grad_norm"] == 0
    assert values["kl_old"] > 0
    learner.train_pass(moved, generators.order)
    assert not equal_states(before, state_of(learner))


def test_only_the_minibatches_without_an_advantage_are_skipped(small):
    """A response without tokens in the loss has nothing to say, whatever its advantage is."""
    learner = Learner.from_config(small(num_minibatches=4))
    experience = learner.collect(seed_step(0, 1))
    advantages = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.5, -1.0, 0.0]])
    experience = replace(experience, used=torch.tensor([False, True] * 4), advantages=advantages)
    before = state_of(learner)
    for rows, learns in [((0, 1), False), ((2, 3), False), ((4, 6), False), ((4, 5), True)]:
        update = learner.update(experience, torch.tensor(rows))
        assert (update.grad_norm is not None) == learns
        assert equal_states(before, state_of(learner)) != learns


@pytest.mark.parametrize(("name", "skipped"), [("grpo", 0), ("cpgd", 0), ("reinforce_pp", 4)])
def test_a_kl_in_the_loss_is_something_to_learn(small, name, skipped):
    """With beta in the reward, all advantages would differ; here they are set to 0."""
    learner = Learner.from_config(small(algorithm=name, beta=0.1, num_iterations=2))
    generators = seed_step(0, 1)
    none = replace(learner.collect(generators), advantages=torch.zeros(2, 4))
    passes = [learner.train_pass(none, generators.order) for _ in range(2)]
    assert metrics.step_metrics(none, passes, learner.task, learner.config)["skipped_updates"] == skipped


@pytest.mark.parametrize(("reward", "skipped"), [("constant", 4), ("alternating", 0)])
def test_a_run_without_rewards_ends_where_it_began(small, tmp_path, monkeypatch, reward, skipped):
    (tmp_path / "rewards_here.py").write_text(
        "def constant(completions, **_):\n    return [1.0] * len(completions)\n"
        "def alternating(completions, **_):\n    return [float(i % 2) for i in range(len(completions))]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = train(small(reward=f"rewards_here:{reward}", num_iterations=2, eval_steps=1))
    assert load_run(run).metrics["skipped_updates"][1:].tolist() == [skipped] * 3
    before, after = (dict(load_policy(m).model.named_parameters()) for m in ("embedded", str(run / "model")))
    assert all(torch.equal(before[name], after[name]) for name in before) == (skipped == 4)


def test_a_reward_function_is_told_the_tokens_and_the_step_and_what_it_logs_is_kept(small, tmp_path, monkeypatch):
    (tmp_path / "rewards_told.py").write_text(
        "def told(completions, completion_ids, trainer_state, log_metric, log_extra, **_):\n"
        "    log_metric('step', trainer_state.global_step)\n"
        "    log_extra('tokens', [len(ids) for ids in completion_ids])\n"
        "    log_extra('seen', [object for _ in completions])\n"
        "    return [None if i % 4 == 0 else float(len(ids)) for i, ids in enumerate(completion_ids)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    _, columns, samples = load_run(train(small(reward="rewards_told:told", logging_steps=1)))
    assert columns["reward/step"][1:].tolist() == [1, 2, 3]
    assert [row["reward"] is None for row in samples] == [True, False, False, False] * 6
    assert [row["advantage"] == 0 for row in samples[::4]] == [True] * 6
    assert all(row["extra"]["seen"] == "<class 'object'>" for row in samples)
    assert all(row["reward"] in (None, row["extra"]["tokens"]) for row in samples)
    assert (columns["reward"][1:] > 1).all()
