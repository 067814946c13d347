"""Plots: every figure, in one style.

In: run folders, studies, predictions, responses, or rows of the table. Out: a matplotlib `Figure`; only `published.py`
writes files. `style.py` has what the figures share.
"""

from minicpgd.plots.clip_and_drift import clip_against_drift
from minicpgd.plots.memory import memory_bars
from minicpgd.plots.objectives import objective_curves, token_regions
from minicpgd.plots.remedies import endurance_fates, endurance_survival, map_heat, rollout_passes, stabilisers_price
from minicpgd.plots.runs import ratio_ranges, run_labels, training_curves
from minicpgd.plots.studies import fair_search, warning_signals
from minicpgd.plots.tokens import token_text

__all__ = [
    "clip_against_drift", "endurance_fates", "endurance_survival", "fair_search", "map_heat", "memory_bars",
    "objective_curves", "ratio_ranges", "rollout_passes", "run_labels", "stabilisers_price", "token_regions",
    "token_text", "training_curves", "warning_signals",
]  # fmt: skip
