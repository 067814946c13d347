"""Experiments: many runs that answer one question, and what may be concluded from them.

In: a question as a grid of settings and seeds. Out: tables with 95 % intervals. `catalogue.py` says what is asked,
`runner.py` makes the runs, `outcome.py` judges each, and `tables.py` sums up.
"""

from minicpgd.experiments.catalogue import QUICK, STUDIES
from minicpgd.experiments.early_warning import warning_study
from minicpgd.experiments.outcome import Outcome, collapsed, outcome
from minicpgd.experiments.runner import Part, Study, run_all, run_study
from minicpgd.experiments.statistics import Estimate, bootstrap_mean, wilson
from minicpgd.experiments.tables import SUMMARIES

__all__ = [
    "QUICK", "STUDIES", "SUMMARIES", "Estimate", "Outcome", "Part", "Study", "bootstrap_mean", "collapsed", "outcome",
    "run_all", "run_study", "warning_study", "wilson",
]  # fmt: skip
