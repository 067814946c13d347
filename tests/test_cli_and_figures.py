"""The commands as a user types them, and the figures as they are drawn."""

import re
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

import minicpgd.cli
from minicpgd import load_run, plots, train
from minicpgd.demo import demo_configs
from minicpgd.outcome import outcome
from minicpgd.policy import load_policy
from minicpgd.pretrain import largest_difference, measure, pretrain
from minicpgd.study import run_all


def main(arguments, monkeypatch, capsys):
    """The command line in this process, which saves the seconds that imports take."""
    monkeypatch.setattr(sys, "argv", ["minicpgd", *map(str, arguments)])
    try:
        minicpgd.cli.main()
    except SystemExit as leaving:
        assert not leaving.code, capsys.readouterr().err  # noqa: PT017 (--help leaves, too)
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return out


@pytest.fixture
def cli(monkeypatch, capsys):
    return lambda *arguments: main(arguments, monkeypatch, capsys)


def test_the_demo_from_end_to_end(tmp_path):
    """All four algorithms in processes of their own, at a sixteenth of the updates."""
    done = subprocess.run(
        [sys.executable, "-m", "minicpgd", "demo", "--max-steps", "10", "--num-iterations", "1"],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = done.stdout
    for words in ("CPGD", "GRPO", "RLOO", "REINFORCE++", "collapsed", "curves.png", "minicpgd sample runs/demo/cpgd"):
        assert words in out
    for figure in ("curves.png", "ratios.png"):
        assert (tmp_path / "runs" / "demo" / figure).stat().st_size > 20_000
    result = outcome(tmp_path / "runs" / "demo" / "cpgd")
    row = next(line for line in out.splitlines() if line.strip().startswith("CPGD ") and "yes" in line or "no" in line)
    assert f"{result.accuracy_before:.2f}" in row
    assert f"{result.accuracy_final:.2f}" in row
    assert result.accuracy_best >= result.accuracy_final > result.accuracy_before


def test_the_demos_runs_differ_in_the_algorithm_alone(tmp_path):
    configs = demo_configs(tmp_path, seed=3)
    assert [c.algorithm for c in configs] == ["cpgd", "grpo", "rloo", "reinforce_pp"]
    same = [{k: v for k, v in vars(c).items() if k not in ("algorithm", "output_dir")} for c in configs]
    assert same[0] == same[1] == same[2] == same[3]
    assert configs[0].updates_per_rollout == 64


def test_sample_evaluate_and_plot(small, tmp_path, cli, monkeypatch):
    out = cli("sample", "--num-problems", 5)
    assert sum(line.startswith(("right", "wrong")) for line in out.splitlines()) == 5
    assert out.splitlines()[-1] == f"{out.count('right  ')} of 5 right"
    assert cli("sample", "--num-problems", 5) == out
    greedy = cli("sample", "--num-problems", 5, "--temperature", 0)
    assert greedy == cli("sample", "--num-problems", 5, "--temperature", 0, "--seed", 0)
    run = train(small())
    out = cli("evaluate", run, "--num-problems", 16, "--num-samples", 4)
    assert [line.split()[0] for line in out.splitlines()] == [
        "accuracy", "sampled_accuracy", "pass@1", "pass@2", "pass@4", "completion_length",
    ]  # fmt: skip
    cli("plot", run, "--out", tmp_path / "figures")
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"curves.png", "ratios.png"}
    monkeypatch.setattr("minicpgd.inspecting.console", Console(force_terminal=True, color_system="standard"))
    assert "\x1b[32mright\x1b[0m" in cli("sample", "--num-problems", 40)


@pytest.mark.parametrize("command", ["", "demo", "train", "evaluate", "sample", "study", "plot", "memory", "pretrain"])
def test_help_is_complete(command, cli):
    """Every flag has a sentence."""
    out = cli(*command.split(), "--help")
    assert out.startswith("usage: minicpgd")
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", out.partition("options")[2]).split())
    described = {}
    for chunk in re.split(r"(?<![a-z])--(?=[a-z])", text)[1:]:
        flag, _, words = chunk.partition(" ")
        described[flag.rstrip(",")] = re.sub(r"\(default:.*", "", words)
    for flag, words in described.items():
        assert f"no-{flag}" in described or len(re.findall("[a-z]{2,}", words)) >= 2, flag
    if command == "train":
        from dataclasses import fields

        from minicpgd import TrainConfig

        assert {field.name.replace("_", "-") for field in fields(TrainConfig)} | {"resume"} <= set(described)


def test_the_figures_show_the_runs(small):
    runs = [train(small(name, algorithm=name)) for name in ("cpgd", "grpo")]
    curves = plots.training_curves(runs)
    assert [axis.get_title(loc="left") for axis in curves.axes] == [
        "Reward", "Response length", "Distance from the sampling policy", "Clipped tokens",
    ]  # fmt: skip
    for axis in curves.axes:
        assert axis.get_ylabel()
        assert len(axis.lines) == 2
        assert len({line.get_linestyle() for line in axis.lines} | {line.get_color() for line in axis.lines}) >= 3
    metrics = load_run(runs[1]).metrics
    drawn = curves.axes[3].lines[1].get_ydata()
    np.testing.assert_array_equal(drawn, metrics["clip_frac_pos"] + metrics["clip_frac_neg"])
    ratios = plots.ratio_ranges(runs)
    assert [axis.get_title(loc="left") for axis in ratios.axes] == ["CPGD", "GRPO"]
    assert all(axis.get_yscale() == "log" for axis in ratios.axes)


def test_a_failing_run_is_told_in_one_line(small):
    """In a process of its own, too."""
    from minicpgd import UserError

    with pytest.raises(UserError, match="no/such-model"):
        run_all([small("a", model="no/such-model"), small("b")], on_wait=lambda: None, jobs=1)


def test_the_embedded_model_is_what_it_is_said_to_be(policy):
    """It can work a problem out, and rarely does."""
    measured = measure(policy)
    assert 0.25 <= measured.accuracy <= 0.40
    assert 0.10 <= measured.worked_share <= 0.25
    assert measured.worked_accuracy >= 0.80
    assert measured.guess_accuracy < 0.35
    from minicpgd.policy import EMBEDDED

    assert sum(p.stat().st_size for p in EMBEDDED.iterdir() if p.suffix in (".json", ".safetensors")) < 1_000_000
    assert sum(p.numel() for p in policy.model.parameters()) == 107_968


def test_pretraining_makes_a_model_from_a_seed(tmp_path, cli):
    """A few steps of it: the same seed the same model, another seed another; the folder loads."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pretrain(tmp_path / name, seed=seed, steps=3)
    assert largest_difference(tmp_path / "a", tmp_path / "b") == 0
    assert largest_difference(tmp_path / "a", tmp_path / "c") > 0.01
    assert largest_difference(tmp_path / "a") > 0.01
    loaded = load_policy(str(tmp_path / "a"))
    assert loaded.tokenizer.decode(loaded.tokenizer("7+5*3=")["input_ids"]) == "7+5*3="
    out = cli("pretrain", "--folder", tmp_path / "d", "--steps", 3)
    assert "the weights are not those shipped" in out
    assert "worked share" in out
