"""Figures of single runs, from their folders.

In: run folders. Out: a matplotlib `Figure`.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from minicpgd.algorithms import ALGORITHMS, display_name
from minicpgd.config import TrainConfig
from minicpgd.errors import UserError
from minicpgd.plots.style import COLOURS, DASHES, KL, RATIO, ribbon_legend, ribbons, styled
from minicpgd.training.run_folder import Run, load_run

RATIOS = ["ratio_min", "ratio_p01", "ratio_p99", "ratio_max"]
SILENT = ("output_dir", "chat_date", "max_steps")  # These settings tell no runs apart.
DRAWN = {"reward", "completion_length", "kl_old", "clip_frac_pos", "clip_frac_neg", *RATIOS}


@styled
def training_curves(runs: Sequence[str | Path]) -> Figure:
    r"""Reward, response length, KL to $\pi_{old}$ and clipped share over the steps of several runs, one line each."""
    loaded = _load(runs)
    labels = run_labels([run.config for run in loaded])
    panels = (
        ("reward", "Reward", "mean reward of a response"),
        ("completion_length", "Response length", "tokens"),
        ("kl_old", "Distance from the sampling policy", KL),
        ("clip_frac", "Clipped tokens", "share of all tokens"),
    )
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for axis, (metric, title, unit) in zip(axes.flat, panels, strict=True):
        for (_, metrics, _), label, colour, dashes in zip(loaded, labels, COLOURS, DASHES, strict=False):
            values = metrics["clip_frac_pos"] + metrics["clip_frac_neg"] if metric == "clip_frac" else metrics[metric]
            axis.plot(metrics["step"], values, color=colour, linestyle=dashes, label=label)
        axis.set(title=title, ylabel=unit)
        if metric == "kl_old":  # Values differ by orders of magnitude. The exact zeros of K = 1 are not drawn.
            axis.set_yscale("log", nonpositive="mask")
        else:
            axis.set_ylim(bottom=min(0, axis.dataLim.y0))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[1]:
        axis.set_xlabel("step (one rollout and its K updates)")
    handles, _ = axes[0, 0].get_legend_handles_labels()
    columns = min(len(loaded), max(1, 100 // (8 + max(map(len, labels)))))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, handlelength=3.2)
    return figure


@styled
def ratio_ranges(runs: Sequence[str | Path]) -> Figure:
    r"""How far the ratios $\pi_\theta / \pi_{old}$ spread, step by step: a panel per run, quantiles as ribbons."""
    loaded = _load(runs)
    n_rows = -(-len(loaded) // 4)
    columns = -(-len(loaded) // n_rows)
    size = (max(5.0, 2.6 * columns), 0.8 + 2.8 * n_rows)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(wspace=0.04))
    axes = figure.subplots(n_rows, columns, sharey=True, sharex=True, squeeze=False)
    labels = run_labels([run.config for run in loaded])
    for axis, (config, metrics, _), label, colour in zip(axes.flat, loaded, labels, COLOURS, strict=False):
        ratios = [np.maximum(metrics[name], 1e-6) for name in RATIOS]
        row = ALGORITHMS[config.algorithm]
        bounds = row.clip_bounds(config.epsilon, config.epsilon_high) if row.clips else ()
        ribbons(axis, metrics["step"], ratios, colour, bounds)
        axis.set(title=label.replace(", ", ",\n"), yscale="log")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    for axis in axes.flat[len(loaded) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for axis in axes[:, 0]:
        axis.set_ylabel(RATIO)
    figure.legend(handles=ribbon_legend(), loc="outside upper center", ncols=3)
    return figure


def _load(runs: Sequence[str | Path]) -> list[Run]:
    loaded = [load_run(run) for run in runs]
    for run, (_, metrics, _) in zip(runs, loaded, strict=True):
        if missing := DRAWN - set(metrics):
            raise UserError(f"{run}: its metrics.jsonl has no {min(missing)!r}; it is drawn after the first step")
    return loaded


def run_labels(runs: Sequence[TrainConfig]) -> list[str]:
    """The name of each run's algorithm, and the settings that tell it apart from the other runs of this algorithm.

    Where some runs have a stop at a KL and others have none, "+ KL stop" is part of the name.
    """
    configs = [{**asdict(run), "model": Path(run.model).name} for run in runs]
    some_stop = len({config["target_kl"] is None for config in configs}) > 1
    names = [
        display_name(config["algorithm"]) + " + KL stop" * (some_stop and config["target_kl"] is not None)
        for config in configs
    ]
    labels = []
    for config, name in zip(configs, names, strict=True):
        same = [other for other, its_name in zip(configs, names, strict=True) if its_name == name]
        differing = [
            field for field in config if len({str(other[field]) for other in same}) > 1 and field not in SILENT
        ]
        if len({other["seed"] for other in configs}) > 1 and "seed" not in differing:
            differing.append("seed")
        labels.append(", ".join([name, *(f"{field} {_short(config[field])}" for field in differing)]))
    alike = {label for label in labels if labels.count(label) > 1}
    folders = [Path(config["output_dir"]).name for config in configs]
    return [f"{label}, {at}" if label in alike else label for label, at in zip(labels, folders, strict=True)]


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
