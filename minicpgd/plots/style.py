"""One style for every figure.

Colour-blind readers can tell the colours (Okabe and Ito) apart. Dashes and markers serve prints in grey.

In: what a figure shows. Out: colours, markers, and parts that several figures share.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec

import matplotlib
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from minicpgd.experiments.statistics import Estimate

STYLE: dict[Any, Any] = {
    "figure.dpi": 150, "savefig.facecolor": "white", "font.size": 10.5, "legend.frameon": False, "lines.linewidth": 2.2,
    "axes.titlesize": 11.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.7,
}  # fmt: skip
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 1.2)), (0, (1.6, 1)), (0, (6, 1.2, 1.4, 1.2)), (0, (9, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE: dict[str, Any] = {"color": "black", "linewidth": 0.9, "linestyle": (0, (4, 2))}  # It marks a clip bound.
ACCURACY = "final accuracy (greedy)"
KL = r"KL to $\pi_{old}$  [nats per token]"
RATIO = r"ratio $\pi_\theta / \pi_{old}$"
P = ParamSpec("P")


class LineStyle(NamedTuple):
    """The keywords that distinguish a line: `axis.plot(x, y, **line_style(0)._asdict())`."""

    color: str
    linestyle: Any
    marker: str


def line_style(which: int) -> LineStyle:
    """The style of the line number `which`, from 0."""
    return LineStyle(COLOURS[which], DASHES[which], MARKERS[which])


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Let a function draw in this style."""
    return matplotlib.rc_context(STYLE)(draw)


def seeds(axis: Axes, by_run: pd.DataFrame, colour: str, dashes: Any = "-", label: str = "") -> None:
    """A thin line for each run, which are the columns, and a thick one for their mean."""
    axis.plot(by_run, color=colour, linewidth=0.7, alpha=0.45, linestyle=dashes)
    axis.plot(by_run.mean(axis=1), color=colour, linestyle=dashes, label=label)


def band(axis: Axes, which: int, points: dict[float, Estimate], label: str, marker: str | None = None) -> None:
    """A line through the estimates at some x, and a band for their intervals."""
    x, (value, low, high) = list(points), zip(*points.values(), strict=True)
    shape = line_style(which)._asdict() | ({} if marker is None else {"marker": marker})
    axis.plot(x, value, label=label, markersize=5, **shape)
    axis.fill_between(x, low, high, color=COLOURS[which], alpha=0.16, linewidth=0)


def interval(axis: Axes, y: float, estimate: Estimate, colour: str, marker: str) -> None:
    """One estimate: a marker, and a bar for its interval."""
    axis.plot([estimate.low, estimate.high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
    axis.plot(estimate.value, y, marker, color=colour, markersize=7, markeredgecolor="white")


def ribbons(axis: Axes, x: ArrayLike, ratios: Sequence[ArrayLike], colour: str, bounds: Sequence[float]) -> None:
    """The spread of ratios (smallest, 1 %, 99 %, largest) over x, in two shades, and the clip bounds."""
    low, p01, p99, high = ratios
    axis.fill_between(x, low, high, color=colour, alpha=0.22, linewidth=0)
    axis.fill_between(x, p01, p99, color=colour, alpha=0.75, linewidth=0)
    for bound in bounds:
        axis.axhline(bound, **LINE)


def ribbon_legend() -> list[Artist]:
    """A legend for the shades of `ribbons`, for `figure.legend(handles=...)`."""
    return [
        Patch(color="#555555", alpha=0.75, label="1 % to 99 % of the tokens"),
        Patch(color="#555555", alpha=0.22, label="smallest to largest"),
        Line2D([], [], **LINE, label="clip bounds"),
    ]
