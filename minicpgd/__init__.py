"""minicpgd: learn, watch and run CPGD (arXiv 2505.12504) beside its baselines.

The packages, in reading order: `algorithms` (the mathematics), `tasks`, `models`, `recipes`, `memory`, `training` (one
step, and the loop), `experiments` (many runs), `plots`, `cli`, `integrations` (TRL and verl).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minicpgd.algorithms import ALGORITHMS, Algorithm, LossOutput, LossSettings
    from minicpgd.config import TrainConfig
    from minicpgd.errors import UserError
    from minicpgd.training import evaluate, load_run, train

__all__ = [
    "ALGORITHMS", "Algorithm", "LossOutput", "LossSettings", "TrainConfig", "UserError", "evaluate", "load_run",
    "train",
]  # fmt: skip
__version__ = "0.1.0"

_PACKAGE_OF = {
    "TrainConfig": "config",
    "UserError": "errors",
    **dict.fromkeys(("ALGORITHMS", "Algorithm", "LossOutput", "LossSettings"), "algorithms"),
    **dict.fromkeys(("evaluate", "load_run", "train"), "training"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `minicpgd --help` does not wait for torch."""
    if name not in _PACKAGE_OF:
        raise AttributeError(f"module 'minicpgd' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minicpgd.{_PACKAGE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
