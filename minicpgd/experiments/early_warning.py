r"""Early warning: which metric announces a collapse, how many steps before the reward falls, how often in vain?

In: the tables of the other studies, whose runs are all looked through, each once. Out: `study.csv`, a row per metric.
All of this was written down before it was tried on any run:

- What is to be announced: the *fall* of a run that collapses (`stats.py` says which do). It begins at the first step
  whose reward, and its mean with the next two, are below 80 % of the best mean of three so far, or of the start's.
- A rule: the metric is above (or below) a threshold. It *announces* a collapse if it fires at a step before the fall:
  what the updates of step t did to a metric shows before the reward of step t + 1 does. It is a *false alarm* if it
  fires anywhere in a run that did not collapse. (Some of those end badly all the same, so they are counted among the
  healthy alone, too, and collapses are counted apart with the drift, "held", and without, "free". Both were added after
  the first look.)
- Side and threshold are fitted on the runs with even seeds (largest share announced minus share of false alarms), and
  judged on those with odd seeds.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from minicpgd.algorithms.table import ALGORITHMS
from minicpgd.errors import UserError
from minicpgd.experiments.runner import write_table
from minicpgd.experiments.statistics import Estimate, wilson
from minicpgd.files import versions

SOURCES = ("map", "drift", "anatomy", "fair")
SIGNALS = (
    *("kl_old", "ratio_p99", "ratio_p01", "ratio_max", "ratio_min"),
    *("clip_frac", "clip_frac_pos", "clip_frac_neg", "grad_norm", "entropy", "completion_length"),
)
FALL = 0.8


class Rule(NamedTuple):
    """Fires where `side * metric > side * threshold`; `side` is 1 for above, -1 for below."""

    signal: str
    side: int
    threshold: float


class Trace(NamedTuple):
    """A run as a rule sees it: its metrics, (S,) each, with `step`; what became of it; the step of its fall or NaN."""

    metrics: dict[str, np.ndarray]
    collapsed: bool
    healthy: bool
    fall: float
    drift: bool  # whether its algorithm has one


def collapse_step(reward: np.ndarray) -> float:
    """The step at which the fall begins, as defined above; NaN if it never does.

    Args:
        reward: (S + 1,), the start's first, then that of each step.
    """
    best = reward[0]
    for t in range(1, len(reward)):
        if t >= 4:
            best = max(best, reward[t - 3 : t].mean())
        if reward[t] < FALL * best and reward[t : t + 3].mean() < FALL * best:
            return float(t)
    return np.nan


def first_alarm(rule: Rule, metrics: dict[str, np.ndarray]) -> float:
    """The step at which a rule first fires; NaN if it never does."""
    fires = rule.side * metrics[rule.signal] > rule.side * rule.threshold
    return float(metrics["step"][fires.argmax()]) if fires.any() else np.nan


def judge(rule: Rule, traces: list[Trace]) -> dict[str, Any]:
    """Counts over some runs: announced of collapsed, false alarms of the rest, of the healthy alone; and the leads."""
    alarms = [(trace, first_alarm(rule, trace.metrics)) for trace in traces]
    leads = [trace.fall - at for trace, at in alarms if trace.collapsed and trace.fall - at >= 1]
    fallen = sum(trace.collapsed for trace in traces)
    return {
        "announced": len(leads),
        "collapsed": fallen,
        "false_alarms": sum(not trace.collapsed and not np.isnan(at) for trace, at in alarms),
        "not_collapsed": len(traces) - fallen,
        "healthy_alarms": sum(trace.healthy and not np.isnan(at) for trace, at in alarms),
        "healthy": sum(trace.healthy for trace in traces),
        "lead_median": float(np.median(leads)) if leads else np.nan,
    }


def fit(signal: str, traces: list[Trace]) -> Rule:
    """The side and threshold with the largest share announced minus share of false alarms; ties go to the first."""
    values = np.concatenate([trace.metrics[signal] for trace in traces])
    candidates = [
        Rule(signal, side, float(f"{threshold:.3g}"))
        for side in (1, -1)
        for threshold in np.unique(np.nanquantile(values, np.linspace(0.005, 0.995, 100)))
    ]

    def gain(rule: Rule) -> float:
        counts = judge(rule, traces)
        return counts["announced"] / max(1, counts["collapsed"]) - counts["false_alarms"] / max(
            1, counts["not_collapsed"]
        )

    return max(candidates, key=gain)


def load_studies(there: list[Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs of some studies' folders, each once, by name; and all their steps, step 0 being before training."""
    runs = pd.concat([pd.read_csv(folder / "study.csv") for folder in there]).drop_duplicates("run").set_index("run")
    steps = pd.concat([pd.read_csv(folder / "steps.csv.gz") for folder in there]).drop_duplicates(["run", "step"])
    return runs, steps


