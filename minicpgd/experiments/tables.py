"""What a study found, as a table of words: printed after `minicpgd study`, and published in docs/results.md.

In: a study's folder. Out: a table of strings, its first column the rows' names. Intervals are those of `stats.py`, in
brackets.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from minicpgd.algorithms import display_name
from minicpgd.experiments.outcome import HEALTHY
from minicpgd.experiments.statistics import Estimate, bootstrap_mean, wilson


def number(estimate: Estimate) -> str:
    """As in 0.58 [0.50, 0.67]; without an interval where there is none."""
    if estimate.low != estimate.low:
        return f"{estimate.value:.2f}"
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def percent(estimate: Estimate) -> str:
    """As in 58 % [50, 67]."""
    if estimate.low != estimate.low:
        return f"{estimate.value:.0%}".replace("%", " %")
    return f"{100 * estimate.value:.0f} % [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


def healthy_share(rows: pd.DataFrame) -> Estimate:
    """The share of an algorithm's map on which it stays healthy, with its interval over seeds."""
    return bootstrap_mean(rows.groupby("seed")["healthy"].mean())


def tolerated_rate(rows: pd.DataFrame) -> pd.Series:
    """By seed, the learning rate that an algorithm bears: where its final accuracy first falls to half.

    That is read along one row of the map, one K, and interpolated on the logarithm of the rate.

    Where it never does, or has at the smallest rate, it is the largest or smallest on the map: a bound.
    """
    borne = {}
    for seed, line in rows.sort_values("learning_rate").groupby("seed"):
        rate, accuracy = np.log(line["learning_rate"].to_numpy()), line["accuracy_final"].to_numpy()
        below = np.flatnonzero(accuracy < HEALTHY)
        i = below[0] if len(below) else len(rate)
        if 0 < i < len(rate):
            part = (accuracy[i - 1] - HEALTHY) / (accuracy[i - 1] - accuracy[i])
            borne[seed] = float(rate[i - 1] + part * (rate[i] - rate[i - 1]))
        else:
            borne[seed] = float(rate[min(i, len(rate) - 1)])
    return np.exp(pd.Series(borne))


def geometric(values: pd.Series, form: str) -> str:
    """A geometric mean over seeds, as in 1.8e-4 [1.6e-4, 2.0e-4]."""
    estimate = (np.exp(x) for x in bootstrap_mean(np.log(values)))
    value, low, high = (format(x, form).replace("e-0", "e-") for x in estimate)
    return value if low == "nan" else f"{value} [{low}, {high}]"


def advantage_size(rows: pd.DataFrame) -> float:
    """The largest |A| of a rollout, averaged over steps and runs: what `auto` follows."""
    return float(rows[["advantage_max_mean"]].assign(low=-rows["advantage_min_mean"]).max(axis=1).mean())


def rate_name(rate: float) -> str:
    """As in 3e-5."""
    return f"{rate:.0e}".replace("e-0", "e-")


def shape_name(generations: int, weight: str, rate: float) -> str:
    """As in G = 4, std, lr 1e-4."""
    return f"G = {generations}, {weight}, lr {rate_name(rate)}"


def arm_name(algorithm: str, beta: float) -> str:
    """As in GRPO, β = 0.04."""
    return display_name(algorithm) + (f", β = {beta:g}" if beta else "")


def map_summary(folder: Path) -> pd.DataFrame:
    """How much of the map each algorithm keeps, by how much CPGD keeps more, and who fell at the largest K."""
    table = pd.read_csv(folder / "study.csv")
    largest = table["updates_per_rollout"].max()
    of_cpgd = tolerated_rate(table.query(f"algorithm == 'cpgd' and updates_per_rollout == {largest}"))
    by_seed = table.groupby(["algorithm", "seed"])["healthy"].mean().unstack("algorithm")
    rows = []
    for algorithm, runs in table.groupby("algorithm", sort=False):
        lead = bootstrap_mean(by_seed["cpgd"] - by_seed[algorithm])
        hardest = runs[runs["updates_per_rollout"] == largest]
        borne = tolerated_rate(hardest)
        bound = "≤ " if (borne < 1.001 * hardest["learning_rate"].min()).any() else ""
        fell = {
            f"fell at K = {largest}, lr {rate_name(rate)}": f"{cell['collapsed'].sum()} of {len(cell)}, "
            + percent(wilson(cell["collapsed"].sum(), len(cell)))
            for rate, cell in hardest.groupby("learning_rate")
        }
        rows.append(
            {
                "algorithm": display_name(str(algorithm)),
                "healthy share of the map": percent(healthy_share(runs)),
                "CPGD's is larger by": "" if algorithm == "cpgd" else percent(lead).replace("%", "points"),
                f"learning rate borne at K = {largest}": bound + geometric(borne, ".1e"),
                "CPGD bears, times that": ""
                if algorithm == "cpgd"
                else bound.replace("≤", "≥") + geometric(of_cpgd / borne, ".1f"),
                "not collapsed": percent(bootstrap_mean(1 - runs.groupby("seed")["collapsed"].mean())),
                f"collapsed at K = {largest}": f"{hardest['collapsed'].sum()} of {len(hardest)}",
            }
            | fell
        )
    return pd.DataFrame(rows)


