"""The mathematics: every algorithm is a row of one table.

In: rewards (N, G) and log-probabilities (B, T), as plain tensors. Out: advantages (N, G), then a scalar loss and its
metrics. This package needs torch and nothing else. Read `surrogates.py`, `loss.py` and `table.py`, in that order.
"""

from minicpgd.algorithms.advantages import WEIGHTS, kept_groups
from minicpgd.algorithms.aggregation import AGGREGATIONS
from minicpgd.algorithms.divergence import bounded_drift, exact_kl, k1, k2, k3
from minicpgd.algorithms.loss import (
    Algorithm,
    LossOutput,
    LossSettings,
    adaptive_drift_coef,
    drift_warning,
    max_advantage_coef,
    mean_kl,
    token_metrics,
)
from minicpgd.algorithms.surrogates import LEVELS
from minicpgd.algorithms.table import ALGORITHMS, display_name

__all__ = [
    "AGGREGATIONS", "ALGORITHMS", "LEVELS", "WEIGHTS", "Algorithm", "LossOutput", "LossSettings",
    "adaptive_drift_coef", "bounded_drift", "display_name", "drift_warning", "exact_kl", "k1", "k2", "k3",
    "kept_groups", "max_advantage_coef", "mean_kl", "token_metrics",
]  # fmt: skip
