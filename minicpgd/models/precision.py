"""How the arithmetic is done: dtype, optimizer, threads, and activations that are computed twice.

In: settings and a model. Out: a dtype with the reason for it, an optimizer, a changed model. The optional packages of
the extra `qlora` are imported here, only when they are needed.
"""

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from minicpgd.config import TrainConfig
from minicpgd.errors import ConfigError, MissingPackageError

LOSS_SCALE = 2.0**12  # float16 has no number below 6e-8, and gradients can be smaller.
SMALL_MODEL = 10**6  # A small model has fewer parameters.


def choose_dtype(wanted: str, *, adapter: bool, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of frozen weights and of the arithmetic, and the reason in words. Trained weights are float32.

    `wanted` is "auto" or the name of a dtype. `adapter` says that the weights are frozen.
    """
    if wanted != "auto":
        return getattr(torch, wanted), "as asked"
    if not adapter:
        return torch.float32, "the weights themselves are trained"
    if device.type == "cpu":
        return torch.float32, "on a CPU it is the fastest"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the card supports it"
    scaling = f"the loss is scaled by {LOSS_SCALE:.0f} so that small gradients survive"
    name = torch.cuda.get_device_name()
    return torch.float16, f"{name} has no bfloat16; log-probabilities are float32 all the same, and {scaling}"


@contextmanager
def one_thread_if_small(model: PreTrainedModel) -> Iterator[None]:
    """Compute on one thread if the model has fewer than a million parameters; restore the number of threads after.

    Such a model gains nothing from a second thread. On a busy machine the threads would wait for each other.
    """
    threads = torch.get_num_threads()
    if model.num_parameters() < SMALL_MODEL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Compute the activations of each layer again in the backward pass, instead of keeping them."""
    # The transformers that verl 0.9.1 needs knows only the second, older name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def disable_dropout(model: nn.Module) -> None:
    """Disable both kinds: dropout modules, and the numbers that attention layers copied from the config."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def make_optimizer(config: TrainConfig, model: PreTrainedModel) -> torch.optim.Optimizer:
    """AdamW for the trained parameters of a model. `paged_adamw_8bit` keeps the moments in 8 bit.

    Raises:
        ConfigError: `reset_optimizer` with `paged_adamw_8bit`.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings: dict[str, Any] = {
        "lr": config.learning_rate, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }  # fmt: skip
    on_card = model.device.type == "cuda"
    if config.reset_optimizer and config.optim == "paged_adamw_8bit":
        raise ConfigError("reset_optimizer: paged_adamw_8bit would keep its old pages; choose optim = adamw")
    auto_8bit = config.optim == "auto" and config.lora_r and on_card and not config.reset_optimizer
    if config.optim == "paged_adamw_8bit" or auto_8bit:
        bnb = import_extra("bitsandbytes")
        kind = bnb.optim.PagedAdamW8bit if on_card else bnb.optim.AdamW8bit  # A CPU cannot page.
        return kind(trained, **settings)
    return torch.optim.AdamW(trained, **settings, fused=True)


def start_rollout(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> float:
    """Set the learning rate of a step (from 1 on), forget the moments if `reset_optimizer`, and return the rate."""
    rate = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    if config.reset_optimizer:
        optimizer.state.clear()
    return rate


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step, from 1 on, as in the schedules of transformers, whose steps count from 0.

    Over the first `warmup_steps` rollouts it rises linearly from 0. Then it stays, or falls to 0 over the rest of the
    run, as a line or as half a cosine. All updates of a rollout share one rate.
    """
    done, warmup = step - 1, config.warmup_steps
    if done < warmup:
        return config.learning_rate * done / warmup
    progress = (done - warmup) / max(1, config.max_steps - warmup)
    factors = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return config.learning_rate * factors[config.lr_scheduler_type]


def import_extra(package: str) -> ModuleType:
    """Import an optional package.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        message = f"4-bit weights and LoRA need {package}: pip install 'minicpgd[qlora]' ({error})"
        raise MissingPackageError(message) from error
