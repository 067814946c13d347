"""Commands that make many runs, or the embedded model: `demo`, `study`, `pretrain`."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from minicpgd.cli.flags import Flag
from minicpgd.cli.progress import Bars, console, text_table
from minicpgd.config import SEEDS, TrainConfig
from minicpgd.errors import Range, UserError

if TYPE_CHECKING:
    from minicpgd.experiments import Study

StudyName = Literal["stabilisers", "endurance", "fair", "default", "warning"]
COLUMNS = ("algorithm", "before", "best", "final", "reward", "collapsed", "max KL", "updates", "sec.")


def demo(seed: int = 0, folder: Path = Path("runs/demo"), max_steps: int = 20, num_iterations: int = 16) -> None:
    """Train CPGD, GRPO, RLOO and REINFORCE++ with many updates on every rollout, two of them also with a stop at a KL.

    Args:
        seed: decides problems and samples, the same ones for all runs.
        folder: where runs and figures go; a number is appended if it exists already.
        max_steps: rollouts; at least 10, so that collapse can be judged.
        num_iterations: passes over each rollout, of 4 updates each. With 1 all of them learn.
    """
    from minicpgd.experiments.catalogue import demo_configs
    from minicpgd.experiments.outcome import WINDOW
    from minicpgd.experiments.runner import run_all
    from minicpgd.plots import run_labels
    from minicpgd.plots.published import save_figures
    from minicpgd.training.run_folder import read_lines

    if max_steps < WINDOW:
        raise UserError(f"max_steps = {max_steps}: collapse is defined over {WINDOW} steps, so at least {WINDOW}")
    candidates = (folder.parent / f"{folder.name or 'demo'}-{n}" if n > 1 else folder for n in count(1))
    chosen = next(path for path in candidates if not path.exists())
    configs = [replace(c, max_steps=max_steps, num_iterations=num_iterations) for c in demo_configs(chosen, seed)]
    k, rate = configs[0].updates_per_rollout, configs[0].learning_rate
    stop, alpha = configs[0].target_kl, configs[0].drift_coef
    console.print(
        f"One model, the same problems, at most {k} updates on every rollout, learning rate {rate:g}, α = {alpha}."
    )
    console.print(f"The first two runs end their updates on a rollout at a KL of {stop}. The papers have no such stop.")
    labels = run_labels(configs)
    with Bars(labels, max_steps) as bars:
        newest = [0] * len(configs)

        def poll() -> None:
            for i, config in enumerate(configs):
                rows = read_lines(config.folder / "metrics.jsonl")
                if rows and rows[-1]["step"] > newest[i]:
                    newest[i] = rows[-1]["step"]
                    bars.update(i, newest[i], f"reward {rows[-1]['reward']:.2f}")

        folders = run_all(configs, on_wait=poll)

    _print_outcomes(configs, labels)
    for path in save_figures(chosen, folders):
        console.print(f"figure  {path}")
    console.print(f"runs    {chosen}/")
    program = sys.argv[0] if sys.argv[0].endswith("minicpgd") else "minicpgd"
    console.print(f"next    {program} sample {shlex.quote(str(folders[0]))}   shows what the first policy writes now;")
    console.print("        docs/results.md has the same question with hundreds of runs.")


def _print_outcomes(configs: Sequence[TrainConfig], labels: Sequence[str]) -> None:
    from minicpgd.experiments.outcome import outcome
    from minicpgd.training.run_folder import run_seconds

    first = configs[0]
    budget = f"{first.max_steps} rollouts, seed {first.seed}"
    table = text_table(*COLUMNS, title=f"\nAfter {budget}: accuracy before, best and final")
    for config, label in zip(configs, labels, strict=True):
        result = outcome(config.folder)
        accuracies = (result.accuracy_before, result.accuracy_best, result.accuracy_final)
        rewards = f"{result.reward_before:.2f}→{result.reward_last:.2f}"
        collapsed = Text("yes", "red") if result.collapsed else Text("no", "green")
        seconds = sum(run_seconds(config.folder).values())
        others = (f"{result.kl_largest:.2g}", f"{result.updates_mean:.0f}", f"{seconds:.0f}")
        cells: list[Any] = [*(f"{share:.2f}" for share in accuracies), rewards, collapsed, *others]
        table.add_row(label, *cells)
    console.print(table)
    console.print(
        "\nAccuracy: greedy, on 256 held-out problems. Reward: of sampled responses, before training and in\n"
        "the last 10 steps. Collapsed: that is below half of its best over any 10 in a row, or below the\n"
        "reward before training. KL: to the policy that sampled, in nats per token; a stop acts after an\n"
        "update, so it may be exceeded. Updates: per rollout. Seconds depend on what else runs.\n"
    )


def study(
    name: Positional[StudyName], /, quick: Flag = False, folder: Path = Path("runs/studies"), jobs: int | None = None
) -> None:
    """Make a study: many runs, a table of their outcomes, and its figures. You may stop and repeat it at any time.

    Args:
        name: which study; `warning` makes no runs: it reads those of the other studies in the same folder.
        quick: a smaller study, in minutes.
        folder: where studies and their runs go. An existing run is not made again.
        jobs: runs at a time; by default one per core.
    """
    if jobs is not None:
        Range(1, 1000).check("jobs", jobs)
    from minicpgd.experiments import QUICK, STUDIES, SUMMARIES, warning_study
    from minicpgd.plots.published import save_study_figures

    tables = folder / (f"{name}-quick" if quick else name)
    if name == "warning":
        warning_study(folder, tables, quick=quick)
    else:
        chosen = (QUICK if quick else STUDIES)[name]
        console.print(chosen.asks)
        make_study(chosen, tables, folder / "runs", jobs)
    summary = SUMMARIES[name](tables)
    if len(summary) < len(summary.columns):  # Transposed, it fits a terminal.
        summary = summary.set_index(summary.columns[0]).T.reset_index(names="")
    printed = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for i, column in enumerate(summary.columns):
        printed.add_column(column, overflow="fold", min_width=None if i else 17)
    for row in summary.itertuples(index=False):
        printed.add_row(*row)
    console.print("", printed, "", sep="\n")
    console.print(
        "Intervals, in brackets, hold 95 %. A run is healthy if it has not collapsed and ends with at least half\n"
        f"of the held-out problems right (minicpgd/experiments/outcome.py)."
        f"{' A quick study decides nothing.' * quick}\n\ntable   {tables / 'study.csv'}"
    )
    for path in save_study_figures(tables, name, tables):
        console.print(f"figure  {path}")


def make_study(chosen: "Study", tables: Path, pool: Path, jobs: int | None = None) -> None:
    """Make a study's missing runs and its tables, with a bar for each part; see `run_study`."""
    from minicpgd.experiments import run_study

    with Bars([part.name for part in chosen.parts], 100, unit=" %") as bars:

        def poll(part: int, work: float, done: int, asked: int) -> None:
            bars.update(part, work * 100, f"{done} of {asked} runs")

        run_study(chosen, tables, pool, jobs=jobs, on_wait=poll)


