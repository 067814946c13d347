"""Commands for before a run: `memory`, what fits on a card, and the plan of `train --dry-run`.

In: settings. Out: tables on the terminal. No weights are loaded, and at most a model's config.json is downloaded.
"""

import math
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from minicpgd.cli.flags import Loop, Model, Objective, Sampling, Task, changed_flags
from minicpgd.cli.progress import console, text_table
from minicpgd.config import MAX_TOKENS, ModelSettings, TrainConfig
from minicpgd.errors import MissingPackageError, Range, UserError, describe_error
from minicpgd.recipes import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from minicpgd.memory import Memory

USUAL = TrainConfig(
    model="Qwen/Qwen2.5-1.5B-Instruct", load_in_4bit=True, lora_r=16, gradient_checkpointing=True, num_prompts=8,
    num_generations=8, max_completion_length=512, rollout_batch_size=64,
)  # fmt: skip


def memory(
    objective: Objective, task: Task, model: Model, sampling: Sampling, loop: Loop,
    recipe: str | None = None, gpu: float | None = None, prompt_length: int = 300,
) -> None:  # fmt: skip
    """Say where the memory of a training step goes, by component, and what fits on a card; no weights are loaded.

    Args:
        recipe: settings for a real model on a real card, by name (see docs/qlora.md), or a YAML file of your own. Other
            flags override it.
        gpu: GB of a card; then also which settings fit on it.
        prompt_length: tokens of the longest prompt; the prediction takes responses of the largest length.
    """
    from minicpgd.memory import GIB, fit_card, model_config

    config = TrainConfig.from_groups(objective, task, model, sampling, loop)
    Range(1, MAX_TOKENS).check("prompt_length", prompt_length)
    architecture = model_config(config.model)
    with _built_from_config(config.model):
        attempts = fit_card(math.inf if gpu is None else gpu, architecture, config, prompt_length=prompt_length)
    console.print(f"{config.model}, prompts of {prompt_length} tokens, responses of {config.max_completion_length}\n")
    _print_memory(attempts[0].memory)
    if gpu is None:
        return
    columns = ("each line changes one thing more", "rollout", "update", "in all", "fits")
    table = text_table(*columns, left=["fits"], title=f"\nOn a card of {gpu:g} GB")
    for before, attempt in zip([attempts[0], *attempts], attempts, strict=False):
        change = " ".join([attempt.change, *changed_flags(attempt.config, before.config)])
        sizes = (attempt.memory.rollout, attempt.memory.update, attempt.memory.peak)
        fitting = Text("yes", "green") if attempt.fits else Text("no", "red")
        table.add_row(change, *(f"{size / GIB:.1f} GiB" for size in sizes), fitting)
    console.print(table)


