"""What an objective asks of one token, as a function of its ratio; and where the tokens of a rollout stand.

In: rows of the table, and the `LossOutput`s of passes over a rollout. Out: matplotlib `Figure`s.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from minicpgd.algorithms import ALGORITHMS, Algorithm, LossOutput, LossSettings
from minicpgd.plots.style import COLOURS, LINE, MARKERS, line_style, styled

SHADE = "#e9e9e9"


def objective_and_weight(
    algorithm: Algorithm, ratios: Sequence[float] | Tensor, advantage: float, *, drift_coef: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    r"""An algorithm's loss for n responses of one token each, whose `ratios` are (n,). They all have one `advantage`.

    Returns:
        (n,) each: the objective $J$, its derivative in $\log \pi_\theta$, and whether the surrogate is clipped.
    """
    d = torch.as_tensor(ratios, dtype=torch.float64).log()[:, None].requires_grad_()
    # The loss is a weighted sum over tokens. Its derivative in a token's weight is that token's own loss.
    ones = torch.ones_like(d).requires_grad_()
    advantages = torch.full((len(d),), advantage, dtype=d.dtype)
    settings = LossSettings(drift_coef=drift_coef)
    out = algorithm.loss(d, torch.zeros_like(d), advantages, ones, settings, token_weights=ones)
    weight, value = torch.autograd.grad(-out.loss, (d, ones))
    return value.detach()[:, 0], weight[:, 0], out.clipped[:, 0]


@styled
def objective_curves(
    names: Sequence[str],
    *,
    weight: bool = False,
    drift_coef: float = 1.0,
    reach: tuple[float, float] = (0.2, 5.0),
    bounds: tuple[float, float] = (0.8, 1.2),
) -> Figure:
    """Objectives, or their gradient weights, over the ratio: for A = 1 on the left, for A = -1 on the right.

    Args:
        names: rows of the table, four at most.
        weight: draw the derivative in log pi in place of the objective.
    """
    figure = Figure(figsize=(9, 3.7), layout="constrained")
    axes = figure.subplots(1, 2)
    ratios = torch.logspace(math.log10(reach[0]), math.log10(reach[1]), 801, dtype=torch.float64)
    for axis, advantage in zip(axes, (1.0, -1.0), strict=True):
        for which, name in enumerate(names):
            lines = objective_and_weight(ALGORITHMS[name], ratios, advantage, drift_coef=drift_coef)
            label = name + (rf"  ($\alpha$ = {drift_coef:g})" if ALGORITHMS[name].drift else "")
            colour, dashes, _ = line_style(which)
            width = 3.8 - 0.6 * which  # Later lines are thinner, so that all can be seen.
            axis.plot(ratios, lines[int(weight)], label=label, color=colour, linestyle=dashes, linewidth=width)
        for bound in bounds:
            axis.axvline(bound, **LINE)
        sign = "+" if advantage > 0 else "\N{MINUS SIGN}"
        axis.set(xscale="log", title=f"A = {sign}1", xlabel="ratio r  (log scale)")
        ticks = [tick for tick in (0.2, 0.5, 0.8, 1.2, 2, 3, 5) if reach[0] <= tick <= reach[1]]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_xticks([], minor=True)
    axes[0].set_ylabel(r"weight  $\partial J / \partial \ln \pi_\theta$" if weight else "objective J of one token")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names), handlelength=3)
    return figure


@styled
def token_regions(
    outputs: Mapping[str, Mapping[int, LossOutput]],
    *,
    bounds: tuple[float, float] = (0.8, 1.2),
    reach: tuple[float, float] = (0.004, 8.0),
) -> Figure:
    """Every token of a rollout in the plane of ratio and advantage, the clipped regions shaded.

    Args:
        outputs: by the name of a row of panels, then by the number of passes made (the same for all rows): the loss.
        reach: the smallest and the largest ratio drawn; points beyond are drawn at the edge.
    """
    columns = list(next(iter(outputs.values())))
    figure = Figure(figsize=(9, 0.6 + 2.1 * len(outputs)), layout="constrained")
    grid = figure.subplots(len(outputs), len(columns), sharex=True, sharey=True, squeeze=False)
    for column, axis in zip(columns, grid[0], strict=True):
        axis.set_title(f"after {column} pass{'es' if column > 1 else ''}")
    for axes, (name, row) in zip(grid, outputs.items(), strict=True):
        axes[0].set_ylabel(f"{name}\nadvantage A")
        for axis, out in zip(axes, row.values(), strict=True):
            A, clipped = out.advantages[out.mask].numpy(), out.clipped[out.mask].numpy()
            ratio = out.log_ratio[out.mask].exp().clamp(*reach).numpy()
            largest = 1.15 * float(np.abs(A).max()) + 0.15
            axis.add_patch(Rectangle((bounds[1], 0), reach[1] * 2, largest, color=SHADE, zorder=0))
            axis.add_patch(Rectangle((0, -largest), bounds[0], largest, color=SHADE, zorder=0))
            # Tokens of one response share A. A small shift keeps them from hiding each other.
            height = A + 0.12 * np.random.default_rng(0).uniform(-1, 1, len(A))
            kinds = {"free": ~clipped & (A != 0), "clipped": clipped, "A = 0": A == 0}
            for which, (kind, chosen) in enumerate(kinds.items()):
                shape = {"marker": MARKERS[which], "color": COLOURS[which], "markersize": 4, "alpha": 0.6}
                axis.plot(ratio[chosen], height[chosen], linestyle="", markeredgewidth=0, label=kind, **shape)
            axis.set(xscale="log", xlim=(reach[0] * 0.8, reach[1] * 1.25), ylim=(-largest, largest))
            axis.set_xticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
            axis.set_xticks([], minor=True)
    for axis in grid[-1]:
        axis.set_xlabel("ratio r  (log scale)")
    handles, _ = grid[0, 0].get_legend_handles_labels()
    region = Rectangle((0, 0), 1, 1, color=SHADE, label="region where the surrogate is clipped")
    figure.legend(handles=[*handles, region], loc="outside lower center", ncols=4, markerscale=2)
    return figure
