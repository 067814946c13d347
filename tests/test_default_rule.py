"""The rule that chose the default, on tables made by hand, and the study that applies it."""

from pathlib import Path

import pandas as pd
import pytest

from minicpgd import TrainConfig
from minicpgd.experiments.default_rule import (
    CANDIDATES,
    SETTINGS,
    default_study,
    first_on_the_map,
    is_admitted,
    setting_names,
)
from minicpgd.experiments.tables import default_summary, late_accuracy


def screened(**collapsed):
    """The table of the part `screen`: one run of each candidate; `collapsed` names those that collapsed."""
    rows = [{"part": "screen"} | settings for settings in CANDIDATES.values()]
    return pd.DataFrame(rows).assign(collapsed=[name in collapsed["names"] for name in CANDIDATES])


def arms(part, table):
    """The names of the settings that a part asks for."""
    return list(setting_names(pd.DataFrame(part.settings(table))))


def test_a_setting_has_its_name_after_a_round_trip_through_a_file(tmp_path):
    pd.DataFrame(SETTINGS.values()).to_csv(tmp_path / "study.csv")
    assert list(setting_names(pd.read_csv(tmp_path / "study.csv"))) == list(SETTINGS)


def test_the_default_of_the_package_is_a_candidate():
    default = TrainConfig()
    settings = {name: getattr(default, name) for name in ("algorithm", "drift_coef", "target_kl")}
    assert settings == CANDIDATES["paper + stop"]


def test_a_candidate_that_collapsed_in_the_screen_is_not_on_the_map():
    screen, on_map, *_ = default_study().parts
    table = screened(names=("max advantage", "max advantage + stop"))
    assert arms(screen, pd.DataFrame()) == list(CANDIDATES) * 2  # Each has two learning rates.
    assert set(arms(on_map, table)) == {"paper", "paper + stop", "adaptive"}
    assert len(on_map.settings(table)) == 3 * 12


@pytest.mark.parametrize(
    ("shares", "first"),
    [
        ({"paper": 0.50, "paper + stop": 0.75, "adaptive": 0.70}, "paper + stop"),
        ({"paper": 0.71, "paper + stop": 0.75, "adaptive": 0.70}, "paper"),  # It is nearly equal, and stands first.
        ({"paper": 0.50, "paper + stop": 0.60, "adaptive": 0.65}, "adaptive"),  # 0.05 is not less than 0.05.
        ({"paper": 0.50, "paper + stop": 0.61, "adaptive": 0.65}, "paper + stop"),
    ],
)
def test_the_largest_share_of_the_map_wins_and_among_equals_the_first(shares, first):
    rows = [
        {"part": "map", "healthy": run < round(100 * share)} | CANDIDATES[name]
        for name, share in shares.items()
        for run in range(100)
    ]
    table = pd.concat([screened(names=()), pd.DataFrame(rows)], ignore_index=True)
    assert first_on_the_map(table) == first
    long = default_study(sizes=(8,)).parts[2]
    names = arms(long, table)
    assert names.count(first) == names.count("no drift") == names.count("max advantage") == 2  # two learning rates
    names = arms(default_study().parts[2], table)
    assert names.count(first) == names.count("no drift") == 4
    assert names.count("max advantage") == 2  # the smaller size


def test_the_summary_agrees_with_one_by_hand(tmp_path):
    """The long runs have 10 steps, so the last fifth has steps 9 and 10."""
    cells = [("no drift", 1e-4), ("no drift", 2e-4), ("paper + stop", 1e-4), ("paper + stop", 2e-4)]
    rows = [
        {"part": "long", "run": f"run-{i}", "seed": 100, "learning_rate": rate, "num_prompts": 8, "max_steps": 10}
        | SETTINGS[name]
        for i, (name, rate) in enumerate(cells)
    ]
    reused = {"part": "K = 64", "run": "run-4", "seed": 100, "learning_rate": 1e-4, "num_prompts": 8, "max_steps": 10}
    table = pd.DataFrame([*rows, reused | SETTINGS["paper + stop"]])
    table = table.assign(collapsed=[False, False, False, True, False], healthy=True, accuracy_final=0.5)
    table["updates_mean"] = 6.0
    table.to_csv(tmp_path / "study.csv", index=False)
    late = {"run-0": 1.0, "run-1": 0.8, "run-2": 0.9, "run-3": 0.8, "run-4": 0.5}
    steps = [
        {"run": run, "step": step, "updates": 6, "eval_accuracy": {8: 0.0, 9: value + 0.1, 10: value - 0.1}.get(step)}
        for run, value in late.items()
        for step in range(11)
    ]
    steps = pd.DataFrame(steps)
    steps.to_csv(tmp_path / "steps.csv.gz", index=False)
    assert late_accuracy(steps).to_dict() == pytest.approx(late)
    summary = default_summary(tmp_path).set_index("setting")
    assert list(summary.index) == list(SETTINGS)
    row = summary.loc["paper + stop"]
    assert (row["long runs, K = 4"], row["collapsed"], row["late accuracy / no drift's"]) == ("2", "1", "0.90")
    assert (row["K = 64: final accuracy"], row["K = 64: updates"]) == ("0.50", "6.0")
    assert summary.loc["adaptive"].tolist() == [""] * 7


@pytest.mark.parametrize(
    ("collapsed", "shares", "admitted"),
    [([0, 0], [0.95, 1.2], True), ([0, 0], [0.949, 1.2], False), ([0, 1], [1.0, 1.0], False)],
)
def test_rule_1_asks_for_no_collapse_and_095_of_the_accuracy_without_drift(collapsed, shares, admitted):
    assert is_admitted(pd.Series(collapsed).astype(bool), pd.Series(shares)) is admitted


def test_the_study_is_small_enough_and_its_settings_are_distinct():
    study = default_study()
    configs = study.runs(study.parts[0], pd.DataFrame(), Path("pool"))["config"]
    assert len({config.folder for config in configs}) == 10
    assert {config.updates_per_rollout for config in configs} == {4}
    assert {config.max_steps for config in configs} == {500}
