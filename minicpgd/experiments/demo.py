"""The demo: four algorithms, the same problems, the same seed, many updates on every rollout.

64 updates on each rollout (4 minibatches, 16 passes) at twice the default learning rate are far more than anyone
recommends. The setting was chosen because the difference shows; the studies say where else it shows (`catalogue.py`).

In: a folder and a seed. Out: a config for each algorithm.
"""

from itertools import count
from pathlib import Path
from typing import Any

from minicpgd.config import TrainConfig
from minicpgd.experiments.catalogue import FOUR

SETTING: dict[str, Any] = {
    "max_steps": 20, "num_prompts": 16, "num_generations": 8, "num_iterations": 16, "num_minibatches": 4,
    "learning_rate": 2e-4, "eval_steps": 2, "logging_steps": 1,
}  # fmt: skip


def free_folder(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, ... that does not exist."""
    candidates = (folder.parent / f"{folder.name or 'demo'}-{n}" if n > 1 else folder for n in count(1))
    return next(path for path in candidates if not path.exists())


def demo_configs(folder: Path, seed: int = 0) -> list[TrainConfig]:
    """One run per algorithm; only the algorithm differs."""
    return [TrainConfig(algorithm=name, seed=seed, output_dir=str(folder / name), **SETTING) for name in FOUR]
