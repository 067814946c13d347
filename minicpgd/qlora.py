r"""QLoRA: a large model's weights frozen in four bits, and a small adapter trained on top of them.

For each linear layer with weights $W$, what is computed is

$$ y = \mathrm{NF4}(W)\,x + \frac{\alpha}{r}\,B A x $$

where $\mathrm{NF4}(W)$ is $W$ in 4-bit NormalFloat, in blocks of 64 with one scale each, the scales themselves in 8 bit
("double quantisation"; Dettmers et al., arXiv 2305.14314, sections 3 and 4), about 4.13 bits a weight. $A$ is
$(r, \mathrm{in})$, drawn at random; $B$ is $(\mathrm{out}, r)$ and 0 at the start, so training begins at the model as
it was (Hu et al., arXiv 2106.09685, equation 3). Only $A$ and $B$ have gradients and moments. Leaving $BAx$ out gives
the model that training started from: the reference of a KL costs no memory.

In: a model's name, a rank. Out: a model in which nothing but the adapter can be trained. The packages behind it, PEFT,
bitsandbytes and accelerate, are the extra `qlora`, imported only where they are needed.
"""

import importlib
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from minicpgd.errors import ConfigError, UserError, said

LOSS_SCALE = 2.0**12  # float16 has no number below 6e-8, and gradients get there


def choose_dtype(wanted: str, *, adapter: bool, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of frozen weights and arithmetic, and the reason in words.

    Args:
        wanted: "auto", or a dtype's name.
        adapter: whether the weights are frozen; weights that are trained are float32.
    """
    if wanted != "auto":
        return getattr(torch, wanted), "as asked"
    if not adapter:
        return torch.float32, "the weights themselves are trained"
    if device.type == "cpu":
        return torch.float32, "on a CPU it is the fastest"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the card has it"
    return torch.float16, (
        f"{torch.cuda.get_device_name()} has no bfloat16; log-probabilities are float32 all the same, and the loss is "
        f"scaled by {LOSS_SCALE:.0f} so that small gradients survive"
    )


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """How to load weights in 4 bit; each is turned back into `dtype` whenever it is multiplied with.

    Raises:
        ConfigError: the extra is not installed.
    """
    for package in ("bitsandbytes", "accelerate"):
        _extra(package)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_as_loaded(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place on a CPU.

    It does so at the first forward pass in eval mode, for a faster kernel; but the repacked weights can be neither
    trained on nor merged, and the wrong result of a merge is silent.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def check_widths(model: nn.Module) -> None:
    """On a CPU, bitsandbytes reads 4-bit rows wrongly, and says nothing, where their width is no multiple of a block.

    Seen with 0.50: of rows of 96 numbers the error is three times that of rows of 64 or 128.

    Raises:
        UserError: a 4-bit layer on a CPU has such a width.
    """
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and module.weight.device.type == "cpu" and module.in_features % state.blocksize:
            raise UserError(
                f"load_in_4bit: on a CPU layers have to be a multiple of {state.blocksize} wide, and {name} is "
                f"{module.in_features}; train it without 4 bit, or on a GPU"
            )


def add_adapter(model: PreTrainedModel, *, r: int, alpha: int, target_modules: str, seed: int) -> PreTrainedModel:
    """Freeze a model and put LoRA on its layers, float32, without dropout.

    Args:
        r: rank.
        alpha: the adapter's output is scaled by alpha / r.
        target_modules: "all-linear" (all but the output layer), or names with commas between them.
        seed: decides A.

    Returns:
        A `peft.PeftModel`, which behaves as the model it wraps.

    Raises:
        ConfigError: the extra is not installed, or there are no such layers.
    """
    peft = _extra("peft")
    names = target_modules if target_modules == "all-linear" else [n.strip() for n in target_modules.split(",")]
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=names, lora_dropout=0.0, task_type="CAUSAL_LM")
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PEFT asks under an old name
            return peft.get_peft_model(model, config)
    except ValueError as error:
        linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        linear.discard("lm_head")  # often shared with the embeddings, and then cannot be merged
        raise ConfigError(
            f"lora_target_modules = {target_modules!r}: choose all-linear, or from {', '.join(sorted(linear))}"
        ) from error


def load_adapter(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """Put a saved adapter on a model, frozen like it.

    Raises:
        ConfigError: the extra is not installed.
        UserError: the folder holds no adapter for this model.
    """
    peft = _extra("peft")
    try:
        config = peft.PeftConfig.from_pretrained(folder)
        if not Path(folder, "adapter_model.safetensors").is_file():  # without, PEFT would take a pickle, or ask the hub
            raise OSError("adapter_model.safetensors is needed")
        if not isinstance(config, peft.LoraConfig) or config.megatron_config:  # of the latter PEFT imports a module
            raise ValueError("its config is not LoRA's alone")
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            warnings.filterwarnings("error", "Found missing adapter keys")  # they would be as they were drawn
            return peft.PeftModel.from_pretrained(model, folder, config=config)
    except Exception as error:  # PEFT raises what its files lead it to
        raise UserError(f"{folder}: not an adapter for this model: {said(error)}") from error


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Have each layer's activations computed again in the backward pass, instead of kept."""
    # the older transformers that verl 0.9.1 wants has it under its old name alone
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def make_optimizer(
    name: str, parameters: Iterable[Tensor], learning_rate: float, *, adapter: bool, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW (0.9, 0.999) without weight decay; `paged_adamw_8bit` keeps moments in 8 bit, and pages them on a GPU.

    Args:
        name: "adamw", "paged_adamw_8bit", or "auto": the second for an adapter on a GPU, else the first.
        parameters: what is trained, of any shape.
    """
    if name == "paged_adamw_8bit" or (name == "auto" and adapter and device.type == "cuda"):
        bnb = _extra("bitsandbytes")
        kind = bnb.optim.PagedAdamW8bit if device.type == "cuda" else bnb.optim.AdamW8bit  # a CPU has nothing to page
        return kind(parameters, lr=learning_rate, weight_decay=0.0)
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)


def _extra(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(f"4-bit weights and LoRA need {package}: pip install 'minicpgd[qlora]' ({error})") from error
