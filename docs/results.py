r"""Fills the numbers of the tables into the pages of docs/: `python docs/results.py`. A test holds them current.

It also draws the figures of docs/metrics.md (`metric_figures.py`).

In a page, a number or a table stands between marks that name its source:

    <!--map | CPGD | healthy share of the map-->58 % [50, 67]<!--/-->      a cell: study | row | column
    <!--map-->...<!--/-->                                                  the summary of a study
    <!--made-->...<!--/-->                                                 the command and time of each study
    <!--merging-->...<!--/-->, memory, generation, vs_trl, ...             a benchmark, from benchmarks/results/
    <!--metrics | kl_old | healthy-->0.05<!--/-->                          a metric, healthy or before a collapse
    <!--metrics-->...<!--/-->                                              the same for all metrics
"""

import importlib
import json
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
from metric_figures import UNITS, Traces, load_metric, metric_traces

from minicpgd.config import TrainConfig
from minicpgd.experiments.catalogue import demo_configs
from minicpgd.experiments.early_warning import collapse_step
from minicpgd.experiments.outcome import collapsed, outcome
from minicpgd.experiments.statistics import wilson
from minicpgd.experiments.tables import SUMMARIES, percent
from minicpgd.plots import run_labels
from minicpgd.training.run_folder import load_run, load_timings

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "docs" / f"{name}.md" for name in ("results", "default", "qlora", "metrics", "peers", "reliability")]
PAGES.append(ROOT / "results" / "README.md")
DEMO_SEEDS = range(5)
TIMINGS = {
    "rollout_seconds": "s",
    "update_seconds": "s",
    "tokens_per_second": "tokens / s",
    "peak_memory_bytes": "bytes",
}
MARKED = re.compile(r"<!--(?P<source>[^>]+?)-->(?P<value>.*?)<!--/-->", re.DOTALL)


@cache
def summary(study: str) -> pd.DataFrame:
    """A study's summary, or that of all metrics, by row."""
    return metrics() if study == "metrics" else SUMMARIES[study](ROOT / "results" / study)


def value_of(source: str) -> str:
    """The text that belongs at a mark.

    Raises:
        KeyError: no such study, row or column.
    """
    if source in TABLES:
        return markdown(TABLES[source]())
    study, *cell = (part.strip() for part in source.split(" | "))
    table = summary(study)
    if cell:
        row, column = cell
        return str(table.set_index(table.columns[0]).loc[row, column])
    return markdown(table)


def made() -> pd.DataFrame:
    """The command, runs, minutes and versions of each study."""
    rows = []
    for study in (name for name in SUMMARIES if (ROOT / "results" / name).exists()):
        provenance = json.loads((ROOT / "results" / study / "made.json").read_text())
        minutes = f"{provenance['core_minutes']:.0f}" if "core_minutes" in provenance else "none"
        runs = provenance.get(
            "runs", f"looks through {provenance.get('fitted_on', 0) + provenance.get('judged_on', 0)}"
        )
        rows.append({"command": f"`{provenance['command']}`", "runs": runs, "core-minutes": minutes})
        rows[-1]["versions"] = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    return pd.DataFrame(rows)


def merging() -> pd.DataFrame:
    """The effect of merging an adapter, by learning rate and target: means over the seeds."""
    table = pd.read_csv(ROOT / "benchmarks" / "results" / "merging.csv")
    rows = table.groupby(["learning_rate", "merged into"], sort=False).mean().reset_index()
    return pd.DataFrame(
        {
            "learning rate": rows["learning_rate"].map("{:g}".format),
            "merged into": rows["merged into"],
            "same answers": rows["same answers"].map("{:.0%}".format),
            "accuracy, trained": rows["accuracy trained"].map("{:.2f}".format),
            "accuracy, merged": rows["accuracy merged"].map("{:.2f}".format),
            "off by": rows["off by"].map("{:.2f}".format),
        }
    )


def memory() -> pd.DataFrame:
    """Predicted and measured peaks of both phases."""
    table = pd.read_csv(ROOT / "benchmarks" / "results" / "memory.csv")
    rows = []
    for case, parts in table[table["part"].isin(["rollout", "update"])].groupby("case", sort=False):
        row = {"settings": case}
        for _, part in parts.iterrows():
            row[f"{part['part']}, MiB"] = f"{part['measured_bytes'] / 2**20:.0f}"
            row[f"{part['part']}, predicted"] = f"{part['predicted_bytes'] / 2**20:.0f} ({_percent(part['error'])})"
        rows.append(row)
    return pd.DataFrame(rows)


def _percent(share: float) -> str:
    rounded = round(100 * share)
    return f"{rounded:+d} %" if rounded else "0 %"


def generation() -> pd.DataFrame:
    """Sampling, ours and transformers'."""
    return pd.read_csv(ROOT / "benchmarks" / "results" / "generation.csv", dtype=str)