def load_traces(there: list[Path]) -> tuple[list[Trace], list[Trace]]:
    """The runs of some studies' folders, each once: those with even seeds, and those with odd ones."""
    outcomes, steps = load_studies(there)
    steps["clip_frac"] = steps["clip_frac_pos"] + steps["clip_frac_neg"]
    halves: tuple[list[Trace], list[Trace]] = ([], [])
    for run, rows in steps.groupby("run", sort=True):
        of, fall = outcomes.loc[run], collapse_step(rows["reward"].to_numpy())
        metrics = {name: rows[name].to_numpy()[1:] for name in ("step", *SIGNALS)}  # line 0 is before training
        drift = ALGORITHMS[of["algorithm"]].drift and of["drift_coef_mean"] > 0
        halves[int(of["seed"]) % 2].append(Trace(metrics, bool(of["collapsed"]), bool(of["healthy"]), fall, drift))
    return halves


def warning_study(studies: Path, folder: Path, *, quick: bool = False) -> Path:
    """Fit each metric's rule on one half of the runs, judge it on the other, and write the table.

    Args:
        studies: where the other studies' tables are.
        folder: where this one's goes.
        quick: look through the quick studies.

    Raises:
        UserError: none of the studies is there, or neither half has runs that collapsed and runs that did not.
    """
    names = [f"{name}-quick" if quick else name for name in SOURCES]
    there = [studies / name for name in names if (studies / name / "steps.csv.gz").exists()]
    if not there:
        raise UserError(
            f"{studies}: none of the studies {', '.join(names)} is there to look through; make one first, "
            f"for example by `minicpgd study map{' --quick' * quick}`"
        )
    even, odd = load_traces(there)
    for half in (even, odd):
        if len({trace.collapsed for trace in half}) < 2:
            raise UserError(
                f"{studies}: too few runs; with even and with odd seeds, some have to collapse and some not"
            )
    rows = []
    for signal in SIGNALS:
        rule = fit(signal, even)
        found = judge(rule, odd)
        with_drift = judge(rule, [trace for trace in odd if trace.drift])
        without_drift = judge(rule, [trace for trace in odd if not trace.drift])
        rows.append(
            {"signal": signal, "fires": "above" if rule.side > 0 else "below", "threshold": rule.threshold, **found}
            | _columns("announced", found["announced"], found["collapsed"])
            | _columns("without_drift", without_drift["announced"], without_drift["collapsed"])
            | _columns("with_drift", with_drift["announced"], with_drift["collapsed"])
            | _columns("false", found["false_alarms"], found["not_collapsed"])
            | _columns("without_drift_false", without_drift["false_alarms"], without_drift["not_collapsed"])
            | _columns("healthy", found["healthy_alarms"], found["healthy"])
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "study.csv", pd.DataFrame(rows))
    made: dict[str, Any] = {
        "command": f"minicpgd study warning{' --quick' * quick}",
        "looked_at": [study.name for study in there],
    }
    made |= {"fitted_on": len(even), "judged_on": len(odd), "versions": versions()}
    (folder / "made.json").write_text(json.dumps(made, indent=2) + "\n")
    return folder


def _columns(name: str, k: int, n: int) -> dict[str, float]:
    """A share and its interval; NaN where there is nothing to take a share of."""
    estimate = wilson(k, n) if n else Estimate(np.nan, np.nan, np.nan)
    return {f"{name}_share": estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
