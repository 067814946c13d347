r"""QLoRA: the weights of a large model are frozen in four bits, and a small adapter is trained on top of them.

A linear layer with weights $W$ computes

$$ y = \mathrm{NF4}(W)\,x + \frac{\alpha}{r}\,B A x $$

where $\mathrm{NF4}(W)$ is $W$ in 4-bit NormalFloat, in blocks of 64 with one scale each, the scales themselves in 8 bit
("double quantisation"; Dettmers et al., arXiv 2305.14314, sections 3 and 4), about 4.13 bits a weight. $A$ is
$(r, \mathrm{in})$, drawn at random; $B$ is $(\mathrm{out}, r)$ and 0 at the start, so training begins at the model as
it was (Hu et al., arXiv 2106.09685, equation 3). Only $A$ and $B$ have gradients and moments. Leaving $BAx$ out gives
the model that training started from: the reference of a KL costs no memory.

In: a model, and an adapter's rank. Out: a model of which only the adapter can be trained. It needs the extra `qlora`.
"""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from minicpgd.config import ModelSettings
from minicpgd.errors import ConfigError, UserError, describe_error, short_repr
from minicpgd.files import parse_json
from minicpgd.models.precision import import_extra


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """The settings for loading weights in 4 bit. Each weight is converted to `dtype` whenever it is multiplied.

    Raises:
        ConfigError: the extra is not installed.
    """
    for package in ("bitsandbytes", "accelerate"):
        import_extra(package)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def disable_cpu_repacking(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place on a CPU.

    It would do so at the first forward pass in eval mode, for a faster kernel. Repacked weights cannot be trained on.
    Merging them gives a wrong result without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def check_4bit_widths(model: nn.Module) -> None:
    """Refuse 4-bit layers that bitsandbytes misreads on a CPU: their width is not a multiple of the block size.

    With bitsandbytes 0.50 the error of rows of 96 numbers is three times that of rows of 64 or 128.

    Raises:
        UserError: a 4-bit layer on a CPU has such a width.
    """
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and module.weight.device.type == "cpu" and module.in_features % state.blocksize:
            rule = f"on a CPU the width of a layer has to be a multiple of {state.blocksize}"
            advice = "train it without 4 bit, or on a GPU"
            raise UserError(f"load_in_4bit: {rule}, and {name} is {module.in_features}; {advice}")


def is_stored_in_4bit(config: PreTrainedConfig, settings: ModelSettings, adapter: str | Path | None) -> bool:
    """Whether the stored weights of a model are in bitsandbytes' 4 bit. With a saved adapter they can be dequantised.

    Raises:
        UserError: the weights are quantised in another way, or in 4 bit without `load_in_4bit`.
    """
    stored = getattr(config, "quantization_config", None) or {}
    values = stored if isinstance(stored, dict) else stored.to_dict()
    if not values:
        return False
    if not values.get("load_in_4bit"):
        kind = short_repr(values.get("quant_method", "an unknown method"))
        advice = "choose the model in full precision, or in bitsandbytes' 4 bit"
        raise UserError(f"model = {settings.model!r}: its weights are quantised by {kind}; {advice}")
    if not (settings.load_in_4bit or adapter):
        advice = "--load-in-4bit --lora-r 16 trains an adapter on them"
        raise UserError(f"model = {settings.model!r}: its weights are stored in 4 bit and cannot be trained; {advice}")
    return True


def set_4bit_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Compute with 4-bit weights in this dtype; stored ones bring their own."""
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            vars(module)["compute_dtype"] = dtype
    return model


def add_adapter(model: PreTrainedModel, settings: ModelSettings) -> PreTrainedModel:
    """Freeze a model and put a LoRA adapter on its layers, in float32 and without dropout. The `seed` decides A.

    With `settings.adapter` it is that saved adapter.

    Raises:
        ConfigError: the extra is not installed, there are no such layers, or a layer shares its weights with another.
        UserError: the saved adapter is not one for this model.
    """
    if settings.adapter is not None:
        return load_adapter(model, settings.adapter, trainable=True)
    peft = import_extra("peft")
    wanted = settings.lora_target_modules
    names = wanted if wanted == "all-linear" else [name.strip() for name in wanted.split(",")]
    config = peft.LoraConfig(
        r=settings.lora_r, lora_alpha=settings.lora_alpha, target_modules=names, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    torch.manual_seed(settings.seed)
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PEFT uses a deprecated name.
            return _untie(peft.get_peft_model(model, config))
    except ValueError as error:
        linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        linear.discard("lm_head")  # Its weights are often those of the embeddings, and a copy of them needs memory.
        choices = ", ".join(sorted(linear))
        raise ConfigError(f"lora_target_modules = {wanted!r}: choose all-linear, or from {choices}") from error


def _untie(model: PreTrainedModel) -> PreTrainedModel:
    """Copy the weights of tied embeddings that have an adapter. Merging would add the adapter to the other layer, too.

    Raises:
        ConfigError: another layer with an adapter shares its weights.
    """
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    network: Any = model
    embeddings = (network.get_input_embeddings(), network.get_output_embeddings())
    for name, module in model.named_modules():
        base: Any = getattr(module, "base_layer", None)
        if base is None or owners[id(base.weight)] == 1:
            continue
        if not any(module is embedding for embedding in embeddings):
            what = f"{name.rpartition('.')[2]} shares its weights with another layer, so its adapter cannot be merged"
            raise ConfigError(f"lora_target_modules: {what}; leave it out")
        base.register_parameter("weight", nn.Parameter(base.weight.detach().clone(), requires_grad=False))
        network.config.tie_word_embeddings = False
    return model


def adapter_config(folder: str) -> dict[str, Any]:
    """The adapter_config.json of a saved adapter.

    Raises:
        UserError: the folder has none.
    """
    try:
        config = parse_json(Path(folder, "adapter_config.json").read_bytes())
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"adapter = {str(folder)!r}: no readable adapter_config.json: {error}") from error
    return config


def load_adapter(model: PreTrainedModel, folder: str, *, trainable: bool = False) -> PreTrainedModel:
    """Put a saved adapter on a model. The model is frozen, and so is the adapter unless it is `trainable`.

    Raises:
        ConfigError: the extra is not installed.
        UserError: the folder holds no adapter for this model.
    """
    peft = import_extra("peft")
    try:
        config = peft.PeftConfig.from_pretrained(folder)
        if not Path(folder, "adapter_model.safetensors").is_file():  # PEFT would load a pickle, or ask the hub.
            raise OSError("adapter_model.safetensors is needed")
        if not isinstance(config, peft.LoraConfig) or config.megatron_config:  # PEFT imports any module named there.
            raise ValueError("its config is not LoRA's alone")
        config.lora_dropout = 0.0
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            warnings.filterwarnings("error", "Found missing adapter keys")  # Missing weights would be random.
            return _untie(peft.PeftModel.from_pretrained(model, folder, config=config, is_trainable=trainable))
    except Exception as error:  # A damaged file can raise any kind.
        raise UserError(f"{folder}: not an adapter for this model: {describe_error(error)}") from error
