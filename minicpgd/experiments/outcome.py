r"""The outcome of a run, in one row.

*Collapsed*: the mean reward of the last 10 steps is below half of its best mean over any 10 consecutive steps, or below
the reward of the model that training started from.

*Healthy*: not collapsed, and at least half of the held-out problems right at the end, greedily. A run that never learns
has not collapsed, and is not healthy either: the embedded model starts with a quarter.

Both rules were written down before the first run of the studies.

*Fell*: at some step the mean reward of the last 10 steps was below half of its best until then. The run may recover.

In: a finished run's folder. Out: an `Outcome`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from minicpgd.training.run_folder import load_run

WINDOW = 10
HEALTHY = 0.5
DIVERGED = "diverged.txt"  # This file marks a run whose loss was not a number.


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run. Accuracies are greedy, on the held-out set, rewards are of samples; shares of 1.

    `reward_best` and `reward_last` are means over 10 steps. KL is that of the last pass over a rollout to the sampling
    policy, in nats per token: its largest value, and its mean over the last 10 steps.
    """

    run: str
    accuracy_before: float
    accuracy_best: float
    accuracy_final: float
    steps_to_90: float  # the first evaluated step with an accuracy of 0.9; NaN if there is none
    reward_before: float
    reward_best: float
    reward_last: float
    collapsed: bool
    diverged: bool
    healthy: bool
    kl_largest: float
    kl_last: float
    ratio_largest: float
    length_last: float
    fell: float  # the first step at which it had fallen; NaN if there is none
    updates_mean: float  # updates made per rollout; K, unless a stop ended the passes or no response had an advantage
    drift_coef_mean: float  # means over the steps
    advantage_max_mean: float
    advantage_min_mean: float


def window_means(reward: ArrayLike) -> np.ndarray:
    """(S,) rewards of S steps to the (S - 9,) means over 10 consecutive ones.

    Raises:
        ValueError: fewer than 10 steps; no judgement is possible.
    """
    rewards = np.asarray(reward, dtype=float)
    if len(rewards) < WINDOW:
        raise ValueError(f"{len(rewards)} steps: collapse is defined over windows of {WINDOW}")
    return np.convolve(rewards, np.full(WINDOW, 1 / WINDOW), mode="valid")


def collapsed(reward: ArrayLike, start: float) -> bool:
    """Whether a run collapsed, from the mean reward of each step and that of the model at the `start`.

    Raises:
        ValueError: fewer than 10 steps.
    """
    means = window_means(reward)
    return bool(means[-1] < 0.5 * means.max() or means[-1] < start)


def first_fall(reward: ArrayLike) -> float:
    """The first step at which the mean reward of 10 steps is below half of its best until then; NaN if there is none.

    Raises:
        ValueError: fewer than 10 steps.
    """
    means = window_means(reward)
    below = means < 0.5 * np.maximum.accumulate(means)
    return float(WINDOW + below.argmax()) if below.any() else np.nan


def outcome(folder: Path) -> Outcome:
    """The outcome of a finished run. A diverged run has collapsed, and its final accuracy is 0."""
    _, metrics, _ = load_run(folder)
    diverged = (folder / DIVERGED).exists()
    reward = metrics["reward"]
    measured = ~np.isnan(metrics["eval_accuracy"])
    accuracy, at = metrics["eval_accuracy"][measured], metrics["step"][measured]
    means = window_means(np.pad(reward[1:], (0, max(0, WINDOW + 1 - len(reward)))))  # A diverged run may be short.
    has_collapsed = diverged or collapsed(reward[1:], start=reward[0])
    final = 0.0 if diverged else accuracy[-1]

    def over(name: str, summary: Callable[[np.ndarray], float], steps: slice = slice(1, None)) -> float:
        return float(summary(metrics[name][steps])) if len(metrics.get(name, ())) > 1 else np.nan

    last = slice(-WINDOW, None)
    return Outcome(
        run=folder.name,
        accuracy_before=accuracy[0],
        accuracy_best=accuracy.max(),
        accuracy_final=final,
        steps_to_90=next((step for step, a in zip(at, accuracy, strict=True) if a >= 0.9), np.nan),
        reward_before=reward[0],
        reward_best=means.max(),
        reward_last=means[-1],
        collapsed=has_collapsed,
        diverged=diverged,
        healthy=not has_collapsed and final >= HEALTHY,
        kl_largest=over("kl_old", np.max),
        kl_last=over("kl_old", np.mean, last),
        ratio_largest=over("ratio_max", np.max),
        length_last=over("completion_length", np.mean, last),
        fell=len(reward) - 1.0 if diverged else first_fall(reward[1:]),
        updates_mean=over("updates", np.mean),
        drift_coef_mean=over("drift_coef", np.mean),
        advantage_max_mean=over("advantage_max", np.mean),
        advantage_min_mean=over("advantage_min", np.mean),
    )
