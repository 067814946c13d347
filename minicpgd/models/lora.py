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
from pathlib import Path

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from minicpgd.config import ModelSettings
from minicpgd.errors import ConfigError, UserError, describe_error
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


def add_adapter(model: PreTrainedModel, settings: ModelSettings) -> PreTrainedModel:
    """Freeze a model and put a LoRA adapter on its layers, in float32 and without dropout. The `seed` decides A.

    Raises:
        ConfigError: the extra is not installed, or there are no such layers.
    """
    peft = import_extra("peft")
    wanted = settings.lora_target_modules
    names = wanted if wanted == "all-linear" else [name.strip() for name in wanted.split(",")]
    config = peft.LoraConfig(
        r=settings.lora_r, lora_alpha=settings.lora_alpha, target_modules=names, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    torch.manual_seed(settings.seed)
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PEFT uses a deprecated name.
            return peft.get_peft_model(model, config)
    except ValueError as error:
        linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        linear.discard("lm_head")  # Its weights are often those of the embeddings, and then it cannot be merged.
        choices = ", ".join(sorted(linear))
        raise ConfigError(f"lora_target_modules = {wanted!r}: choose all-linear, or from {choices}") from error


def load_adapter(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """Put a saved adapter on a model. Model and adapter are frozen.

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
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            warnings.filterwarnings("error", "Found missing adapter keys")  # Missing weights would be random.
            return peft.PeftModel.from_pretrained(model, folder, config=config)
    except Exception as error:  # A damaged file can raise any kind.
        raise UserError(f"{folder}: not an adapter for this model: {describe_error(error)}") from error
