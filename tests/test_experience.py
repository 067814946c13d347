"""One step, taken apart: its draws, its experience, its passes."""

import pytest
import torch

from minicpgd.experience import Draws
from minicpgd.learner import Learner


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
    passes = learner.passes(made, draws.order)
    torch.testing.assert_close(learner.score(made.rollout), made.rollout.logp, atol=1e-5, rtol=1e-4)  # none made yet
    orders = []
    for seen in passes:
        assert len(seen.losses) == len(seen.norms) == num_minibatches
        assert sum(int(output.mask.sum()) for output in seen.outputs) == int(made.rollout.mask.sum())
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
