r"""Statistics: has a run collapsed, and how sure may we be of a number?

All of this was written down before a single run of the studies was made.

*Collapsed*: the mean reward of the last 10 steps is below half of its best mean over any 10 consecutive steps, or below
that of the model that training started from.

*Healthy*: not collapsed, and at least half of the held-out problems right at the end, greedily. Standing still is no
collapse, and no health either: the embedded model starts with a quarter.

Intervals hold 95 %. A share of runs has Wilson's. A mean has a bootstrap over seeds: a seed is drawn or left out as a
whole, with every setting it was run at, since it meets the same problems at each of them. Five seeds make a coarse
bootstrap, which tends to be too narrow; read it as the spread of the seeds, not as a guarantee.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

WINDOW = 10
HEALTHY = 0.5


class Estimate(NamedTuple):
    """A number and its 95 % interval, which is NaN where one value is all there is."""

    value: float
    low: float
    high: float


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
    """Whether a run fell apart; the rule stands above.

    Args:
        reward: mean reward of each step, in order.
        start: mean reward of the model that training started from.

    Raises:
        ValueError: fewer than 10 steps.
    """
    means = window_means(reward)
    return bool(means[-1] < 0.5 * means.max() or means[-1] < start)


def share(successes: int, n: int) -> Estimate:
    """A share of n runs with its Wilson interval (Wilson 1927)."""
    from scipy.stats import binomtest  # here, as its half a second is more than most commands need

    interval = binomtest(int(successes), int(n)).proportion_ci(0.95, method="wilson")
    return Estimate(successes / n, interval.low, interval.high)


def mean(per_seed: ArrayLike) -> Estimate:
    """The mean of one value per seed, with its percentile bootstrap interval; the same numbers each time."""
    values = np.asarray(per_seed, dtype=float)
    if len(values) < 2 or np.ptp(values) == 0:
        spread = values[0] if len(values) > 1 else np.nan
        return Estimate(values.mean(), spread, spread)
    from scipy.stats import bootstrap

    drawn = bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0))
    return Estimate(values.mean(), *drawn.confidence_interval)
