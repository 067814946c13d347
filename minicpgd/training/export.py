r"""Export: add the adapter into the model's weights, for programs that know nothing of adapters.

W is a weight matrix of the model as published. The result is W + (`lora_alpha` / `lora_r`) B A in full precision, with
the adapter's matrices B and A. A run in 4 bit used a rounded copy of W. So the adapter can be added to one of
two versions of W:

- `dequantised`: the rounded weights, written out in full. The result computes what the trained model does.
- `full`: W itself. A run in 4 bit trained its adapter on the rounded weights, not on W.

The adapter is never added into the 4-bit weights themselves. They lie on a grid of 16 values, and a change smaller than
half a step is rounded away. `docs/qlora.md` has the measurements.

The whole model has to fit into memory in float32, with four bytes a weight. If the card has too little memory, hide
it with `CUDA_VISIBLE_DEVICES= minicpgd export RUN`; the CPU then does everything.

In: the folder of a finished LoRA run. Out: a folder that transformers loads, and an `ExportReport`.
"""

import gc
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from minicpgd.config import MAX_TOKENS
from minicpgd.errors import Range, UserError
from minicpgd.models.policy import Policy, load_policy
from minicpgd.tasks import load_task
from minicpgd.training.evaluation import open_policy, respond

Base = Literal["full", "dequantised"]
MAX_ROUNDING = 0.01  # nats, the limit; merging in float32 rounds by about 1e-6


@dataclass(frozen=True)
class ExportReport:
    """The difference between the exported and the trained model. The trained one answers held-out problems greedily.

    Both models score these answers. Differences are absolute, between log-probabilities of tokens, in nats.
    """

    rounding: float  # the largest difference between the model with its adapter separate and merged, in float32
    mean_difference: float  # the mean difference to the model as it was trained
    same_answers: float  # share of problems with the same text
    accuracy_trained: float
    accuracy_exported: float
    num_problems: int


def export(run: Path, folder: Path, *, base: Base = "dequantised", num_problems: int = 64) -> ExportReport:
    """Merge a run's adapter into its model, save the result in a new folder, and measure the difference.

    Raises:
        UserError: the run trained no adapter or has no checkpoint yet, the folder exists, or merging changes a token's
            log-probability by more than MAX_ROUNDING. Nothing is saved then.
    """
    trained, config = open_policy(run)
    if not trained.peft:
        model = run / config.weights_folder
        hint = f"; {model} can be used as it is" if model.is_dir() else ": name the folder of a run with LoRA"
        raise UserError(f"{run}: has no adapter{hint}")
    Range(1, MAX_TOKENS).check("num_problems", num_problems)
    if folder.exists():
        raise UserError(f"folder = {str(folder)!r} exists already: choose another")
    task = load_task(config)
    answers, right = respond(trained, task, num_problems, config, greedy=True)
    score = partial(answers.score, size=config.micro_batch_size, tokens=config.micro_batch_tokens)
    before = score(trained.model.eval())
    weights = dequantised(trained.peft.get_base_model()) if base == "dequantised" and config.load_in_4bit else {}
    in_float32 = replace(config, load_in_4bit=False, beta=0.0, dtype="float32")
    with TemporaryDirectory() as temporary:
        adapter = run / config.weights_folder
        if not adapter.is_dir():  # The run has not finished; this is the adapter of its newest checkpoint.
            adapter = Path(temporary) / "adapter"
            trained.save(adapter)
        del trained
        gc.collect()  # Only this frees a model with an adapter. A card has no room for two models.
        policy = load_policy(in_float32, adapter=adapter)
    for name, module in policy.peft.get_base_model().named_modules():
        if name in weights:
            getattr(module, "base_layer", module).weight.data.copy_(weights.pop(name))
    apart = score(policy.model.eval())
    merged = Policy(policy.peft.merge_and_unload(), policy.tokenizer, policy.settings)
    together, mask = score(merged.model.eval()), answers.mask
    rounding = (together - apart)[mask].abs().max().item()
    if not rounding <= MAX_ROUNDING:
        change = (
            f"merging the adapter changes a log-probability by {rounding:.2g} nats; at most {MAX_ROUNDING} is right"
        )
        raise UserError(
            f"{run}: {change}; nothing is exported. The adapter itself can be used: {config.weights_folder}/"
        )
    again, right_again = respond(merged, task, num_problems, config, greedy=True)
    merged.save(folder)
    return ExportReport(
        rounding=rounding,
        mean_difference=(together - before)[mask].abs().mean().item(),
        same_answers=sum(a == b for a, b in zip(answers.completions, again.completions, strict=True)) / len(right),
        accuracy_trained=right.double().mean().item(),
        accuracy_exported=right_again.double().mean().item(),
        num_problems=len(right),
    )


def dequantised(model: PreTrainedModel) -> dict[str, Tensor]:
    """The dequantised 4-bit weights of a model, (out, in) each, by the layer's name, on the CPU."""
    from bitsandbytes.functional import dequantize_4bit

    quantised = {name: m.weight for name, m in model.named_modules() if hasattr(m, "quant_state")}
    return {n.removesuffix(".base_layer"): dequantize_4bit(w.data, w.quant_state).cpu() for n, w in quantised.items()}
