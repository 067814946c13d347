"""Commands that train: demo, train, study, pretrain.

Each is a function; its arguments are its flags and its docstring is its help. Ctrl-C during training finishes the step,
saves, and says how to go on.
"""

import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.table import Table

from minicpgd import demo as demo_
from minicpgd import pretrain as pretrain_
from minicpgd.card import write_card
from minicpgd.config import TrainConfig, check_range
from minicpgd.errors import UserError
from minicpgd.figures import save_figures, save_study_figures
from minicpgd.outcome import outcome
from minicpgd.policy import Policy, load_policy
from minicpgd.progress import Bars, console
from minicpgd.runlog import read_lines, run_seconds
from minicpgd.stats import WINDOW
from minicpgd.studies import QUICK, STUDIES
from minicpgd.study import run_all, run_study
from minicpgd.summary import SUMMARIES, display_name
from minicpgd.trainer import Listener
from minicpgd.trainer import train as train_
from minicpgd.warning import warning_study


def demo(seed: int = 0, folder: Path = Path("runs/demo"), max_steps: int = 20, num_iterations: int = 16) -> None:
    """Train CPGD, GRPO, RLOO and REINFORCE++ side by side, pushed hard, and show what became of them.

    Args:
        seed: decides problems and samples, the same ones for all four.
        folder: where runs and figures go; a number is appended if it is there already.
        max_steps: rollouts; at least 10, so that collapse can be judged.
        num_iterations: passes over each rollout, of 4 updates each. At 1 nobody is pushed.
    """
    if max_steps < WINDOW:
        raise UserError(f"max_steps = {max_steps}: collapse is defined over {WINDOW} steps, so at least {WINDOW}")
    chosen = demo_.free_folder(folder)
    configs = [
        replace(config, max_steps=max_steps, num_iterations=num_iterations)
        for config in demo_.demo_configs(chosen, seed)
    ]
    k = configs[0].updates_per_rollout
    console.print(f"Four algorithms, one model, the same problems, {k} updates on every rollout.")
    with Bars([display_name(config.algorithm) for config in configs], configs[0].max_steps) as bars:
        seen = [0] * len(configs)

        def look() -> None:
            for i, config in enumerate(configs):
                rows = read_lines(config.folder / "metrics.jsonl")
                if rows and rows[-1]["step"] > seen[i]:
                    seen[i] = rows[-1]["step"]
                    bars.update(i, seen[i], f"reward {rows[-1]['reward']:.2f}")

        folders = run_all(configs, on_wait=look)

    title = f"\nAfter {configs[0].max_steps} rollouts of {k} updates, seed {seed}: accuracy before, best and final"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("algorithm", "before", "best", "final", "reward", "collapsed", "max KL", "max ratio", "sec."):
        table.add_column(name, justify="left" if name == "algorithm" else "right", no_wrap=True)
    for config, result in zip(configs, map(outcome, folders), strict=True):
        table.add_row(
            display_name(config.algorithm),
            *(f"{share:.2f}" for share in (result.accuracy_before, result.accuracy_best, result.accuracy_final)),
            f"{result.reward_before:.2f}→{result.reward_last:.2f}",
            "[red]yes[/]" if result.collapsed else "[green]no[/]",
            f"{result.kl_largest:.2g}",
            f"{result.ratio_largest:.3g}",
            f"{run_seconds(config.folder):.0f}",
        )
    console.print(table)
    console.print(
        "\nAccuracy: greedy, on 256 held-out problems. Reward: of sampled responses, before training and in\n"
        "the last 10 steps. Collapsed: that is below half of its best over any 10 in a row, or below the\n"
        "reward before training. KL and ratio: of the policy to the one that sampled; nats per token.\n"
    )
    for path in save_figures(chosen, folders):
        console.print(f"figure  {path}")
    console.print(f"runs    {chosen}/")
    program = sys.argv[0] if sys.argv[0].endswith("minicpgd") else "minicpgd"
    console.print(f"next    {program} sample {folders[0]}   shows what CPGD's policy writes now;")
    console.print("        minicpgd/algorithms.py is the table these four rows come from.")


