r"""Statistics: how sure may one be of a number?

Intervals hold 95 %. A share of runs has Wilson's interval. A mean has a bootstrap interval over seeds: a seed is drawn
or left out as a whole, with every setting that it was run at, since it has the same problems at each of them. A
bootstrap over five seeds tends to be too narrow; read it as the spread of the seeds, not as a guarantee.

In: counts, or one value per seed. Out: an `Estimate`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Estimate(NamedTuple):
    """A number and its 95 % interval, which is NaN for a single value."""

    value: float
    low: float
    high: float


def wilson(successes: int, n: int) -> Estimate:
    """A share of n runs with its Wilson interval (Wilson 1927)."""
    from scipy.stats import binomtest  # This import takes half a second.

    interval = binomtest(int(successes), int(n)).proportion_ci(0.95, method="wilson")
    return Estimate(successes / n, interval.low, interval.high)


def bootstrap_mean(per_seed: ArrayLike) -> Estimate:
    """The mean of one value per seed, with its percentile bootstrap interval. The result is always the same."""
    values = np.asarray(per_seed, dtype=float)
    if len(values) < 2 or np.ptp(values) == 0:
        spread = values[0] if len(values) > 1 else np.nan
        return Estimate(values.mean(), spread, spread)
    from scipy.stats import bootstrap

    drawn = bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0))
    return Estimate(values.mean(), *drawn.confidence_interval)
