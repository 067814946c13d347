"""The demo: four algorithms, the same problems, the same seed, pushed hard. Who survives?

K = 64 updates on every rollout (4 minibatches, 16 passes) at twice the default learning rate is far more than anyone
recommends. It stands in for every way in which a policy can get ahead of its data.
The setting was chosen because the difference shows at it; where else it shows, a study has to say.
"""

from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from minicpgd.config import TrainConfig
from minicpgd.runlog import load_run, load_timings
from minicpgd.study import WINDOW, collapsed

ALGORITHMS = ("cpgd", "grpo", "rloo", "reinforce_pp")


def free_folder(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, ... that does not exist."""
    candidates = (folder.with_name(f"{folder.name}-{n}") if n > 1 else folder for n in count(1))
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
        for algorithm in ALGORITHMS
    ]


@dataclass(frozen=True)
class Outcome:
    """A line of the demo's table. Accuracies are greedy, shares of 1; rewards sampled; KL in nats per token."""

    algorithm: str
    before: float
    best: float
    final: float
    reward_before: float
    reward_last: float
    collapsed: bool
    largest_kl: float
    largest_ratio: float
    seconds: float


def outcome(run: str | Path) -> Outcome:
    """What came of a finished run."""
    config, metrics, _ = load_run(run)
    timings = load_timings(run)
    accuracy = metrics["eval_accuracy"]
    measured = accuracy[~np.isnan(accuracy)]
    return Outcome(
        algorithm=config.algorithm,
        before=measured[0],
        best=measured.max(),
        final=measured[-1],
        reward_before=metrics["reward"][0],
        reward_last=metrics["reward"][-WINDOW:].mean(),
        collapsed=collapsed(metrics["reward"][1:], start=metrics["reward"][0]),
        largest_kl=np.nanmax(metrics["kl_old"]),
        largest_ratio=np.nanmax(metrics["ratio_max"]),
        seconds=(timings["rollout_seconds"] + timings["update_seconds"]).sum(),
    )