def train(config: TrainConfig, resume: Path | None = None) -> None:
    """Train a policy on one GPU or the CPU, and leave a run's folder behind.

    Args:
        resume: go on with this run, bit for bit, from its newest whole checkpoint. Only --max-steps may be changed.
    """
    if resume:
        config = replace(config, output_dir=str(resume))
    if config.model == "embedded":
        torch.set_num_threads(1)  # so small a model gains nothing from a second one, and waits for it on a busy machine
    else:
        console.print(
            f"loading {config.model} and the problems of {config.task}; the hub is asked for what is not here"
        )
    interrupted: list[int] = []
    reached = 0

    def remember(number: int, _: object) -> None:
        if interrupted:
            raise KeyboardInterrupt
        interrupted.append(number)
        console.print("\nfinishing this step and saving; once more to stop at once")

    handlers = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    with Bars([display_name(config.algorithm)], config.max_steps) as bars:

        def heard(step: int, metrics: dict[str, float], timings: dict[str, float]) -> None:
            nonlocal reached
            reached = step
            note = f"reward {metrics['reward']:.2f}  length {metrics['completion_length']:.0f}"
            bars.update(0, step, note + (f"  accuracy {a:.2f}" if (a := metrics.get("eval_accuracy")) else ""))

        def loaded(policy: Policy) -> None:
            if policy.peft:
                console.print(f"{config.model} on {policy.device}, {policy.arithmetic}")

        listener = Listener(
            loaded=loaded,
            resumed=lambda step: console.print(f"going on after step {step}"),
            step=heard,
            warn=lambda line: print(f"warning: {line}", file=sys.stderr),
            stop=lambda: bool(interrupted),
        )
        folder = train_(config, resume=bool(resume), listener=listener)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if interrupted and reached < config.max_steps:  # model/ would not tell: a run that was made longer has one already
        console.print(f"stopped and saved. Go on with: minicpgd train --resume {folder}")
        sys.exit(128 + interrupted[0])
    if config.lora_r:
        write_card(folder / config.trained_as, folder)
    console.print(f"done: {folder}   (minicpgd evaluate {folder}; minicpgd plot {folder})")


def study(
    name: tyro.conf.Positional[Literal["map", "drift", "anatomy", "fair", "warning"]],
    /,
    quick: tyro.conf.FlagCreatePairsOff[bool] = False,
    folder: Path = Path("runs/studies"),
    jobs: int | None = None,
) -> None:
    """Make a study: many runs, a table of what came of them, and its figures. Stop and repeat it as you like.

    Args:
        name: which; `warning` makes no runs, it looks through those of the others in the same folder.
        quick: a smaller one, in minutes.
        folder: where studies and their runs go. A run that is there already is not made again.
        jobs: runs at a time; by default one per core.
    """
    if jobs is not None:
        check_range("jobs", jobs, 1, 1000)
    made = folder / (f"{name}-quick" if quick else name)
    if name == "warning":
        warning_study(folder, made, quick=quick)
    else:
        chosen = (QUICK if quick else STUDIES)[name]
        console.print(chosen.asks)
        with Bars([part.name for part in chosen.parts], 100, unit=" %") as bars:
            run_study(
                chosen,
                made,
                folder / "runs",
                jobs=jobs,
                on_wait=lambda part, work, done, asked: bars.update(part, work * 100, f"{done} of {asked} runs"),
            )
    table = SUMMARIES[name](made)
    if len(table) < len(table.columns):  # so that it fits a terminal
        table = table.set_index(table.columns[0]).T.reset_index(names="")
    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for i, column in enumerate(table.columns):
        shown.add_column(column, overflow="fold", min_width=None if i else 17)
    for row in table.itertuples(index=False):
        shown.add_row(*row)
    console.print("", shown, "", sep="\n")
    console.print(
        "Intervals, in brackets, hold 95 %. A run is healthy if it has not collapsed and ends with at least half"
    )
    console.print(f"of the held-out problems right (minicpgd/stats.py).\n\ntable   {made / 'study.csv'}")
    for path in save_study_figures(made, name, made):
        console.print(f"figure  {path}")


def pretrain(folder: Path = Path("runs/embedded"), seed: int = 0, steps: int = pretrain_.STEPS) -> None:
    """Make the embedded model again from a seed, and compare it with the one that ships.

    Args:
        folder: where weights and tokenizer go; must not exist yet.
        seed: 0 made the shipped one.
        steps: optimizer steps.
    """
    check_range("steps", steps, 1, 10**9)
    check_range("seed", seed, 0, 2**63 - 1)
    if folder.exists():
        raise UserError(f"folder = {str(folder)!r} exists already: choose another")
    with Bars(["pretraining"], steps) as bars:
        remade = pretrain_.pretrain(
            folder, seed=seed, steps=steps, on_step=lambda step, loss: bars.update(0, step, f"loss {loss:.3f}")
        )
    difference = pretrain_.largest_difference(folder)
    table = Table("1,024 held-out problems, one sample each", "remade", "shipped")
    a, b = pretrain_.measure(remade), pretrain_.measure(load_policy("embedded"))
    for name in ("accuracy", "worked_share", "worked_accuracy", "guess_accuracy"):
        table.add_row(name.replace("_", " "), f"{getattr(a, name):.3f}", f"{getattr(b, name):.3f}")
    console.print(table)
    verdict = (
        "those shipped, to the last bit" if difference == 0 else f"not those shipped: off by up to {difference:.2g}"
    )
    console.print(f"{folder}: the weights are {verdict}")
