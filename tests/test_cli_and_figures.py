"""The commands as a user types them, and the figures as they are drawn."""

import functools
import re
import shutil
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
from rich.console import Console

import minicpgd
from minicpgd import UserError, load_run, plots, train
from minicpgd.cli.flags import GROUPS
from minicpgd.cli.main import COMMANDS, main
from minicpgd.config import TrainConfig
from minicpgd.experiments import outcome, run_all
from minicpgd.experiments.catalogue import demo_configs
from minicpgd.models import EMBEDDED, load_policy
from minicpgd.models.pretrain import largest_difference, measure, pretrain
from minicpgd.plots.runs import run_labels


@pytest.fixture
def cli(monkeypatch, capsys):
    """A function that types a command in this process, which saves the seconds that imports take."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def type_command(*words):
        monkeypatch.setattr(sys, "argv", ["minicpgd", *map(str, words)])
        try:
            main()
        except SystemExit as leaving:
            assert not leaving.code, capsys.readouterr().err  # noqa: PT017 (--help leaves, too)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return out

    return type_command


def test_the_demo_from_end_to_end(tmp_path, monkeypatch, cli):
    """It trains all runs in processes of their own, with a sixteenth of the updates and few evaluations."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "minicpgd.experiments.catalogue.demo_configs", lambda *a: [replace(c, eval_steps=5) for c in demo_configs(*a)]
    )
    out = cli("demo", "--max-steps", 10, "--num-iterations", 1)
    labels = ("CPGD + KL stop", "GRPO + KL stop", "CPGD", "GRPO", "RLOO", "REINFORCE++")
    for words in (*labels, "collapsed", "curves.png", "minicpgd sample runs/demo/cpgd_kl_stop"):
        assert words in out
    for figure in ("curves.png", "ratios.png"):
        assert (tmp_path / "runs" / "demo" / figure).stat().st_size > 20_000
    result = outcome(tmp_path / "runs" / "demo" / "cpgd")
    (row,) = [line for line in out.splitlines() if re.match(r" *CPGD  .* (yes|no) ", line)]
    assert f"{result.accuracy_before:.2f}" in row
    assert f"{result.accuracy_final:.2f}" in row
    assert result.accuracy_best >= result.accuracy_final > result.accuracy_before


def test_the_runs_of_the_demo_differ_in_the_row_and_the_stop_alone(tmp_path):
    configs = demo_configs(tmp_path, seed=3)
    assert [c.algorithm for c in configs] == ["cpgd", "grpo", "cpgd", "grpo", "rloo", "reinforce_pp"]
    assert [c.target_kl for c in configs] == [TrainConfig().target_kl] * 2 + [None] * 4
    same = [{k: v for k, v in vars(c).items() if k not in ("algorithm", "target_kl", "output_dir")} for c in configs]
    assert all(settings == same[0] for settings in same)
    assert len({c.folder for c in configs}) == 6
    assert (configs[0].updates_per_rollout, configs[0].drift_coef) == (64, TrainConfig().drift_coef)


def test_sample_evaluate_and_plot_show_a_run(small, tmp_path, cli, monkeypatch):
    out = cli("sample", "--num-problems", 5)
    assert sum(line.startswith(("right", "wrong")) for line in out.splitlines()) == 5
    assert out.splitlines()[-1] == f"{out.count('right  ')} of 5 right"
    assert cli("sample", "--num-problems", 5) == out
    greedy = cli("sample", "--num-problems", 5, "--temperature", 0)
    assert greedy == cli("sample", "--num-problems", 5, "--temperature", 0, "--seed", 0)
    run = train(small())
    out = cli("evaluate", run, "--num-problems", 16, "--num-samples", 4)
    assert [line.split()[0] for line in out.splitlines()] == [
        "problems", "accuracy", "sampled_accuracy", "pass@1", "pass@2", "pass@4", "completion_length",
    ]  # fmt: skip
    cli("plot", run, "--out", tmp_path / "figures")
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"curves.png", "ratios.png"}
    monkeypatch.setattr("minicpgd.cli.inspect.console", Console(force_terminal=True, color_system="standard"))
    assert "\x1b[32mright\x1b[0m" in cli("sample", "--num-problems", 40)


