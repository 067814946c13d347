r"""What a training step needs: bytes of memory, predicted from a model's config.

Memory can be at its largest at eight moments. A rollout, or an evaluation, reads the prompts, computes a token in all
layers, and draws it. An update computes the loss. Gradients then flow through the output layer, through the last layer
while all activations exist, and through the first layer when all gradients exist; then the optimizer steps. Each moment
needs its own components, and the largest sum decides whether a run fits.

Most components have a formula and a function here. The activations, and what one layer needs while it computes, depend
on the code of a library, so `simulate.py` runs that code.

In: settings and an architecture. Out: bytes by moment and component. No weights are loaded. The prediction is for the
worst case: every response has the largest length, and some prompts are padded. You may change what is assumed.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from minicpgd.config import TrainConfig
from minicpgd.memory import simulate
from minicpgd.memory.architectures import model_config
from minicpgd.models.logprobs import LOGITS_AT_ONCE
from minicpgd.recipes import load_recipe

ROLLOUT, UPDATE = ("prompt", "token", "draw"), ("loss", "output", "last layer", "first layer", "step")
COMPONENTS = {
    "weights": "of the model, 4-bit where asked",
    "reference": "a frozen copy, for beta without an adapter",
    "adapter": "LoRA's A and B, float32",
    "optimizer": "two moments of what is trained",
    "gradients": "of what is trained",
    "KV cache": "keys and values of all tokens so far",
    "activations": "kept for the backward pass",
    "logits": "one number per token and word, several times over",
    "one layer": "temporary tensors of the layer that computes",
    "dequantised": "the largest 4-bit matrix, unpacked for its product",
}
GIB = 2**30
PROMPT_LENGTH = 300  # tokens; a long problem of gsm8k in a chat template has about 250
TABLES = 4 * (16 + 256 + 1)  # bytes: NF4's 16 values, the 256 values of 8-bit scales, and the mean of the scales
ASSUMED_CONTEXT = 0.6 * GIB  # bytes of CUDA and its libraries; nobody measured them
ASSUMED_SLACK = 0.1  # share of memory lost between the allocator's blocks; nobody measured it


@dataclass(frozen=True)
class Memory:
    """Bytes by moment and component; `assumed` bytes, for a card's context and allocator, have not been measured."""

    moments: dict[str, dict[str, int]]
    assumed: int = 0

    def total(self, moment: str) -> int:
        """Bytes of tensors at a moment."""
        return sum(self.moments[moment].values())

    @property
    def worst(self) -> str:
        """The moment that needs the most."""
        return max(self.moments, key=self.total)

    @property
    def rollout(self) -> int:
        """Bytes of tensors at the rollout's largest moment."""
        return max(map(self.total, ROLLOUT))

    @property
    def update(self) -> int:
        """Bytes of tensors at the update's largest moment."""
        return max(map(self.total, UPDATE))

    @property
    def peak(self) -> int:
        """Bytes in all, with the assumed ones."""
        return self.total(self.worst) + self.assumed


def weights(shape: PreTrainedModel, four_bit: bool) -> int:
    r"""Bytes of the weights without an adapter.

    Each number has the size of its dtype. In NF4 a matrix $W$ of a layer needs half a byte per number, one byte for the
    scale of each 64 numbers, four bytes for each 256 scales, and two tables. Embeddings, norms, biases and the output
    layer are not quantised.
    """
    adapted = hasattr(shape, "peft_config")
    sizes: dict[Tensor, int] = {p: p.nbytes for p in shape.parameters() if not (adapted and p.requires_grad)}
    for matrix in _quantised(shape) if four_bit else ():
        blocks = math.ceil(matrix.numel() / 64)
        sizes[matrix] = math.ceil(matrix.numel() / 2) + blocks + 4 * math.ceil(blocks / 256) + TABLES
    return sum(sizes.values())


def trained(shape: PreTrainedModel) -> int:
    """Bytes of the trained parameters, an adapter's or all. Their gradients have the same size."""
    return sum(p.nbytes for p in shape.parameters() if p.requires_grad)


