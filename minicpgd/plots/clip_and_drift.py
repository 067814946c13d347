"""The clip against the drift: the force on one token, and the two fates of a policy that it decides.

In: the folder of the study `default`. Out: a matplotlib `Figure`.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from minicpgd.algorithms import ALGORITHMS
from minicpgd.experiments.default_rule import SETTINGS
from minicpgd.experiments.tables import named_table, rate_name
from minicpgd.plots.objectives import SHADE, objective_and_weight
from minicpgd.plots.style import COLOURS, DASHES, RATIO, seeds, styled

LINES = {  # the settings that the lower panels show: colour, dashes, and the name in the legend
    "no drift": (COLOURS[4], DASHES[0], "no drift"),
    "paper": (COLOURS[2], DASHES[3], "paper (α = 0.01)"),
    "max advantage": (COLOURS[1], DASHES[1], "max advantage (the old default)"),
    "paper + stop": (COLOURS[0], DASHES[2], "paper + stop (the default)"),
}


@styled
def clip_against_drift(folder: Path) -> Figure:
    """The force on a token over its ratio; below it the accuracy in long runs at K = 4, and in short ones at K = 64."""
    table = named_table(folder, SETTINGS)
    steps = pd.read_csv(folder / "steps.csv.gz").dropna(subset="eval_accuracy")
    figure = Figure(figsize=(10, 7.4), layout="constrained")
    above, below = np.asarray(figure.subfigures(2, 1, height_ratios=(5, 6)))
    top = above.subplots(1, 2, sharey=True)
    for axis, advantage in zip(top, (-1.0, 1.0), strict=True):
        draw_net_force(axis, advantage)
    top[0].set_ylabel("force on its log-probability")
    above.legend(*top[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, handlelength=3.2)
    long = table[table["part"] == "long"]
    # Old and new default are compared on the smaller rollouts, at the largest learning rate.
    size, rate = long["num_prompts"].min(), long["learning_rate"].max()
    long = long[(long["num_prompts"] == size) & (long["learning_rate"] == rate)]
    panels = (
        ("K = 4", long, ("no drift", "max advantage", "paper + stop")),
        ("K = 64", table[table["part"] == "K = 64"], ("paper", "max advantage", "paper + stop")),
    )
    for axis, (k, runs, names) in zip(below.subplots(1, 2, sharey=True), panels, strict=True):
        for name in names:
            colour, dashes, label = LINES[name]
            rows = steps.merge(runs.loc[runs["name"] == name, ["run"]], on="run")
            by_seed = rows.pivot_table(index="step", columns="run", values="eval_accuracy")
            seeds(axis, by_seed, colour, dashes, label)
        axis.set(title=f"{k}, learning rate {rate_name(runs['learning_rate'].max())}", xlabel="rollout", ylim=(0, 1.03))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axis.legend(handlelength=3.2, loc="lower left")
    below.axes[0].set_ylabel("greedy accuracy")
    return figure


def draw_net_force(axis: Axes, advantage: float, alpha: float = 1.0) -> None:
    """Surrogate, drift and their sum, as forces on the log-probability of one token; clipped ratios are shaded."""
    ratios = torch.linspace(0.4, 1.6, 481, dtype=torch.float64)
    _, total, clipped = objective_and_weight(ALGORITHMS["cpgd"], ratios, advantage, drift_coef=alpha)
    _, surrogate, _ = objective_and_weight(ALGORITHMS["cpg"], ratios, advantage)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.plot(ratios, surrogate, color=COLOURS[2], linestyle=DASHES[1], label="advantage, with the clip")
    axis.plot(ratios, total - surrogate, color=COLOURS[1], linestyle=DASHES[2], label="drift")
    axis.plot(ratios, total, color=COLOURS[0], linewidth=2.6, label="their sum")
    axis.fill_between(ratios, -2, 2, where=clipped.numpy(), color=SHADE, label="clipped: the drift acts alone")
    kind = "that failed, A = −1" if advantage < 0 else "that succeeded, A = 1"
    axis.set(title=f"A token {kind}", xlabel=RATIO, ylim=(-1.7, 1.7), xlim=(0.4, 1.6))
