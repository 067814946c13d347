"""minicpgd: learn, watch and run CPGD (arXiv 2505.12504) beside its baselines."""

from minicpgd.algorithms import ALGORITHMS, Algorithm, LossOutput
from minicpgd.config import TrainConfig
from minicpgd.errors import UserError
from minicpgd.evaluation import evaluate
from minicpgd.runlog import load_run
from minicpgd.trainer import train

__all__ = ["ALGORITHMS", "Algorithm", "LossOutput", "TrainConfig", "UserError", "evaluate", "load_run", "train"]
__version__ = "0.1.0"
