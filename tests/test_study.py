"""Studies: their settings, runs that are made only once, their outcomes, and the tables."""

import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from programs import Program, minicpgd

from minicpgd import TrainConfig, UserError, load_run, plots, train
from minicpgd.cli.main import main
from minicpgd.experiments import QUICK, STUDIES, Part, Study, run_study, warning_study
from minicpgd.experiments.catalogue import FOUR, fair_study
from minicpgd.experiments.default_rule import setting_names
from minicpgd.experiments.early_warning import Rule, Trace, collapse_step, first_alarm, fit, judge
from minicpgd.experiments.endurance import (
    ENDURING,
    FIGURE_1,
    ON_THE_MAP,
    REMEDIES,
    REUSED,
    endurance_study,
    stabilisers_study,
)
from minicpgd.experiments.outcome import collapsed, first_fall, outcome, window_means
from minicpgd.experiments.runner import _check_same, _finish
from minicpgd.experiments.statistics import bootstrap_mean, wilson
from minicpgd.experiments.tables import fair_summary, named_table, stabilisers_summary, tolerated_rate
from minicpgd.recipes import save_config
from minicpgd.training import Callbacks
from minicpgd.training.run_folder import resolved

KILLS = int(os.environ.get("MINICPGD_KILLS", "1"))
SECONDS = 600  # A process has this long to end. On an idle machine it takes less than one.
FILES = ("study.csv", "steps.csv.gz", "passes.csv.gz")


def tiny(seeds=(0, 1), algorithms=("cpgd", "grpo"), **changes):
    base = {"max_steps": 10, "num_prompts": 2, "num_generations": 4, "num_minibatches": 2, "num_iterations": 2}
    base |= {"eval_problems": 8, "save_steps": 3, "max_completion_length": 32, "target_kl": None}
    first = Part("first", seeds, lambda _: [{"algorithm": name, "learning_rate": 1e-4} for name in algorithms])
    best = Part(
        "second", (7,), lambda t: [{"algorithm": t.loc[t["reward_last"].idxmax(), "algorithm"], "epsilon": 0.1}]
    )
    return Study("tiny", "Does it work?", base | changes, [first, best])


def silent(*_):
    pass


def make_tiny(folder, jobs, **changes):
    run_study(tiny(**changes), folder / "tiny", folder / "runs", on_wait=silent, jobs=jobs)


def make_endless(folder):
    """Make a study of runs that would take hours, in two workers, as the leader of a group of processes."""
    os.setsid()
    make_tiny(folder, jobs=2, max_steps=100_000)


def logs(folder):
    return list(folder.glob("runs/*/metrics.jsonl"))


