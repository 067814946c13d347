r"""Export: the adapter added into the model's weights, for whatever knows nothing of adapters.

$W + \frac{\alpha}{r}BA$, in full precision. A run in 4 bit never saw the published $W$, but its rounded copy, so there
are two weights to add to:

- `dequantised`: the rounded weights, written out in full. The result computes what was trained, to the last digits.
- `full`: the weights as published, for which the adapter was not made.

Never into the 4-bit weights themselves. Those lie on a grid of 16 values; a sum of theirs with something smaller than
half a step is rounded back to where it was, and a gentle training is gone. In `docs/qlora.md` all this is measured.

The whole model in float32 has to fit: four bytes a weight, more than training took. Where a card has less, hide it
(`CUDA_VISIBLE_DEVICES= minicpgd export RUN`), and all is done on the CPU.

In: the folder of a finished LoRA run. Out: a folder that transformers loads, and by how much it differs.
"""

import gc
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from minicpgd.config import TrainConfig
from minicpgd.errors import UserError
from minicpgd.evaluation import open_policy, respond
from minicpgd.policy import Policy, policy_of
from minicpgd.rollout import Rollout
from minicpgd.tasks import task_of

Base = Literal["full", "dequantised"]


@dataclass(frozen=True)
class Exported:
    """How far the exported model is from the trained one, on greedy answers of the trained one to held-out problems.

    Log-probabilities in nats: absolute differences over the answers' tokens. Shares of 1.
    """

    rounding: float  # the largest, between adding the adapter's output and adding it into the weights
    mean_difference: float  # the mean, to the model as it was trained
    same_answers: float  # share of problems with the same text
    accuracy_trained: float
    accuracy_exported: float
    num_problems: int


def export(run: Path, folder: Path, *, base: Base = "dequantised", num_problems: int = 64) -> Exported:
    """Merge a run's adapter into its model, save that, and measure the difference.

    Args:
        run: a finished run that trained an adapter.
        folder: where the model goes; must not exist yet.
        base: the weights to add to; see above. Of a run that was not in 4 bit they are the same.
        num_problems: held-out problems that both models answer.

    Raises:
        UserError: the run trained no adapter or has not finished, or the folder exists.
    """
    trained, config = open_policy(run)
    if not trained.peft:
        whole = run / config.trained_as
        as_it_is = f"; {whole} can be used as it is" if whole.is_dir() else ": name the folder of a run with LoRA"
        raise UserError(f"{run}: has no adapter{as_it_is}")
    if num_problems < 1:
        raise UserError(f"num_problems = {num_problems}: it has to be at least 1")
    if folder.exists():
        raise UserError(f"folder = {str(folder)!r} exists already: choose another")
    answers, right = _answers(trained, config, num_problems)
    score = partial(answers.score, size=config.micro_batch_size, tokens=config.micro_batch_tokens)
    before = score(trained.model.eval())
    weights = dequantised(trained.peft.get_base_model()) if base == "dequantised" and config.load_in_4bit else {}
    del trained
    gc.collect()  # adapters refer to themselves; a card holds one of the two models

    policy = policy_of(replace(config, load_in_4bit=False, beta=0.0, dtype="float32"), adapter=run / config.trained_as)
    for name, module in policy.peft.get_base_model().named_modules():
        if name in weights:
            getattr(module, "base_layer", module).weight.data.copy_(weights.pop(name))
    apart = score(policy.model.eval())
    merged = Policy(policy.peft.merge_and_unload(), policy.tokenizer, chat_template=policy.chat_template)
    together = score(merged.model.eval())
    again, right_again = _answers(merged, config, num_problems)
    merged.save(folder)

    mask = answers.mask
    return Exported(
        rounding=(together - apart)[mask].abs().max().item(),
        mean_difference=(together - before)[mask].abs().mean().item(),
        same_answers=sum(a == b for a, b in zip(answers.completions, again.completions, strict=True)) / len(right),
        accuracy_trained=right.double().mean().item(),
        accuracy_exported=right_again.double().mean().item(),
        num_problems=len(right),
    )


def dequantised(model: PreTrainedModel) -> dict[str, Tensor]:
    """The 4-bit weights of a model, each (out, in), as the numbers they stand for, by the layer's name; on the CPU."""
    from bitsandbytes.functional import dequantize_4bit

    quantised = {name: m.weight for name, m in model.named_modules() if hasattr(m, "quant_state")}
    return {n.removesuffix(".base_layer"): dequantize_4bit(w.data, w.quant_state).cpu() for n, w in quantised.items()}


def _answers(policy: Policy, config: TrainConfig, num_problems: int) -> tuple[Rollout, Tensor]:
    return respond(
        policy,
        task_of(config),
        num_problems,
        max_completion_length=config.max_completion_length,
        batch_size=config.rollout_batch_size,
    )
