"""Responses as text, with a colour for each token.

In: tokens, and a number for each. Out: a matplotlib `Figure`.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from minicpgd.plots.style import styled

LETTER, LINE = 0.155, 0.5  # The width of a letter and the height of a row are in inches.


@styled
def token_text(
    tokens: Sequence[Sequence[str]],
    values: ArrayLike,
    *,
    labels: Sequence[str] | None = None,
    low: float = -np.inf,
    high: float = np.inf,
    limit: float | None = None,
    unit: str = "",
    title: str = "",
) -> Figure:
    r"""Rows of text, coloured: violet where a value is negative, orange where it is positive.

    A token beyond `high` has a triangle above, one beyond `low` a triangle below, which grey prints show too.

    Args:
        tokens: B rows of tokens, each a string; rows may differ in length.
        values: (B, T), a number per token; values beyond a row's own length are not read.
        labels: B texts to the left of the rows.
        limit: the value of the strongest colour; by default the largest value.
    """
    numbers = np.asarray(values, dtype=float)
    names = list(labels) if labels is not None else [""] * len(tokens)
    letters = max(sum(max(1, len(token)) for token in row) for row in tokens)
    margin = LETTER * 0.62 * (max(map(len, names)) + 2)
    size = (margin + LETTER * letters + 1.0, LINE * len(tokens) + 0.75)
    figure = Figure(figsize=size)
    axis = figure.add_axes((margin / size[0], 0.15 / size[1], LETTER * letters / size[0], 1 - 0.6 / size[1]))
    axis.set(xlim=(0, letters), ylim=(len(tokens), 0), title=title)
    axis.set_axis_off()
    largest = limit or max(float(np.abs(numbers[i, : len(row)]).max()) for i, row in enumerate(tokens) if row)
    shades = axis.scatter([], [], c=[], cmap="PuOr_r", vmin=-largest, vmax=largest)
    for i, row in enumerate(tokens):
        axis.text(-0.8, i + 0.5, names[i], ha="right", va="center", family="monospace", fontsize=9)
        x = 0
        for token, value in zip(row, numbers[i], strict=False):
            width = max(1, len(token))
            red, green, blue, _ = colour = shades.to_rgba(np.clip(value, -largest, largest))
            ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
            axis.add_patch(Rectangle((x, i + 0.2), width, 0.6, color=colour, linewidth=0))
            axis.text(x + width / 2, i + 0.5, token, ha="center", va="center", family="monospace", color=ink)
            if value > high or value < low:
                y, shape = (i + 0.14, "^") if value > high else (i + 0.86, "v")
                axis.plot(x + width / 2, y, shape, color="black", markersize=4, clip_on=False)
            x += width
    place = (1 - 0.75 / size[0], 0.3 / size[1], 0.13 / size[0], 1 - 0.9 / size[1])
    scale = figure.colorbar(shades, cax=figure.add_axes(place))
    scale.set_label(unit, fontsize=9)
    scale.ax.tick_params(labelsize=8)
    return figure
