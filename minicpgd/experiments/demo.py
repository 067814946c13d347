"""The demo: four algorithms, the same problems, the same seed, pushed hard. Who survives?

K = 64 updates on every rollout (4 minibatches, 16 passes) at twice the default learning rate is far more than anyone
recommends. It stands in for every way in which a policy can get ahead of its data.
The setting was chosen because the difference shows at it; where else it shows, the studies say (`studies.py`).
"""

from itertools import count
from pathlib import Path

from minicpgd.config import TrainConfig
from minicpgd.experiments.catalogue import FOUR


def free_folder(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, ... that does not exist."""
    candidates = (folder.parent / f"{folder.name or 'demo'}-{n}" if n > 1 else folder for n in count(1))
    return next(path for path in candidates if not path.exists())


def demo_configs(folder: Path, seed: int = 0) -> list[TrainConfig]:
    """One run per algorithm; nothing but the algorithm differs."""
    return [
        TrainConfig(
            algorithm=algorithm,
            seed=seed,
            output_dir=str(folder / algorithm),
            max_steps=20,
            num_prompts=16,
            num_generations=8,
            num_iterations=16,
            num_minibatches=4,
            learning_rate=2e-4,
            eval_steps=2,
            logging_steps=1,
        )
        for algorithm in FOUR
    ]
