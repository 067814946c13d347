"""What a step records: its experience, its passes, and nearly all metrics that a run logs.

Nothing here changes the learner. In: an `Experience` and the passes over it. Out: the lines of metrics.jsonl,
timings.jsonl, samples.jsonl and passes.jsonl. docs/metrics.md defines each metric.
"""

import math
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minicpgd.algorithms import LossOutput, k3, token_metrics
from minicpgd.config import TrainConfig
from minicpgd.models.sampling import Rollout
from minicpgd.tasks.rewards import RewardContext
from minicpgd.tasks.task import Task
from minicpgd.training.first_look import FirstLook


@dataclass(frozen=True)
class Experience:
    """One rollout with everything that its updates need. The G responses to one prompt stand together."""

    problems: list[dict[str, Any]]  # B = N * G
    rollout: Rollout
    rewards: Tensor  # (N, G)
    advantages: Tensor  # (N, G)
    drift_coef: float  # of this rollout
    ref_logp: Tensor | None  # (B, T) under the reference policy, nats, if there is one
    used: Tensor  # (B,) whether a response counts in the loss
    pass_weights: Tensor | None = None  # (B, T), multiply the advantages of this pass; None: all are 1
    context: RewardContext = field(default_factory=RewardContext)  # what the reward function has logged


class Update(NamedTuple):
    """One optimizer step, or one that was not made."""

    outputs: list[LossOutput]  # one per micro-batch; their losses, from before the step, add up to the minibatch's
    grad_norm: float | None  # before clipping; None: not made, because all advantages are 0 or the KL is too large
    ends_passes: bool = False  # Whether the step was not made because the KL exceeded `target_kl`.


class Pass(NamedTuple):
    """The results of one pass over a rollout."""

    outputs: list[LossOutput]  # of every micro-batch
    losses: list[float]  # of every minibatch
    grad_norms: list[float]  # of every update that was made, before clipping
    was_ended: bool = False  # Whether `target_kl` ended this pass. Its last minibatch then had no update.

    @classmethod
    def from_updates(cls, updates: Sequence[Update]) -> "Pass":
        """Put the results of `Learner.update` together."""
        outputs = [output for update in updates for output in update.outputs]
        losses = [sum(output.loss.item() for output in update.outputs) for update in updates]
        norms = [update.grad_norm for update in updates if update.grad_norm is not None]
        return cls(outputs, losses, norms, updates[-1].ends_passes)

    @property
    def skipped(self) -> int:
        """The number of updates that were skipped because no response had an advantage."""
        return len(self.losses) - len(self.grad_norms) - self.was_ended


class StepLog(NamedTuple):
    """What a step leaves in the run's folder."""

    metrics: dict[str, float]  # a line of metrics.jsonl
    timings: dict[str, float] = {}  # a line of timings.jsonl: seconds, tokens per second, bytes; empty for step 0
    samples: Sequence[dict] = ()  # lines of samples.jsonl: the responses of the rollout
    passes: Sequence[dict] = ()  # lines of passes.jsonl: ratios, KL and shares of clipped tokens of each pass
    look: FirstLook | None = None  # only of step 0


def step_metrics(experience: Experience, passes: Sequence[Pass], task: Task, config: TrainConfig) -> dict[str, float]:
    """The metrics of a step, but for the learning rate and those of the held-out set.

    Ratios, `kl_old` and shares of clipped tokens are those of the last pass. So is `kl_ref` if `beta` acts in the loss;
    if it acts in the reward, `kl_ref` is that of the policy that sampled.
    """
    rollout = experience.rollout
    # A response without a reward counts as the mean of its group.
    means = experience.rewards.nanmean(dim=1, keepdim=True).nan_to_num()
    rewards = torch.where(experience.rewards.isnan(), means, experience.rewards)
    deviation = rewards.std(dim=1, correction=min(1, rewards.shape[1] - 1))
    responses = zip(experience.problems, rollout.completions, strict=True)
    metrics = {
        "reward": rewards.mean().item(),
        "reward_std": deviation.mean().item(),
        "frac_reward_zero_std": (deviation == 0).double().mean().item(),
        "accuracy": float(np.mean([task.is_correct(problem, text) for problem, text in responses])),
        "completion_length": rollout.lengths.double().mean().item(),
        "frac_truncated": rollout.truncated.double().mean().item(),
        "entropy": rollout.entropy[rollout.mask].mean().item(),
        "advantage_min": experience.advantages.min().item(),
        "advantage_max": experience.advantages.max().item(),
        "drift_coef": experience.drift_coef if config.row.drift else 0.0,
        **token_metrics(passes[-1].outputs),
        "grad_norm": mean_of_numbers([norm for seen in passes for norm in seen.grad_norms]),
        "updates": sum(len(seen.grad_norms) for seen in passes),
        "skipped_updates": sum(seen.skipped for seen in passes),
        "loss": float(np.mean([loss for seen in passes for loss in seen.losses])),
    }
    if experience.ref_logp is not None:  # If beta acts in the loss, token_metrics has added kl_ref.
        metrics.setdefault("kl_ref", k3((experience.ref_logp - rollout.logp)[rollout.mask]).mean().item())
    return metrics | {f"reward/{name}": mean_of_numbers(logged) for name, logged in experience.context.metrics.items()}


def mean_of_numbers(values: Sequence[float]) -> float:
    """The mean of the values that are numbers, or 0 if there are none. A response without a reward has NaN."""
    numbers = [value for value in values if not math.isnan(value)]
    return float(np.mean(numbers)) if numbers else 0.0


def before_training(rollout: Rollout, rewards: Sequence[float], right: Tensor) -> dict[str, float]:
    """The metrics of step 0, from samples for the held-out problems; `right`, of any shape, judges each sample."""
    return {
        "reward": mean_of_numbers(rewards),
        "accuracy": right.double().mean().item(),
        "completion_length": rollout.lengths.double().mean().item(),
    }


def step_timings(rollout: Rollout, rollout_seconds: float, update_seconds: float) -> dict[str, float]:
    """What depends on the clock and the machine."""
    return {
        "rollout_seconds": rollout_seconds,
        "update_seconds": update_seconds,
        "tokens_per_second": int(rollout.lengths.sum()) / rollout_seconds,
        "peak_memory_bytes": peak_memory(),
    }


def peak_memory() -> int:
    """The largest number of bytes so far: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


def sample_rows(step: int, experience: Experience) -> list[dict]:
    """The responses to all prompts, as rows of samples.jsonl, with what the reward function logged of them."""
    answers = zip(
        experience.problems,
        experience.rollout.completions,
        [None if math.isnan(reward) else reward for reward in experience.rewards.flatten().tolist()],
        experience.advantages.flatten().tolist(),
        strict=True,
    )
    rows: list[dict[str, Any]] = [
        {"step": step, "prompt": problem["prompt"], "completion": text, "reward": reward, "advantage": advantage}
        for problem, text, reward, advantage in answers
    ]
    for name, values in experience.context.extra.items():
        for row, value in zip(rows, values, strict=False):
            row.setdefault("extra", {})[name] = value
    return rows


def pass_rows(step: int, passes: Sequence[Pass]) -> list[dict]:
    """Ratios, KL and shares of clipped tokens of each pass, as rows of passes.jsonl; passes count from 1."""
    return [{"step": step, "pass": number, **token_metrics(seen.outputs)} for number, seen in enumerate(passes, 1)]
