"""What a run shows before its first step, and what it warns of."""

import math

import pytest

from minicpgd import TrainConfig, train
from minicpgd.training import Callbacks
from minicpgd.training.first_look import Answer, FirstLook
from minicpgd.training.run_folder import read_lines


def look(rewards, truncated=0.0, best_greedy=0.0):
    return FirstLook("1+1=", Answer("2", 1.0), [Answer("3", 0.0)] * 2, best_greedy, rewards, truncated, 20)


@pytest.mark.parametrize(
    ("rewards", "truncated", "found"),
    [
        ([0.0] * 40, 0.1, ["while none has, nothing is learned; try easier problems"]),
        ([0.0] * 40, 0.9, ["most were cut off: try a longer --max-completion-length than 20"]),
        ([math.nan] * 40, 0.0, ["none of these answers had a reward"]),
        ([1.0] * 40, 0.0, ["every sampled answer had the reward 1; try harder problems"]),
        ([0.5, 1.0] * 20, 0.5, ["half of the answers or more were cut off"]),
        ([0.0, 1.0] * 20, 0.4, []),
    ],
)
def test_what_stands_in_the_way_of_learning_is_told_with_a_remedy(rewards, truncated, found):
    lines = look(rewards, truncated).warnings
    assert len(lines) == len(found)
    assert all(part in line for part, line in zip(found, lines, strict=True))


def test_a_greedy_answer_with_a_reward_is_a_signal():
    assert look([0.0] * 40, best_greedy=0.5).warnings == []


def test_the_summary_has_the_shares():
    line = look([0.0, 0.5, 1.0, math.nan] * 10, 0.25).summary
    assert line == "of 40 sampled answers 50% had a reward above 0, and 25% were cut off at 20 tokens"
    assert look([0.0, 1.0]).summary.endswith("; a share of so few says little")


def test_a_real_model_answers_no_more_problems_than_a_rollout_has_responses(text_model, tmp_path):
    seen = []
    config = TrainConfig(
        model=str(text_model), task="reasoning_gym", data="chain_sum", max_steps=1, num_prompts=3, num_generations=2,
        num_minibatches=1, max_completion_length=5, eval_problems=40, reward="last_number",
        output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    train(config, callbacks=Callbacks(on_first_look=seen.append))
    assert len(seen) == 1
    assert len(seen[0].rewards) == 6
    assert seen[0].prompt.startswith("State the final answer to the following arithmetic problem:")
    assert len(seen[0].samples) == 2
    assert 0 <= seen[0].truncated <= 1
    first = read_lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert first["reward"] == pytest.approx(sum(seen[0].rewards) / 6)


def test_the_embedded_model_answers_all(small):
    seen = []
    train(small(max_steps=1), callbacks=Callbacks(on_first_look=seen.append))
    assert len(seen[0].rewards) == small().eval_problems == 8