def optimizer(shape: PreTrainedModel, eight_bit: bool) -> int:
    r"""Bytes of Adam: two moments of each trained number, and a step counter of each tensor.

    In 8 bit a moment needs one byte, and each 256 moments a scale of four. bitsandbytes keeps the moments of a tensor
    with fewer than 4096 numbers in 32 bit.
    """
    tensors = [p for p in shape.parameters() if p.requires_grad]
    if not eight_bit:
        return sum(2 * p.nbytes + 4 for p in tensors)
    return 2 * sum(4 * n if (n := p.numel()) < 4096 else n + 4 * math.ceil(n / 256) for p in tensors)


def gradients(shape: PreTrainedModel, first: bool, chunked: bool) -> dict[str, int]:
    r"""Bytes of the gradients at the moments of an update: none before its first backward pass, and all after it.

    If the output layer is trained, its gradient of $V \times H$ numbers is a sum over the chunks of the loss, to which
    each chunk adds its own. If the embeddings share its weights, this gradient waits for theirs; then both exist beside
    their sum.

    Args:
        first: the update makes one backward pass, so there are no gradients of an earlier one.
        chunked: the loss is computed in more than one chunk.
    """
    total, matrix = trained(shape), shape.get_output_embeddings().weight
    own = matrix.nbytes if matrix.requires_grad else 0
    waits, before = matrix is shape.get_input_embeddings().weight, 0 if first else total
    return {
        "loss": before + own * chunked,
        "output": before + own * (1 + chunked),
        "last layer": before + own * (waits or first),
        "first layer": total + own * (waits and not first),
        "step": total + own * (2 * waits + (not first)),
    }


def kv_cache(architecture: PretrainedConfig, rows: int, length: int, itemsize: int) -> int:
    r"""Bytes of all keys and values.

    A layer has $2 \cdot \text{rows} \cdot \text{length} \cdot \text{heads}_{kv} \cdot \text{head size}$ numbers, where
    `length` is in tokens. A layer with a sliding window keeps only the tokens in its window.
    """
    text = architecture.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    seen = sum(min(length, text.sliding_window) if "sliding" in kind else length for kind in kinds)
    return 2 * rows * seen * text.num_key_value_heads * head * itemsize


def logits_scored(tokens: int, architecture: PretrainedConfig, itemsize: int) -> int:
    r"""Bytes of the logits of the tokens that `logprobs.py` scores at once, at its largest moment.

    They exist once in the model's dtype, and five times in float32: divided by the temperature, as log-probabilities,
    and, for the entropy $-\sum p \log p$, as $p$, as $\log p$ without infinities, and as their product. A softcap adds
    two in the model's dtype.
    """
    text = architecture.get_text_config()
    capped = 2 if getattr(text, "final_logit_softcapping", None) else 0
    return tokens * text.vocab_size * (5 * 4 + (1 + capped) * itemsize)


def logits_drawn(rows: int, words: int) -> int:
    """Bytes of the logits of one token per row: five times in float32 as above, when the model's own are freed."""
    return 5 * 4 * rows * words


def dequantised(shape: PreTrainedModel, four_bit: bool) -> int:
    """Bytes of the largest 4-bit matrix in the dtype of the arithmetic, and of its float32 scales."""
    return max(m.nbytes + 4 * math.ceil(m.numel() / 64) for m in _quantised(shape)) if four_bit else 0


