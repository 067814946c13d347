"""Which settings fit on a card? The file tries changes that save memory, the cheapest first.

In: a card's size, an architecture and settings. Out: an `Attempt` for each change. You may change the attempts.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from minicpgd.config import TrainConfig
from minicpgd.errors import UserError
from minicpgd.memory.predict import GIB, Memory, predict


class Attempt(NamedTuple):
    """One attempt to fit."""

    change: str  # the difference from the attempt before
    config: TrainConfig
    memory: Memory
    fits: bool


def fit_card(
    gpu_gb: float, architecture: PretrainedConfig, config: TrainConfig, *, prompt_length: int
) -> list[Attempt]:
    """Try settings that need less and less memory. Each attempt keeps the changes before it.

    Args:
        gpu_gb: the card's nominal size, in GiB.
        prompt_length: the longest prompt to expect, in tokens.

    Returns:
        An attempt for each change that changes something. Take the first that fits.

    Raises:
        UserError: gpu_gb is not more than 0.
    """
    if not gpu_gb > 0:
        raise UserError(f"gpu = {gpu_gb}: the card's memory in GB, more than 0; 12, say")
    length = prompt_length + config.max_completion_length
    few = min(config.micro_batch_tokens or 4 * length, 4 * length)
    half = min(config.num_generations, max(2, config.num_generations // 2))
    minibatches = math.gcd(config.num_minibatches, config.num_prompts * half)
    changes: dict[str, dict[str, Any]] = {
        "as asked": {},
        "gradient checkpointing": {"gradient_checkpointing": True},
        "four responses at a time": {"micro_batch_tokens": few},
        "one response at a time": {"micro_batch_tokens": min(few, length)},
        "16 responses generated at once": {"rollout_batch_size": min(config.rollout_batch_size or 16, 16)},
        "4-bit weights and an adapter": {"load_in_4bit": True, "lora_r": config.lora_r or 16},
        "half the generations": {"num_generations": half, "num_minibatches": minibatches},
        "half the new tokens": {"max_completion_length": max(1, config.max_completion_length // 2)},
    }
    attempts: list[Attempt] = []
    for change, settings in changes.items():
        changed = replace(config, **settings)
        if not attempts or changed != config:
            memory = predict(changed, architecture, prompt_length=prompt_length)
            attempts.append(Attempt(change, changed, memory, memory.peak <= gpu_gb * GIB))
        config = changed
    return attempts
