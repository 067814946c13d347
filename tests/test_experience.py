"""One step, taken apart: its draws, its experience, its passes."""

import pytest
import torch

from minicpgd import ALGORITHMS
from minicpgd.experience import Draws
from minicpgd.learner import Learner
from minicpgd.plots import token_text
from minicpgd.plots.objectives import objective_and_weight


def numbers(draws):
    order = torch.randperm(50, generator=draws.order)
    return draws.problems.random(), torch.rand(3, generator=draws.tokens).tolist(), order.tolist()


def test_draws_come_from_seed_and_step_alone():
    first = numbers(Draws.at(3, 5))
    assert numbers(Draws.at(3, 5)) == first
    for other in (Draws.at(3, 6), Draws.at(4, 5)):
        assert all(a != b for a, b in zip(numbers(other), first, strict=True))


def test_auto_follows_the_advantages_of_each_rollout(small):
    learner = Learner.from_config(small(num_prompts=8))
    for step in (1, 2):
        made = learner.experience(Draws.at(0, step))
        assert learner.drift_coef == made.advantages.abs().max().item() > 0
    learner = Learner.from_config(small("fixed", drift_coef=0.7))
    learner.experience(Draws.at(0, 1))
    assert learner.drift_coef == 0.7


@pytest.mark.parametrize("num_minibatches", [1, 2, 4])
def test_a_pass_meets_every_response_once_and_makes_its_updates_when_asked(small, num_minibatches):
    learner = Learner.from_config(small(num_iterations=2, num_minibatches=num_minibatches, learning_rate=1e-3))
    draws = Draws.at(0, 1)
    made = learner.experience(draws)
    norms, update = [], learner.update
    learner.update = lambda *args: (done := update(*args), norms.append(done[1]))[0]
    passes = learner.passes(made, draws.order)
    torch.testing.assert_close(learner.score(made.rollout), made.rollout.logp, atol=1e-5, rtol=1e-4)  # none made yet
    orders = []
    for seen in passes:
        assert len(seen.losses) == len(seen.norms) == num_minibatches
        assert sum(int(output.mask.sum()) for output in seen.outputs) == int(made.rollout.mask.sum())
        assert seen.norms == norms[-num_minibatches:]
        assert seen.losses == pytest.approx([output.loss.item() for output in seen.outputs])
        assert (learner.score(made.rollout) - made.rollout.logp).abs().max() > 1e-4
        orders.append(torch.cat([output.advantages[:, 0] for output in seen.outputs]).tolist())
    assert len(orders) == 2
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(made.advantages.tolist())
    assert orders[0] != orders[1]  # in another order


def test_tokens_are_the_response_piece_by_piece(policy):
    learner_text = "7+5=2,2*3=6#6"
    ids = torch.tensor(policy.tokenizer(learner_text)["input_ids"] + [1, 0, 0])[None]
    length = torch.tensor([len(learner_text) + 1])
    pieces = policy.tokens(ids, length)[0]
    assert "".join(pieces[:-1]) == learner_text
    assert len(pieces) == length


def test_tokens_beyond_a_bound_wear_a_triangle():
    figure = token_text([["#", "4"], ["7", "+", "7"]], [[-0.5, 0.1, 9], [0.9, 0.0, -0.1]], low=-0.2, high=0.2, unit="d")
    axis = figure.axes[0]
    marks = [(line.get_marker(), float(line.get_xdata()[0]), int(line.get_ydata()[0])) for line in axis.lines]
    assert marks == [("v", 0.5, 0), ("^", 0.5, 1)]  # what lies beyond a row's own length is not read
    shades = {text.get_text(): box.get_facecolor() for text, box in zip(axis.texts[1:3], axis.patches[:2], strict=True)}
    assert shades["#"][2] > shades["#"][1]  # violet, as it is negative
    assert shades["4"][0] > shades["4"][2]  # orange


@pytest.mark.parametrize(
    ("name", "r", "A", "weight", "clipped"),
    [
        *(("grpo", 0.7, -1.0, 0.0, True), ("grpo", 1.3, -1.0, -1.3, False), ("grpo", 5.0, -1.0, -5.0, False)),
        *(("cpg", 1.3, 1.0, 0.0, True), ("cpg", 0.7, 1.0, 1.0, False), ("cpgd", 1.3, 1.0, -0.6, True)),
        ("grpo_dual_clip", 5.0, -1.0, 0.0, True),
    ],
)
def test_the_weight_of_a_token_by_hand(name, r, A, weight, clipped):
    """-J of one token differentiated; CPGD with a drift of alpha = 2: -2 (r - 1) where its surrogate is clipped."""
    objective, slope, bounded = objective_and_weight(ALGORITHMS[name], [r], A, drift_coef=2.0)
    assert slope.item() == pytest.approx(weight)
    assert bounded.item() == clipped
    if name == "grpo" and not clipped:
        assert objective.item() == pytest.approx(r * A)
