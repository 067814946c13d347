"""Every figure: `plots.runs` from run folders, `plots.maps`, `plots.studies` and `plots.metrics` from studies,
`plots.memory` from predictions, `plots.tokens` from responses, `plots.objectives` from rows of the table, in one
`plots.style`.

Each function returns a matplotlib `Figure`; nothing here writes a file.
"""

from minicpgd.plots.maps import map_curves, map_frontiers, map_heat
from minicpgd.plots.memory import memory_bars
from minicpgd.plots.metrics import metric_traces
from minicpgd.plots.objectives import objective_curves, token_regions
from minicpgd.plots.runs import ratio_ranges, training_curves
from minicpgd.plots.studies import anatomy_passes, anatomy_rows, drift_coefs, fair_search, warning_signals
from minicpgd.plots.tokens import token_text

__all__ = [
    "anatomy_passes",
    "anatomy_rows",
    "drift_coefs",
    "fair_search",
    "map_curves",
    "map_frontiers",
    "map_heat",
    "memory_bars",
    "metric_traces",
    "objective_curves",
    "ratio_ranges",
    "token_regions",
    "token_text",
    "training_curves",
    "warning_signals",
]
