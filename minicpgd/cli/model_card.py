"""A model card: what was trained, on what, with which outcome, and how to load it.

In: a finished run. Out: `README.md` and `curves.png`, which the model hub shows, in the folder of the adapter or of the
exported model. You may change the template, `model_card.md`.
"""

import shlex
from pathlib import Path

import numpy as np

from minicpgd.algorithms import display_name
from minicpgd.cli.flags import changed_flags
from minicpgd.config import ModelSettings, TrainConfig
from minicpgd.experiments.outcome import WINDOW
from minicpgd.files import versions
from minicpgd.plots import training_curves
from minicpgd.training.export import ExportReport
from minicpgd.training.run_folder import load_run

TEMPLATE = Path(__file__).with_suffix(".md")
LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base}, dtype="auto")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")"""
LOAD_MODEL = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")"""
FOUR_BIT = """It was trained on weights rounded to 4 bit. On the weights as published it may answer differently; \
`minicpgd export` writes out the model it was trained on.

"""
MERGED = """Merged: {0.same_answers:.1%} of its greedy answers to held-out problems are those of the model as it was \
trained, to the letter; accuracy {0.accuracy_exported:.3f} against {0.accuracy_trained:.3f}. Mean difference of their \
tokens' log-probabilities {0.mean_difference:.2g} nats; adding the adapter into the weights changes one by \
{0.rounding:.2g} at most.

"""


def write_card(folder: Path, run: Path, exported: ExportReport | None = None) -> Path:
    """Write the card of a run's adapter, or of the model that was `exported` from it, to `folder`; return its path."""
    config, metrics, _ = load_run(run)
    accuracy, reward = metrics["eval_accuracy"], metrics["reward"]
    accuracy = accuracy[~np.isnan(accuracy)]  # A stopped run has no evaluation of its last step.
    last = min(WINDOW, len(reward) - 1)
    training_curves([run]).savefig(folder / "curves.png", dpi=100)
    is_embedded = config.model == ModelSettings.model
    load = LOAD_MODEL if exported else LOAD_ADAPTER.format(base="EMBEDDED" if is_embedded else f'"{config.model}"')
    packages = ["peft"] * bool(config.lora_r) + ["bitsandbytes"] * config.load_in_4bit
    card = TEMPLATE.read_text().format(
        config=config,
        algorithm=display_name(config.algorithm),
        base="minicpgd/embedded" if is_embedded else config.model,
        library="transformers" if exported else "peft",
        lora_tag="" if exported else "lora, ",
        rollouts=len(reward) - 1,
        four_bit=", 4-bit weights" * config.load_in_4bit,
        lora=f", LoRA of rank {config.lora_r}" * bool(config.lora_r),
        accuracy=(accuracy[0], accuracy[-1]),
        last=last,
        reward=(reward[0], reward[-last:].mean()),
        merged=MERGED.format(exported) if exported else "",
        load="from minicpgd.models import EMBEDDED\n" * (is_embedded and not exported) + load,
        warning=FOUR_BIT * (config.load_in_4bit and not exported),
        command=command(config),
        versions=", ".join(f"{name} {number}" for name, number in versions(*packages).items()),
    )
    path = folder / "README.md"
    path.write_text(card)
    return path


def command(config: TrainConfig) -> str:
    """The command that makes this run, with the settings that are not the default."""
    default = TrainConfig(output_dir=config.output_dir)
    return shlex.join(["minicpgd", "train", *changed_flags(config, default)])