def pretrain(folder: Path = Path("runs/embedded"), seed: int = 0, steps: int = 750) -> None:
    """Make the embedded model again from a seed, and compare it with the one that ships.

    Args:
        folder: where weights and tokenizer go; it must not exist yet.
        seed: seed 0 made the model that ships.
        steps: optimizer steps.
    """
    Range(1, 10**9).check("steps", steps)
    SEEDS.check("seed", seed)
    if folder.exists():
        raise UserError(f"folder = {str(folder)!r} exists already: choose another")
    from minicpgd.models import load_policy
    from minicpgd.models import pretrain as maker

    with Bars(["pretraining"], steps) as bars:
        remade = maker.pretrain(
            folder, seed=seed, steps=steps, on_step=lambda step, loss: bars.update(0, step, f"loss {loss:.3f}")
        )
    difference = maker.largest_difference(folder)
    table = Table("1,024 held-out problems, one sample each", "remade", "shipped")
    a, b = maker.measure(remade), maker.measure(load_policy())
    for name in ("accuracy", "worked_share", "worked_accuracy", "guess_accuracy"):
        table.add_row(name.replace("_", " "), f"{getattr(a, name):.3f}", f"{getattr(b, name):.3f}")
    console.print(table)
    different = f"not those that ship: they differ by up to {difference:.2g}"
    console.print(f"{folder}: the weights are {different if difference else 'those that ship, to the last bit'}")
