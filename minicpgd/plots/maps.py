"""Figures of the map: learning rate x updates per rollout.

In: a study's folder, which `experiments/runner.py` describes. Out: a matplotlib `Figure`. Bands are 95 % intervals.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from minicpgd.algorithms import display_name
from minicpgd.experiments.statistics import Estimate, bootstrap_mean
from minicpgd.experiments.tables import healthy_share, percent, rate_name, tolerated_rate
from minicpgd.plots.style import ACCURACY, COLOURS, DASHES, band, seeds, styled


@styled
def map_heat(folder: Path) -> Figure:
    """Four maps of learning rate x K: final accuracy as colour and number, and how many seeds collapsed."""
    table = pd.read_csv(folder / "study.csv")
    figure = Figure(figsize=(10, 3.3), layout="constrained")
    axes = figure.subplots(1, table["algorithm"].nunique(), sharey=True)
    for axis, (algorithm, rows) in zip(axes, table.groupby("algorithm", sort=False), strict=True):
        cells = rows.groupby(["updates_per_rollout", "learning_rate"])
        accuracy = cells["accuracy_final"].mean().unstack()
        collapsed = cells["collapsed"].sum().unstack()
        image = axis.imshow(accuracy, cmap="cividis", vmin=0, vmax=1, aspect="auto", origin="lower")
        for (y, x), value in np.ndenumerate(accuracy.to_numpy()):
            ink = "white" if value < 0.5 else "black"
            axis.text(x, y + 0.12, f"{value:.2f}", ha="center", va="center", color=ink, weight="bold", size=10.5)
            if n := int(collapsed.to_numpy()[y, x]):
                axis.text(x, y - 0.26, f"{n} fell", ha="center", va="center", color=ink, size=8.5)
        axis.set_title(f"{display_name(algorithm)}\nhealthy {percent(healthy_share(rows))}", size=10.5)
        axis.set_xticks(range(accuracy.shape[1]), map(rate_name, accuracy.columns))
        axis.set_yticks(range(accuracy.shape[0]), accuracy.index)
        axis.grid(False)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    axes[0].set_ylabel("K, updates per rollout")
    figure.supxlabel("learning rate", size=10.5)
    figure.colorbar(image, ax=axes, label=ACCURACY, pad=0.01, aspect=14)
    return figure


@styled
def map_frontiers(folder: Path) -> Figure:
    """Final accuracy over the learning rate for each K; the tolerated rate over K; the share of the map so accurate."""
    table = pd.read_csv(folder / "study.csv")
    ks = np.unique(table["updates_per_rollout"])
    figure = Figure(figsize=(10, 6.8), layout="constrained")
    above, below = np.asarray(figure.subfigures(2, 1, height_ratios=(5, 6)))
    top = above.subplots(1, len(ks), sharey=True, squeeze=False)[0]
    frontier, whole = below.subplots(1, 2)
    for i, (name, rows) in enumerate(table.groupby("algorithm", sort=False)):
        label = display_name(str(name))
        for axis, k in zip(top, ks, strict=True):
            cells = rows[rows["updates_per_rollout"] == k].groupby("learning_rate")["accuracy_final"]
            band(axis, i, {rate: bootstrap_mean(values) for rate, values in cells}, label)
        tolerated = {k: bootstrap_mean(np.log(tolerated_rate(line))) for k, line in rows.groupby("updates_per_rollout")}
        band(frontier, i, {k: Estimate(*np.exp(estimate)) for k, estimate in tolerated.items()}, label)
        wanted = np.linspace(0, 1, 101)
        reached = [bootstrap_mean((rows["accuracy_final"] >= x).groupby(rows["seed"]).mean()) for x in wanted]
        band(whole, i, dict(zip(wanted, reached, strict=True)), label, marker="")
    for axis, k in zip(top, ks, strict=True):
        axis.set(xscale="log", ylim=(0, 1.03), title=f"K = {k}", xlabel="learning rate")
    top[0].set_ylabel(ACCURACY)
    frontier.set(xscale="log", yscale="log", title="The frontier", xlabel="K, updates per rollout")
    frontier.set_xticks(ks, ks)
    frontier.xaxis.set_minor_locator(NullLocator())
    frontier.set_ylabel("learning rate at which\naccuracy falls to half")
    whole.set(xlim=(0, 1), ylim=(0, 1.03), title="The whole map", xlabel=f"at least this {ACCURACY}")
    whole.set_ylabel("share of the map")
    figure.legend(*top[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, handlelength=3.2)
    return figure


@styled
def map_curves(folder: Path) -> Figure:
    """Reward, length, KL and clipped share at the largest K and a middling rate: seeds thin, their mean thick."""
    table = pd.read_csv(folder / "study.csv")
    rates, k = np.unique(table["learning_rate"]), table["updates_per_rollout"].max()
    learning_rate = rates[(len(rates) - 1) // 2]
    table = table[(table["learning_rate"] == learning_rate) & (table["updates_per_rollout"] == k)]
    steps = pd.read_csv(folder / "steps.csv.gz").merge(table[["run", "algorithm"]], on="run")
    panels: Sequence[tuple[str, Sequence[tuple[str, str, Any]]]] = (
        ("mean reward", [("reward", "", "-")]),
        ("length [tokens]", [("completion_length", "", "-")]),
        ("KL [nats / token]", [("kl_old", "", "-")]),
        ("share clipped", [("clip_frac_pos", "A > 0", "-"), ("clip_frac_neg", "A < 0", DASHES[1])]),
    )
    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots(len(panels), table["algorithm"].nunique(), sharex=True, sharey="row")
    for column, algorithm, colour in zip(axes.T, table["algorithm"].unique(), COLOURS, strict=False):
        rows = steps[steps["algorithm"] == algorithm]
        for axis, (_, lines) in zip(column, panels, strict=True):
            for metric, label, dashes in lines:
                by_seed = rows.pivot_table(index="step", columns="run", values=metric)
                seeds(axis, by_seed, colour, dashes, label)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        column[0].set(title=display_name(algorithm), ylim=(0, 1))
        column[2].set(yscale="log", ylim=(1e-4, None))  # A rollout without advantages has no KL.
    for axis, (unit, _) in zip(axes[:, 0], panels, strict=True):
        axis.set_ylabel(unit)
    axes[-1, 0].legend(handlelength=3)
    figure.supxlabel(f"step (one rollout and its K = {k} updates), learning rate {learning_rate:g}", size=10.5)
    return figure
