r"""Early warning: which metric announces a collapse, how many steps before it, and how often in vain?

In: the tables of the other studies; each run counts once. Out: `study.csv`, a row per metric. All of this was written
down before it was tried on any run:

- The *collapse step* of a run that collapses (`outcome.py` has the rule) is the first step whose reward, and whose mean
  with the next two, are below 80 % of the best mean of three so far, or of the reward at the start.
- A rule says that the metric is above (or below) a threshold. It *announces* a collapse if it fires at a step before
  the collapse step: the updates of step t change a metric before they change the reward of step t + 1. It is a *false
  alarm* if it fires anywhere in a run that did not collapse. Some columns were added after the first look: alarms in
  healthy runs alone, since other runs may end badly too, and the same by *guard*, that is, by what limits a run's KL: a
  stop, a drift with an α of at least 0.1, or neither.
- Side and threshold are fitted on the runs with even seeds (largest share announced minus share of false alarms). They
  are judged on those with odd seeds.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from minicpgd.algorithms import ALGORITHMS
from minicpgd.errors import UserError
from minicpgd.experiments.runner import write_table
from minicpgd.experiments.statistics import Estimate, wilson
from minicpgd.files import versions

SOURCES = ("stabilisers", "fair")
SIGNALS = (
    *("kl_old", "ratio_p99", "ratio_p01", "ratio_max", "ratio_min"),
    *("clip_frac", "clip_frac_pos", "clip_frac_neg", "grad_norm", "entropy", "completion_length"),
)
FALL = 0.8
LARGE = 0.1  # A smaller α than this limits no KL here; the authors have 0.01.
GUARDS = ("neither", "drift", "stop")


class Rule(NamedTuple):
    """A rule fires where `side * metric > side * threshold`; `side` is 1 for above, -1 for below."""

    signal: str
    side: int
    threshold: float


class Trace(NamedTuple):
    """A run as a rule sees it: its metrics, (S,) each, with `step`; its outcome; its collapse step, or NaN."""

    metrics: dict[str, np.ndarray]
    collapsed: bool
    healthy: bool
    collapse: float
    guard: str  # one of `GUARDS`


def collapse_step(reward: np.ndarray) -> float:
    """The collapse step, from the `reward` before training and that of each step, (S + 1,); NaN if there is none."""
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
    """Count announced collapses and false alarms over some runs, and take the median number of steps of warning."""
    alarms = [(trace, first_alarm(rule, trace.metrics)) for trace in traces]
    leads = [trace.collapse - at for trace, at in alarms if trace.collapsed and trace.collapse - at >= 1]
    collapsed_runs = sum(trace.collapsed for trace in traces)
    return {
        "announced": len(leads),
        "collapsed": collapsed_runs,
        "false_alarms": sum(not trace.collapsed and not np.isnan(at) for trace, at in alarms),
        "not_collapsed": len(traces) - collapsed_runs,
        "healthy_alarms": sum(trace.healthy and not np.isnan(at) for trace, at in alarms),
        "healthy": sum(trace.healthy for trace in traces),
        "lead_median": float(np.median(leads)) if leads else np.nan,
    }


def fit(signal: str, traces: list[Trace]) -> Rule:
    """The rule with the largest share announced minus share of false alarms; the first of equal ones."""
    values = np.concatenate([trace.metrics[signal] for trace in traces])
    thresholds = np.unique(np.nanquantile(values, np.linspace(0.005, 0.995, 100)))
    candidates = [Rule(signal, side, float(f"{threshold:.3g}")) for side in (1, -1) for threshold in thresholds]

    def gain(rule: Rule) -> float:
        counts = judge(rule, traces)
        announced = counts["announced"] / max(1, counts["collapsed"])
        return announced - counts["false_alarms"] / max(1, counts["not_collapsed"])

    return max(candidates, key=gain)


def load_studies(folders: list[Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs of some studies, each once, by name; and all their steps. Step 0 is the model before training."""
    runs = pd.concat([pd.read_csv(folder / "study.csv") for folder in folders]).drop_duplicates("run").set_index("run")
    steps = pd.concat([pd.read_csv(folder / "steps.csv.gz") for folder in folders]).drop_duplicates(["run", "step"])
    return runs, steps


