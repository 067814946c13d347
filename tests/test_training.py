"""The loop learns, obeys its callbacks, and writes the metrics that it should, under the names that it should."""

import dataclasses
import math
import random
from itertools import combinations

import numpy as np
import pytest
import torch

import minicpgd
from minicpgd import ALGORITHMS, TrainConfig, UserError, evaluate, load_run, train
from minicpgd.config import SamplingSettings
from minicpgd.errors import NonFiniteError
from minicpgd.experiments.outcome import collapsed
from minicpgd.tasks import get_task
from minicpgd.training import Callbacks, Learner, load_timings, respond
from minicpgd.training.evaluation import pass_at_k
from minicpgd.training.run_folder import read_lines

METRICS = (
    "reward reward_std frac_reward_zero_std accuracy completion_length frac_truncated advantage_min "
    "advantage_max drift_coef entropy kl_old "
    "ratio_min ratio_p01 ratio_p99 ratio_max clip_frac_pos clip_frac_neg grad_norm loss learning_rate "
    "updates skipped_updates eval_accuracy eval_reward step"
).split()
TIMINGS = "step rollout_seconds update_seconds tokens_per_second peak_memory_bytes".split()


def test_cpgd_learns_to_work_the_answer_out(tmp_path):
    """With the defaults, K = 4, accuracy rises from a quarter to nine in ten, because responses become longer."""
    run = train(TrainConfig(output_dir=str(tmp_path / "run"), max_steps=30))
    metrics = load_run(run).metrics
    assert metrics["eval_accuracy"][0] < 0.45
    assert metrics["eval_accuracy"][-1] >= 0.90
    assert metrics["completion_length"][1] < 15
    assert metrics["completion_length"][-1] >= 20
    result = evaluate(run, num_problems=64, num_samples=4)
    assert result["accuracy"] >= 0.85
    assert result["sampled_accuracy"] == pytest.approx(result["pass@1"])
    assert result["pass@1"] <= result["pass@2"] <= result["pass@4"]
    assert result["completion_length"] >= 20
    assert evaluate(run, num_problems=64, num_samples=4) == result


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_row_trains(small, name):
    """test_determinism.py tests that each run repeats itself to the byte."""
    changes = {"algorithm": name, "max_steps": 2, "num_iterations": 2, "eval_steps": 1, "logging_steps": 1}
    first, other = train(small("first", **changes)), train(small("other", seed=1, **changes))
    assert (first / "metrics.jsonl").read_bytes() != (other / "metrics.jsonl").read_bytes()
    config, metrics, samples = load_run(first)
    assert config == small("first", **changes)
    assert set(metrics) == set(METRICS)
    assert set(load_timings(first)) == set(TIMINGS)
    assert metrics["step"].tolist() == [0, 1, 2]
    assert all(np.isfinite(metrics[m][1:]).all() for m in METRICS)
    assert (metrics["drift_coef"][1:] > 0).all() == ALGORITHMS[name].drift
    assert {"step", "prompt", "completion", "reward", "advantage"} == set(samples[0])
    assert (metrics["kl_old"][1:] > 0).any()


def test_metrics_of_a_rollout(small):
    """They agree with what samples.jsonl has. With one prompt the samples are the whole rollout."""
    run = train(small(num_prompts=1, num_generations=16, max_steps=4, logging_steps=1, drift_coef=2.5))
    _, metrics, samples = load_run(run)
    for step in range(1, 5):
        rows = [s for s in samples if s["step"] == step]
        rewards = [s["reward"] for s in rows]
        assert len(rows) == 16
        assert metrics["reward"][step] == pytest.approx(np.mean(rewards))
        assert metrics["accuracy"][step] == pytest.approx(np.mean(rewards))
        assert metrics["reward_std"][step] == pytest.approx(np.std(rewards, ddof=1), abs=1e-6)
        assert metrics["frac_reward_zero_std"][step] == (len(set(rewards)) == 1)
        ended = 1  # A response that was not truncated has an end-of-sequence token that its text does not show.
        if metrics["frac_truncated"][step] == 0:
            assert metrics["completion_length"][step] == pytest.approx(
                np.mean([len(s["completion"]) for s in rows]) + ended
            )
        assert metrics["drift_coef"][step] == 2.5
        assert metrics["advantage_min"][step] == pytest.approx(min(s["advantage"] for s in rows))
        assert metrics["advantage_max"][step] == pytest.approx(max(s["advantage"] for s in rows))