def drift_summary(folder: Path) -> pd.DataFrame:
    r"""The best $\alpha$ of the grid beside `auto`, for each size of advantages."""
    table = pd.read_csv(folder / "study.csv")
    rows = []
    for (generations, weight, rate), runs in table.groupby(
        ["num_generations", "advantage_weight", "learning_rate"], sort=False
    ):
        auto, grid = runs[runs["drift_coef"] == "auto"], runs[runs["drift_coef"] != "auto"]
        by_coef = {
            coef: bootstrap_mean(cell["accuracy_final"])
            for coef, cell in grid.groupby(grid["drift_coef"].astype(float))
        }
        best = max(by_coef, key=lambda coef: by_coef[coef].value)
        rows.append(
            {
                "advantages": shape_name(generations, weight, rate),
                "largest of A": f"{runs['advantage_max_mean'].mean():.2f}",
                "largest of −A": f"{-runs['advantage_min_mean'].mean():.2f}",
                "accuracy at α = 0": number(by_coef[0.0]),
                "best α of the grid": f"{best:g}",
                "accuracy there": number(by_coef[best]),
                "α of auto, mean": f"{auto['drift_coef_mean'].mean():.2f}",
                "accuracy of auto": number(bootstrap_mean(auto["accuracy_final"])),
            }
        )
    return pd.DataFrame(rows)


def anatomy_summary(folder: Path) -> pd.DataFrame:
    """Each variant's end, best first."""
    table = pd.read_csv(folder / "study.csv")
    arms = [
        {
            "variant": arm_name(str(algorithm), float(beta)),
            "final accuracy": number(bootstrap_mean(runs["accuracy_final"])),
            "best accuracy": number(bootstrap_mean(runs["accuracy_best"])),
            "reward, last 10 steps": number(bootstrap_mean(runs["reward_last"])),
            "collapsed": f"{runs['collapsed'].sum()} of {len(runs)}",
            "share": percent(wilson(runs["collapsed"].sum(), len(runs))),
        }
        for (algorithm, beta), runs in table.groupby(["algorithm", "beta"], sort=False)
    ]
    return pd.DataFrame(sorted(arms, key=lambda arm: arm["final accuracy"], reverse=True))


def fair_summary(folder: Path) -> pd.DataFrame:
    """Each algorithm at its own best settings, on fresh seeds, and its difference to CPGD, seed by seed."""
    table = pd.read_csv(folder / "study.csv").query("part == 'report'")
    cpgd = table[table["algorithm"] == "cpgd"].set_index("seed")
    rows = []
    for algorithm, runs in table.groupby("algorithm", sort=False):
        paired, chosen = runs.set_index("seed"), runs.iloc[0]
        rows.append(
            {
                "algorithm": display_name(str(algorithm)),
                "learning rate": f"{chosen['learning_rate']:g}",
                "ε": f"{chosen['epsilon']:g}",
                "β": f"{chosen['beta']:g}",
                "final accuracy": number(bootstrap_mean(runs["accuracy_final"])),
                "minus CPGD's": ""
                if algorithm == "cpgd"
                else number(bootstrap_mean(paired["accuracy_final"] - cpgd["accuracy_final"])),
                "reward, last 10 steps": number(bootstrap_mean(runs["reward_last"])),
                "reward minus CPGD's": ""
                if algorithm == "cpgd"
                else number(bootstrap_mean(paired["reward_last"] - cpgd["reward_last"])),
                "collapsed": f"{runs['collapsed'].sum()} of {len(runs)}",
            }
        )
    return pd.DataFrame(rows)


def warning_summary(folder: Path) -> pd.DataFrame:
    """Each metric's rule and what it is worth on runs that it was not fitted on, best first."""
    table = pd.read_csv(folder / "study.csv")
    table = table.iloc[(table["false_share"] - table["announced_share"]).argsort(kind="stable")]
    return pd.DataFrame(
        {
            "metric": row.signal,
            "alarm": f"{row.fires} {row.threshold:.3g}",
            "collapses announced": percent(Estimate(row.announced_share, row.announced_low, row.announced_high)),
            "without drift": percent(Estimate(row.without_drift_share, row.without_drift_low, row.without_drift_high)),
            "with drift": percent(Estimate(row.with_drift_share, row.with_drift_low, row.with_drift_high)),
            "false alarms": percent(Estimate(row.false_share, row.false_low, row.false_high)),
            "false alarms, no drift": percent(
                Estimate(row.without_drift_false_share, row.without_drift_false_low, row.without_drift_false_high)
            ),
            "alarms in healthy runs": percent(Estimate(row.healthy_share, row.healthy_low, row.healthy_high)),
            "steps before the fall, median": f"{row.lead_median:g}",
        }
        for row in table.itertuples()
    )


SUMMARIES: dict[str, Callable[[Path], pd.DataFrame]] = {
    "map": map_summary,
    "drift": drift_summary,
    "anatomy": anatomy_summary,
    "fair": fair_summary,
    "warning": warning_summary,
}