def test_the_workers_of_a_killed_study_end(tmp_path):
    """The study is killed in the middle of its runs."""
    process = Program(tmp_path, make_endless, tmp_path)
    while len(logs(tmp_path)) < 2:
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()
    process.kill()
    process.wait()
    deadline = time.monotonic() + SECONDS
    try:
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)  # This only asks whether the group still has a process.
            time.sleep(0.1)
    except ProcessLookupError:
        return
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail(f"{SECONDS} seconds after the study was killed, its workers still run")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a finished study, with its tables in tiny/ and its runs in runs/; and its reports of progress."""
    folder, reports = tmp_path_factory.mktemp("studies"), []
    run_study(tiny(), folder / "tiny", folder / "runs", on_wait=lambda *report: reports.append(report), jobs=2)
    return folder, reports


def test_a_killed_study_continues_and_makes_no_run_twice(uninterrupted, tmp_path):
    """It is killed at a random moment, and has the same tables in the end. MINICPGD_KILLS=30 kills it more often."""
    rng, folder, finished = random.Random(time.time_ns()), tmp_path / "killed", {}
    for attempt in itertools.count():
        process = Program(tmp_path, make_tiny, folder, 1)
        if attempt < KILLS:
            before = len(logs(folder))
            while len(logs(folder)) <= before and process.poll() is None:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 1.5))
            process.kill()
        assert process.wait() in (0, -signal.SIGKILL), process.communicate()
        for path in folder.glob("runs/*/model"):
            written = (path.parent / "metrics.jsonl").stat().st_mtime_ns
            assert finished.setdefault(path, written) == written, "a finished run was made again"
        if process.poll() == 0:
            break
    assert len(finished) == 5
    for name in FILES:
        assert (folder / "tiny" / name).read_bytes() == (uninterrupted[0] / "tiny" / name).read_bytes()


def test_the_tables_contain_what_the_runs_logged(uninterrupted):
    (studies, reports), folder = uninterrupted, uninterrupted[0] / "tiny"
    assert reports[0] == (0, 0.0, 0, 4)
    assert reports[-1] == (1, 1.0, 1, 1)
    table = pd.read_csv(folder / "study.csv")
    steps, passes = pd.read_csv(folder / "steps.csv.gz"), pd.read_csv(folder / "passes.csv.gz")
    assert list(table["part"]) == ["first"] * 4 + ["second"]
    assert list(table["seed"]) == [0, 0, 1, 1, 7]
    assert list(table["algorithm"][:4]) == ["cpgd", "grpo"] * 2
    assert list(table["epsilon"][4:]) == [0.1]
    assert set(table["updates_per_rollout"]) == {4}
    first = table[table["part"] == "first"]
    assert table["algorithm"][4] == first.loc[first["reward_last"].idxmax(), "algorithm"]
    for _, row in table.iterrows():
        config, metrics, _ = load_run(studies / "runs" / row["run"])
        assert (config.algorithm, config.seed) == (row["algorithm"], row["seed"])
        logged = steps[steps["run"] == row["run"]]
        for name in metrics:
            np.testing.assert_allclose(logged[name], metrics[name], rtol=1e-5)
        assert len(passes[passes["run"] == row["run"]]) == 2 * 2  # Steps 1 and 10 have two passes each.
        assert row["accuracy_final"] == pytest.approx(metrics["eval_accuracy"][10], abs=1e-6)
        assert row["accuracy_before"] == pytest.approx(metrics["eval_accuracy"][0], abs=1e-6)
        assert row["reward_last"] == pytest.approx(np.mean(metrics["reward"][1:]), rel=1e-5)
        assert row["kl_largest"] == pytest.approx(max(metrics["kl_old"][1:]), rel=1e-5)
        assert row["collapsed"] == collapsed(metrics["reward"][1:], metrics["reward"][0])
    provenance = json.loads((folder / "made.json").read_text())
    assert provenance["command"] == "minicpgd study tiny"
    assert provenance["runs"] == 5
    assert provenance["versions"]["torch"].startswith("2.")


def test_studies_with_the_same_settings_share_their_runs(uninterrupted, tmp_path):
    studies, _ = uninterrupted
    written = {path: path.stat().st_mtime_ns for path in logs(studies)}
    assert len(written) == 5
    run_study(tiny(), tmp_path / "again", studies / "runs", on_wait=silent, jobs=1)
    assert {path: path.stat().st_mtime_ns for path in logs(studies)} == written
    names = [
        list(study.runs(study.parts[0], pd.DataFrame(), tmp_path)["config"].map(lambda c: c.folder.name))
        for study in (tiny(), tiny(seeds=(1, 2)), tiny(temperature=0.9))
    ]
    assert names[0][2:] == names[1][:2]
    assert not set(names[0]) & set(names[2])


def test_a_study_refuses_a_run_that_was_made_with_other_defaults(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted[0] / "runs", tmp_path / "runs")
    path = next(tmp_path.glob("runs/cpgd-seed0-*/config.json"))
    path.write_text(path.read_text().replace('"epsilon": 0.2', '"epsilon": 0.3'))
    with pytest.raises(UserError, match=r"config\.json: its defaults are not today's; choose another folder"):
        run_study(tiny(), tmp_path / "tiny", tmp_path / "runs", on_wait=silent)


def test_a_run_that_diverges_is_an_outcome(small, tmp_path):
    """A loss that is not a number does not stop a study. The run counts as collapsed, with an accuracy of 0."""
    folder = _finish(small(max_steps=12, learning_rate=1e30))
    result = outcome(folder)
    assert result.diverged
    assert result.collapsed
    assert not result.healthy
    assert result.accuracy_final == 0
    assert "the gradient's norm nan" in (folder / "diverged.txt").read_text()


@pytest.mark.parametrize(
    ("rewards", "accuracies", "has_collapsed", "healthy", "to_90"),
    [
        ([0.5] * 20, [0.3, 0.6, 0.9, 0.95, 0.7], False, True, 10),
        ([0.5] * 20, [0.3, 0.4, 0.4, 0.4, 0.4], False, False, math.nan),  # It has not learned.
        ([0.8] * 10 + [0.3] * 10, [0.3, 0.95, 0.9, 0.9, 0.9], True, False, 5),  # Its reward is below half of its best.
        ([0.35] * 20, [0.3, 0.6, 0.6, 0.6, 0.6], True, False, math.nan),  # Its reward is below that at the start, 0.4.
    ],
)
def test_an_outcome_agrees_with_one_by_hand(small, rewards, accuracies, has_collapsed, healthy, to_90):
    config = small(max_steps=20)
    config.folder.mkdir()
    save_config(config.folder / "config.json", config)
    lines = [{"step": step, "reward": reward, "kl_old": 0.1 * step} for step, reward in enumerate([0.4, *rewards])]
    for line, accuracy in zip(lines[::5], accuracies, strict=True):
        line["eval_accuracy"] = accuracy
    (config.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = outcome(config.folder)
    assert (result.collapsed, result.healthy) == (has_collapsed, healthy)
    assert result.steps_to_90 == pytest.approx(to_90, nan_ok=True)
    assert (result.accuracy_before, result.accuracy_best, result.accuracy_final) == (
        accuracies[0], max(accuracies), accuracies[-1],
    )  # fmt: skip
    assert result.reward_last == pytest.approx(np.mean(rewards[10:]))
    assert result.reward_best == pytest.approx(max(rewards))
    assert (result.kl_largest, result.kl_last) == pytest.approx((2.0, 1.55))


def test_a_run_has_one_writer_at_a_time(small):
    """A second process is refused, and has changed nothing."""
    config = small(max_steps=4)

    def resume_elsewhere(step, *_):
        if step == 2:
            before = (config.folder / "metrics.jsonl").read_bytes()
            other = Program(config.folder.parent, minicpgd, ["train", "--resume", config.folder])
            assert other.wait() == 2
            assert "another process is writing this run" in other.communicate()[1]
            assert (config.folder / "metrics.jsonl").read_bytes() == before

    train(config, callbacks=Callbacks(on_step=resume_elsewhere))
    assert len(load_run(config.folder).metrics["step"]) == 5


def test_wilsons_interval_agrees_with_its_formula():
    """The formula is (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), with z = 1.959964."""
    z = 1.959964
    for k, n in ((0, 5), (3, 5), (5, 5), (17, 40)):
        p = k / n
        centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        ours = wilson(k, n)
        assert ours.value == p
        assert ours.low == pytest.approx((centre - half) / (1 + z * z / n), abs=1e-6)
        assert ours.high == pytest.approx((centre + half) / (1 + z * z / n), abs=1e-6)


def test_the_bootstrap_interval_of_many_values_is_the_normal_one():
    values = np.random.default_rng(1).normal(2.0, 3.0, 400)
    ours, half = bootstrap_mean(values), 1.96 * values.std() / 20
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(values.mean() - half, abs=0.05)
    assert ours.high == pytest.approx(values.mean() + half, abs=0.05)
    assert bootstrap_mean([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)
    assert np.isnan(bootstrap_mean([0.5]).low)
    assert bootstrap_mean(values) == ours


def test_window_means_agree_with_those_by_hand():
    assert window_means([0.0] * 10 + [1.0] * 5).tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    with pytest.raises(ValueError, match="9 steps"):
        window_means([1.0] * 9)


def test_the_run_of_a_model_with_a_relative_path_is_found_again(tmp_path, monkeypatch):
    """Its config.json has the absolute path."""
    monkeypatch.chdir(tmp_path)
    for folder in ("mine", "run"):
        (tmp_path / folder).mkdir()
    config = TrainConfig(model="mine", output_dir="run")
    save_config(config.folder / "config.json", resolved(config))
    _check_same(config)
    with pytest.raises(UserError, match="its defaults are not today's"):
        _check_same(replace(config, model="embedded"))


def test_a_fall_is_a_mean_of_ten_rewards_below_half_of_the_best_before():
    assert math.isnan(first_fall([0.2] * 10 + [1.0] * 10))
    assert first_fall([1.0] * 12 + [0.01] * 5 + [0.0] * 5) == 18  # Six of the last ten are small.
    assert first_fall([1.0] * 12 + [0.01] * 5 + [0.0] * 5 + [1.0] * 20) == 18  # It recovers.
    assert math.isnan(first_fall([1.0] * 10 + [0.51] * 30))


@pytest.mark.parametrize("study", [endurance_study, stabilisers_study])
def test_a_remedy_has_its_name_after_a_round_trip_through_a_file(study, tmp_path):
    """Columns that a part does not set are empty in the table."""
    parts = [study().runs(part, pd.DataFrame(), tmp_path).drop(columns="config") for part in study().parts]
    pd.concat(parts).to_csv(tmp_path / "study.csv", index=False)
    names = setting_names(pd.read_csv(tmp_path / "study.csv"), REMEDIES)
    wanted = {"endurance": {*ENDURING, *FIGURE_1, *REUSED}, "stabilisers": {*ON_THE_MAP}}
    assert set(names) == wanted[study().name]
    for name, settings in REMEDIES.items():
        rows = pd.concat(parts)[(names == name).to_numpy()]
        for column, value in settings.items() if len(rows) else ():
            assert rows[column].isna().all() if value is None else (rows[column].astype(str) == str(value)).all()


def arms(study):
    part = study.parts[0]
    return [{**study.base, **arm} for arm in part.settings(pd.DataFrame())], list(part.seeds)


def test_the_studies_have_the_settings_that_they_announce(tmp_path):
    cells, seeds = arms(STUDIES["stabilisers"])
    grid = {(c["learning_rate"], c["num_iterations"] * 4) for c in cells}
    assert grid == set(itertools.product((3e-5, 1e-4, 3e-4, 1e-3), (4, 16, 64)))
    assert len(cells) == len(grid) * len(ON_THE_MAP)
    assert len(seeds) == 3
    for study in (*STUDIES.values(), *QUICK.values()):
        for config in study.runs(study.parts[0], pd.DataFrame(), tmp_path)["config"]:
            assert config.num_responses == 64  # All have rollouts of one size.
    endurance = STUDIES["endurance"]
    steps = {
        part.name: {c.max_steps for c in endurance.runs(part, pd.DataFrame(), tmp_path)["config"]}
        for part in endurance.parts
    }
    assert steps == {"K = 4": {500}, "K = 8": {500}, "Figure 1": {500}, "K = 64": {100}}


def test_a_fair_search_gives_each_algorithm_the_same_chances():
    study = fair_study()
    search, report = study.parts
    cells = search.settings(pd.DataFrame())
    per_algorithm = {
        name: [{k: c[k] for k in c if k not in ("algorithm", "drift_coef")} for c in cells if c["algorithm"] == name]
        for name in FOUR
    }
    assert all(settings == per_algorithm["cpgd"] for settings in per_algorithm.values())
    assert not set(search.seeds) & set(report.seeds)
    assert all(1e-5 <= c["learning_rate"] <= 1e-3 for c in cells)
    assert {c["target_kl"] for c in cells} == {None, 0.003}
    table = pd.DataFrame([{**c, "reward_last": 0.1, "accuracy_final": 0.9} for c in cells])
    table.loc[5, ["reward_last", "accuracy_final"]] = 0.7, 0.2  # The training reward decides.
    chosen = {c["algorithm"]: c for c in report.settings(table)}
    assert set(chosen) == set(FOUR)
    assert chosen[cells[5]["algorithm"]] == cells[5]


def test_the_collapse_step_agrees_with_one_by_hand():
    assert math.isnan(collapse_step(np.full(21, 0.5)))
    assert collapse_step(np.array([0.3, 0.5, 0.5, 0.5, 0.6, 0.1, 0.1, 0.1])) == 5
    assert collapse_step(np.array([0.3, 0.5, 0.5, 0.5, 0.6, 0.1, 0.6, 0.6])) != 5  # One bad rollout is no collapse.
    assert collapse_step(np.array([0.5, 0.2, 0.2, 0.2])) == 1


def trace(signal, collapse, healthy=False):
    """A run with this signal, which collapses at this step, or not at all."""
    metrics = {"step": np.arange(1, 11), "kl_old": np.array(signal, dtype=float)}
    has_collapsed = collapse is not None
    return Trace(metrics, has_collapsed, healthy, collapse if has_collapsed else math.nan, guard="neither")


def test_the_judgement_of_a_rule_agrees_with_one_by_hand():
    early = [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]  # The first alarm is at step 4.
    never = [0] * 10
    rule = Rule("kl_old", 1, 0.5)
    assert first_alarm(rule, trace(early, None).metrics) == 4
    assert math.isnan(first_alarm(rule, trace(never, None).metrics))
    runs = [trace(early, 6), trace(early, 5), trace(early, 4), trace(never, 5), trace(never, None)]
    runs += [trace(early, None), trace(early, None, healthy=True), trace(never, None, healthy=True)]
    assert judge(rule, runs) == {
        "announced": 2, "collapsed": 4, "false_alarms": 2, "not_collapsed": 4, "healthy_alarms": 1, "healthy": 2,
        "lead_median": 1.5,
    }  # fmt: skip
    above = fit("kl_old", [trace(early, 6), trace(never, None)])
    assert judge(above, [trace(early, 6), trace(never, None)])["announced"] == 1
    assert above.side == 1
    below = fit("kl_old", [trace([-x for x in early], 6), trace(never, None)])
    assert below.side == -1


def test_the_warning_study_needs_runs_of_other_studies(uninterrupted, tmp_path):
    with pytest.raises(UserError, match="make one first"):
        warning_study(tmp_path, tmp_path / "warning")
    shutil.copytree(uninterrupted[0] / "tiny", tmp_path / "stabilisers")
    with pytest.raises(UserError, match="too few runs"):
        warning_study(tmp_path, tmp_path / "warning")


def test_the_warning_study_reads_one_study_alone(tmp_path):
    """The race has no column for the drift's coefficient."""
    shutil.copytree(Path(__file__).parent.parent / "results" / "fair", tmp_path / "fair")
    with pytest.raises(UserError, match="too few runs"):  # With odd seeds no run collapsed.
        warning_study(tmp_path, tmp_path / "warning")


