"""The command line: demo, train, evaluate, sample, plot, pretrain.

Each command is a function below; its arguments are its flags and its docstring is its help. What the user can put right
is told in one line, with exit code 2. Ctrl-C during training finishes the step, saves, and says how to go on.
"""

import contextlib
import functools
import io
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from minicpgd import demo as demo_
from minicpgd import pretrain as pretrain_
from minicpgd.config import TrainConfig, load_config
from minicpgd.errors import UserError
from minicpgd.evaluation import evaluate as evaluate_
from minicpgd.evaluation import open_policy, respond
from minicpgd.plots import FIGURES, display_name
from minicpgd.policy import load_policy, quiet
from minicpgd.progress import Bars, console
from minicpgd.runlog import read_lines
from minicpgd.study import WINDOW, run_all
from minicpgd.tasks import get_task
from minicpgd.trainer import Listener
from minicpgd.trainer import train as train_


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
    for result in map(demo_.outcome, folders):
        table.add_row(
            display_name(result.algorithm),
            *(f"{share:.2f}" for share in (result.before, result.best, result.final)),
            f"{result.reward_before:.2f}→{result.reward_last:.2f}",
            "[red]yes[/]" if result.collapsed else "[green]no[/]",
            f"{result.largest_kl:.2g}",
            f"{result.largest_ratio:.3g}",
            f"{result.seconds:.0f}",
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

        listener = Listener(
            step=heard, warn=lambda line: print(f"warning: {line}", file=sys.stderr), stop=lambda: bool(interrupted)
        )
        folder = train_(config, resume=bool(resume), listener=listener)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if interrupted and reached < config.max_steps:  # model/ would not tell: a run that was made longer has one already
        console.print(f"stopped and saved. Go on with: minicpgd train --resume {folder}")
        sys.exit(128 + interrupted[0])
    console.print(f"done: {folder}   (minicpgd evaluate {folder}; minicpgd plot {folder})")


def evaluate(
    run_or_model: tyro.conf.Positional[str] = "embedded",
    /,
    task: str | None = None,
    num_problems: int = 256,
    num_samples: int = 8,
    seed: int = 0,
) -> None:
    """Measure a run or a model on held-out problems: greedy and sampled accuracy, pass@k, response length.

    Args:
        run_or_model: a finished run's folder, "embedded", a model folder, or a hub name.
        task: by default the run's, else chain_arithmetic.
        num_problems: how many held-out problems.
        num_samples: sampled responses per problem.
        seed: chooses problems and samples.
    """
    result = evaluate_(run_or_model, task=task, num_problems=num_problems, num_samples=num_samples, seed=seed)
    for name, value in result.items():
        console.print(f"{name:<18} {value:8.3f}")


def sample(
    run_or_model: tyro.conf.Positional[str] = "embedded",
    /,
    num_problems: int = 12,
    temperature: float = 1.0,
    seed: int = 0,
) -> None:
    """Show held-out problems with a sampled response each, right ones green and wrong ones red.

    Args:
        run_or_model: a finished run's folder, "embedded", a model folder, or a hub name.
        num_problems: how many.
        temperature: of the sampling; 0 takes the likeliest token each time.
        seed: chooses problems and samples.
    """
    policy, config = open_policy(run_or_model)
    task = get_task(config.task)
    rollout, right = respond(
        policy,
        task,
        num_problems,
        int(temperature > 0),
        max_completion_length=config.max_completion_length,
        temperature=temperature or 1.0,
        seed=seed,
    )
    for problem, text, ok in zip(task.held_out(num_problems, seed), rollout.completions, right[:, 0], strict=True):
        mark, colour = ("right", "green") if ok else ("wrong", "red")
        console.print(f"[{colour}]{mark}[/]  {escape(problem['prompt'])}[{colour}]{escape(text)}[/]")
    console.print(f"{int(right.sum())} of {num_problems} right")


def plot(runs: tyro.conf.Positional[list[Path]], /, out: Path = Path("figures")) -> None:
    """Draw the training curves and the spread of the ratios of one or more runs.

    Args:
        runs: folders of runs, up to seven.
        out: where the figures go.
    """
    if not 1 <= len(runs) <= 7:
        raise UserError(f"plot: {len(runs)} runs given; 1 to 7 can be told apart in one figure")
    for path in save_figures(out, runs):
        console.print(f"figure  {path}")


def pretrain(folder: Path = Path("runs/embedded"), seed: int = 0, steps: int = pretrain_.STEPS) -> None:
    """Make the embedded model again from a seed, and compare it with the one that ships.

    Args:
        folder: where weights and tokenizer go; must not exist yet.
        seed: 0 made the shipped one.
        steps: optimizer steps.
    """
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


def save_figures(folder: Path, runs: Sequence[Path]) -> Iterator[Path]:
    """Draw every figure of `plots.FIGURES` from some runs, and say where each went."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        figure: Figure = draw(runs)
        figure.savefig(folder / f"{name}.png")
        yield folder / f"{name}.png"


def parse(argv: list[str]) -> Callable[[], None]:
    """Let tyro read the command line; what it has to object to becomes one line."""
    stored = TrainConfig()
    if argv[:1] == ["train"] and "--resume" in argv[:-1]:  # what is not given then comes from the run itself
        folder = Path(argv[argv.index("--resume") + 1])
        if not (folder / "config.json").is_file():
            raise UserError(f"cannot resume {folder}: there is no config.json in it")
        stored = load_config(folder / "config.json")

    def train_command(
        config: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes] = stored, resume: Path | None = None
    ) -> None:
        train(config, resume)

    train_command.__doc__ = train.__doc__
    commands: dict[str, Callable[..., None]] = {
        "demo": demo,
        "train": train_command,
        "evaluate": evaluate,
        "sample": sample,
    }
    commands |= {"plot": plot, "pretrain": pretrain}
    objection = io.StringIO()
    try:
        with contextlib.redirect_stderr(objection):
            return tyro.extras.subcommand_cli_from_dict(
                {name: _later(command) for name, command in commands.items()},
                prog="minicpgd",
                description="Learn, watch and run CPGD (arXiv 2505.12504) beside its baselines.",
                args=argv,
            )
    except SystemExit as leaving:
        text = re.sub(r"─{5,} (?!│)", "", re.split(r"│ ─{5,}", objection.getvalue())[0].partition("\n")[2])
        words = " ".join(re.sub("[╭╮╰╯│─]", " ", text).split())
        if leaving.code and words:
            command = argv[0] if argv and argv[0] in commands else ""
            raise UserError(f"{words} (see minicpgd {command} --help)".replace("  ", " ")) from None
        raise


def _later(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """The same command, with the same flags and help, that waits to be called once more."""

    @functools.wraps(command)
    def parsed(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(command, *args, **kwargs)

    return parsed


def main() -> None:
    """Entry point of `minicpgd`."""
    quiet()
    sys.path.insert(0, "")  # as `python -m` has it: a reward function may lie in the folder one is in
    try:
        parse(sys.argv[1:])()
    except UserError as error:
        print(f"minicpgd: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
