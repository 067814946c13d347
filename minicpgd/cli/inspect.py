"""Commands for a finished run or a model: `evaluate`, `sample`, `export`, `plot`."""

import hashlib
from pathlib import Path
from typing import Literal

from rich.text import Text
from tyro.conf import Positional

from minicpgd.cli.flags import Flag
from minicpgd.cli.progress import console
from minicpgd.config import TEMPERATURES, SamplingSettings
from minicpgd.errors import Range, UserError

Base = Literal["full", "dequantised"]


def evaluate(
    run_or_model: Positional[str] = "embedded", /, task: str | None = None,
    num_problems: int = 256, num_samples: int = 8, seed: int = 0,
) -> None:  # fmt: skip
    """Measure a run or a model on held-out problems: greedy and sampled accuracy, pass@k, response length.

    Args:
        run_or_model: a finished run's folder, "embedded", a model folder, or a hub name.
        task: by default the run's, else chain_arithmetic.
        num_problems: how many held-out problems.
        num_samples: sampled responses per problem.
        seed: chooses problems and samples.
    """
    from minicpgd.training.evaluation import evaluate as measure

    result = measure(run_or_model, task=task, num_problems=num_problems, num_samples=num_samples, seed=seed)
    for name, value in result.items():
        console.print(f"{name:<18} {value:8.3f}")


def sample(
    run_or_model: Positional[str] = "embedded", /, num_problems: int = 12, temperature: float = 1.0, seed: int = 0
) -> None:
    """Show held-out problems with a sampled response each, right ones green and wrong ones red.

    Args:
        run_or_model: a finished run's folder, "embedded", a model folder, or a hub name.
        num_problems: how many.
        temperature: of the sampling; 0 takes the likeliest token each time.
        seed: chooses problems and samples.
    """
    Range(0, TEMPERATURES.most).check("temperature", temperature)
    from minicpgd.tasks import load_task
    from minicpgd.training import open_policy, respond

    policy, config = open_policy(run_or_model)
    task = load_task(config)
    length, batch_size = config.max_completion_length, config.rollout_batch_size
    settings = SamplingSettings(length, temperature or 1.0, rollout_batch_size=batch_size)
    rollout, right = respond(policy, task, num_problems, settings, greedy=temperature == 0, seed=seed)
    for problem, text, ok in zip(task.held_out(num_problems, seed), rollout.completions, right[:, 0], strict=True):
        mark, colour = ("right", "green") if ok else ("wrong", "red")
        console.print(Text.assemble((mark, colour), f"  {problem['prompt']}", (text, colour)))
    console.print(f"{int(right.sum())} of {len(right)} right")


def export(
    run: Positional[Path], /, folder: Path | None = None, base: Base = "dequantised", num_problems: int = 64
) -> None:
    """Merge a run's adapter into its model, in full precision, and say how far the result is from the run.

    Args:
        run: a finished run with an adapter.
        folder: where the model goes; by default the run's folder, under exported.
        base: the weights to add to. dequantised: those the run saw, rounded to 4 bit and written out in full; the
            result answers as the run did. full: those published, for which the adapter was not made.
        num_problems: held-out problems that both answer.
    """
    from minicpgd.cli.model_card import write_card
    from minicpgd.training.export import export as merge

    exported = folder or run / "exported"
    result = merge(run, exported, base=base, num_problems=num_problems)
    write_card(exported, run, result)
    rows = {
        "same answers": f"{result.same_answers:.1%}   of {result.num_problems} held-out problems, greedily",
        "accuracy": f"{result.accuracy_trained:.3f} → {result.accuracy_exported:.3f}",
        "log-probabilities": f"{result.mean_difference:.2g}   nats from the run's, mean over the answers' tokens",
        "rounding": f"{result.rounding:.2g}   nats at most, by adding the adapter into the weights",
    }
    for name, value in rows.items():
        console.print(f"{name:<18} {value}")
    console.print(f"\nmodel   {exported}/\ncard    {exported / 'README.md'}")


def plot(
    runs: Positional[list[Path]] = [], /, all: Flag = False,  # noqa: B006 (never changed)
    results: Path = Path("results"), out: Path | None = None,
) -> None:  # fmt: skip
    """Draw the curves of one or more runs, or every published figure from the committed logs.

    Args:
        runs: folders of runs, up to seven.
        all: every figure of README.md and docs/, from the committed logs.
        results: where the committed logs are.
        out: where the figures go; by default a folder in figures/ with the runs' names; for all, docs/figures/.
    """
    from minicpgd.plots.published import save_figures, save_published

    if not all and not 1 <= len(runs) <= 7:
        raise UserError(f"plot: {len(runs)} runs given; 1 to 7 can be told apart in one figure")
    names = "+".join("-".join(run.parts).strip("/") for run in runs)[:100]
    digest = hashlib.sha256(" ".join(map(str, runs)).encode()).hexdigest()[:6]  # Two lists of runs may share a name.
    folder = out or Path("docs/figures" if all else f"figures/{names}-{digest}")
    paths = save_published(results, folder) if all else save_figures(folder, runs)
    for path in paths:
        console.print(f"figure  {path}")
