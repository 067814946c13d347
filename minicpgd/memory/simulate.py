"""A simulated training step: the real model runs on tensors that have a shape and no numbers.

How many bytes does the backward pass keep? A formula would be long, and would change with every library. So the model's
own code, with LoRA and gradient checkpointing, runs here on torch's fake tensors. They need no memory, whatever their
size, and `LiveBytes` adds up the bytes that they would need. Layers of one kind are alike, so models of two and three
layers are enough.

In: an architecture, settings and a batch's shape. Out: bytes. A new architecture needs no change here.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel

from minicpgd.config import TrainConfig
from minicpgd.models.logprobs import position_ids
from minicpgd.models.lora import add_adapter
from minicpgd.models.precision import checkpoint_layers
from minicpgd.models.sampling import cache_argument


class Bytes(NamedTuple):
    """The bytes of tensors that are not parameters: at the end, and at most."""

    kept: int
    peak: int


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of the storages that operations allocate while this mode is on, until they are freed."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet(t.untyped_storage() for t in (*model.parameters(), *model.buffers()))

    def __torch_dispatch__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storages of its results, each once for all views of it."""
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


Run = Callable[[PreTrainedModel, LiveBytes], int]  # runs the model, and returns the bytes that are kept


def shape_of(model_config: PretrainedConfig, config: TrainConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model on torch's meta device, with its adapter: parameters have a shape and a dtype, but no numbers."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
        if config.gradient_checkpointing:
            checkpoint_layers(model)
        return add_adapter(model, config) if config.lora_r else model


def update(model_config: PretrainedConfig, config: TrainConfig, dtype: torch.dtype, batch: int, length: int) -> Bytes:
    """A forward and a backward pass of (batch, length) tokens in the decoder; `kept` is after the forward pass."""

    def run(model: PreTrainedModel, live: LiveBytes) -> int:
        model.get_input_embeddings().requires_grad_(False)  # Their gradient comes last and belongs to no layer.
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.grad = torch.zeros_like(parameter)  # An earlier pass left it. `predict.gradients` counts it.
            live.seen.add(parameter.grad.untyped_storage())
        with live:
            hidden = _decode(model, batch, length)
            kept = live.now
            hidden.backward(torch.empty_like(hidden))
        return kept

    return _extrapolate(model_config, config, dtype, run)


def prompt(model_config: PretrainedConfig, config: TrainConfig, dtype: torch.dtype, batch: int, length: int) -> int:
    """The peak while the decoder reads (batch, length) tokens, without the cache that it fills."""

    @torch.no_grad()
    def run(model: PreTrainedModel, live: LiveBytes) -> int:
        with live:
            _decode(model.eval(), batch, length)
        return 0

    return _extrapolate(model_config, config, dtype, run).peak


def token(model_config: PretrainedConfig, config: TrainConfig, dtype: torch.dtype, batch: int, length: int) -> Bytes:
    """One token after `length` - 1 other tokens; `kept` is the cache at the end, and `peak` belongs to that token."""

    @torch.no_grad()
    def run(model: PreTrainedModel, live: LiveBytes) -> int:
        cache = DynamicCache(config=model.config)
        with live:
            _decode(model.eval(), batch, length - 1, cache=cache)
            live.peak = 0
            _decode(model, batch, length, start=length - 1, cache=cache)
        return live.now

    return _extrapolate(model_config, config, dtype, run)


def _decode(
    model: PreTrainedModel, batch: int, length: int, *, start: int = 0, cache: DynamicCache | None = None
) -> Tensor:
    """The hidden states of `length` tokens from `start` on; the cache holds those before."""
    mask = torch.ones(batch, length, dtype=torch.long)
    decoder = model.get_decoder()
    return decoder(
        input_ids=torch.zeros_like(mask)[:, start:],
        attention_mask=mask,
        position_ids=position_ids(mask)[:, start:],
        use_cache=cache is not None,
        **{cache_argument(decoder): cache},
    ).last_hidden_state


def _extrapolate(model_config: PretrainedConfig, config: TrainConfig, dtype: torch.dtype, run: Run) -> Bytes:
    """The bytes of `run` with all layers: those with two, and for each other layer what a third of its kind adds."""
    text = model_config.get_text_config()
    kinds = Counter(getattr(text, "layer_types", None) or ["layer"] * text.num_hidden_layers)
    first = min(kinds)  # A layer with full_attention needs the most, and comes before sliding_attention.

    def simulate(*layers: str) -> Bytes:
        shallow = copy.deepcopy(model_config)
        text = shallow.get_text_config()
        text.num_hidden_layers = len(layers)
        if getattr(text, "layer_types", None):
            text.layer_types = list(layers)
        model = shape_of(shallow, config, dtype)
        with FakeTensorMode():
            # Fake tensors claim to be on the CPU. On the meta device attention has no kernel that saves memory.
            model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
            live = LiveBytes(model.train())
            return Bytes(run(model, live), live.peak)

    two = simulate(first, first)  # The first layer differs from all others: its input is the embedding.
    kept, peak = two
    for kind, number in kinds.items():
        three, others = simulate(first, first, kind), number - 2 * (kind == first)
        kept, peak = kept + others * (three.kept - two.kept), peak + others * (three.peak - two.peak)
    return Bytes(kept, peak)