def test_the_command_study_from_end_to_end(tmp_path, monkeypatch, capsys):
    """It makes one cell of the map with two seeds, in one worker. The figures show the numbers of the table."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    names = ("GRPO", "CPGD, α = 0.01", "CPGD, α = max A", "CPGD, default", "GRPO, stop 0.003")
    quick = stabilisers_study(rates=(1e-4,), updates=(8,), seeds=(100, 101), names=names, max_steps=10)
    small = {"num_prompts": 2, "num_generations": 4, "max_completion_length": 16, "eval_steps": 5, "eval_problems": 16}
    monkeypatch.setitem(QUICK, "stabilisers", replace(quick, base=quick.base | small))
    arguments = ["study", "stabilisers", "--quick", "--folder", str(tmp_path), "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", ["minicpgd", *arguments])
    main()
    out, folder = capsys.readouterr().out, tmp_path / "stabilisers-quick"
    assert quick.asks in out
    assert "10 of 10 runs" in out
    for name in ("study.csv", "map.png", "stabilisers.png", "passes.png"):
        assert str(folder / name) in out
        assert (folder / name).stat().st_size > 1000
    table = named_table(folder)
    heat = {axis.get_title(loc="left").split("\n")[0]: axis for axis in plots.map_heat(folder).axes if axis.texts}
    assert heat.keys() == {*names}
    for name, rows in table.groupby("name"):
        assert f"{rows['accuracy_final'].mean():.2f}" in [text.get_text() for text in heat[name].texts]
    monkeypatch.setattr(sys, "argv", ["minicpgd", "plot", "--all", "--results", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert "missing; --results names the folder of committed logs" in capsys.readouterr().err


def test_the_tolerated_rate_agrees_with_one_by_hand():
    """An accuracy of 1 at 1e-4 and of 0 at 1e-2 gives 1e-3. Other seeds give the largest or the smallest rate."""
    rows = pd.DataFrame(
        {
            "seed": [1, 1, 2, 2, 3, 3],
            "learning_rate": [1e-2, 1e-4] * 3,
            "accuracy_final": [0.0, 1.0, 0.9, 1.0, 0.1, 0.4],
        }
    )
    assert tolerated_rate(rows).tolist() == pytest.approx([1e-3, 1e-2, 1e-4])


def test_the_summary_of_the_fair_study_agrees_with_one_by_hand(tmp_path):
    """Differences are taken seed by seed, and the report leaves the search out."""
    report = {"cpgd": (0.9, 0.7), "grpo": (0.8, 0.6)}
    rows = [
        {"part": "report", "algorithm": name, "seed": seed, "accuracy_final": final, "reward_last": final / 2}
        for name, finals in report.items()
        for seed, final in enumerate(finals)
    ]
    rows += [{"part": "search", "algorithm": "grpo", "seed": 9, "accuracy_final": 0.0, "reward_last": 0.0}]
    table = pd.DataFrame(rows).assign(
        learning_rate=3e-5, epsilon=0.1, beta=0.0, collapsed=False, target_kl=[None, None, 0.003, 0.003, 0.003]
    )
    table.loc[3, "collapsed"] = True
    table.to_csv(tmp_path / "study.csv")
    cpgd, grpo = fair_summary(tmp_path).to_dict("records")
    assert (cpgd["final accuracy"], cpgd["minus CPGD's"]) == ("0.80 [0.70, 0.90]", "")
    assert (grpo["minus CPGD's"], grpo["reward minus CPGD's"]) == ("-0.10 [-0.10, -0.10]", "-0.05 [-0.05, -0.05]")
    assert (grpo["learning rate"], grpo["ε"], grpo["collapsed"]) == ("3e-05", "0.1", "1 of 2")
    assert (cpgd["stop"], grpo["stop"]) == ("none", "0.003")


def test_the_summary_of_the_stabilisers_agrees_with_one_by_hand(tmp_path):
    """Of two remedies the stop is healthy in both cells, makes 6 of 64 updates, and takes 16/74 of the time."""
    study = stabilisers_study(rates=(1e-4, 3e-4), updates=(64,), seeds=(100,), names=("GRPO", "GRPO, stop 0.003"))
    table = study.runs(study.parts[0], pd.DataFrame(), tmp_path).drop(columns="config")
    is_stop = table["target_kl"].notna()
    table = table.assign(
        run=[f"run-{i}" for i in range(4)], healthy=is_stop, accuracy_final=np.where(is_stop, 0.9, 0.1)
    )
    table.assign(updates_mean=np.where(is_stop, 6.0, 64.0)).to_csv(tmp_path / "study.csv", index=False)
    seconds = pd.DataFrame(
        {"run": table["run"], "rollout_seconds": 20.0, "update_seconds": np.where(is_stop, 12.0, 128.0)}
    )
    seconds.to_csv(tmp_path / "seconds.csv", index=False)
    # A rollout costs as much as 10 updates.
    updates = dict(zip(table["run"], np.where(is_stop, 6.0, 64.0), strict=True))
    steps = [
        {"run": run, "step": step, "updates": updates[run] if step else None, "eval_accuracy": step / 20}
        for run in table["run"]
        for step in range(21)
    ]
    pd.DataFrame(steps).to_csv(tmp_path / "steps.csv.gz", index=False)
    summary = stabilisers_summary(tmp_path).set_index("remedy")
    assert list(summary.index) == ["GRPO, stop 0.003", "GRPO"]
    assert summary["K = 64, 1e-4: accuracy"].tolist() == ["0.90", "0.10"]
    assert summary["in the time of the stop"].tolist() == ["1.00", "0.20"]  # GRPO makes 4 steps in this time.
    assert summary["updates per rollout"].tolist() == ["6.0", "64.0"]
    assert summary["time, GRPO = 1"].tolist() == ["0.22", "1.00"]
    assert summary["learning rate tolerated, K = 64"].tolist() == ["≥ 3.0e-4", "≤ 1.0e-4"]
    names = plots.stabilisers_price(tmp_path).axes[0].get_yticklabels()
    assert names[-1].get_text() == "GRPO, stop 0.003"