def test_passes_of_a_rollout(small):
    """Each pass has a line, at step 1 and every `logging_steps`. The step's metrics are those of the last pass."""
    run = train(small(num_iterations=3, max_steps=5, logging_steps=4))
    rows, metrics = read_lines(run / "passes.jsonl"), load_run(run).metrics
    assert [(row["step"], row["pass"]) for row in rows] == [(step, n) for step in (1, 4) for n in (1, 2, 3)]
    for row in rows:
        if row["pass"] == 3:
            for name in row.keys() - {"step", "pass"}:
                assert row[name] == metrics[name][row["step"]]
    assert rows[0]["kl_old"] < rows[2]["kl_old"]


def test_one_update_per_rollout_is_on_policy(small):
    """Its metrics are those at ratio 1."""
    run = train(small(num_minibatches=1, max_steps=2))
    metrics = load_run(run).metrics
    assert metrics["ratio_max"][1:] == pytest.approx(1, abs=1e-4)
    assert metrics["ratio_min"][1:] == pytest.approx(1, abs=1e-4)
    assert np.abs(metrics["kl_old"][1:]).max() < 1e-7
    assert (metrics["clip_frac_pos"][1:] == 0).all()


@pytest.mark.parametrize("name", ["cpgd", "reinforce_pp", "dr_grpo", "gspo"])
def test_micro_batches_make_the_same_update(small, name):
    """After one SGD step the parameters are the same, whole and in threes, with a reference and truncation."""
    after = []
    for size in (None, 3):
        config = small(
            algorithm=name, micro_batch_size=size, num_generations=8, beta=0.1, max_completion_length=12,
            mask_truncated_completions=True, num_iterations=2,
        )  # fmt: skip
        learner = Learner.from_config(config)
        learner.optimizer = torch.optim.SGD(learner.policy.model.parameters(), lr=0.1)
        metrics = learner.step(1).metrics
        assert 0 < metrics["frac_truncated"] < 1
        after.append(([p.detach().clone() for p in learner.policy.model.parameters()], metrics))
    for whole, parts in zip(after[0][0], after[1][0], strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-5)
    assert {k: pytest.approx(v, rel=1e-3, abs=1e-5) for k, v in after[0][1].items()} == after[1][1]


