r"""How the default of `cpgd` was chosen: the candidates, the rule, and the study that applies it.

In: nothing, or a smaller size. Out: a `Study`. `tables.default_summary` reads its outcome. docs/default.md states the
rule in words; it was committed before the runs that decide.

1. Never worse than no drift: over 500 rollouts at K = 4 no run collapses, and the mean greedy accuracy of the last
   fifth is at least 0.95 of that of `cpg`, at every learning rate and size of the rollout.
2. Then the largest healthy share of the map, learning rate x K.
3. Two shares are equal if they differ by less than 0.05. Then the candidate that stands first in `CANDIDATES` wins.

The study saves runs: a candidate that collapses with the first seed of 1 (the part `screen`) is left out of the rest,
and only the candidate that wins by 2 and 3 makes all long runs, with rollouts of 8 x 8 and of 16 x 16 responses.
"""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import product

import pandas as pd

from minicpgd.config import TrainConfig
from minicpgd.experiments.runner import BASE, Part, Settings, Study

CANDIDATES: dict[str, Settings] = {
    "paper": {"algorithm": "cpgd", "drift_coef": 0.01, "target_kl": None},
    "paper + stop": {"algorithm": "cpgd", "drift_coef": 0.01, "target_kl": 0.003},
    "max advantage": {"algorithm": "cpgd", "drift_coef": "max_advantage", "target_kl": None},
    "max advantage + stop": {"algorithm": "cpgd", "drift_coef": "max_advantage", "target_kl": 0.003},
    "adaptive": {"algorithm": "cpgd", "drift_coef": "adaptive", "target_kl": 0.003},
}
OTHERS: dict[str, Settings] = {  # They have no drift. Their drift_coef is only what a log of theirs contains.
    "no drift": {"algorithm": "cpg", "drift_coef": 0.01, "target_kl": None},
    "GRPO": {"algorithm": "grpo", "drift_coef": 0.01, "target_kl": None},
    "GRPO + stop": {"algorithm": "grpo", "drift_coef": 0.01, "target_kl": 0.003},
}
SETTINGS = CANDIDATES | OTHERS
ENOUGH = 0.95  # A candidate has at least this share of the accuracy of `cpg`.
EQUAL = 0.05  # Shares of the map that differ by less are equal.


def setting_names(table: pd.DataFrame, settings: dict[str, Settings] = SETTINGS) -> pd.Series:
    """The name in `settings` of each row of a study's table. An empty cell is the default of a config, or no stop."""
    default = asdict(TrainConfig()) | {"target_kl": None}
    columns = sorted({column for values in settings.values() for column in values})
    names = {tuple(str(values.get(c, default[c])) for c in columns): name for name, values in settings.items()}
    cells = table.reindex(columns=columns).astype(object)
    rows = cells.where(cells.notna(), pd.Series(default), axis=1).itertuples(index=False)
    return pd.Series([names[tuple(map(str, row))] for row in rows], index=table.index, dtype=object)


def survivors(table: pd.DataFrame) -> list[str]:
    """The candidates of which no run of the part `screen` collapsed, in the order of `CANDIDATES`."""
    screen = table[table["part"] == "screen"]
    collapsed = set(setting_names(screen)[screen["collapsed"].astype(bool)])
    return [name for name in CANDIDATES if name not in collapsed]


def first_on_the_map(table: pd.DataFrame) -> str:
    """The candidate that rules 2 and 3 put first. Only those that survived the screen are on the map."""
    runs = table[table["part"] == "map"]
    shares = runs["healthy"].astype(float).groupby(setting_names(runs)).mean()
    return next(name for name in CANDIDATES if name in shares and shares[name] > shares.max() - EQUAL)


def is_admitted(collapsed: pd.Series, shares: pd.Series) -> bool:
    """Rule 1, from whether each long run collapsed, and from the accuracy at each setting as a share of no drift's."""
    return not collapsed.any() and bool(shares.min() >= ENOUGH)


def default_study(
    seeds: Sequence[int] = range(100, 105),
    sizes: Sequence[int] = (8, 16),
    rates: Sequence[float] = (1e-4, 2e-4),
    map_rates: Sequence[float] = (3e-5, 1e-4, 3e-4, 1e-3),
    max_steps: int = 500,
) -> Study:
    """The study. A rollout of size n has n problems and n responses to each; the map and K = 64 have size 8."""
    long: Settings = {"max_steps": max_steps, "eval_steps": 10, "logging_steps": 50, "save_steps": 100}

    def long_runs(names: Sequence[str], of_sizes: Sequence[int]) -> list[Settings]:
        return [
            SETTINGS[name] | long | {"learning_rate": rate, "num_prompts": n, "num_generations": n}
            for n, rate, name in product(of_sizes, rates, names)
        ]

    def on_the_map(so_far: pd.DataFrame) -> list[Settings]:
        cells = product((1, 4, 16), map_rates, survivors(so_far))
        return [SETTINGS[name] | {"learning_rate": rate, "num_iterations": passes} for passes, rate, name in cells]

    def at_length(so_far: pd.DataFrame) -> list[Settings]:
        # The rule does not need those of the old default. The figure shows them.
        return long_runs(["no drift", first_on_the_map(so_far)], sizes) + long_runs(["max advantage"], sizes[:1])

    reused: Settings = {"learning_rate": 1e-4, "num_iterations": 16, "eval_steps": 5}
    names = ("paper", "paper + stop", "max advantage", "GRPO", "GRPO + stop")
    parts = [
        Part("screen", seeds[:1], lambda _: long_runs(list(CANDIDATES), sizes[:1])),
        Part("map", seeds, on_the_map),
        Part("long", seeds, at_length),
        Part("K = 64", seeds, lambda _: [SETTINGS[name] | reused for name in names]),
    ]
    asks = "Which drift, and which stop, keep CPGD as healthy as no drift at K = 4, and healthy on most of the map?"
    return Study("default", asks, BASE, parts, log_every=5)
