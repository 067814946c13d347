"""The command `train`. Ctrl-C finishes the step, saves, and says how to continue."""

import os
import shlex
import signal
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from minicpgd.cli.flags import Flag, Loop, Model, Objective, Sampling, Task
from minicpgd.cli.plan import show_plan
from minicpgd.cli.progress import Bars, console, say_conversion
from minicpgd.config import ModelSettings, TrainConfig
from minicpgd.recipes import load_recipe


def train(
    objective: Objective, task: Task, model: Model, sampling: Sampling, loop: Loop,
    resume: Path | None = None, recipe: str | None = None, dry_run: Flag = False,
) -> None:  # fmt: skip
    """Train a policy on one GPU or the CPU, and leave a run's folder behind.

    Args:
        resume: continue this run, bit for bit, from its newest intact checkpoint. Only --max-steps may be
            changed; a smaller one ends the run early.
        recipe: settings for a real model on a real card, by name (see docs/qlora.md), or a YAML file of your own. Other
            flags override it.
        dry_run: say what the run would do and need, and do nothing.
    """
    config = TrainConfig.from_groups(objective, task, model, sampling, loop)
    if dry_run:
        show_plan(config, load_recipe(recipe) if recipe else None)
    else:
        run(replace(config, output_dir=str(resume)) if resume else config, resume=resume is not None)


def run(config: TrainConfig, *, resume: bool = False) -> None:
    """Train with a progress bar; a first Ctrl-C stops after the step, a second one at once."""
    from minicpgd import training
    from minicpgd.algorithms import display_name
    from minicpgd.cli.model_card import write_card
    from minicpgd.models import Policy
    from minicpgd.training.first_look import FirstLook
    from minicpgd.training.run_folder import resume_command

    say_conversion(config.model)
    if config.model != ModelSettings.model:
        console.print(f"loading {config.model} and the problems of {config.task}; missing files come from the hub")
    reached = 0
    with _stop_signals() as received, Bars([display_name(config.algorithm)], config.max_steps) as bars:

        def on_step(step: int, metrics: dict[str, float], timings: dict[str, float]) -> None:
            nonlocal reached
            reached = step
            if step == 1 < config.max_steps:
                seconds = timings["rollout_seconds"] + timings["update_seconds"]
                whole = seconds * config.max_steps
                total = f"{whole / 60:.0f} minutes" if whole > 100 else f"{whole:.0f} seconds"
                console.print(f"about {seconds:.1f} s a step, {total} in all")
            note = f"reward {metrics['reward']:.2f}  length {metrics['completion_length']:.0f}"
            measure = "accuracy" if config.reward is None else "reward"
            if (value := metrics.get(f"eval_{measure}")) is not None:
                note += f"  eval {measure} {value:.2f}"
            bars.update(0, step, note)

        def on_first_look(look: FirstLook) -> None:
            console.print("\nBefore training, the first held-out problem, as the model sees it:\n")
            console.print(textwrap.indent(look.prompt, "    "))
            for name, answer in [("greedy", look.greedy), *(("sampled", answer) for answer in look.samples)]:
                console.print(f"{name}, reward {answer.reward:.2f}")
                console.print(textwrap.indent(answer.text, "    "))
            console.print(f"\n{look.summary}\n")
            for line in look.warnings:
                print(f"warning: {line}", file=sys.stderr)

        def on_load(policy: Policy) -> None:
            if policy.peft:
                weights = "4-bit weights, arithmetic in " if config.load_in_4bit else ""
                console.print(f"{config.model} on {policy.device}, {weights}{policy.dtype_in_words}")

        callbacks = training.Callbacks(
            on_load=on_load,
            on_first_look=on_first_look,
            on_resume=lambda step: console.print(f"continuing after step {step}"),
            on_step=on_step,
            on_warning=lambda line: print(f"warning: {line}", file=sys.stderr),
            should_stop=lambda: bool(received),
        )
        folder = training.train(config, resume=resume, callbacks=callbacks)
    if received and reached < config.max_steps:  # The folder model/ cannot tell: a prolonged run has one already.
        console.print(f"stopped and saved. Continue with: {resume_command(folder).strip('`')}")
        sys.exit(128 + received[0])
    if config.trains_adapter:
        write_card(folder / config.weights_folder, folder)
    quoted = shlex.quote(str(folder))
    console.print(f"done: {folder}   (minicpgd evaluate {quoted}; minicpgd plot {quoted})")


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM in a list; the second one ends the process."""
    received: list[int] = []

    def remember(number: int, _: object) -> None:
        if received:  # An exception could be lost here, for example in a __del__.
            os.write(2, b"\x1b[?25h" * console.is_terminal + b"minicpgd: stopped. Finished work is kept\n")
            os._exit(130)
        received.append(number)
        console.print("\nfinishing this step and saving; press Ctrl-C again to stop at once")

    handlers = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
