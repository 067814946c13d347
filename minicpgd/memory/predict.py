r"""What fits on which card: where the memory of a training step goes, from a model's config alone.

Memory may be at its most at eight moments. In a rollout, or an evaluation: the prompts are read, a token is computed by
all layers, a token is drawn. In an update: the loss is computed; gradients flow back through the output layer, through
the last layer while all activations are still there, and through the first when all gradients are; the optimizer steps.
Each moment needs its own mixture of the same components; the largest decides whether a run fits.

Components with a formula stand below, one function each. The two that hang on how a library writes its layers, the
activations and what one layer needs while it works, are rehearsed with the real code (`simulate.py`).

In: settings, an architecture. Out: bytes by moment and component. No weights are loaded, hardly a byte is allocated.
Everything is predicted for the worst case: every response as long as it may be, and some prompts padded.
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
    "one layer": "what the layer at work needs for itself",
    "dequantised": "the largest 4-bit matrix, unpacked to be multiplied with",
}
GIB = 2**30
PROMPT_LENGTH = 300  # tokens; a long problem of gsm8k in a chat template has about 250
TABLES = 4 * (16 + 256 + 1)  # NF4's 16 values, the 256 of the scales' 8 bits, and the scales' mean
ASSUMED_CONTEXT = 0.6 * GIB  # assumed, not measured: what CUDA and its libraries take for themselves
ASSUMED_SLACK = 0.1  # assumed, not measured: of what comes and goes, lost between blocks of the allocator


@dataclass(frozen=True)
class Memory:
    """Bytes by moment and component; `assumed` is for a card's context and allocator, and nobody measured it."""

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
        """Bytes in all, what is assumed included."""
        return self.total(self.worst) + self.assumed


def weights(shape: PreTrainedModel, four_bit: bool) -> int:
    r"""Frozen or not, without the adapter.

    Unquantised, every number takes its dtype's bytes. In NF4 the matrices $W$ of the layers take half a byte a number,
    each block of 64 a scale of one byte, each 256 of those a scale of four, and each matrix two tables. Embeddings,
    norms, biases and the output layer are not quantised.
    """
    adapted = hasattr(shape, "peft_config")
    sizes: dict[Tensor, int] = {
        p: p.numel() * p.element_size() for p in shape.parameters() if not (adapted and p.requires_grad)
    }
    for matrix in _quantised(shape) if four_bit else ():
        blocks = math.ceil(matrix.numel() / 64)
        sizes[matrix] = math.ceil(matrix.numel() / 2) + blocks + 4 * math.ceil(blocks / 256) + TABLES
    return sum(sizes.values())


def trained(shape: PreTrainedModel) -> int:
    """Bytes of what has gradients: the adapter, or all of the model. Its gradients take as many."""
    return sum(p.numel() * p.element_size() for p in shape.parameters() if p.requires_grad)


def optimizer(shape: PreTrainedModel, eight_bit: bool) -> int:
    r"""Adam's two moments of each trained number, and a step counter of each tensor.

    In 8 bit they take a byte each, and each 256 of them a scale of four; bitsandbytes leaves tensors of fewer than 4096
    numbers in 32 bit.
    """
    tensors = [p for p in shape.parameters() if p.requires_grad]
    if not eight_bit:
        return sum(2 * p.numel() * p.element_size() + 4 for p in tensors)
    return 2 * sum(4 * n if (n := p.numel()) < 4096 else n + 4 * math.ceil(n / 256) for p in tensors)


def gradients(shape: PreTrainedModel, first: bool, chunked: bool) -> dict[str, int]:
    r"""Of what is trained, at the moments of the update: none before its first backward pass, all after it.

    Where the output layer is trained, too, its gradient of $V \times H$ numbers is collected over the chunks of the
    loss: the sum so far, and what the next chunk adds. Where the embeddings share its weights, it waits for theirs;
    then both and their sum are there at once.

    Args:
        first: the update makes only one backward pass, so none are there from before.
        chunked: the loss is computed in more than one chunk.
    """
    total, matrix = trained(shape), shape.get_output_embeddings().weight
    own = matrix.numel() * matrix.element_size() if matrix.requires_grad else 0
    waits, before = matrix is shape.get_input_embeddings().weight, 0 if first else total
    return {
        "loss": before + own * chunked,
        "output": before + own * (1 + chunked),
        "last layer": before + own * (waits or first),
        "first layer": total + own * (waits and not first),
        "step": total + own * (2 * waits + (not first)),
    }


def kv_cache(architecture: PretrainedConfig, rows: int, length: int, itemsize: int) -> int:
    r"""$2 \cdot \text{rows} \cdot \text{length} \cdot \text{heads}_{kv} \cdot \text{head size}$ numbers a layer.

    `length` is in tokens, the result in bytes. A layer that looks back through a window keeps no more than that.
    """
    text = architecture.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    seen = sum(min(length, text.sliding_window) if "sliding" in kind else length for kind in kinds)
    return 2 * rows * seen * text.num_key_value_heads * head * itemsize


