"""A metric around a collapse: the steps of many runs, counted from the step at which the reward begins to fall.

In: the folder of the studies; `stabilisers` and `fair` are used. Out: a metric's `Traces`, and a figure of them. The
rules are in `experiments/early_warning.py` and `experiments/outcome.py`.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from minicpgd.algorithms.table import ALGORITHMS
from minicpgd.experiments.early_warning import collapse_step, load_studies
from minicpgd.plots.style import line_style, styled

LOOKED_AT = ("stabilisers", "fair")
UNITS = {
    "reward": "mean reward",
    "reward_std": "reward",
    "frac_reward_zero_std": "share of prompts",
    "accuracy": "share of responses",
    "eval_accuracy": "share of problems",
    "completion_length": "tokens",
    "frac_truncated": "share of responses",
    "entropy": "nats per token",
    "advantage_min": "A",
    "advantage_max": "A",
    "drift_coef": "α",
    "kl_old": "nats per token",
    "kl_ref": "nats per token",
    "ratio_min": "ratio r",
    "ratio_p01": "ratio r",
    "ratio_p99": "ratio r",
    "ratio_max": "ratio r",
    "clip_frac_pos": "share of tokens",
    "clip_frac_neg": "share of tokens",
    "grad_norm": "norm",
    "loss": "−J",
    "learning_rate": "per update",
}
LOGARITHMIC = ("kl_old", "kl_ref", "ratio_min", "ratio_p01", "ratio_p99", "ratio_max", "learning_rate")
OFFSETS = range(-5, 6)  # steps from the collapse


class Traces(NamedTuple):
    """One metric of many runs, (S, runs) each; for collapsed runs, the collapse step, and whether they had a drift."""

    healthy: pd.DataFrame
    collapsed: pd.DataFrame
    falls: pd.Series
    drift: pd.Series

    def around(self, offset: int) -> tuple[np.ndarray, np.ndarray]:
        """The values `offset` steps from each collapse: of the collapsing run, and of all healthy runs at that step."""
        at = self.falls + offset
        collapsed = self.collapsed.unstack().reindex(list(at.items())).to_numpy()
        healthy = self.healthy.reindex(at).to_numpy().ravel()
        return collapsed[~np.isnan(collapsed)], healthy[~np.isnan(healthy)]


@cache
def _tables(studies: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs, each once, and all their steps."""
    runs, steps = load_studies([studies / name for name in LOOKED_AT])
    runs["drift"] = runs["algorithm"].map(lambda name: ALGORITHMS[name].drift)
    runs["fall"] = steps.groupby("run")["reward"].apply(lambda reward: collapse_step(reward.to_numpy()))
    return runs, steps[steps["step"] > 0]


def load_metric(studies: Path, metric: str) -> Traces:
    """One metric of the runs that collapsed, and of the runs that stayed healthy; other runs are left out.

    An algorithm without drift logs its coefficient as 0, so `drift_coef` leaves out those runs too.
    """
    runs, steps = _tables(studies)
    values = steps.pivot(index="step", columns="run", values=metric)
    runs = runs[(runs["drift"] | (metric != "drift_coef")) & values.notna().any().reindex(runs.index)]
    collapsed = runs[runs["collapsed"]]
    return Traces(
        values[runs.index[runs["healthy"]]], values[collapsed.index], collapsed["fall"].astype(int), collapsed["drift"]
    )


@styled
def metric_traces(studies: Path, metric: str) -> Figure:
    """A metric around the fall of the reward: median and 10 to 90 % of the runs that collapse, beside healthy runs.

    Args:
        studies: the folder of the committed studies, `results/`.
        metric: a key of `UNITS`.
    """
    traces = load_metric(studies, metric)
    figure = Figure(figsize=(6.5, 3), layout="constrained")
    axis = figure.subplots()
    around = [traces.around(offset) for offset in OFFSETS]
    first = f", {len(around[0][0])} at {OFFSETS[0]}".replace("-", "−")
    labels = (
        f"collapsed runs (n = {len(traces.falls)}{first})",
        f"healthy, same steps (n = {traces.healthy.shape[1]})",
    )
    for which, label in enumerate(labels):
        shape = line_style(1 - which)
        x = [offset for offset, values in zip(OFFSETS, around, strict=True) if len(values[which])]
        spread = [np.quantile(values[which], (0.1, 0.5, 0.9)) for values in around if len(values[which])]
        low, middle, high = np.array(spread).T
        axis.plot(x, middle, label=label, markersize=5, **shape._asdict())
        axis.fill_between(x, low, high, facecolor=shape.color, alpha=0.16, linewidth=0)
        axis.plot(x, low, x, high, color=shape.color, linestyle=shape.linestyle, linewidth=0.8)
    axis.axvline(0, color="black", linewidth=0.9)
    if metric in LOGARITHMIC:
        axis.set_yscale("log")
        if axis.dataLim.y1 < 100 * axis.dataLim.y0:
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set(xlabel="steps from the fall of the reward", xlim=(OFFSETS[0], OFFSETS[-1]))
    axis.set_ylabel(f"{metric}\n[{UNITS[metric]}]")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=11))
    figure.legend(loc="outside upper left", ncols=2, handlelength=3.2, columnspacing=1.2, fontsize=9.5)
    return figure