def collapse_in_trl() -> pd.DataFrame:
    """The final accuracy of each run, in our loop and in TRL's, a column per seed; and how many runs collapsed."""
    table = pd.read_csv(ROOT / "benchmarks" / "results" / "collapse_in_trl.csv")
    index = ["learning_rate", "algorithm", "loop"]
    start = load_run(_demo()[0][0]).metrics["reward"][0]  # the same model in every run
    fell = table.groupby([*index, "seed"])["reward"].agg(lambda reward: collapsed(reward.to_numpy(), start=start))
    ends = table.dropna(subset="eval_accuracy").pivot(index=index, columns="seed", values="eval_accuracy")
    rows = pd.DataFrame(
        {
            "learning rate": ends.index.get_level_values("learning_rate").map("{:g}".format),
            "algorithm": ends.index.get_level_values("algorithm").str.upper(),
            "loop": ends.index.get_level_values("loop").map({"minicpgd": "ours", "trl": "TRL's"}),
        }
    )
    for seed in ends.columns:
        rows[f"seed {seed}"] = ends[seed].map("{:.2f}".format).to_numpy()
    counts = fell.groupby(index).agg(["sum", "count"]).map("{:.0f}".format)
    means = ends.mean(axis=1).map("{:.2f}".format)
    return rows.assign(mean=means.to_numpy(), collapsed=(counts["sum"] + " of " + counts["count"]).to_numpy())


def vs_trl() -> pd.DataFrame:
    """The time and memory of our step and of TRL's: medians over the rounds, and their ratio."""
    table = pd.read_csv(ROOT / "benchmarks" / "results" / "vs_trl.csv")
    medians = table.groupby(["size", "device", "by"], sort=False).median(numeric_only=True)
    rows = []
    for (size, device), pair in medians.groupby(["size", "device"], sort=False):
        ours, trls = (pair.droplevel(["size", "device"]).loc[by] for by in ("minicpgd", "trl"))
        for loop, row, bold, number in (
            ("ours", ours, "", ",.0f"),
            ("TRL's", trls, "", ",.0f"),
            ("ours / TRL's", ours / trls, "**", ".2f"),
        ):
            cells = {"model": size, "loop": f"{bold}{loop}{bold}", "s per step": f"{bold}{row['seconds']:.2f}{bold}"}
            cells |= {name: f"{row[name]:.2f}" for name in ("rollout", "scoring", "update")}
            cells["tokens / s"] = f"{row['tokens_per_second']:{number}}"
            cells["peak, MiB"] = f"{bold}{row['peak_mib']:{number}}{bold}"
            cells["reward"] = "" if bold else f"{row['reward_first']:.2f} to {row['reward_last']:.2f}"
            rows.append(cells | {"on": "" if bold else device})
    return pd.DataFrame(rows)


def faults() -> pd.DataFrame:
    """How often each kind of fault was injected, and its effect."""
    table = pd.read_csv(ROOT / "benchmarks" / "results" / "faults.csv")
    rows = []
    for fault, cases in [*table.groupby("fault"), ("**all**", table)]:
        counts = (len(cases), (cases["lost"] > 0).sum(), cases["wrong"].notna().sum(), cases["shown"].notna().sum())
        seconds = f"{cases['seconds'].median():.1f}; {cases['seconds'].max():.1f}"
        names = ("struck", "lost steps", "resumed wrongly", "told badly")
        idle = int((cases["code"] == 0).sum())
        cells = {"fault": fault, **dict(zip(names, counts, strict=True)), "without effect": idle}
        rows.append(cells | {"s until the process ended: median; longest": seconds})
    return pd.DataFrame(rows)


def _benchmark(name: str) -> ModuleType:
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.insert(0, str(ROOT / "benchmarks"))
    return importlib.import_module(name)


def long_run() -> pd.DataFrame:
    """The first and the last steps of a long run."""
    module = _benchmark("long_run")
    return module.summary(pd.read_csv(module.RESULTS))


def which_tokens() -> pd.DataFrame:
    """Accuracy for each part of the drift, in each setting."""
    return _benchmark("which_tokens").parts_summary()


def which_clip() -> pd.DataFrame:
    """Accuracy with and without the drift, for each epsilon."""
    return _benchmark("which_tokens").clip_summary()


def mutants() -> pd.DataFrame:
    """For each file: how many mutants there were, and how many of them a test detected."""
    return pd.read_csv(ROOT / "benchmarks" / "results" / "mutants.csv", dtype=str)


def metrics() -> pd.DataFrame:
    """Each metric in healthy runs and before the reward fell; the timings, in the demo's runs."""
    studied = [_metric(name, unit, load_metric(ROOT / "results", name)) for name, unit in UNITS.items()]
    return pd.DataFrame(studied + [_metric(name, unit, _demo_timings(name)) for name, unit in TIMINGS.items()])


