r"""The demo and the studies: the question, the algorithms, the settings and the seeds of each.

Each study is a function of what may be made smaller: `STUDIES` has the full ones, `QUICK` those that take minutes. The
seeds from 100 on were not used for anything before. The seeds of a search are never used for its report.

`endurance.py` has the two largest studies, and `default_rule.py` the one that chose the default.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from minicpgd.config import TrainConfig
from minicpgd.experiments.default_rule import default_study
from minicpgd.experiments.endurance import endurance_study, stabilisers_study
from minicpgd.experiments.runner import BASE, Part, Settings, Study

# The demo's setting was chosen because the difference shows: 64 updates on each rollout, at twice the default learning
# rate, are far more than anyone recommends. The studies say where else it shows.
DEMO: Settings = {
    "max_steps": 20, "num_prompts": 16, "num_generations": 8, "num_iterations": 16, "num_minibatches": 4,
    "learning_rate": 2e-4, "eval_steps": 2, "logging_steps": 1,
}  # fmt: skip
QUICK_NAMES = ("GRPO", "CPGD, α = 0.01", "CPGD, α = max A", "GRPO, stop 0.003", "CPGD, default")
FOUR = ("cpgd", "grpo", "rloo", "reinforce_pp")
HARD: Settings = {"learning_rate": 1e-4, "num_iterations": 16}  # This makes K = 64.


def demo_configs(folder: Path, seed: int = 0) -> list[TrainConfig]:
    """The runs of the demo: CPGD and GRPO with this package's stop, then all four without, as their papers have them.

    Everything else is the same, and the default. Each run has a folder in `folder`.
    """
    stopped: dict[str, Settings] = {f"{name}_kl_stop": {"algorithm": name} for name in FOUR[:2]}
    papers: dict[str, Settings] = {name: {"algorithm": name, "target_kl": None} for name in FOUR}
    runs = (stopped | papers).items()
    return [TrainConfig(**DEMO, **settings, seed=seed, output_dir=str(folder / name)) for name, settings in runs]


def fair_study(
    draws: int = 12, search_seeds: Sequence[int] = (200,), seeds: Sequence[int] = range(300, 308), max_steps: int = 20
) -> Study:
    """Each algorithm at its own best settings, found with the same number of runs; then fresh seeds."""

    def search(_: pd.DataFrame) -> list[Settings]:
        """The same draws for each: a learning rate in each twelfth of 1e-5 to 1e-3, every other with the stop."""
        random_ = random.Random(0)
        arms: list[Settings] = []
        for i in range(draws):
            rate = 10 ** (-5 + 2 * (i + random_.random()) / draws)
            settings: Settings = {"learning_rate": float(f"{rate:.2g}"), "epsilon": random_.choice((0.1, 0.2, 0.3))}
            settings |= {"beta": random_.choice((0.0, 0.0, 0.01, 0.1)), "target_kl": (None, 0.003)[i % 2]}
            arms += [HARD | {"algorithm": name} | settings for name in FOUR]
        return arms

    def best(found: pd.DataFrame) -> list[Settings]:
        """The settings with the best mean reward in the last 10 steps. The held-out problems play no part."""
        names = ["algorithm", "learning_rate", "epsilon", "beta", "target_kl"]
        means = found.groupby(names, sort=False, dropna=False)["reward_last"].mean().reset_index()
        chosen = means.loc[means.groupby("algorithm", sort=False)["reward_last"].idxmax(), names]
        return [HARD | settings for settings in chosen.astype(object).where(chosen.notna(), None).to_dict("records")]

    asks = "Does the difference survive when each algorithm has its own best settings?"
    parts = [Part("search", search_seeds, search), Part("report", seeds, best)]
    return Study("fair", asks, BASE | {"max_steps": max_steps}, parts)


_ALL = (stabilisers_study, endurance_study, fair_study, default_study)
STUDIES = {study.name: study for study in (make() for make in _ALL)}
QUICK = {
    study.name: replace(study, quick=True)
    for study in (
        stabilisers_study(rates=(1e-4, 3e-4), updates=(4, 64), seeds=range(100, 102), names=QUICK_NAMES, max_steps=12),
        endurance_study(seeds=(100,), rates=(2e-4,), max_steps=20, reused_steps=10),
        fair_study(draws=2, seeds=(300,), max_steps=10),
        default_study(seeds=(100,), sizes=(8,), rates=(2e-4,), map_rates=(1e-4, 3e-4), max_steps=20),
    )
}
