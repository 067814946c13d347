r"""The studies: what is asked, of which algorithms, at which settings, with which seeds.

Each is a function of what may be made smaller: `STUDIES` has the full ones, `QUICK` those that take minutes. The seeds
from 100 on had not been used for anything before, and those of a search are never used for its report.

All share one rollout budget: 20 rollouts of 8 problems x 8 responses. The learning rate, and K, the number of updates
made on a rollout, say how hard an algorithm is pushed.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import product

import pandas as pd

from minicpgd.experiments.runner import Part, Settings, Study

FOUR = ("cpgd", "grpo", "rloo", "reinforce_pp")
BASE: Settings = {"max_steps": 20, "num_prompts": 8, "num_generations": 8, "eval_steps": 2, "logging_steps": 5}
HARD: Settings = {"learning_rate": 1e-4, "num_iterations": 16}  # K = 64


def _always(settings: Iterable[Settings]) -> Callable[[pd.DataFrame], list[Settings]]:
    fixed = list(settings)
    return lambda so_far: fixed


def map_study(
    rates: Sequence[float] = (3e-5, 1e-4, 3e-4, 1e-3),
    updates: Sequence[int] = (4, 16, 64),
    seeds: Sequence[int] = range(100, 105),
    max_steps: int = 20,
) -> Study:
    """The headline: learning rate x updates per rollout, for four algorithms."""
    grid = [
        {"algorithm": algorithm, "learning_rate": rate, "num_iterations": k // 4}
        for k, rate, algorithm in product(updates, rates, FOUR)
    ]
    return Study(
        "map",
        "How hard may each algorithm be pushed: how often can a rollout be reused, how large may the step be?",
        BASE | {"max_steps": max_steps},
        [Part("map", seeds, _always(grid))],
    )


def drift_study(
    coefs: Sequence[float | str] = (0.0, 0.3, 1.0, 3.0, 10.0, 30.0, "auto"),
    seeds: Sequence[int] = range(100, 103),
    max_steps: int = 20,
) -> Study:
    r"""$\alpha$ from 0 to 30 beside `auto`, where the advantages are of different size."""
    shapes = [(generations, weight, 1e-4) for generations in (4, 16) for weight in ("std", "equal")]
    shapes.append((16, "std", 2e-4))
    grid: list[Settings] = [
        HARD
        | {"num_generations": g, "num_prompts": 64 // g, "advantage_weight": w, "learning_rate": rate, "drift_coef": c}
        for (g, w, rate), c in product(shapes, coefs)
    ]
    return Study(
        "drift",
        "How large should the drift's coefficient be, and does the best one follow the size of the advantages?",
        BASE | {"max_steps": max_steps},
        [Part("drift", seeds, _always(grid))],
    )


def anatomy_study(seeds: Sequence[int] = range(100, 108), max_steps: int = 20) -> Study:
    """CPGD taken apart, its drift given to the others, and GRPO held by a reference instead."""
    rows = (
        *("cpgd", "cpg", "pgd", "pg", "grpo", "grpo_drift", "grpo_dual_clip", "grpo_unclipped"),
        *("rloo", "rloo_drift", "reinforce_pp", "reinforce_pp_drift"),
    )
    arms: list[Settings] = [HARD | {"algorithm": row} for row in rows]
    arms += [HARD | {"algorithm": "grpo", "beta": beta} for beta in (0.04, 0.4)]
    return Study(
        "anatomy",
        "Which half of CPGD does the work, and does it help the others as much?",
        BASE | {"max_steps": max_steps},
        [Part("anatomy", seeds, _always(arms))],
    )


def fair_study(
    draws: int = 12, search_seeds: Sequence[int] = (200,), seeds: Sequence[int] = range(300, 308), max_steps: int = 20
) -> Study:
    """Each algorithm at its own best settings, found with the same number of runs; then fresh seeds."""

    def search(_: pd.DataFrame) -> list[Settings]:
        """The same draws for each: learning rate (log-uniform, 1e-5 to 3e-4), epsilon, beta."""
        random_ = random.Random(0)
        drawn = [
            {
                "learning_rate": float(f"{10 ** random_.uniform(-5, math.log10(3e-4)):.2g}"),
                "epsilon": random_.choice((0.1, 0.2, 0.3)),
                "beta": random_.choice((0.0, 0.0, 0.01, 0.1)),
            }
            for _ in range(draws)
        ]
        return [HARD | {"algorithm": algorithm} | settings for settings in drawn for algorithm in FOUR]

    def best(found: pd.DataFrame) -> list[Settings]:
        """By the mean reward of the last 10 steps of training: the held-out problems have no say."""
        names = ["algorithm", "learning_rate", "epsilon", "beta"]
        means = found.groupby(names, sort=False)["reward_last"].mean().reset_index()
        chosen = means.loc[means.groupby("algorithm", sort=False)["reward_last"].idxmax(), names]
        return [HARD | settings for settings in chosen.to_dict("records")]

    return Study(
        "fair",
        "Does the difference survive when each algorithm has its own best settings?",
        BASE | {"max_steps": max_steps},
        [Part("search", search_seeds, search), Part("report", seeds, best)],
    )


STUDIES = {study.name: study for study in (map_study(), drift_study(), anatomy_study(), fair_study())}
QUICK = {
    study.name: replace(study, quick=True)
    for study in (
        map_study(rates=(1e-4, 3e-4), updates=(4, 64), seeds=range(100, 102), max_steps=12),
        drift_study(coefs=(0.0, 3.0, "auto"), seeds=(100,), max_steps=10),
        anatomy_study(seeds=(100,), max_steps=10),
        fair_study(draws=2, seeds=(300,), max_steps=10),
    )
}
