"""A model card: what was trained, on what, with which outcome, and how to load it.

In: a finished run. Out: `README.md` and `curves.png`, which the model hub shows, in the folder of the run's adapter or of
the exported model.
"""

import shlex
from dataclasses import fields
from pathlib import Path

from minicpgd.algorithms import display_name
from minicpgd.config import ModelSettings, TrainConfig
from minicpgd.experiments.outcome import WINDOW
from minicpgd.files import versions
from minicpgd.plots import training_curves
from minicpgd.training.export import ExportReport
from minicpgd.training.run_folder import load_run

LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base}, dtype="auto")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")"""

LOAD_MODEL = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")"""

FOUR_BIT = (
    "It was trained on weights rounded to 4 bit. On the weights as published it may answer differently; "
    "`minicpgd export` writes out the model it was trained on."
)


def write_card(folder: Path, run: Path, exported: ExportReport | None = None) -> Path:
    """Write the card of a run's adapter, or of what was exported from it.

    Args:
        folder: of the adapter or the model; it exists.
        run: the finished run.
        exported: what `export` measured; None for an adapter.

    Returns:
        The card's path.
    """
    config, metrics, _ = load_run(run)
    accuracy, reward = metrics["eval_accuracy"], metrics["reward"]
    last = min(WINDOW, len(reward) - 1)
    training_curves([run]).savefig(folder / "curves.png", dpi=100)
    algorithm, load = display_name(config.algorithm), LOAD_MODEL if exported else LOAD_ADAPTER
    is_embedded = config.model == ModelSettings.model
    base = "minicpgd/embedded" if is_embedded else config.model
    source = "EMBEDDED" if is_embedded else f'"{config.model}"'
    load = "from minicpgd.models import EMBEDDED\n" * (is_embedded and not exported) + load
    more = ["peft"] * bool(config.lora_r) + ["bitsandbytes"] * config.load_in_4bit
    used = versions(*more)
    lines = [
        "---",
        f"base_model: {base}",
        f"library_name: {'transformers' if exported else 'peft'}",
        f"tags: [reinforcement-learning, {'' if exported else 'lora, '}{config.algorithm}, minicpgd]",
        "---",
        "",
        f"# {base}, trained with {algorithm} on {config.task}",
        "",
        f"{len(reward) - 1} rollouts of {config.num_prompts} x {config.num_generations} responses, "
        f"{config.updates_per_rollout} updates on each{', 4-bit weights' if config.load_in_4bit else ''}"
        f"{f', LoRA of rank {config.lora_r}' if config.lora_r else ''}. One run with one seed ({config.seed}).",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| accuracy, greedy, at most {config.eval_problems} problems | {accuracy[0]:.3f} | {accuracy[-1]:.3f} |",
        f"| reward of samples; after: in the last {last} steps | {reward[0]:.3f} | {reward[-last:].mean():.3f} |",
        "",
        "![reward, length, KL and clipped share over the steps](curves.png)",
        "",
        *([_difference(exported), ""] if exported else []),
        f"## Load\n\n```python\n{load.format(base=source)}\n```",
        "",
        *([FOUR_BIT, ""] if config.load_in_4bit and not exported else []),
        f"## Made by\n\n```bash\n{command(config)}\n```",
        "",
        "with " + ", ".join(f"{name} {number}" for name, number in used.items()) + ".",
    ]
    path = folder / "README.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def command(config: TrainConfig) -> str:
    """The command that makes this run, with the settings that are not the default."""
    words = ["minicpgd", "train"]
    for field in fields(config):
        value, flag = getattr(config, field.name), field.name.replace("_", "-")
        if value == field.default or field.name == "output_dir":
            continue
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return shlex.join(words)


def _difference(exported: ExportReport) -> str:
    return (
        f"Merged: {exported.same_answers:.1%} of its greedy answers to held-out problems are those of the model as it "
        f"was trained, to the letter; accuracy {exported.accuracy_exported:.3f} against "
        f"{exported.accuracy_trained:.3f}. Mean difference of their tokens' log-probabilities "
        f"{exported.mean_difference:.2g} nats; adding the adapter into the weights changes one by "
        f"{exported.rounding:.2g} at most."
    )