def test_chunks_and_checkpointing_make_the_same_update(small):
    after = []
    for changes in ({}, {"chunk_size": 16}, {"gradient_checkpointing": True}):
        learner = Learner.from_config(small(**changes))
        learner.optimizer = torch.optim.SGD(learner.policy.model.parameters(), lr=0.1)
        learner.step(1)
        after.append([p.detach().clone() for p in learner.policy.model.parameters()])
    for other in after[1:]:
        for a, b in zip(after[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_masked_truncated_responses_change_no_weight(small):
    """Nothing changes if all are truncated. Without the mask the weights change."""
    for masked in (True, False):
        config = small(max_completion_length=2, mask_truncated_completions=masked, drift_coef=0.0, num_generations=16)
        learner = Learner.from_config(config)
        before = [p.detach().clone() for p in learner.policy.model.parameters()]
        learner.reward = lambda prompts, completions, **_: [float(c[0] == "#") for c in completions]
        metrics = learner.step(1).metrics
        unchanged = all(torch.equal(a, b) for a, b in zip(before, learner.policy.model.parameters(), strict=True))
        assert metrics["frac_truncated"] > 0.7
        if metrics["frac_truncated"] == 1:
            assert unchanged == masked


def test_beta_keeps_the_policy_near_its_start(small):
    """In the loss (grpo) or the reward (reinforce_pp), kl_ref is logged, 0 at first, and smaller with a large beta."""
    for name in ("grpo", "reinforce_pp"):
        last = {}
        for beta in (1e-9, 3.0):
            config = small(f"{name}-{beta}", algorithm=name, beta=beta, max_steps=12, num_generations=16)
            kl = load_run(train(config)).metrics["kl_ref"]
            last[beta] = kl[-1]
            assert kl[1] < 0.02
        assert last[3.0] < last[1e-9]


def test_auto_keeps_its_value_if_no_response_has_an_advantage(small):
    learner = Learner.from_config(small(num_minibatches=1))
    learner.drift_coef = 0.123
    learner.reward = lambda prompts, completions, **_: [0.5] * len(completions)
    metrics = learner.step(1).metrics
    assert metrics["drift_coef"] == 0.123
    assert metrics["frac_reward_zero_std"] == 1
    assert metrics["grad_norm"] < 1e-4


def test_a_reward_function_of_your_own(small, tmp_path, monkeypatch):
    """It has TRL's signature, with the columns of the dataset. Accuracy still counts right answers."""
    (tmp_path / "short_is_better.py").write_text(
        "def short(prompts, completions, answer, **columns):\n"
        "    assert len(prompts) == len(completions) == len(answer) and prompts[0].endswith('=')\n"
        "    return [-len(c) / 10 for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    metrics = load_run(train(small(reward="short_is_better:short", logging_steps=1))).metrics
    assert metrics["reward"].max() < 0
    assert metrics["accuracy"].max() > 0


def test_callbacks_learn_of_every_step_and_can_stop_the_run(small):
    steps, resumed = [], []

    def on_step(step, metrics, timings):
        steps.append((step, "reward" in metrics, set(timings)))

    run = train(small(max_steps=5), callbacks=Callbacks(on_step=on_step, should_stop=lambda: len(steps) == 2))
    assert [step for step, *_ in steps] == [0, 1, 2]
    assert steps[0][1:] == (True, set())
    assert steps[1][1:] == (True, set(TIMINGS) - {"step"})
    assert not (run / "model").exists()
    train(small(max_steps=5), resume=True, callbacks=Callbacks(on_step=on_step, on_resume=resumed.append))
    assert [step for step, *_ in steps] == [0, 1, 2, 3, 4, 5]
    assert resumed == [2]


def test_training_computes_the_embedded_model_on_one_thread(small, record_threads):
    """The caller's number of threads is restored for each callback, and at the end."""
    used, between = [], []

    def on_load(policy):
        nonlocal used
        used = record_threads(policy.model)
        for parameter in policy.model.parameters():
            parameter.register_hook(lambda gradient: used.append(torch.get_num_threads()))

    def on_step(step, metrics, timings):
        between.append(torch.get_num_threads())

    torch.set_num_threads(3)
    train(small(max_steps=2, beta=0.1), callbacks=Callbacks(on_load=on_load, on_step=on_step))
    assert len(used) > 100
    assert set(used) == {1}
    assert between == [3, 3, 3]
    assert torch.get_num_threads() == 3


def test_a_training_that_fails_restores_the_number_of_threads(small, record_threads):
    def break_model(policy):
        with torch.no_grad():
            policy.model.lm_head.weight[3] = float("nan")

    torch.set_num_threads(3)
    with pytest.raises(NonFiniteError, match="step 0: the model's logits are not finite"):
        train(small(), callbacks=Callbacks(on_load=break_model))
    assert torch.get_num_threads() == 3


def test_evaluation_computes_the_embedded_model_on_one_thread(policy, record_threads):
    torch.set_num_threads(3)
    used = record_threads(policy.model)
    evaluate(policy, num_problems=8, num_samples=2)
    assert len(used) > 10
    assert set(used) == {1}
    assert torch.get_num_threads() == 3
    with torch.no_grad():
        policy.model.lm_head.weight[3] = float("nan")
    with pytest.raises(NonFiniteError):
        evaluate(policy, num_problems=8, num_samples=2)
    assert torch.get_num_threads() == 3


def test_responses_to_held_out_problems(policy):
    """`right` has a row for each problem. Greedy responses to one prompt are the same, and samples are not."""
    task, settings = get_task("chain_arithmetic"), SamplingSettings(48, top_k=1)
    rollout, right = respond(policy, task, 6, settings, num_samples=4, seed=1)
    problems = task.held_out(6, seed=1)
    assert right.shape == (6, 4)
    expected = [task.is_correct(problems[i // 4], text) for i, text in enumerate(rollout.completions)]
    assert right.flatten().tolist() == expected
    assert any(len(set(rollout.completions[i : i + 4])) > 1 for i in range(0, 24, 4))  # top_k is not used.
    greedy, _ = respond(policy, task, 6, settings, num_samples=4, greedy=True, seed=1)
    assert all(len(set(greedy.completions[i : i + 4])) == 1 for i in range(0, 24, 4))


def test_held_out_problems_are_never_trained_on():
    task = get_task("chain_arithmetic")
    held_out = {p["prompt"] for p in task.held_out(2000)}
    trained = {p["prompt"] for p in task.sample(20_000, random.Random(0))}
    assert not held_out & trained
    assert task.held_out(10) == task.held_out(10)
    assert task.held_out(10) != task.held_out(10, seed=1)
    for problem in task.held_out(200):
        value, rest = int(problem["prompt"][0]), problem["prompt"][1:-1]
        for operation, digit in zip(rest[::2], rest[1::2], strict=True):
            value = eval(f"{value}{operation}{digit}") % 10
        assert problem["answer"] == str(value)
        assert task.is_correct(problem, problem["worked"])
        assert task.is_correct(problem, "#" + problem["answer"])
        assert not task.is_correct(problem, problem["answer"])
        assert not task.is_correct(problem, f"#{value}#{value}")
        assert not task.is_correct(problem, f"#{(value + 1) % 10}")
        assert not task.is_correct(problem, f"#{value}{value}")


def test_pass_at_k_is_unbiased():
    """It is the share of all ways to draw k of n in which one is right."""
    for n, c in ((5, 0), (5, 2), (6, 3), (4, 4)):
        for k in range(1, n + 1):
            draws = list(combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_collapse():
    assert not collapsed([0.3] * 10 + [0.9] * 10, start=0.3)
    assert collapsed([0.3] * 10 + [0.9] * 10 + [0.4] * 10, start=0.3)  # The end is below half of the best.
    assert not collapsed([0.3] * 10 + [0.9] * 10 + [0.5] * 10, start=0.3)
    assert collapsed([0.3] * 10 + [0.29] * 10, start=0.3)  # The end is below the start.
    assert collapsed([0.2] * 10, start=0.3)
    with pytest.raises(ValueError, match="10"):
        collapsed([0.5] * 9, start=0.3)


def test_the_public_names_and_defaults(tmp_path):
    for name in minicpgd.__all__:
        assert getattr(minicpgd, name)
    assert len(ALGORITHMS) == 17
    assert {f.name for f in dataclasses.fields(TrainConfig)} >= set(
        "num_generations max_completion_length temperature top_p top_k beta epsilon epsilon_high num_iterations "
        "learning_rate max_grad_norm gradient_checkpointing seed mask_truncated_completions disable_dropout output_dir "
        "max_steps save_steps eval_steps logging_steps algorithm model task num_prompts num_minibatches drift_coef "
        "drift_clip advantage_weight aggregation chunk_size".split()
    )
    assert TrainConfig().drift_coef == 0.01
    assert TrainConfig(num_iterations=16, num_minibatches=4).updates_per_rollout == 64
    with pytest.raises(UserError, match="not a run"):
        load_run(tmp_path / "nowhere")
    assert math.isclose(TrainConfig().temperature, 1)