def test_the_figures_of_different_runs_go_to_different_folders(small, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        train(small(name, seed=len(name), max_steps=1))
    drawn = {}
    for runs in (["first"], ["second"], ["first", "second"], ["second", "first"]):
        words = cli("plot", *runs).split()
        assert words[::2] == ["figure", "figure"]
        for path in words[1::2]:
            assert path not in drawn  # No other runs have their figures there.
            drawn[path] = (tmp_path / path).read_bytes()
    assert {path.split("/")[0] for path in drawn} == {"figures"}
    assert {path: (tmp_path / path).read_bytes() for path in drawn} == drawn
    assert set(cli("plot", "first").split()[1::2]) < set(drawn)  # The same runs have the same folder.


def test_seven_runs_with_long_names_can_be_drawn_without_naming_a_folder(small, tmp_path, monkeypatch, cli):
    """A study's runs have such names."""
    monkeypatch.chdir(tmp_path)
    run = train(small(max_steps=1))
    names = [f"runs/studies/runs/reinforce_pp-seed{seed}-0123456789" for seed in range(100, 107)]
    for name in names:
        shutil.copytree(run, tmp_path / name)
    for path in cli("plot", *names).split()[1::2]:
        assert (tmp_path / path).stat().st_size > 20_000


def test_the_version_is_printed(cli):
    assert cli("--version") == f"minicpgd {minicpgd.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", minicpgd.__version__)


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("demo", "; the same command begins a new demo"),
        ("study fair", "; the same command continues the study"),
        ("sample", ""),
        ("plot run", ""),
    ],
)
def test_the_line_after_ctrl_c_says_what_the_same_command_does(words, advice, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    command = words.split()[0]
    monkeypatch.setitem(COMMANDS, command, functools.wraps(COMMANDS[command])(interrupted))
    monkeypatch.setattr(sys, "argv", ["minicpgd", *words.split()])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as leaving:
        main()
    assert leaving.value.code == 130
    assert capsys.readouterr().err == f"minicpgd: stopped. Finished work is kept{advice}\n"


def described_flags(text):
    """The flags in some text of --help, each with its sentence."""
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())
    described = {}
    for chunk in re.split(r"(?<![a-z])--(?=[a-z])", text)[1:]:
        flag, _, words = chunk.partition(" ")
        described[flag.rstrip(",")] = re.sub(r"\(default:.*", "", words)
    return described


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_a_sentence_for_every_flag(command, cli):
    out = cli(*command.split(), "--help")
    assert out.startswith("usage: minicpgd")
    described = described_flags(out.partition("options")[2])
    for flag, words in described.items():
        assert f"no-{flag}" in described or len(re.findall("[a-z]{2,}", words)) >= 2, flag
    if command == "train":
        assert {field.name.replace("_", "-") for field in fields(TrainConfig)} | {"resume"} <= set(described)


@pytest.mark.parametrize("command", ["train", "memory"])
def test_help_has_one_section_for_each_group_of_settings(command, cli):
    """tyro draws a title in a frame or above a line, as the terminal allows."""
    _, *sections = re.split(r"^[╭─ ]*(?:(\w+) )?options[─╮ ]*$", cli(command, "--help"), flags=re.MULTILINE)
    assert sections[::2] == [None, "objective", "task", "model", "sampling", "loop"]
    for name, text in zip(sections[2::2], sections[3::2], strict=True):
        settings = {field.name.replace("_", "-") for field in fields(GROUPS[name])}
        described = set(described_flags(text))
        assert described - {f"no-{flag}" for flag in settings} == settings


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


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ([{}, {"algorithm": "grpo"}], ["CPGD", "GRPO"]),
        ([{}, {"algorithm": "grpo", "learning_rate": 1e-3}], ["CPGD", "GRPO"]),
        ([{}, {"learning_rate": 1e-3}], ["CPGD, learning_rate 0.0001", "CPGD, learning_rate 0.001"]),
        ([{"seed": 3}, {"algorithm": "grpo", "seed": 4}], ["CPGD, seed 3", "GRPO, seed 4"]),
        ([{}, {"target_kl": None}, {"algorithm": "grpo"}], ["CPGD + KL stop", "CPGD", "GRPO + KL stop"]),
        ([{}, {"target_kl": 0.01}], ["CPGD, target_kl 0.003", "CPGD, target_kl 0.01"]),
        ([{"model": "/a/x"}, {"model": "/b/y"}], ["CPGD, model x", "CPGD, model y"]),
        ([{"output_dir": "runs/a"}, {"output_dir": "runs/b", "max_steps": 9}], ["CPGD, a", "CPGD, b"]),
    ],
)
def test_a_line_is_named_by_what_tells_its_run_apart(changes, labels):
    assert run_labels([TrainConfig(**change) for change in changes]) == labels


def test_a_run_that_fails_in_its_own_process_raises_its_line_here(small):
    with pytest.raises(UserError, match="no/such-model"):
        run_all([small("a", model="no/such-model"), small("b")], on_wait=lambda: None, jobs=1)


def test_the_embedded_model_can_work_a_problem_out_and_rarely_does(policy):
    measured = measure(policy)
    assert 0.25 <= measured.accuracy <= 0.40
    assert 0.10 <= measured.worked_share <= 0.25
    assert measured.worked_accuracy >= 0.80
    assert measured.guess_accuracy < 0.35
    assert sum(p.stat().st_size for p in EMBEDDED.iterdir() if p.suffix in (".json", ".safetensors")) < 1_000_000
    assert sum(p.numel() for p in policy.model.parameters()) == 107_968


def test_pretraining_makes_a_model_from_a_seed(tmp_path, monkeypatch, cli):
    """After a few steps, the same seed has given the same model, and another seed another. The folder loads.

    The command measures a model here on 64 problems. The test above does it on all 1,024.
    """
    for name, seed, steps in (("a", 0, 2), ("c", 1, 1)):
        pretrain(tmp_path / name, seed=seed, steps=steps)
    assert largest_difference(tmp_path / "a", tmp_path / "c") > 0.01
    assert largest_difference(tmp_path / "a") > 0.01
    loaded = load_policy(str(tmp_path / "a"))
    assert loaded.tokenizer.decode(loaded.tokenizer("7+5*3=")["input_ids"]) == "7+5*3="
    monkeypatch.setattr("minicpgd.models.pretrain.measure", functools.partial(measure, num_problems=64))
    out = cli("pretrain", "--folder", tmp_path / "b", "--steps", 2)
    assert largest_difference(tmp_path / "a", tmp_path / "b") == 0
    assert "the weights are not those that ship" in out
    assert "worked share" in out
