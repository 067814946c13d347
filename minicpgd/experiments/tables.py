"""What a study found, as a table of words; `minicpgd study` prints it, and docs/results.md publishes it.

In: a study's folder. Out: a table of strings, with the names of the rows in the first column. Intervals of 95 %, from
`statistics.py`, are in brackets.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from minicpgd.algorithms import display_name
from minicpgd.experiments.default_rule import SETTINGS, is_admitted, setting_names
from minicpgd.experiments.endurance import REMEDIES
from minicpgd.experiments.outcome import HEALTHY
from minicpgd.experiments.runner import Settings
from minicpgd.experiments.statistics import Estimate, bootstrap_mean, wilson


def _with_interval(estimate: Iterable[float], form: str, unit: str = "") -> str:
    """A number and the ends of its interval in brackets, which are left out if they are NaN."""
    value, low, high = (format(x, form).replace("e-0", "e-") for x in estimate)
    return f"{value}{unit}" if low == "nan" else f"{value}{unit} [{low}, {high}]"


def mean_text(per_seed: pd.Series) -> str:
    """A mean over seeds, as in 0.58 [0.50, 0.67]; without an interval if there is one seed."""
    return _with_interval(bootstrap_mean(per_seed), ".2f")


def percent(estimate: Estimate) -> str:
    """As in 58 % [50, 67]."""
    return _with_interval([100 * x for x in estimate], ".0f", unit=" %")


def count_text(collapsed: pd.Series) -> str:
    """As in 3 of 5."""
    return f"{collapsed.sum()} of {len(collapsed)}"


def collapse_share(collapsed: pd.Series) -> str:
    """The share of collapsed runs with its interval, as in 60 % [23, 88]."""
    return percent(wilson(collapsed.sum(), len(collapsed)))


def healthy_share(rows: pd.DataFrame) -> Estimate:
    """The share of an algorithm's map on which it stays healthy, with its interval over seeds."""
    return bootstrap_mean(rows.groupby("seed")["healthy"].mean())


def tolerated_rate(rows: pd.DataFrame) -> pd.Series:
    """The learning rate that an algorithm tolerates, by seed: the rate at which its final accuracy first falls to half.

    The rows are those of one K on the map; the logarithm of the rate is interpolated. If accuracy never falls to half,
    or is below it at the smallest rate, the result is the largest or smallest rate on the map: a bound.
    """
    tolerated = {}
    for seed, line in rows.sort_values("learning_rate").groupby("seed"):
        rate, accuracy = np.log(line["learning_rate"].to_numpy()), line["accuracy_final"].to_numpy()
        below = np.flatnonzero(accuracy < HEALTHY)
        i = below[0] if len(below) else len(rate)
        if 0 < i < len(rate):
            part = (accuracy[i - 1] - HEALTHY) / (accuracy[i - 1] - accuracy[i])
            tolerated[seed] = float(rate[i - 1] + part * (rate[i] - rate[i - 1]))
        else:
            tolerated[seed] = float(rate[min(i, len(rate) - 1)])
    return np.exp(pd.Series(tolerated))


def geometric(values: pd.Series, form: str) -> str:
    """A geometric mean over seeds, as in 1.8e-4 [1.6e-4, 2.0e-4]."""
    return _with_interval(np.exp(bootstrap_mean(np.log(values))), form)


def rate_name(rate: float) -> str:
    """As in 3e-5."""
    return f"{rate:.0e}".replace("e-0", "e-")


