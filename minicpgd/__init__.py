"""minicpgd: learn, watch and run CPGD (arXiv 2505.12504) beside its baselines."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minicpgd.algorithms import ALGORITHMS, Algorithm, LossOutput
    from minicpgd.config import TrainConfig
    from minicpgd.errors import UserError
    from minicpgd.evaluation import evaluate
    from minicpgd.runlog import load_run
    from minicpgd.trainer import train

__all__ = ["ALGORITHMS", "Algorithm", "LossOutput", "TrainConfig", "UserError", "evaluate", "load_run", "train"]
__version__ = "0.1.0"

_HOMES = {
    "ALGORITHMS": "algorithms",
    "Algorithm": "algorithms",
    "LossOutput": "algorithms",
    "TrainConfig": "config",
    "UserError": "errors",
    "evaluate": "evaluation",
    "load_run": "runlog",
    "train": "trainer",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that `__main__` is reached before torch is."""
    if name not in _HOMES:
        raise AttributeError(f"module 'minicpgd' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minicpgd.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