@contextmanager
def _built_from_config(name: str) -> Iterator[None]:
    """Turn an unusable config.json in a user's folder into one line. Errors with a known model keep their traceback."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not Path(name).is_dir():
            raise
        reason = describe_error(error)
        raise UserError(f"model = {name!r}: no model can be built from its config.json: {reason}") from error


def show_plan(config: TrainConfig, recipe: Recipe | None = None) -> None:
    """Print what a run would do and need, without downloading or loading a model.

    Raises:
        UserError: the model is unknown, or the data are not where they should be.
    """
    import torch

    from minicpgd.memory import model_config, predict
    from minicpgd.memory.simulate import shape_of
    from minicpgd.tasks import describe_data, load_reward
    from minicpgd.training.run_folder import refuse_existing, resolved

    config = replace(config, adapter=None, lora_r=resolved(config).lora_r)  # A new adapter needs the same memory.
    refuse_existing(config.folder)
    reward = config.reward or "the task's own"
    try:
        if config.reward is not None:
            load_reward(config.reward)
    except MissingPackageError as error:
        reward = f"{reward} ({error})"
    architecture = model_config(config.model)
    on_card = torch.cuda.is_available() or (recipe is not None and recipe.card_gib is not None)
    with _built_from_config(config.model):
        shape = shape_of(architecture, config, torch.bfloat16)
    sizes = {kind: sum(p.numel() for p in shape.parameters() if p.requires_grad == kind) for kind in (True, False)}
    weights = f"{sizes[False] / 1e6:,.0f} M frozen weights{' in 4-bit NF4' if config.load_in_4bit else ''}"
    adapter = f"a LoRA adapter of rank {config.lora_r}, {sizes[True] / 1e6:.1f} M parameters, on {weights}"
    plan = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    rows = {
        "model": f"{config.model}; {_whereabouts(config.model, sizes[False] or sizes[True])}",
        "trained": adapter if config.lora_r else f"all {sizes[True] / 1e6:,.1f} M weights",
        "problems": describe_data(config),
        "reward": reward,
        "steps": f"{config.max_steps} rollouts of {config.num_prompts} x {config.num_generations} responses of at most "
        f"{config.max_completion_length} tokens; {config.updates_per_rollout} updates on each, by {config.algorithm}"
        + (f"; they end at a KL of {config.target_kl:g}" if config.target_kl else ""),
        "goes to": f"{config.folder}/",
    }
    for name, value in rows.items():
        plan.add_row(name, value)
    console.print(plan, "", sep="\n")
    length, counted = _prompt_length(config, shape)
    with _built_from_config(config.model):
        predicted = predict(config, architecture, prompt_length=length, device="cuda" if on_card else "cpu")
    where = "on a card" if on_card else "on this CPU, besides Python and its libraries"
    console.print(f"Memory {where}, predicted for prompts of {length} tokens ({counted}):\n")
    _print_memory(predicted)
    if recipe and recipe.peak_gib and recipe.card_gib:
        note = f"The recipe expects {recipe.peak_gib:g} GiB of {recipe.card_gib:g}: {recipe.basis}."
        console.print(note + " That is for its own settings; some differ here." * (config != recipe.config))
    console.print("Nothing was downloaded or written. Without --dry-run it starts.")


def _prompt_length(config: TrainConfig, shape: "PreTrainedModel") -> tuple[int, str]:
    """The tokens of the longest prompt, and how that is known: from 200 problems, if nothing has to be downloaded."""
    from transformers import AutoTokenizer

    from minicpgd.memory import PROMPT_LENGTH
    from minicpgd.models.policy import Policy
    from minicpgd.models.source import gguf_folder, is_gguf, resolve_model
    from minicpgd.tasks import load_task

    folder = gguf_folder(Path(config.model)) if is_gguf(config.model) else Path(resolve_model(config.model))
    if not folder.is_dir() or config.task == "gsm8k":
        return PROMPT_LENGTH, "a guess: the problems or the tokenizer are not here yet"
    problems = load_task(config).sample(200, random.Random(0))
    policy = Policy(shape, AutoTokenizer.from_pretrained(folder), config)
    _, mask = policy.encode([problem["prompt"] for problem in problems], config.max_completion_length)
    return mask.shape[1], f"the longest of {len(problems)}"


def _print_memory(predicted: "Memory") -> None:
    """Print a table of components, at the largest moment of each phase."""
    from minicpgd.memory.predict import COMPONENTS, GIB, ROLLOUT, UPDATE

    moments = {"rollout": max(ROLLOUT, key=predicted.total), "update": max(UPDATE, key=predicted.total)}
    totals = [predicted.total(moment) + predicted.assumed for moment in moments.values()]
    unit, size_of_unit, digits = ("GiB", GIB, 2) if max(totals) > GIB / 2 else ("MiB", 2**20, 1)

    def in_units(sizes: Iterable[float]) -> list[str]:
        return [f"{size / size_of_unit:.{digits}f}" if size else "" for size in sizes]

    table = text_table(unit, *moments, "", left=[""])
    for name, meaning in COMPONENTS.items():
        sizes = [predicted.moments[moment][name] for moment in moments.values()]
        if any(sizes):
            table.add_row(name, *in_units(sizes), Text(meaning, "dim"))
    if predicted.assumed:
        both = in_units([predicted.assumed] * 2)
        table.add_row("CUDA itself", *both, Text("its context, gaps between blocks; assumed, not measured", "dim"))
    bold = [Text(words, "bold") for words in ("in all", *in_units(totals))]
    table.add_row(*bold, "at the worst moment of each phase")
    console.print(table)


def _whereabouts(name: str, parameters: int) -> str:
    from huggingface_hub import try_to_load_from_cache

    from minicpgd.models.source import gguf_folder, is_gguf

    if name == ModelSettings.model:
        return "comes with minicpgd"
    if Path(name).is_dir():
        return "a local folder"
    if is_gguf(name):
        return f"training converts it into {gguf_folder(Path(name))}/"
    weights = ("model.safetensors", "model.safetensors.index.json")
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in weights):
        return "in this machine's cache"
    return f"to be downloaded from the hub, about {parameters * 2 / 1e9:.1f} GB"