def fair_summary(folder: Path) -> pd.DataFrame:
    """Each algorithm at its own best settings, on fresh seeds, and its difference to CPGD, seed by seed."""
    table = pd.read_csv(folder / "study.csv").query("part == 'report'").set_index("seed")
    cpgd = table[table["algorithm"] == "cpgd"]
    rows = []
    for algorithm, runs in table.groupby("algorithm", sort=False):
        first, is_other = runs.iloc[0], algorithm != "cpgd"
        row = {
            "algorithm": display_name(algorithm),
            "learning rate": f"{first['learning_rate']:g}",
            "ε": f"{first['epsilon']:g}",
            "β": f"{first['beta']:g}",
            "stop": "none" if pd.isna(first["target_kl"]) else f"{first['target_kl']:g}",
            "final accuracy": mean_text(runs["accuracy_final"]),
            "minus CPGD's": mean_text(runs["accuracy_final"] - cpgd["accuracy_final"]) if is_other else "",
            "reward, last 10 steps": mean_text(runs["reward_last"]),
            "reward minus CPGD's": mean_text(runs["reward_last"] - cpgd["reward_last"]) if is_other else "",
            "collapsed": count_text(runs["collapsed"]),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def warning_summary(folder: Path) -> pd.DataFrame:
    """Each metric's rule, and how well it does on runs that it was not fitted on, best first."""
    table = pd.read_csv(folder / "study.csv")
    table = table.iloc[(table["false_share"] - table["announced_share"]).argsort(kind="stable")]
    shares = {
        "collapses announced": "announced",
        "with neither drift nor stop": "neither",
        "with a drift": "drift",
        "with a stop": "stop",
        "false alarms": "false",
        "false alarms, neither": "neither_false",
        "alarms in healthy runs": "healthy",
    }
    rows = []
    for found in table.to_dict("records"):
        row = {"metric": found["signal"], "alarm": f"{found['fires']} {found['threshold']:.3g}"}
        for column, name in shares.items():
            row[column] = percent(Estimate(found[f"{name}_share"], found[f"{name}_low"], found[f"{name}_high"]))
        lead = "" if np.isnan(found["lead_median"]) else f"{found['lead_median']:g}"
        rows.append(row | {"steps before the collapse, median": lead})
    return pd.DataFrame(rows)


def late_accuracy(steps: pd.DataFrame) -> pd.Series:
    """The mean greedy accuracy of each run over the last fifth of its steps, by the run's name."""
    late = steps[steps["step"] > 0.8 * steps.groupby("run")["step"].transform("max")]
    return late.groupby("run")["eval_accuracy"].mean()  # A step without an evaluation has NaN, which does not count.


def named_table(folder: Path, settings: dict[str, Settings] = REMEDIES) -> pd.DataFrame:
    """The runs of a study, each with the `name` of its setting."""
    table = pd.read_csv(folder / "study.csv")
    return table.assign(name=setting_names(table, settings))


def named_runs(folder: Path, settings: dict[str, Settings] = REMEDIES) -> pd.DataFrame:
    """The `named_table` of a study, with the `late_accuracy` of each run as `late`."""
    table = named_table(folder, settings)
    return table.assign(late=table["run"].map(late_accuracy(pd.read_csv(folder / "steps.csv.gz"))))


def default_summary(folder: Path) -> pd.DataFrame:
    """What the rule of `default_rule.py` asks of each setting: long runs beside no drift, the map, and K = 64."""
    table = named_runs(folder, SETTINGS)
    long, cell = table[table["part"] == "long"], ["num_prompts", "learning_rate"]
    no_drift = long[long["name"] == "no drift"].groupby(cell)["late"].mean()
    candidates = set(table.loc[table["part"] == "screen", "name"])
    rows = []
    for name in SETTINGS:
        runs = table[table["name"] == name]
        at_length = runs[runs["part"].isin(["screen", "long"])].drop_duplicates("run")
        shares = at_length.groupby(cell)["late"].mean() / no_drift
        on_map, reused = runs[runs["part"] == "map"], runs[runs["part"] == "K = 64"]
        row = {
            "setting": name,
            "long runs, K = 4": str(len(at_length) or ""),
            "collapsed": str(at_length["collapsed"].sum()) if len(at_length) else "",
            "late accuracy / no drift's": f"{shares.min():.2f}" if len(at_length) else "",
            "rule 1": ("yes" if is_admitted(at_length["collapsed"], shares) else "no") if name in candidates else "",
            "healthy share of the map": percent(healthy_share(on_map)) if len(on_map) else "",
            "K = 64: final accuracy": mean_text(reused["accuracy_final"]) if len(reused) else "",
            "K = 64: updates": f"{reused['updates_mean'].mean():.1f}" if len(reused) else "",
        }
        rows.append(row)
    return pd.DataFrame(rows)


def endurance_summary(folder: Path) -> pd.DataFrame:
    """How many long runs of each remedy fell, and how many did not recover; accuracy over the last fifth."""
    rows = []
    for (part, remedy), runs in named_runs(folder).groupby(["part", "name"], sort=False):
        row = {"remedy": f"{remedy}, {part}"}
        for rate, cell in runs.groupby("learning_rate"):
            row[f"fell, lr {rate_name(rate)}"] = count_text(cell["fell"].notna())
            row[f"collapsed, lr {rate_name(rate)}"] = count_text(cell["collapsed"])
            row[f"late accuracy, lr {rate_name(rate)}"] = mean_text(cell["late"])
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def tolerated_text(runs: pd.DataFrame) -> str:
    """The `tolerated_rate` of runs at one K, as in 1.8e-4 [1.6e-4, 2.0e-4]; with ≥ or ≤ if it is a bound for a seed."""
    tolerated, rates = tolerated_rate(runs), runs["learning_rate"]
    bound = "≤ " if (tolerated < 1.001 * rates.min()).any() else "≥ " if (tolerated > 0.999 * rates.max()).any() else ""
    return bound + geometric(tolerated, ".1e")


def hard_cell(table: pd.DataFrame) -> pd.DataFrame:
    """The runs of a map at the largest K and a middling learning rate."""
    rates, k = np.unique(table["learning_rate"]), table["updates_per_rollout"].max()
    return table[(table["learning_rate"] == rates[(len(rates) - 1) // 2]) & (table["updates_per_rollout"] == k)]


def priced_runs(folder: Path) -> pd.DataFrame:
    """The runs of `stabilisers` in the `hard_cell`, with `cost` and two accuracies.

    The `cost` of a run is in seconds: its rollouts and its updates, each at the median of the whole study, since the
    clock of a single run depends on what else a machine does. `accuracy_final` is that after all rollouts, and
    `accuracy_in_time` that of the last evaluation before a run costs as much as GRPO with the stop does in the end.
    """
    table, steps = named_table(folder), pd.read_csv(folder / "steps.csv.gz")
    clock = pd.read_csv(folder / "seconds.csv").merge(table.drop_duplicates("run"), on="run").query("updates_mean >= 1")
    rollouts = clock["run"].map(steps.groupby("run")["step"].max())
    a_rollout = (clock["rollout_seconds"] / rollouts).median()
    an_update = (clock["update_seconds"] / rollouts / clock["updates_mean"]).median()
    steps = steps.assign(cost=steps["step"] * a_rollout + steps.groupby("run")["updates"].cumsum() * an_update)
    runs = hard_cell(table)
    runs = runs.assign(cost=runs["run"].map(steps.groupby("run")["cost"].max()))
    budget = runs.loc[runs["name"] == "GRPO, stop 0.003", "cost"].max()
    in_time = steps[(steps["cost"].fillna(0) <= budget) & steps["eval_accuracy"].notna()]
    return runs.assign(accuracy_in_time=runs["run"].map(in_time.groupby("run")["eval_accuracy"].last()))


def best_first(table: pd.DataFrame, hard: pd.DataFrame) -> list[str]:
    """The names of the remedies, by healthy share of the map; among equals by accuracy in the `hard_cell`."""
    means = pd.DataFrame(
        {"share": table.groupby("name")["healthy"].mean(), "hard": hard.groupby("name")["accuracy_final"].mean()}
    )
    return list(means.round(6).sort_values(["share", "hard"], ascending=False, kind="stable").index)


def stabilisers_summary(folder: Path) -> pd.DataFrame:
    """The healthy share of the map of each remedy, the rate it tolerates at each K, and its price, best first."""
    table, at_one_rate = named_table(folder), priced_runs(folder)
    largest, rate = table["updates_per_rollout"].max(), rate_name(at_one_rate["learning_rate"].iloc[0])
    hardest = dict(iter(at_one_rate.groupby("name")))
    usual = hardest["GRPO"]["cost"].mean()
    rows = []
    for remedy in best_first(table, at_one_rate):
        runs, hard = table[table["name"] == remedy], hardest[remedy]
        row = {"remedy": remedy, "healthy share of the map": percent(healthy_share(runs))}
        for k, at_k in runs.groupby("updates_per_rollout"):
            row[f"learning rate tolerated, K = {k}"] = tolerated_text(at_k)
        row[f"K = {largest}, {rate}: accuracy"] = mean_text(hard["accuracy_final"])
        row["in the time of the stop"] = mean_text(hard["accuracy_in_time"])
        row["updates per rollout"] = f"{hard['updates_mean'].mean():.1f}"
        row["time, GRPO = 1"] = f"{hard['cost'].mean() / usual:.2f}"
        rows.append(row)
    return pd.DataFrame(rows)


SUMMARIES: dict[str, Callable[[Path], pd.DataFrame]] = {
    "stabilisers": stabilisers_summary, "endurance": endurance_summary, "fair": fair_summary,
    "default": default_summary, "warning": warning_summary,
}  # fmt: skip
