"""Problems of reasoning-gym: made from numbers, held out by their text, judged by its own scorer."""

import json
import random

import pytest

from minicpgd import TrainConfig, UserError, train
from minicpgd.tasks import describe_data, get_task
from minicpgd.tasks.rewards import last_number, number_in_text, numbers
from minicpgd.training.run_folder import read_lines

SMALL = "chain_sum:max_terms=2,max_digits=1"  # It has 160 problems.


@pytest.fixture(scope="module")
def task():
    return get_task("reasoning_gym", data=SMALL)


def test_training_never_sees_a_held_out_problem_even_of_a_small_task(task):
    held_out = [row["prompt"] for row in task.held_out(1000)]
    assert 10 < len(held_out) == len(set(held_out)) < 160
    trained = {row["prompt"] for row in task.sample(2000, random.Random(1))}
    assert len(trained) > 80
    assert not trained & set(held_out)
    assert held_out[:7] == [row["prompt"] for row in get_task("reasoning_gym", data=SMALL).held_out(7)]
    assert task.held_out(5, seed=1) != task.held_out(5, seed=0)
    assert task.sample(5, random.Random(3)) == get_task("reasoning_gym", data=SMALL).sample(5, random.Random(3))


def test_the_scorer_of_the_task_judges_the_stated_answer(task):
    row = task.held_out(1)[0]
    columns = {"entry": [row["entry"]] * 3, "answer": [row["answer"]] * 3}
    completions = [rf"I add. \boxed{{{row['answer']}}}", row["answer"], "no"]
    assert task.reward([row["prompt"]] * 3, completions, **columns) == [1.0, 1.0, 0.0]
    assert [task.is_correct(row, completion) for completion in completions] == [True, True, False]


def test_a_scorer_may_accept_more_than_one_answer():
    """countdown asks for any expression that gives a number."""
    row = get_task("reasoning_gym", data="countdown:min_numbers=2,max_numbers=2").sample(1, random.Random(0))[0]
    task, answer = get_task("reasoning_gym", data="countdown"), row["answer"]
    assert task.is_correct(row, answer)
    assert task.is_correct(row, f"({answer})")
    assert not task.is_correct(row, "1 + 1")


def test_options_and_an_instruction_reach_the_problems():
    task = get_task(
        "reasoning_gym", data="chain_sum:min_terms=4,max_terms=4,allow_negation=true", instruction="Be short."
    )
    rows = task.sample(20, random.Random(0))
    assert {row["entry"]["metadata"]["num_terms"] for row in rows} == {4}
    assert any("-" in row["entry"]["metadata"]["expression"].split()[0] for row in rows)
    assert all(row["prompt"].endswith("\n\nBe short.") for row in rows)
    assert describe_data(TrainConfig(task="reasoning_gym", data=SMALL)).startswith("made by reasoning-gym: chain_sum")


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (None, "needs the name of one of its tasks, as --data chain_sum"),
        ("chain_sm", "no task 'chain_sm'; did you mean 'chain_sum'"),
        ("chain_sum:terms=3", "chain_sum has no option 'terms'; it has min_terms, max_terms"),
        ("chain_sum:3", "options are needed as max_terms=3,max_digits=1"),
        ("chain_sum:max_terms=1+", "options are needed as"),
        ("chain_sum:max_terms=0", "reasoning-gym refuses it: AssertionError: max_terms must be >= min_terms"),
        ("chain_sum:max_terms=many", "reasoning-gym refuses it: TypeError"),
    ],
)
def test_a_wrong_name_or_option_is_told_in_one_line(data, line):
    with pytest.raises(UserError) as told:
        get_task("reasoning_gym", data=data)
    assert line in str(told.value)
    assert "\n" not in str(told.value)


def test_a_run_on_such_problems_logs_their_scores(tmp_path, text_model):
    settings = {"num_prompts": 2, "num_generations": 4, "num_minibatches": 1, "eval_problems": 2, "eval_steps": 1}
    config = TrainConfig(
        task="reasoning_gym", data=SMALL, model=str(text_model), max_steps=1, max_completion_length=4,
        output_dir=str(tmp_path / "run"), **settings,
    )  # fmt: skip
    train(config)
    log = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert {"eval_accuracy", "reward"} <= log[-1].keys()
    json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("5-3=2", [5, 3, 2]), ("The answer is 1,234.50.", [1234.5]), ("x2 costs $3 and -4", [3, -4]), ("(5)-3", [5, 3]),
        ("10,11", [10, 11]), ("v1.2.3", []), ("none", []), ("−7 degrees", [-7]), ("12,345,678", [12345678]),
    ],
)  # fmt: skip
def test_numbers_in_a_text(text, found):
    assert numbers(text) == found


def test_rewards_for_a_number_at_the_end_or_anywhere():
    completions = ["it is 5", "5 or 6", "none", "5.0", [{"role": "assistant", "content": "5"}]]
    answer = ["5", "#### 5", "5", "5", 5]
    assert last_number(completions, completions, answer) == [1, 0, 0, 1, 1]
    assert number_in_text(completions, completions, answer) == [1, 1, 0, 1, 1]
    for reward in (last_number, number_in_text):
        with pytest.raises(ValueError, match="answer = 'blue': one number is needed"):
            reward(["?"], ["5"], ["blue"])
