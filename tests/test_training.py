"""The loop: it learns, repeats itself to the byte, and measures what SPEC says under the names SPEC gives."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import minicpgd
from minicpgd import ALGORITHMS, TrainConfig, UserError, evaluate, load_run, train
from minicpgd.evaluation import pass_at_k
from minicpgd.learner import Learner
from minicpgd.runlog import load_timings, read_lines
from minicpgd.stats import collapsed
from minicpgd.trainer import Listener

METRICS = (
    "reward reward_std frac_reward_zero_std accuracy completion_length frac_truncated advantage_min "
    "advantage_max drift_coef entropy kl_old "
    "ratio_min ratio_p01 ratio_p99 ratio_max clip_frac_pos clip_frac_neg grad_norm loss learning_rate "
    "eval_accuracy step"
).split()
TIMINGS = "step rollout_seconds update_seconds tokens_per_second peak_memory_bytes".split()


def test_cpgd_learns_to_work_it_out(tmp_path):
    """K = 4, the defaults: from a quarter to nine in ten, by discovering that writing more is worth it."""
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
    """That each repeats itself to the byte is shown in test_determinism.py."""
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
    """Against what can be counted in samples.jsonl: one prompt, so the samples are the whole rollout."""
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
        ended = 1  # each response that was not cut has an end-of-sequence token that the text does not show
        if metrics["frac_truncated"][step] == 0:
            assert metrics["completion_length"][step] == pytest.approx(
                np.mean([len(s["completion"]) for s in rows]) + ended
            )
        assert metrics["drift_coef"][step] == 2.5
        assert metrics["advantage_min"][step] == pytest.approx(min(s["advantage"] for s in rows))
        assert metrics["advantage_max"][step] == pytest.approx(max(s["advantage"] for s in rows))


def test_passes_of_a_rollout(small):
    """A line per pass, at step 1 and every `logging_steps`; the last pass is what the step's metrics say."""
    run = train(small(num_iterations=3, max_steps=5, logging_steps=4))
    rows, metrics = read_lines(run / "passes.jsonl"), load_run(run).metrics
    assert [(row["step"], row["pass"]) for row in rows] == [(step, n) for step in (1, 4) for n in (1, 2, 3)]
    for row in rows:
        if row["pass"] == 3:
            for name in row.keys() - {"step", "pass"}:
                assert row[name] == metrics[name][row["step"]]
    assert rows[0]["kl_old"] < rows[2]["kl_old"]


def test_k_1_is_on_policy(small):
    """One update per rollout: its metrics are those at ratio 1."""
    run = train(small(num_minibatches=1, max_steps=2))
    metrics = load_run(run).metrics
    assert metrics["ratio_max"][1:] == pytest.approx(1, abs=1e-4)
    assert metrics["ratio_min"][1:] == pytest.approx(1, abs=1e-4)
    assert np.abs(metrics["kl_old"][1:]).max() < 1e-7
    assert (metrics["clip_frac_pos"][1:] == 0).all()


@pytest.mark.parametrize("name", ["cpgd", "reinforce_pp", "dr_grpo", "gspo"])
def test_micro_batches_make_the_same_update(small, name):
    """Through the whole model: parameters after one SGD step, whole and in threes, with a reference and truncation."""
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


def test_masked_truncated_responses_teach_nothing(small):
    """All are cut: nothing changes. Without the mask, something does."""
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


def test_beta_holds_the_policy_to_its_start(small):
    """In the loss (grpo) or the reward (reinforce_pp): kl_ref is reported, 0 at first, smaller under a large beta."""
    for name in ("grpo", "reinforce_pp"):
        last = {}
        for beta in (1e-9, 3.0):
            config = small(f"{name}-{beta}", algorithm=name, beta=beta, max_steps=12, num_generations=16)
            kl = load_run(train(config)).metrics["kl_ref"]
            last[beta] = kl[-1]
            assert kl[1] < 0.02
        assert last[3.0] < last[1e-9]


def test_auto_keeps_its_value_when_nothing_is_learned(small):
    learner = Learner.from_config(small(num_minibatches=1))
    learner.drift_coef = 0.123
    learner.reward = lambda prompts, completions, **_: [0.5] * len(completions)
    metrics = learner.step(1).metrics
    assert metrics["drift_coef"] == 0.123
    assert metrics["frac_reward_zero_std"] == 1
    assert metrics["grad_norm"] < 1e-4


def test_a_reward_function_of_your_own(small, tmp_path, monkeypatch):
    """TRL's signature, columns included; accuracy still counts right answers."""
    (tmp_path / "mine.py").write_text(
        "def short(prompts, completions, answer, **columns):\n"
        "    assert len(prompts) == len(completions) == len(answer) and prompts[0].endswith('=')\n"
        "    return [-len(c) / 10 for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    metrics = load_run(train(small(reward="mine:short", logging_steps=1))).metrics
    assert metrics["reward"].max() < 0
    assert metrics["accuracy"].max() > 0


def test_a_listener_hears_and_stops(small):
    heard = []
    listener = Listener(step=lambda step, metrics, timings: heard.append(step), stop=lambda: len(heard) == 2)
    run = train(small(max_steps=5), listener=listener)
    assert heard == [0, 1, 2]
    assert not (run / "model").exists()
    train(small(max_steps=5), resume=True, listener=Listener(step=lambda step, *_: heard.append(step)))
    assert heard == [0, 1, 2, 3, 4, 5]


def test_held_out_problems_are_never_trained_on():
    import random

    from minicpgd.tasks import get_task

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
    """By brute force over all ways to draw k of n."""
    from itertools import combinations

    for n, c in ((5, 0), (5, 2), (6, 3), (4, 4)):
        for k in range(1, n + 1):
            draws = list(combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_collapse():
    assert not collapsed([0.3] * 10 + [0.9] * 10, start=0.3)
    assert collapsed([0.3] * 10 + [0.9] * 10 + [0.4] * 10, start=0.3)  # below half of its best
    assert not collapsed([0.3] * 10 + [0.9] * 10 + [0.5] * 10, start=0.3)
    assert collapsed([0.3] * 10 + [0.29] * 10, start=0.3)  # below where it started
    assert collapsed([0.2] * 10, start=0.3)
    with pytest.raises(ValueError, match="10"):
        collapsed([0.5] * 9, start=0.3)


def test_the_public_face():
    for name in minicpgd.__all__:
        assert getattr(minicpgd, name)
    assert len(ALGORITHMS) == 17
    assert {f.name for f in dataclasses.fields(TrainConfig)} >= set(
        "num_generations max_completion_length temperature top_p top_k beta epsilon epsilon_high num_iterations "
        "learning_rate max_grad_norm gradient_checkpointing seed mask_truncated_completions disable_dropout output_dir "
        "max_steps save_steps eval_steps logging_steps algorithm model task num_prompts num_minibatches drift_coef "
        "drift_clip advantage_weight aggregation chunk_size".split()
    )
    assert TrainConfig().drift_coef == "auto"
    assert TrainConfig(num_iterations=16, num_minibatches=4).updates_per_rollout == 64
    with pytest.raises(UserError, match="not a run"):
        load_run("nowhere")
    assert math.isclose(TrainConfig().temperature, 1)