def load_traces(folders: list[Path]) -> tuple[list[Trace], list[Trace]]:
    """The runs of some studies, each once: first those with even seeds, then those with odd seeds."""
    outcomes, steps = load_studies(folders)
    steps["clip_frac"] = steps["clip_frac_pos"] + steps["clip_frac_neg"]
    halves: tuple[list[Trace], list[Trace]] = ([], [])
    for run, rows in steps.groupby("run", sort=True):
        row, began = outcomes.loc[run], collapse_step(rows["reward"].to_numpy())
        metrics = {name: rows[name].to_numpy()[1:] for name in ("step", *SIGNALS)}  # Line 0 is before training.
        outcome = (bool(row["collapsed"]), bool(row["healthy"]), began)
        halves[int(row["seed"]) % 2].append(Trace(metrics, *outcome, _guard(row)))
    return halves


def _guard(run: pd.Series) -> str:
    if pd.notna(run.get("target_kl")) and run.get("drift_coef") != "adaptive":  # For adaptive the number is an aim.
        return "stop"
    return "drift" if ALGORITHMS[run["algorithm"]].drift and run["drift_coef_mean"] >= LARGE else "neither"


def warning_study(studies: Path, folder: Path, *, quick: bool = False) -> Path:
    """Fit each metric's rule on one half of the runs of all `studies`, judge it on the other, and write the table.

    Raises:
        UserError: none of the studies exists, or one half has not both runs that collapsed and runs that did not.
    """
    names = [f"{name}-quick" if quick else name for name in SOURCES]
    found = [studies / name for name in names if (studies / name / "steps.csv.gz").exists()]
    if not found:
        hint = f"make one first, for example by `minicpgd study stabilisers{' --quick' * quick}`"
        raise UserError(f"{studies}: it has none of the studies {', '.join(names)}; {hint}")
    even, odd = load_traces(found)
    if any(len({trace.collapsed for trace in half}) < 2 for half in (even, odd)):
        raise UserError(f"{studies}: too few runs; with even and with odd seeds, some have to collapse and some not")
    rows = []
    for signal in SIGNALS:
        rule = fit(signal, even)
        counts = judge(rule, odd)
        by_guard = {name: judge(rule, [trace for trace in odd if trace.guard == name]) for name in GUARDS}
        shares = {
            "announced": (counts["announced"], counts["collapsed"]),
            **{name: (count["announced"], count["collapsed"]) for name, count in by_guard.items()},
            "false": (counts["false_alarms"], counts["not_collapsed"]),
            "neither_false": (by_guard["neither"]["false_alarms"], by_guard["neither"]["not_collapsed"]),
            "healthy": (counts["healthy_alarms"], counts["healthy"]),
        }
        row = {"signal": signal, "fires": "above" if rule.side > 0 else "below", "threshold": rule.threshold, **counts}
        for name, (k, n) in shares.items():  # A share and its interval are NaN where n is 0.
            estimate = wilson(k, n) if n else Estimate(np.nan, np.nan, np.nan)
            row |= {f"{name}_{part}": x for part, x in zip(("share", "low", "high"), estimate, strict=True)}
        rows.append(row)
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "study.csv", pd.DataFrame(rows))
    provenance: dict[str, Any] = {
        "command": f"minicpgd study warning{' --quick' * quick}",
        "looked_at": [study.name for study in found],
        "fitted_on": len(even),
        "judged_on": len(odd),
        "versions": versions(),
    }
    (folder / "made.json").write_text(json.dumps(provenance, indent=2) + "\n")
    return folder