def logits_scored(tokens: int, architecture: PretrainedConfig, itemsize: int) -> int:
    r"""Logits of the tokens scored at once, as often as `logprobs.py` holds them at its worst.

    As the model gives them, in its own dtype; divided by the temperature, as log-probabilities, and for the entropy
    $-\sum p \log p$ as $p$, as $\log p$ without infinities and as their product: five times in float32. A softcap adds
    two in the model's dtype.
    """
    text = architecture.get_text_config()
    capped = 2 if getattr(text, "final_logit_softcapping", None) else 0
    return tokens * text.vocab_size * (5 * 4 + (1 + capped) * itemsize)


def logits_drawn(rows: int, words: int) -> int:
    """Of one token per row, five times in float32 as above; the model's own are gone by then."""
    return 5 * 4 * rows * words


def dequantised(shape: PreTrainedModel, four_bit: bool) -> int:
    """The largest 4-bit matrix in the dtype of the arithmetic, and its scales in float32: one matrix at a time."""
    sizes = [m.numel() * m.element_size() + 4 * math.ceil(m.numel() / 64) for m in _quantised(shape)]
    return max(sizes) if four_bit else 0


def predict(config: TrainConfig, architecture: PretrainedConfig, *, prompt_length: int, device: str = "cuda") -> Memory:
    """Bytes by moment and component.

    Args:
        config: the settings.
        architecture: of the model, from `model_config`.
        prompt_length: P, tokens of the longest prompt; all others are padded to it.
        device: cuda or cpu; decides what `auto` means for dtype and optimizer, and on cuda adds what is assumed.
    """
    adapted, on_card = config.lora_r > 0, device == "cuda"
    dtype = _dtype(config, on_card)
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
    rows, asked, length = *rollout_batch(config), prompt_length + config.max_completion_length
    some, scored = micro_batch(config, length)
    words = shape.get_output_embeddings().weight.shape[0]
    at_once = min(scored, config.chunk_size or max(1, LOGITS_AT_ONCE // words))
    one_pass = some == config.num_responses // config.num_minibatches

    token = simulate.token(architecture, config, dtype, rows, length)
    update = simulate.update(architecture, config, dtype, some, length)
    working, layers = update.peak - update.kept, architecture.get_text_config().num_hidden_layers
    unpacked = dequantised(shape, config.load_in_4bit)
    cache = kv_cache(architecture, rows, length, size)
    moments: dict[str, dict[str, int]] = {
        "prompt": {
            "KV cache": kv_cache(architecture, asked, prompt_length, size),
            "one layer": simulate.prompt(architecture, config, dtype, asked, prompt_length),
            "dequantised": unpacked,
        },
        "token": {
            "KV cache": cache,
            "logits": 4 * rows * words,  # of the token before
            "one layer": token.peak - token.kept,
            "dequantised": unpacked,
        },
        "draw": {"KV cache": cache, "logits": logits_drawn(rows, words)},
        "loss": {"activations": update.kept, "logits": logits_scored(at_once, architecture, size)},
        "output": {"activations": update.kept, "logits": 4 * at_once * words},  # their gradient
        "last layer": {"activations": update.kept, "one layer": working, "dequantised": unpacked},
        "first layer": {"activations": update.kept // layers, "one layer": working, "dequantised": unpacked},
        "step": {},
    }
    for moment, total in gradients(shape, first=one_pass, chunked=at_once < scored).items():
        moments[moment]["gradients"] = total
    worst = max(sum(own.values()) for own in moments.values())
    full = {moment: {name: (always | own).get(name, 0) for name in COMPONENTS} for moment, own in moments.items()}
    return Memory(full, int(ASSUMED_CONTEXT + ASSUMED_SLACK * worst) if on_card else 0)


@functools.cache
def predict_recipe(name: str) -> Memory:
    """What a recipe is predicted to need on a card.

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
    """Responses of `length` tokens, prompt included, in a forward pass of the update, and how many tokens it scores."""
    rows = config.num_responses // config.num_minibatches
    rows = min(rows, config.micro_batch_size or rows, max(1, (config.micro_batch_tokens or rows * length) // length))
    return rows, rows * config.max_completion_length


def _dtype(config: TrainConfig, on_card: bool) -> torch.dtype:
    """`auto` as in `qlora.choose_dtype`, for a card that has bfloat16; float16 takes as many bytes."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.bfloat16 if config.lora_r and on_card else torch.float32


def _quantised(shape: PreTrainedModel) -> list[Tensor]:
    """The matrices that 4 bit is for: of the frozen linear layers, without the output layer."""
    linear = [m for m in shape.modules() if isinstance(m, nn.Linear) and m is not shape.get_output_embeddings()]
    return [layer.weight for layer in linear if not layer.weight.requires_grad]
