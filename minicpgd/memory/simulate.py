r"""A rehearsal without memory: the real model runs on tensors that have a shape and no numbers.

How many bytes does the backward pass keep? Formulas for it fill pages and age with every release of every library.
Autograd knows. So the model's own code, LoRA and gradient checkpointing included, runs here on torch's fake tensors,
which are as large as one likes and cost nothing, while the bytes of all that is alive are added up. Layers are alike:
two and three of them tell what any number need.

In: an architecture, settings, a batch's shape. Out: bytes.
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
    """Of tensors that are not parameters."""

    kept: int  # what is there at the end
    peak: int  # what was there at most


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of the storages that operations make while this mode is on, until they are freed."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet(t.untyped_storage() for t in (*model.parameters(), *model.buffers()))

    def __torch_dispatch__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What the operation makes is counted once, however many views of it there are."""
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


def shape_of(model_config: PretrainedConfig, config: TrainConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model on torch's meta device: every parameter's shape and dtype, adapter included, and no numbers."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
        if config.gradient_checkpointing:
            checkpoint_layers(model)
        if config.lora_r:
            model = add_adapter(model, config)
    return model


def update(model_config: PretrainedConfig, config: TrainConfig, dtype: torch.dtype, batch: int, length: int) -> Bytes:
    """Forward and backward through the decoder, of (batch, length) tokens: `kept` is what the forward pass leaves."""

    def run(model: PreTrainedModel, live: LiveBytes) -> int:
        model.get_input_embeddings().requires_grad_(False)  # their gradient comes last, and is no layer's
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.grad = torch.zeros_like(parameter)  # as after an earlier pass; they are counted elsewhere
            live.seen.add(parameter.grad.untyped_storage())
        with live:
            hidden = _decode(model, batch, length)
            kept = live.now
            gradient = torch.empty_like(hidden)
            hidden.backward(gradient)
        return kept

    return _extrapolated(model_config, config, dtype, run)


def prompt(model_config: PretrainedConfig, config: TrainConfig, dtype: torch.dtype, batch: int, length: int) -> int:
    """What reading (batch, length) tokens needs at once, without the cache that it fills."""

    @torch.no_grad()
    def run(model: PreTrainedModel, live: LiveBytes) -> int:
        with live:
            _decode(model.eval(), batch, length)
        return 0

    return _extrapolated(model_config, config, dtype, run).peak


def token(model_config: PretrainedConfig, config: TrainConfig, dtype: torch.dtype, batch: int, length: int) -> Bytes:
    """One token after `length` - 1 other tokens: `kept` is the cache then, `peak` what there was as a layer read it."""

    @torch.no_grad()
    def run(model: PreTrainedModel, live: LiveBytes) -> int:
        cache = DynamicCache(config=model.config)
        with live:
            _decode(model.eval(), batch, length - 1, cache)
            live.peak = 0
            _decode(model, batch, length, cache, new=1)
        return live.now

    return _extrapolated(model_config, config, dtype, run)


def _decode(
    model: PreTrainedModel, batch: int, length: int, cache: DynamicCache | None = None, new: int | None = None
) -> Tensor:
    """Hidden states of the last `new` of `length` tokens."""
    mask = torch.ones(batch, length, dtype=torch.long)
    ids, positions = torch.zeros_like(mask), position_ids(mask)
    decoder = model.get_decoder()
    return decoder(
        input_ids=ids[:, -(new or length) :],
        attention_mask=mask,
        position_ids=positions[:, -(new or length) :],
        use_cache=cache is not None,
        **{cache_argument(decoder): cache},
    ).last_hidden_state


def _extrapolated(
    model_config: PretrainedConfig,
    config: TrainConfig,
    dtype: torch.dtype,
    run: Callable[[PreTrainedModel, LiveBytes], int],
) -> Bytes:
    """What `run` needs with all layers: what two need, and for each further one what a third of its kind adds."""
    kinds = Counter(getattr(model_config.get_text_config(), "layer_types", None) or [])
    kinds = kinds or Counter({"layer": model_config.get_text_config().num_hidden_layers})
    first = min(kinds)  # full_attention before sliding_attention: what a layer needs for itself is largest there

    def rehearse(layers: list[str]) -> Bytes:
        model = shape_of(_with_layers(model_config, layers), config, dtype)
        with FakeTensorMode():
            _make_fake(model)
            live = LiveBytes(model.train())
            return Bytes(run(model, live), live.peak)

    two = rehearse([first, first])  # the first is unlike all others: what it reads is the embedding itself
    kept, peak = two
    for kind, number in kinds.items():
        three = rehearse([first, first, kind])
        more = number - 2 * (kind == first)
        kept, peak = kept + more * (three.kept - two.kept), peak + more * (three.peak - two.peak)
    return Bytes(kept, peak)


def _with_layers(model_config: PretrainedConfig, layers: list[str]) -> PretrainedConfig:
    """The same architecture with these layers, by their kinds."""
    shallow = copy.deepcopy(model_config)
    text = shallow.get_text_config()
    text.num_hidden_layers = len(layers)
    if getattr(text, "layer_types", None):
        text.layer_types = layers
    return shallow


def _make_fake(model: nn.Module) -> None:
    """From the meta device, where attention has no memory-saving kernel, to fake tensors that say they are a CPU's."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
