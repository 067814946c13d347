"""The same tensors for our losses and for a peer's, so that loss and gradient can be compared.

In: a seed, and how far the policy has moved. Out: a `Case` in float32: log-probabilities (B, T) in nats, with random
numbers where the mask is 0; advantages (B,) of both signs and one 0; lengths from 1 to T. The log-ratios of tokens, and
their means over responses, are not near any bound of a clip. Near one a rounding error would decide the gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from conftest import loss_of
from torch import Tensor

B, T = 8, 12
LENGTHS = (1, 2, 3, 5, 7, 8, 11, T)
BOUNDS = [math.log(ratio) for ratio in (0.2, 0.8, 1.2, 1.28, 3.0)]
REACHES = {"far": (2.4, 1.6), "inside": (0.05, 0.1)}  # the largest mean log-ratio, and the distance of tokens from it
SEEDS = range(3)
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Case:
    """One batch: `logp`, `old_logp` and `mask` (B, T), `advantages` (B,)."""

    logp: Tensor
    old_logp: Tensor
    advantages: Tensor
    mask: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """(tokens,), inside the mask."""
        return (self.logp - self.old_logp)[self.mask.bool()]


def make(seed: int, reach: str = "far") -> Case:
    """Make a batch whose log-ratios lie in [-4, 4] ("far"), or within every bound ("inside")."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).float()
    mask = mask[torch.randperm(B, generator=generator)]
    between, within = REACHES[reach]
    middles = torch.linspace(-between, between, B)[torch.randperm(B, generator=generator)]
    while True:
        d = middles[:, None] + within * (2 * torch.rand(B, T, generator=generator) - 1)
        means = (d * mask).sum(dim=1) / mask.sum(dim=1)
        log_ratios = torch.cat([d.flatten(), means])
        if all((log_ratios - bound).abs().min() > 1e-4 for bound in BOUNDS):
            break
    old_logp = -3 * torch.rand(B, T, generator=generator) - 0.05
    padding = -30 * torch.rand(B, T, generator=generator)
    advantages = torch.linspace(-2, 2, B + 1)[:B][torch.randperm(B, generator=generator)]
    return Case(torch.where(mask.bool(), old_logp + d, padding), old_logp, advantages, mask)


def loss_and_gradient(function: Callable[[Tensor], Tensor], logp: Tensor) -> tuple[Tensor, Tensor]:
    """Return the value of a scalar function of `logp` (B, T), ours or a peer's, and its gradient (B, T)."""
    logp = logp.detach().clone().requires_grad_()
    loss = function(logp)
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


def ours(name: str, case: Case, **settings) -> tuple[Tensor, Tensor]:
    """Return loss and gradient of a row of our table, with changed columns and numbers."""
    rest = (case.old_logp, case.advantages, case.mask)
    return loss_and_gradient(lambda logp: loss_of(name, logp, *rest, **settings).loss, case.logp)


def distance(one: Tensor, other: Tensor) -> float:
    """Return the largest difference between two tensors, in units of the largest number of `other`.

    For a scalar the unit is at least 1. So a small loss is compared absolutely, and a large one relatively. A gradient
    is always compared relatively.
    """
    scale = other.abs().max().item()
    return (one - other).abs().max().item() / (max(scale, 1.0) if other.ndim == 0 else scale or 1.0)


def agree(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], tolerance: float = TOLERANCE) -> bool:
    """Return whether two losses and their gradients are the same, up to rounding."""
    return all(distance(a, b) <= tolerance for a, b in zip(one, other, strict=True))


def rewards_of(kind: str, seed: int, prompts: int = 4, group: int = 6) -> tuple[Tensor, Tensor, np.ndarray]:
    """Return rewards (B,), lengths (B,) in tokens and uids (B,) of prompts * group responses, in a shuffled order.

    "binary" rewards are 0 or 1, "graded" ones are any number. Those of the first prompt are all equal.
    """
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(prompts, group, generator=generator)
    rewards = (rewards > 0.5).float() if kind == "binary" else rewards * 3 - 1
    rewards[0] = 1.0
    rewards[1, :2] = torch.tensor([0.0, 1.0])  # At least one prompt has different rewards.
    lengths = torch.randint(1, T + 1, (prompts * group,), generator=generator)
    order = torch.randperm(prompts * group, generator=generator)
    uids = np.array([f"prompt-{i // group}" for i in range(prompts * group)], dtype=object)
    return rewards.flatten()[order], lengths, uids[order.numpy()]
