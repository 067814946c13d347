"""What a metric does before a run falls apart: the steps of many runs, counted from the fall of the reward.

In: the folder of the studies, of which three are looked at: the map, the anatomy and the fair race. (A collapse in the
fourth is often no fall: where the drift is far too large, nothing is learned.) Out: a metric's `Traces`, and a figure
of them; nothing here writes a file. When a run falls is said in `warning.py`, which runs collapsed in `stats.py`.
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

LOOKED_AT = ("map", "anatomy", "fair")
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
    """One metric of many runs, (S, runs) each; of those that collapsed, the step of the fall, and had they a drift?"""

    healthy: pd.DataFrame
    collapsed: pd.DataFrame
    falls: pd.Series
    drift: pd.Series

    def around(self, offset: int) -> tuple[np.ndarray, np.ndarray]:
        """The values `offset` steps from each fall: of the run that falls, and of all healthy ones at that step."""
        at = self.falls + offset
        fell = self.collapsed.unstack().reindex(list(at.items())).to_numpy()
        well = self.healthy.reindex(at).to_numpy().ravel()
        return fell[~np.isnan(fell)], well[~np.isnan(well)]


@cache
def _tables(studies: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs, each once, and all their steps."""
    runs, steps = load_studies([studies / name for name in LOOKED_AT])
    runs["drift"] = runs["algorithm"].map(lambda name: ALGORITHMS[name].drift)
    runs["fall"] = steps.groupby("run")["reward"].apply(lambda reward: collapse_step(reward.to_numpy()))
    return runs, steps[steps["step"] > 0]


def load_metric(studies: Path, metric: str) -> Traces:
    """One metric of the runs that collapsed, and of those that stayed healthy; what is neither is left out.

    An algorithm without drift logs its coefficient as 0: for `drift_coef` those runs are left out, too.
    """
    runs, steps = _tables(studies)
    values = steps.pivot(index="step", columns="run", values=metric)
    runs = runs[(runs["drift"] | (metric != "drift_coef")) & values.notna().any().reindex(runs.index)]
    fell = runs[runs["collapsed"]]
    return Traces(values[runs.index[runs["healthy"]]], values[fell.index], fell["fall"].astype(int), fell["drift"])


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
    axis.set(
        ylabel=f"{metric}\n[{UNITS[metric]}]",
        xlabel="steps from the fall of the reward",
        xlim=(OFFSETS[0], OFFSETS[-1]),
    )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=11))
    figure.legend(loc="outside upper left", ncols=2, handlelength=3.2, columnspacing=1.2, fontsize=9.5)
    return figure
