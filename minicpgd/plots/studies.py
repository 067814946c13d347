"""Figures of studies, from their tables.

In: a study's folder, which `experiments/runner.py` describes. Out: a matplotlib `Figure`. Bars are 95 % intervals.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from minicpgd.algorithms import display_name
from minicpgd.experiments.statistics import Estimate, bootstrap_mean
from minicpgd.plots.style import ACCURACY, COLOURS, interval, line_style, styled


@styled
def fair_search(folder: Path) -> Figure:
    """The search, one dot per run, the chosen setting ringed; and the report, with fresh seeds."""
    table = pd.read_csv(folder / "study.csv")
    search, report = table[table["part"] == "search"], table[table["part"] == "report"]
    algorithms = list(search["algorithm"].unique())
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    above, below = np.asarray(figure.subfigures(2, 1, height_ratios=(5, 4)))
    top = above.subplots(1, len(algorithms), sharey=True)
    for i, (axis, algorithm) in enumerate(zip(top, algorithms, strict=True)):
        runs = search[search["algorithm"] == algorithm]
        for stops, fill, label in ((False, COLOURS[i], "no stop"), (True, "white", "stop")):
            some = runs[runs["target_kl"].notna() == stops]
            marks: dict[str, Any] = {"markerfacecolor": fill, "markersize": 7, "label": label}
            axis.plot(some["learning_rate"], some["reward_last"], line_style(i).marker, color=COLOURS[i], **marks)
        best = report[report["algorithm"] == algorithm].iloc[0][["learning_rate", "epsilon", "beta"]]  # one draw each
        at = runs[(runs[best.index] == best).all(axis=1)]
        ring: dict[str, Any] = {"markersize": 15, "markerfacecolor": "none", "markeredgewidth": 1.4, "label": "chosen"}
        axis.plot(at["learning_rate"].iloc[0], at["reward_last"].mean(), "o", color="black", **ring)
        axis.set(xscale="log", xlim=(8e-6, 1.3e-3), ylim=(0, 1), title=display_name(algorithm), xlabel="learning rate")
    top[0].set_ylabel("search: mean reward,\nlast 10 steps")
    above.legend(*top[0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    reported = (("accuracy_final", ACCURACY), ("reward_last", "mean reward, last 10 steps"))
    for axis, (metric, unit) in zip(below.subplots(1, 2, sharey=True), reported, strict=True):
        for i, algorithm in enumerate(algorithms):
            values = report.loc[report["algorithm"] == algorithm, metric]
            axis.plot(values, [-i] * len(values), line_style(i).marker, color=COLOURS[i], alpha=0.35, markersize=5)
            interval(axis, -i, bootstrap_mean(values), COLOURS[i], line_style(i).marker)
        axis.set(xlabel=f"fresh seeds: {unit}", yticks=[-i for i in range(len(algorithms))])
        axis.set_yticklabels([display_name(a) for a in algorithms])
        axis.margins(y=0.2)
    return figure


@styled
def warning_signals(folder: Path) -> Figure:
    """For each metric: the share of collapses that it announces, and of its false alarms."""
    table = pd.read_csv(folder / "study.csv")
    table = table.iloc[(table["announced_share"] - table["false_share"]).argsort()].reset_index(drop=True)
    figure = Figure(figsize=(10, 7.4), layout="constrained")
    axis = figure.subplots()
    kinds = (
        ("neither", "collapses announced, no drift, no stop", COLOURS[2], "^"),
        ("drift", "with a drift", COLOURS[0], "D"),
        ("stop", "with a stop", COLOURS[6], "o"),
        ("false", "alarms in runs without collapse", COLOURS[1], "X"),
        ("healthy", "in healthy runs", COLOURS[4], "s"),
    )
    for y, row in enumerate(table.to_dict("records")):
        for shift, (kind, _, colour, marker) in zip((0.32, 0.16, 0, -0.16, -0.32), kinds, strict=True):
            estimate = Estimate(row[f"{kind}_share"], row[f"{kind}_low"], row[f"{kind}_high"])
            interval(axis, y + shift, estimate, colour, marker)
        if not np.isnan(row["lead_median"]):
            axis.text(1.03, y, f"{row['lead_median']:g}", va="center")
    axis.text(1.03, len(table) - 0.35, "steps before\nthe fall\n(median)", va="bottom", size=9)
    for _, label, colour, marker in kinds:
        axis.plot([], [], marker, color=colour, label=label, markersize=8)
    names = [f"{row['signal']} {row['fires']} {row['threshold']:.3g}" for _, row in table.iterrows()]
    axis.set_yticks(range(len(table)), names)
    axis.set(xlim=(-0.02, 1.02), xlabel="share of the runs that the rule was not fitted on")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
    figure.legend(loc="outside upper left", ncols=3, handletextpad=0.2, columnspacing=1.2)
    return figure
