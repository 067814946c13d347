"""Figures of the remedies: how long a policy stays alive, on how much of the map, and at what price.

In: the folder of the study `endurance` or `stabilisers`, which `experiments/runner.py` describes. Out: a matplotlib
`Figure`. Bars are 95 % intervals.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from minicpgd.experiments.endurance import FIGURE_1
from minicpgd.experiments.statistics import bootstrap_mean, wilson
from minicpgd.experiments.tables import (
    best_first,
    hard_cell,
    healthy_share,
    named_runs,
    named_table,
    percent,
    priced_runs,
    rate_name,
)  # fmt: skip
from minicpgd.plots import style
from minicpgd.plots.style import ACCURACY, COLOURS, DASHES, KL, interval, line_style, styled

MAPPED = (
    *("GRPO", "REINFORCE++", "CPGD, α = 0.01", "CPGD, α = max A"),
    *("CPGD, default", "GRPO, stop 0.003", "GRPO, stop 0.001", "GRPO, β = 0.04"),
)
SURVIVORS = ("GRPO", "RLOO", "REINFORCE++", "CPGD, α = 0.01", "CPGD, α = max A", "CPGD, default", "GRPO, stop 0.003")


@styled
def endurance_survival(folder: Path) -> Figure:
    """The share of long runs that has not fallen, over rollouts; below it each remedy's late accuracy and falls."""
    from scipy.stats import CensoredData, ecdf  # This import takes half a second.

    table = named_runs(folder)
    long = table[table["part"].isin(["K = 4", "K = 8"])]
    figure = Figure(figsize=(10, 9), layout="constrained")
    above, below = np.asarray(figure.subfigures(2, 1, height_ratios=(4, 5)))
    for axis, (part, runs) in zip(above.subplots(1, 2, sharey=True), long.groupby("part", sort=False), strict=True):
        for i, remedy in enumerate(SURVIVORS):
            fell = runs.loc[runs["name"] == remedy, "fell"]
            length = runs["max_steps"].max()
            alive = ecdf(CensoredData(uncensored=fell.dropna(), right=[length] * fell.isna().sum())).sf
            x, y = np.append(alive.quantiles, length), np.append(alive.probabilities, alive.probabilities[-1])
            style_of = line_style(i)
            axis.step(
                np.append(0, x), np.append(1, y), color=style_of.color, linestyle=style_of.linestyle, where="post"
            )
            end = wilson(fell.isna().sum(), len(fell))
            axis.plot([length * (1.03 + 0.025 * i)] * 2, [end.low, end.high], color=style_of.color, linewidth=2)
            axis.plot(length * (1.03 + 0.025 * i), end.value, style_of.marker, color=style_of.color, label=remedy)
        axis.set(title=f"{part}, all learning rates", xlabel="rollout", ylim=(-0.02, 1.04))
    above.axes[0].set_ylabel("share that has not fallen")
    above.legend(*above.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    cells = long.groupby(["name", "part", "learning_rate"], sort=False)
    late, fallen = cells["late"].mean().unstack([1, 2]), cells["fell"].count().unstack([1, 2])
    order = late.mean(axis=1).sort_values(ascending=False).index
    axis = below.subplots()
    axis.imshow(late.loc[order], cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (y, x), accuracy in np.ndenumerate(late.loc[order].to_numpy()):
        text = f"{accuracy:.2f}   fell {fallen.loc[order].iloc[y, x]}"
        axis.text(x, y, text, ha="center", va="center", color="white" if accuracy < 0.55 else "black", size=9)
    axis.set_xticks(range(late.shape[1]), [f"{part}, {rate_name(rate)}" for part, rate in late.columns])
    axis.set_yticks(range(len(order)), order)
    axis.set_title("Greedy accuracy over the last fifth; of how many seeds the reward fell")
    axis.grid(visible=False)
    return figure


@styled
def endurance_fates(folder: Path) -> Figure:
    """Reward, length, ratios and clipped tokens over the run, at the largest rate at K = 4: the paper's Figure 1."""
    table = named_table(folder)
    rate = table["learning_rate"].max()
    chosen = table[table["part"].isin(["K = 4", "Figure 1"]) & (table["learning_rate"] == rate)]
    names = ("GRPO", "RLOO", "REINFORCE++", "CPGD, α = 0", "CPGD, α = 0.01", *FIGURE_1)
    steps = pd.read_csv(folder / "steps.csv.gz").assign(clipped=lambda t: t["clip_frac_pos"] + t["clip_frac_neg"])
    panels = {"reward": "reward", "completion_length": "tokens", "ratio_p99": "ratio, 99 %", "clipped": "share clipped"}
    figure = Figure(figsize=(10, 9), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True)
    for i, name in enumerate(names):
        rows = steps.merge(chosen.loc[chosen["name"] == name, ["run"]], on="run")
        colour, dashes = COLOURS[i % len(COLOURS)], DASHES[(i + i // len(COLOURS)) % len(DASHES)]
        for axis, column in zip(axes, panels, strict=True):
            mean = rows.pivot_table(index="step", columns="run", values=column).mean(axis=1)
            axis.plot(mean.rolling(4, min_periods=1).mean(), color=colour, linestyle=dashes, label=name, linewidth=1.7)
    for axis, unit in zip(axes, panels.values(), strict=True):
        axis.set_ylabel(unit)
    axes[2].set_yscale("log")
    axes[-1].set_xlabel(f"rollout (K = 4, learning rate {rate_name(rate)}; means over seeds)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, handlelength=3.2)
    return figure


@styled
def stabilisers_price(folder: Path) -> Figure:
    """Each remedy's healthy share of the map; at K = 64 its accuracy, per rollout and per second, and its updates."""
    table, hard = named_table(folder), priced_runs(folder)
    order = best_first(table, hard)[::-1]
    setting = f"K = {table['updates_per_rollout'].max()}, {rate_name(hard['learning_rate'].iloc[0])}"
    figure = Figure(figsize=(10, 1.6 + 0.27 * len(order)), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(3, 3, 2))
    for y, remedy in enumerate(order):
        interval(left, y, healthy_share(table[table["name"] == remedy]), COLOURS[0], "o")
        runs = hard[hard["name"] == remedy]
        interval(middle, y + 0.12, bootstrap_mean(runs["accuracy_final"]), COLOURS[1], "s")
        interval(middle, y - 0.12, bootstrap_mean(runs["accuracy_in_time"]), COLOURS[2], "^")
        interval(right, y, bootstrap_mean(runs["updates_mean"]), COLOURS[3], "D")
    left.set_yticks(range(len(order)), order)
    left.set(title="Healthy share of the map", xlim=(0, 1))
    left.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
    middle.set(title=f"Accuracy, {setting}", xlim=(0, 1.02))
    middle.plot([], [], "s", color=COLOURS[1], label="after 20 rollouts")
    middle.plot([], [], "^", color=COLOURS[2], label="in the time of GRPO with the stop")
    right.set(title="Updates per rollout", xlim=(0, None))
    figure.legend(*middle.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


@styled
def map_heat(folder: Path) -> Figure:
    """A map of learning rate x K for eight remedies: final accuracy as colour and number; how many seeds collapsed."""
    table = named_table(folder)
    remedies = [name for name in MAPPED if name in set(table["name"])]
    n_rows, seeds = -(-len(remedies) // 4), table["seed"].nunique()
    figure = Figure(figsize=(10, 0.5 + 2.7 * n_rows), layout="constrained")
    axes = figure.subplots(n_rows, -(-len(remedies) // n_rows), sharex=True, sharey=True, squeeze=False)
    for axis, name in zip(axes.flat, remedies, strict=False):
        rows = table[table["name"] == name]
        cells = rows.groupby(["updates_per_rollout", "learning_rate"])
        accuracy = cells["accuracy_final"].mean().unstack()
        collapsed = cells["collapsed"].sum().unstack()
        image = axis.imshow(accuracy, cmap="cividis", vmin=0, vmax=1, aspect="auto", origin="lower")
        for (y, x), value in np.ndenumerate(accuracy.to_numpy()):
            ink = "white" if value < 0.5 else "black"
            axis.text(x, y + 0.12, f"{value:.2f}", ha="center", va="center", color=ink, weight="bold", size=10.5)
            if n := int(collapsed.to_numpy()[y, x]):
                axis.text(x, y - 0.26, f"{n} of {seeds}", ha="center", va="center", color=ink, size=8.5)
        axis.set_title(f"{name}\nhealthy {percent(healthy_share(rows))}", size=10.5)
        axis.set_xticks(range(accuracy.shape[1]), map(rate_name, accuracy.columns))
        axis.set_yticks(range(accuracy.shape[0]), accuracy.index)
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    figure.supylabel("K, updates per rollout", size=10.5)
    figure.supxlabel("learning rate     (small numbers: how many seeds collapsed)", size=10.5)
    figure.colorbar(image, ax=axes, label=ACCURACY, pad=0.01, aspect=14 * n_rows)
    return figure


@styled
def rollout_passes(folder: Path, *, step: int = 1) -> Figure:
    """Ratios, KL and clipped tokens over the passes of one rollout; at step 1 all start from the same policy."""
    table = hard_cell(named_table(folder))
    passes = pd.read_csv(folder / "passes.csv.gz").query(f"step == {step}").merge(table[["run", "name"]], on="run")
    colours = {
        "GRPO": COLOURS[1],
        "CPGD, α = 0.01": COLOURS[4],
        "CPGD, α = max A": COLOURS[5],
        "CPGD, default": COLOURS[0],
    }
    figure = Figure(figsize=(10, 6.6), layout="constrained")
    axes = figure.subplots(3, len(colours), sharex=True, sharey="row", height_ratios=(3, 2, 2))
    for column, (name, colour) in zip(axes.T, colours.items(), strict=True):
        rows = passes[passes["name"] == name]
        by_pass = rows.groupby("pass")
        low, p01, p99, high = (by_pass[f"ratio_{q}"].median() for q in ("min", "p01", "p99", "max"))
        style.ribbons(column[0], low.index, (low, p01, p99, high), colour, bounds=(0.8, 1.2))
        column[0].set(yscale="log", title=name)
        by_run = rows.pivot_table(index="pass", columns="run", values="kl_old")
        style.seeds(column[1], by_run, colour)
        column[1].set_yscale("log")
        for sign, dashes, label in (("pos", "-", "A > 0"), ("neg", DASHES[1], "A < 0")):
            column[2].plot(by_pass[f"clip_frac_{sign}"].mean(), color=colour, linestyle=dashes, label=label)
        column[2].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    for axis, unit in zip(axes[:, 0], (style.RATIO, KL.replace("  ", "\n"), "share clipped"), strict=True):
        axis.set_ylabel(unit)
    ratios = [0.3, 0.5, 0.8, 1.2, 2, 3]
    axes[0, 0].set_yticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axes[0, 0].yaxis.set_minor_locator(NullLocator())
    figure.legend(handles=style.ribbon_legend(), loc="outside upper right", ncols=3)
    axes[2, -1].legend(handlelength=3, fontsize=9)
    k, rate = table[["updates_per_rollout", "learning_rate"]].iloc[0]
    setting = f"K = {k:g}, learning rate {rate_name(rate)}"
    figure.supxlabel(f"pass over the same rollout, 4 updates each ({setting})", size=10.5)
    return figure
