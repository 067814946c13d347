"""Figures of studies, from their tables.

In: a study's folder, which `experiments/runner.py` describes. Out: a matplotlib `Figure`. Bars are 95 % intervals.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from minicpgd.algorithms import ALGORITHMS, display_name
from minicpgd.experiments.default_rule import setting_names
from minicpgd.experiments.endurance import FIGURE_1, REMEDIES
from minicpgd.experiments.statistics import Estimate, bootstrap_mean, wilson
from minicpgd.experiments.tables import advantage_size, arm_name, healthy_share, named_runs, rate_name, shape_name
from minicpgd.plots import style
from minicpgd.plots.style import ACCURACY, COLOURS, DASHES, KL, band, interval, line_style, styled


@styled
def drift_coefs(folder: Path) -> Figure:
    r"""The effect of $\alpha$, for advantages of different size; `max_advantage` is a large open marker."""
    table = pd.read_csv(folder / "study.csv")
    panels = (
        ("accuracy_final", "Where it ends", ACCURACY),
        ("accuracy_final", "The same, in units of the advantages", ACCURACY),
        ("kl_last", "How far it moves", KL),
        ("steps_to_90", "How fast it learns", "steps to an accuracy of 0.9 (median)"),
    )
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = list(figure.subplots(2, 2).flat)
    shapes = table.groupby(["num_generations", "advantage_weight", "learning_rate"], sort=False)
    for i, (shape, rows) in enumerate(shapes):
        is_rule = rows["drift_coef"] == "max_advantage"
        rule, grid = rows[is_rule], rows[~is_rule]
        grid = grid.assign(alpha=grid["drift_coef"].astype(float))
        for axis, (metric, title, unit) in zip(axes, panels, strict=True):
            scale = advantage_size(rows) if "units" in title else 1.0
            by = {alpha / scale: _middle(metric, values) for alpha, values in grid.groupby("alpha")[metric]}
            band(axis, i, by, shape_name(*shape))
            value = _middle(metric, rule[metric]).value
            mark = {"marker": line_style(i).marker, "markersize": 12, "markerfacecolor": "white", "markeredgewidth": 2}
            axis.plot(rule["drift_coef_mean"].mean() / scale, value, color=COLOURS[i], **mark)  # type: ignore[arg-type]
            axis.set(title=title, ylabel=unit)
            axis.set_xscale("symlog", linthresh=0.3, linscale=0.5)
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_xticks([0, 0.3, 1, 3, 10, 30], ["0", "0.3", "1", "3", "10", "30"])
            axis.set_xlabel(r"$\alpha$ / largest $|A|$ of a rollout" if "units" in title else r"$\alpha$, drift_coef")
    axes[0].set_ylim(0, 1.03)
    axes[1].set_ylim(0, 1.03)
    axes[2].set_yscale("log")
    axes[3].set_yticks([0, 5, 10, 15, 20, 22], ["0", "5", "10", "15", "20", "never"])
    axes[0].plot([], [], "o", color="black", markersize=12, markerfacecolor="white", label="large and open: max |A|")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, handlelength=3.2)
    return figure


def _middle(metric: str, values: pd.Series) -> Estimate:
    """A mean with its interval; the median alone for a number of steps, which may be "never"."""
    return Estimate(*[values.fillna(22).median()] * 3) if metric == "steps_to_90" else bootstrap_mean(values)


@styled
def anatomy_rows(folder: Path) -> Figure:
    """Each variant's final accuracy, last rewards and collapse rate: seeds as dots, mean and interval beside them."""
    table = pd.read_csv(folder / "study.csv")
    table["arm"] = [arm_name(a, b) for a, b in zip(table["algorithm"], table["beta"], strict=True)]
    order = table.groupby("arm")["accuracy_final"].mean().sort_values().index
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True, width_ratios=(3, 3, 2))
    blue, orange, green, *_ = COLOURS
    kinds = (("with the drift", "D", blue), ("KL to the reference", "^", green), ("neither", "s", orange))
    for y, arm in enumerate(order):
        rows = table[table["arm"] == arm]
        first = rows.iloc[0]
        _, marker, colour = kinds[0 if ALGORITHMS[first["algorithm"]].drift else 1 if first["beta"] else 2]
        for axis, metric in zip(axes, ("accuracy_final", "reward_last"), strict=False):
            axis.plot(rows[metric], [y] * len(rows), "o", color=colour, alpha=0.35, markersize=4.5, markeredgewidth=0)
            interval(axis, y, bootstrap_mean(rows[metric]), colour, marker)
        interval(axes[2], y, wilson(rows["collapsed"].sum(), len(rows)), colour, marker)
    axes[0].set_yticks(range(len(order)), order)
    axes[0].set(xlabel=ACCURACY, xlim=(0, 1.02), title="Held-out problems")
    axes[1].set(xlabel="mean reward, last 10 steps", xlim=(0, 1.02), title="Training")
    axes[2].set(xlabel="share of seeds", xlim=(-0.03, 1.03), title="Collapsed")
    for label, marker, colour in kinds:
        axes[2].plot([], [], marker, color=colour, label=label)
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return figure


