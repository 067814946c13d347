"""Figures of single runs, from their folders.

In: run folders. Out: a matplotlib `Figure`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from minicpgd.algorithms import ALGORITHMS, display_name
from minicpgd.errors import UserError
from minicpgd.plots.style import COLOURS, DASHES, KL, RATIO, ribbon_legend, ribbons, styled
from minicpgd.training.run_folder import Run, load_run

RATIOS = ["ratio_min", "ratio_p01", "ratio_p99", "ratio_max"]
DRAWN = {"reward", "completion_length", "kl_old", "clip_frac_pos", "clip_frac_neg", *RATIOS}


@styled
def training_curves(runs: Sequence[str | Path]) -> Figure:
    r"""Reward, response length, KL to $\pi_{old}$ and clipped share over the steps of several runs, one line each."""
    loaded = _load(runs)
    panels = (
        ("reward", "Reward", "mean reward of a response"),
        ("completion_length", "Response length", "tokens"),
        ("kl_old", "Distance from the sampling policy", KL),
        ("clip_frac", "Clipped tokens", "share of all tokens"),
    )
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for axis, (metric, title, unit) in zip(axes.flat, panels, strict=True):
        for (config, metrics, _), colour, dashes in zip(loaded, COLOURS, DASHES, strict=False):
            values = metrics["clip_frac_pos"] + metrics["clip_frac_neg"] if metric == "clip_frac" else metrics[metric]
            label = display_name(config.algorithm) + _suffix(config.seed, loaded)
            axis.plot(metrics["step"], values, color=colour, linestyle=dashes, label=label)
        axis.set(title=title, ylabel=unit)
        if metric == "kl_old":  # Values differ by orders of magnitude. The exact zeros of K = 1 are not drawn.
            axis.set_yscale("log", nonpositive="mask")
        else:
            axis.set_ylim(bottom=min(0, axis.dataLim.y0))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[1]:
        axis.set_xlabel("step (one rollout and its K updates)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(loaded), handlelength=3.2)
    return figure


@styled
def ratio_ranges(runs: Sequence[str | Path]) -> Figure:
    r"""How far the ratios $\pi_\theta / \pi_{old}$ spread, step by step: a panel per run, quantiles as ribbons."""
    loaded = _load(runs)
    figure = Figure(figsize=(max(5.0, 2.6 * len(loaded)), 3.6), layout=ConstrainedLayoutEngine(wspace=0.04))
    axes = figure.subplots(1, len(loaded), sharey=True, sharex=True, squeeze=False)[0]
    for axis, (config, metrics, _), colour in zip(axes, loaded, COLOURS, strict=False):
        ratios = [np.maximum(metrics[name], 1e-6) for name in RATIOS]
        row = ALGORITHMS[config.algorithm]
        bounds = row.clip_bounds(config.epsilon, config.epsilon_high) if row.clips else ()
        ribbons(axis, metrics["step"], ratios, colour, bounds)
        axis.set(title=display_name(config.algorithm) + _suffix(config.seed, loaded), xlabel="step", yscale="log")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes[0].set_ylabel(RATIO)
    figure.legend(handles=ribbon_legend(), loc="outside upper center", ncols=3)
    return figure


def _load(runs: Sequence[str | Path]) -> list[Run]:
    loaded = [load_run(run) for run in runs]
    for run, (_, metrics, _) in zip(runs, loaded, strict=True):
        if missing := DRAWN - set(metrics):
            raise UserError(f"{run}: its metrics.jsonl has no {min(missing)!r}; it is drawn after the first step")
    return loaded


def _suffix(seed: int, runs: Sequence[Run]) -> str:
    return f", seed {seed}" if len({run.config.seed for run in runs}) > 1 else ""
