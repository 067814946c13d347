r"""What one step hands from hand to hand: its draws, its experience, what its passes saw, what it leaves in the log.

Nothing here decides anything; `learner.py` does. Whoever takes a step apart, in a notebook say, meets these:

    draws = Draws.at(seed, step)                    where all randomness of the step comes from
    made = learner.experience(draws)                problems, rollout, rewards, advantages
    for seen in learner.passes(made, draws.order):  the updates, one pass over the rollout at a time
        learner.score(made.rollout)                 where every token stands now
"""

import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minicpgd.algorithms import LossOutput
from minicpgd.rollout import Rollout


class Draws(NamedTuple):
    """The sources of a step's randomness: which problems, which tokens, in which order."""

    problems: random.Random
    tokens: torch.Generator
    order: torch.Generator

    @classmethod
    def at(cls, seed: int, step: int, device: torch.device | str = "cpu") -> "Draws":
        """From (seed, step) and nothing else; `device` is the policy's."""
        words = [int(w) for w in np.random.SeedSequence([seed, step]).generate_state(4)]
        torch.manual_seed(words[3])  # dropout, where a model keeps it, draws from the global source
        tokens = torch.Generator(device).manual_seed(words[1])
        return cls(random.Random(words[0]), tokens, torch.Generator().manual_seed(words[2]))


@dataclass(frozen=True)
class Experience:
    """One rollout, with all that its updates need; the G responses to one prompt stand together."""

    problems: list[dict[str, str]]  # B = N * G
    rollout: Rollout
    rewards: Tensor  # (N, G)
    advantages: Tensor  # (B,)
    ref_logp: Tensor | None  # (B, T) under the reference policy, nats, where `beta` asks for it


class Pass(NamedTuple):
    """What the updates of one pass over a rollout saw: each minibatch just before its own update."""

    outputs: list[LossOutput]  # of every micro-batch
    losses: list[float]  # of every update
    norms: list[float]  # of every update's gradient, before clipping


class StepLog(NamedTuple):
    """What a step leaves in the run's folder."""

    metrics: dict[str, float]  # for metrics.jsonl
    timings: dict[str, float]  # seconds, tokens per second, bytes; nothing for the starting point
    samples: list[dict]  # rows for samples.jsonl: the responses to the first prompt
    passes: list[dict]  # rows for passes.jsonl: ratios, KL, clipped shares of each pass over this rollout


def rollout_metrics(made: Experience, right: list[bool]) -> dict[str, float]:
    """What can be told before any update; `right` has a value for each response."""
    rollout, rewards = made.rollout, made.rewards
    deviation = rewards.std(dim=1, correction=min(1, rewards.shape[1] - 1))
    return {
        "reward": rewards.mean().item(),
        "reward_std": deviation.mean().item(),
        "frac_reward_zero_std": (deviation == 0).double().mean().item(),
        "accuracy": float(np.mean(right)),
        "completion_length": rollout.lengths.double().mean().item(),
        "frac_truncated": rollout.truncated.double().mean().item(),
        "entropy": rollout.entropy[rollout.mask].mean().item(),
    }


def sample_rows(step: int, made: Experience) -> list[dict]:
    """The responses to the first prompt, as rows for samples.jsonl."""
    columns = (made.problems, made.rollout.completions, made.rewards.flatten().tolist(), made.advantages.tolist())
    return [
        {"step": step, "prompt": problem["prompt"], "completion": text, "reward": reward, "advantage": advantage}
        for problem, text, reward, advantage in zip(*columns, strict=True)
    ][: made.rewards.shape[1]]
