"""What fits on a card: settings that spare more and more memory, in the order of what they cost.

In: a card's size, an architecture, settings. Out: a row for each attempt.
"""

import math
from dataclasses import replace
from typing import NamedTuple

from transformers import PretrainedConfig

from minicpgd.config import TrainConfig
from minicpgd.errors import UserError
from minicpgd.memory.predict import GIB, Memory, predict


class Attempt(NamedTuple):
    """One attempt to fit."""

    change: str  # what differs from the attempt before
    config: TrainConfig
    memory: Memory
    fits: bool


def fit_card(
    gpu_gb: float, architecture: PretrainedConfig, config: TrainConfig, *, prompt_length: int
) -> list[Attempt]:
    """Try settings that need less and less memory, in the order of what they cost.

    Args:
        gpu_gb: what the card is sold as having, in GiB.
        prompt_length: the longest prompt to be expected, in tokens.

    Returns:
        An attempt for each change that matters. Take the first that fits.

    Raises:
        UserError: gpu_gb is not more than 0.
    """
    if not gpu_gb > 0:
        raise UserError(f"gpu = {gpu_gb}: the card's memory in GB, more than 0; 12, say")
    attempts: list[Attempt] = []
    for change, settings in _attempts(config, prompt_length + config.max_completion_length):
        changed = replace(attempts[-1].config if attempts else config, **settings)
        if attempts and changed == attempts[-1].config:
            continue
        memory = predict(changed, architecture, prompt_length=prompt_length)
        attempts.append(Attempt(change, changed, memory, memory.peak <= gpu_gb * GIB))
    return attempts


def _attempts(config: TrainConfig, length: int) -> list[tuple[str, dict]]:
    some = min(config.micro_batch_tokens or 4 * length, 4 * length)
    half = min(config.num_generations, max(2, config.num_generations // 2))
    minibatches = math.gcd(config.num_minibatches, config.num_prompts * half)
    return [
        ("as asked", {}),
        ("gradient checkpointing", {"gradient_checkpointing": True}),
        ("four responses at a time", {"micro_batch_tokens": some}),
        ("one response at a time", {"micro_batch_tokens": min(some, length)}),
        ("16 responses generated at once", {"rollout_batch_size": min(config.rollout_batch_size or 16, 16)}),
        ("4-bit weights and an adapter", {"load_in_4bit": True, "lora_r": config.lora_r or 16}),
        ("half the generations", {"num_generations": half, "num_minibatches": minibatches}),
        ("half the new tokens", {"max_completion_length": max(1, config.max_completion_length // 2)}),
    ]