def _metric(name: str, unit: str, traces: Traces) -> dict[str, str]:
    """The healthy range holds 90 % of all steps of all healthy runs; a run that fell at step 1 has no step before.

    A run leaves it on the side on which the collapsed runs leave it more often than the healthy, by more.
    """
    low, high = np.nanquantile(traces.healthy, (0.05, 0.95))
    before = [traces.around(offset) for offset in (-3, -2, -1)]
    fell, well = (np.concatenate([pair[which] for pair in before]) for which in (0, 1))
    sides = {"above": _left(traces, lambda x: x > high), "below": _left(traces, lambda x: x < low)}
    side = max(sides, key=lambda name: sides[name][0].mean() - sides[name][1])
    left, strayed = sides[side]
    drift = traces.drift[left.index]
    row = {
        "metric": name,
        "unit": unit,
        "healthy": f"{_number(low)} to {_number(high)}",
        "before the fall": _number(np.median(fell)),
        "healthy, same steps": _number(np.median(well)),
        "left": side,
        "before the fall, left": _share(left),
        "healthy, left by then": f"{100 * strayed:.0f} %",
        "left, no drift": _share(left[~drift]),
        "left, drift": _share(left[drift]),
    }
    counts = {
        "healthy runs": traces.healthy.shape[1],
        "collapsed runs": len(traces.falls),
        "with a step before": len(left),
    }
    return row | {name: str(n) for name, n in counts.items()}


def _left(traces: Traces, outside: Callable[[pd.DataFrame], pd.DataFrame]) -> tuple[pd.Series, float]:
    """Which collapsed runs left the range before their reward fell; and the share of healthy runs by the same steps."""
    ever = outside(traces.collapsed).cummax()
    left = pd.Series({run: bool(ever.loc[fall - 1, run]) for run, fall in traces.falls.items() if fall > 1})
    return left, outside(traces.healthy).cummax().mean(axis=1)[traces.falls[left.index] - 1].mean()


def metric_summary() -> pd.DataFrame:
    """The columns of the table at the top of the metrics page."""
    table = summary("metrics").copy()
    table["metric"] = "`" + table["metric"] + "`"
    return table[list(table.columns[:8])]


def _share(which: pd.Series) -> str:
    if not len(which):
        return "none"
    return percent(wilson(which.sum(), len(which)))


def _number(value: float) -> str:
    """A number with two digits."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return re.sub(r"e([+-])0?(\d+)", lambda e: f"e{e[1].strip('+')}{e[2]}", f"{value:.1e}")
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}"


def _demo_configs() -> list[list[TrainConfig]]:
    return [demo_configs(ROOT / "results" / "demo" / f"seed{seed}", seed) for seed in DEMO_SEEDS]


def demo() -> pd.DataFrame:
    """The runs of the demo, a row each, with the values of the seeds in order."""
    by_seed = _demo_configs()
    rows = []
    for label, *configs in zip(run_labels(by_seed[0]), *by_seed, strict=True):
        rewards = [load_run(config.folder).metrics["reward"][-5:].mean() for config in configs]
        outcomes = [outcome(config.folder) for config in configs]
        row = {
            "run": label,
            "reward, last 5 steps": ", ".join(f"{reward:.2f}" for reward in rewards),
            "greedy accuracy at the end": ", ".join(f"{o.accuracy_final:.2f}" for o in outcomes),
            "best": ", ".join(f"{o.accuracy_best:.2f}" for o in outcomes),
            "collapsed": f"{sum(o.collapsed for o in outcomes)} of {len(outcomes)}",
            "largest KL": f"{max(o.kl_largest for o in outcomes):.2g}",
            "updates per rollout": f"{np.mean([o.updates_mean for o in outcomes]):.0f}",
        }
        rows.append(row)
    return pd.DataFrame(rows)


@cache
def _demo() -> list[tuple[Path, bool, bool, int]]:
    folders = [config.folder for configs in _demo_configs() for config in configs]
    outcomes = [outcome(folder) for folder in folders]
    falls = [collapse_step(load_run(folder).metrics["reward"]) for folder in folders]
    return [(f, o.collapsed, o.healthy, fall) for f, o, fall in zip(folders, outcomes, falls, strict=True)]


def _demo_timings(name: str) -> Traces:
    """The timings of the demo's runs, in the form of `load_metric`."""
    values = {}
    for folder, *_ in _demo():
        timings = load_timings(folder)
        values[folder] = pd.Series(timings[name], index=timings["step"].astype(int))
    fell = {folder: int(fall) for folder, collapsed, _, fall in _demo() if collapsed}
    well = [folder for folder, _, healthy, _ in _demo() if healthy]
    table = pd.DataFrame(values)
    drift = pd.Series({folder: folder.name == "cpgd" for folder in fell}, dtype=bool)
    return Traces(table[well], table[list(fell)], pd.Series(fell), drift)


_MEASURED = (
    made, demo, merging, memory, generation, collapse_in_trl, vs_trl, faults, long_run, which_tokens, which_clip,
    mutants,
)  # fmt: skip
BENCHMARKS = {function.__name__: function for function in _MEASURED}
TABLES = BENCHMARKS | {"metrics": metric_summary}


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table, on its own lines."""
    lines = [list(table.columns), ["---"] * table.shape[1], *table.astype(str).to_numpy().tolist()]
    return "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


def filled(page: str) -> str:
    """The page with the tables' numbers."""
    return MARKED.sub(lambda mark: f"<!--{mark['source']}-->{value_of(mark['source'])}<!--/-->", page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path.read_text()))
    for metric in UNITS:
        metric_traces(ROOT / "results", metric).savefig(ROOT / "docs" / "figures" / "metrics" / f"{metric}.png")