def predict(config: TrainConfig, architecture: PretrainedConfig, *, prompt_length: int, device: str = "cuda") -> Memory:
    """Predict the bytes by moment and component.

    Args:
        architecture: the model's, from `model_config`.
        prompt_length: P, tokens of the longest prompt; all others are padded to it.
        device: cuda or cpu. It decides what `auto` means for dtype and optimizer, and cuda adds the assumed bytes.
    """
    adapted, on_card = config.lora_r > 0, device == "cuda"
    auto = torch.bfloat16 if adapted and on_card else torch.float32  # as in `choose_dtype`; float16 has the same size
    dtype = auto if config.dtype == "auto" else getattr(torch, config.dtype)
    size = dtype.itemsize
    shape = simulate.shape_of(architecture, config, dtype)
    eight_bit = config.optim == "paged_adamw_8bit" or (config.optim == "auto" and adapted and on_card)
    model_bytes = weights(shape, config.load_in_4bit)
    always = {
        "weights": model_bytes,
        "reference": model_bytes if config.beta > 0 and not adapted else 0,
        "adapter": trained(shape) if adapted else 0,
        "optimizer": optimizer(shape, eight_bit),
    }
    length = prompt_length + config.max_completion_length
    (rows, prompts), (batch, scored) = rollout_batch(config), micro_batch(config, length)
    words = shape.get_output_embeddings().weight.shape[0]
    chunk = min(scored, config.chunk_size or max(1, LOGITS_AT_ONCE // words))
    one_pass = batch == config.num_responses // config.num_minibatches

    reading = simulate.prompt(architecture, config, dtype, prompts, prompt_length)
    token = simulate.token(architecture, config, dtype, rows, length)
    update = simulate.update(architecture, config, dtype, batch, length)
    unpacked = {"dequantised": dequantised(shape, config.load_in_4bit)}
    cache, activations = {"KV cache": kv_cache(architecture, rows, length, size)}, {"activations": update.kept}
    layer = {"one layer": update.peak - update.kept, **unpacked}
    first_activations = update.kept // architecture.get_text_config().num_hidden_layers
    moments: dict[str, dict[str, int]] = {
        "prompt": {"KV cache": kv_cache(architecture, prompts, prompt_length, size), "one layer": reading, **unpacked},
        "token": {"logits": 4 * rows * words, "one layer": token.peak - token.kept, **cache, **unpacked},
        "draw": {"logits": logits_drawn(rows, words), **cache},
        "loss": {"logits": logits_scored(chunk, architecture, size), **activations},
        "output": {"logits": 4 * chunk * words, **activations},  # the gradient of the logits
        "last layer": {**layer, **activations},
        "first layer": {**layer, "activations": first_activations},
        "step": {},
    }
    for moment, total in gradients(shape, first=one_pass, chunked=chunk < scored).items():
        moments[moment]["gradients"] = total
    worst = max(sum(own.values()) for own in moments.values())
    full = {moment: {name: (always | own).get(name, 0) for name in COMPONENTS} for moment, own in moments.items()}
    return Memory(full, int(ASSUMED_CONTEXT + ASSUMED_SLACK * worst) if on_card else 0)


@functools.cache
def predict_recipe(name: str) -> Memory:
    """Predict what a recipe needs on a card.

    Raises:
        ConfigError: there is no such recipe.
    """
    config = load_recipe(name).config
    return predict(config, model_config(config.model), prompt_length=PROMPT_LENGTH)


def rollout_batch(config: TrainConfig) -> tuple[int, int]:
    """Responses generated at once, and prompts read at once: one for a group, but in evaluations one for a response."""
    at_once = config.rollout_batch_size or max(config.num_responses, config.eval_problems)
    rollout, evaluation = min(config.num_responses, at_once), min(config.eval_problems, at_once)
    return max(rollout, evaluation), max(math.ceil(rollout / config.num_generations), evaluation)


def micro_batch(config: TrainConfig, length: int) -> tuple[int, int]:
    """Responses in a forward pass of the update, and tokens scored there; `length` is in tokens, with the prompt."""
    rows = config.num_responses // config.num_minibatches
    rows = min(rows, config.micro_batch_size or rows, max(1, (config.micro_batch_tokens or rows * length) // length))
    return rows, rows * config.max_completion_length


def _quantised(shape: PreTrainedModel) -> list[Tensor]:
    """The matrices that 4 bit quantises: those of frozen linear layers, without the output layer."""
    linear = [m for m in shape.modules() if isinstance(m, nn.Linear) and m is not shape.get_output_embeddings()]
    return [layer.weight for layer in linear if not layer.weight.requires_grad]