@styled
def anatomy_passes(folder: Path, *, step: int = 1) -> Figure:
    """Inside one rollout: ratios, KL and clipped tokens over its passes; at step 1 all start from the same policy."""
    table = pd.read_csv(folder / "study.csv")
    passes = pd.read_csv(folder / "passes.csv.gz").query(f"step == {step}")
    passes = passes.merge(table[["run", "algorithm", "beta"]], on="run").query("beta == 0")
    colours = {"grpo": COLOURS[1], "cpg": COLOURS[4], "grpo_drift": COLOURS[5], "cpgd": COLOURS[0]}
    figure = Figure(figsize=(10, 6.6), layout="constrained")
    axes = figure.subplots(3, len(colours), sharex=True, sharey="row", height_ratios=(3, 2, 2))
    for column, (algorithm, colour) in zip(axes.T, colours.items(), strict=True):
        rows = passes[passes["algorithm"] == algorithm]
        by_pass = rows.groupby("pass")
        low, p01, p99, high = (by_pass[f"ratio_{q}"].median() for q in ("min", "p01", "p99", "max"))
        style.ribbons(column[0], low.index, (low, p01, p99, high), colour, bounds=(0.8, 1.2))
        column[0].set(yscale="log", title=display_name(algorithm))
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
    figure.supxlabel("pass over the same rollout (4 updates each)", size=10.5)
    return figure


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
        for has_beta, fill, label in ((False, COLOURS[i], "β = 0"), (True, "white", "with β")):
            some = runs[(runs["beta"] > 0) == has_beta]
            marks: dict[str, Any] = {"markerfacecolor": fill, "markersize": 7, "label": label}
            axis.plot(some["learning_rate"], some["reward_last"], line_style(i).marker, color=COLOURS[i], **marks)
        best = report[report["algorithm"] == algorithm].iloc[0][["learning_rate", "epsilon", "beta"]]
        at = runs[(runs[best.index] == best).all(axis=1)]
        ring: dict[str, Any] = {"markersize": 15, "markerfacecolor": "none", "markeredgewidth": 1.4, "label": "chosen"}
        axis.plot(at["learning_rate"].iloc[0], at["reward_last"].mean(), "o", color="black", **ring)
        axis.set(xscale="log", xlim=(8e-6, 4e-4), ylim=(0, 1), title=display_name(algorithm), xlabel="learning rate")
    top[0].set_ylabel("search: mean reward,\nlast 10 steps")
    above.legend(*top[0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    reported = (("accuracy_final", ACCURACY), ("reward_last", "mean reward, last 10 steps"))
    for axis, (metric, unit) in zip(below.subplots(1, 2, sharey=True), reported, strict=True):
        for i, algorithm in enumerate(algorithms):
            values = report.loc[report["algorithm"] == algorithm, metric]
            axis.plot(values, [-i] * len(values), line_style(i).marker, color=COLOURS[i], alpha=0.35, markersize=5)
            interval(axis, -i, bootstrap_mean(values), COLOURS[i], line_style(i).marker)
        axis.set(xlabel=f"fresh seeds: {unit}", yticks=[-i for i in range(len(algorithms))], xlim=(0, 1.02))
        axis.set_yticklabels([display_name(a) for a in algorithms])
        axis.margins(y=0.2)
    return figure


@styled
def warning_signals(folder: Path) -> Figure:
    """For each metric: the share of collapses that it announces, and of its false alarms."""
    table = pd.read_csv(folder / "study.csv")
    table = table.iloc[(table["announced_share"] - table["false_share"]).argsort()].reset_index(drop=True)
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axis = figure.subplots()
    kinds = (
        ("without_drift", "collapses announced, no drift", COLOURS[2], "^"),
        ("with_drift", "with the drift", COLOURS[0], "D"),
        ("false", "alarms in runs without collapse", COLOURS[1], "X"),
        ("healthy", "in healthy runs", COLOURS[4], "s"),
    )
    for y, row in enumerate(table.to_dict("records")):
        for shift, (kind, _, colour, marker) in zip((0.27, 0.09, -0.09, -0.27), kinds, strict=True):
            estimate = Estimate(row[f"{kind}_share"], row[f"{kind}_low"], row[f"{kind}_high"])
            interval(axis, y + shift, estimate, colour, marker)
        axis.text(1.03, y, f"{row['lead_median']:g}", va="center")
    axis.text(1.03, len(table) - 0.35, "steps before\nthe fall\n(median)", va="bottom", size=9)
    for _, label, colour, marker in kinds:
        axis.plot([], [], marker, color=colour, label=label, markersize=8)
    names = [f"{row['signal']} {row['fires']} {row['threshold']:.3g}" for _, row in table.iterrows()]
    axis.set_yticks(range(len(table)), names)
    axis.set(xlim=(-0.02, 1.02), xlabel="share of the runs that the rule was not fitted on")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
    figure.legend(loc="outside upper left", ncols=4, handletextpad=0.2, columnspacing=1.2)
    return figure


SURVIVORS = ("GRPO", "RLOO", "REINFORCE++", "drift 0.01", "drift max advantage", "CPGD, default", "stop 0.003")


@styled
def endurance_survival(folder: Path) -> Figure:
    """The share of long runs that has not fallen, over rollouts; below it each remedy's late accuracy and falls."""
    from scipy.stats import CensoredData, ecdf  # This import takes half a second.

    table = named_runs(folder, REMEDIES)
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
    table = pd.read_csv(folder / "study.csv")
    table = table.assign(name=setting_names(table, REMEDIES))
    rate = table["learning_rate"].max()
    chosen = table[table["part"].isin(["K = 4", "Figure 1"]) & (table["learning_rate"] == rate)]
    names = ("GRPO", "RLOO", "REINFORCE++", "log-ratio clip", "drift 0.01", *FIGURE_1)
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
    """Each remedy's healthy share of the map, and how many of 64 updates it makes; the best at the top."""
    table = pd.read_csv(folder / "study.csv")
    table = table.assign(name=setting_names(table, REMEDIES))
    order = table.groupby("name")["healthy"].mean().sort_values().index
    largest = table["updates_per_rollout"].max()
    figure = Figure(figsize=(10, 1.6 + 0.27 * len(order)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for y, remedy in enumerate(order):
        runs = table[table["name"] == remedy]
        interval(left, y, healthy_share(runs), COLOURS[0], "o")
        made = runs.loc[runs["updates_per_rollout"] == largest, "updates_mean"]
        interval(right, y, bootstrap_mean(made.to_numpy()), COLOURS[1], "s")
    left.set_yticks(range(len(order)), order)
    left.set(title="Healthy share of the map", xlim=(0, 1))
    left.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
    right.set(title=f"Updates made per rollout at K = {largest}", xlim=(0, None))
    return figure
