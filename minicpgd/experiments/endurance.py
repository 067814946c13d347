r"""What keeps a policy alive, for how long, and at what price? The two studies that ask, and the remedies by name.

*Endurance* makes long runs at few updates per rollout, and shorter ones at many. *Stabilisers* makes short runs of
every remedy on the map, learning rate x K.

In: nothing, or a smaller size. Out: a `Study`. `tables.py` and `plots/remedies.py` read their outcomes. In the names,
*stop* is `target_kl`, *max A* the largest |A| of a rollout, and *decay* a learning rate that falls to zero.
"""

from collections.abc import Sequence
from itertools import product

from minicpgd.experiments.runner import BASE, Part, Settings, Study


def remedy(algorithm: str, target_kl: float | None = None, **settings: object) -> Settings:
    """A row with its settings; without a stop unless `target_kl` is given."""
    return {"algorithm": algorithm, "target_kl": target_kl} | settings


DECAY: Settings = {"lr_scheduler_type": "linear"}
REMEDIES: dict[str, Settings] = {
    "GRPO": remedy("grpo"),
    "RLOO": remedy("rloo"),
    "REINFORCE++": remedy("reinforce_pp"),
    "DAPO": remedy("dapo"),
    "GRPO, dual clip": remedy("grpo_dual_clip"),
    "CPGD, α = 0": remedy("cpg"),
    "CPGD, α = 0.01": remedy("cpgd", drift_coef=0.01),  # the authors' α
    "CPGD, α = 0.1": remedy("cpgd", drift_coef=0.1),
    "CPGD, α = 0.3": remedy("cpgd", drift_coef=0.3),
    "CPGD, α = 1": remedy("cpgd", drift_coef=1.0),
    "CPGD, α = 3": remedy("cpgd", drift_coef=3.0),
    "CPGD, α = max A": remedy("cpgd", drift_coef="max_advantage"),
    "CPGD, α adaptive": remedy("cpgd", 0.003, drift_coef="adaptive"),
    "GRPO, drift α = 1": remedy("grpo_drift", drift_coef=1.0),
    "CPGD without clip": remedy("pgd", drift_coef=0.01),
    "CPGD without both": remedy("pg"),
    "GRPO, β = 0.04": remedy("grpo", beta=0.04),
    "GRPO, β = 0.4": remedy("grpo", beta=0.4),
    "GRPO, stop 0.001": remedy("grpo", 0.001),
    "GRPO, stop 0.003": remedy("grpo", 0.003),
    "GRPO, stop 0.01": remedy("grpo", 0.01),
    "GRPO, stop 0.03": remedy("grpo", 0.03),
    "CPGD, default": remedy("cpgd", 0.003, drift_coef=0.01),
    "CPGD, α = max A, stop": remedy("cpgd", 0.003, drift_coef="max_advantage"),
    "GRPO, dual clip, stop": remedy("grpo_dual_clip", 0.003),
    "GRPO, decay": remedy("grpo") | DECAY,
    "GRPO, decay, stop": remedy("grpo", 0.003) | DECAY,
    "CPGD, default, decay": remedy("cpgd", 0.003, drift_coef=0.01) | DECAY,
}
ENDURING = (
    "GRPO", "RLOO", "REINFORCE++", "CPGD, α = 0", "CPGD, α = 0.01", "CPGD, α = max A", "CPGD, default",
    "GRPO, stop 0.003", "GRPO, decay", "CPGD, default, decay",
)  # fmt: skip
FIGURE_1 = ("GRPO, dual clip", "GRPO, drift α = 1", "CPGD without clip", "CPGD without both")
TWO_PASSES = ("GRPO", "CPGD, α = 0.01", "CPGD, α = max A", "CPGD, default", "GRPO, stop 0.003", "GRPO, decay")
REUSED = (
    "CPGD, default",
    "GRPO, stop 0.003",
    "CPGD, α = max A",
    "CPGD, α = max A, stop",
    "CPGD, α adaptive",
    "CPGD, α = 3",
)
ON_THE_MAP = tuple(name for name in REMEDIES if name not in ("DAPO", "CPGD, default, decay", *FIGURE_1[1:]))


def endurance_study(
    seeds: Sequence[int] = range(100, 105),
    rates: Sequence[float] = (1e-4, 2e-4, 3e-4),
    max_steps: int = 500,
    reused_steps: int = 100,
) -> Study:
    """Runs of 500 rollouts at K = 4 and 8; the methods of the paper's Figure 1; and 100 rollouts at K = 64.

    K = 8 is two passes; it has fewer remedies and the first three seeds, since its runs take longest. The part
    `K = 64` has what was healthy after 20 rollouts there.
    """

    def grid(names: Sequence[str], passes: int, of_rates: Sequence[float], steps: int = max_steps) -> list[Settings]:
        return [
            REMEDIES[name] | {"learning_rate": rate, "num_iterations": passes, "max_steps": steps}
            for rate, name in product(of_rates, names)
        ]

    parts = [
        Part("K = 4", seeds, lambda _: grid(ENDURING, 1, rates)),
        Part("K = 8", seeds[:3], lambda _: grid(TWO_PASSES, 2, rates)),
        Part("Figure 1", seeds, lambda _: grid(FIGURE_1, 1, rates[-1:])),
        Part("K = 64", seeds, lambda _: grid(REUSED, 16, rates[:1], reused_steps)),
    ]
    base: Settings = {"num_prompts": 8, "num_generations": 8, "eval_steps": 25, "logging_steps": 50, "save_steps": 100}
    asks = "For how many rollouts does a policy stay alive, and with which remedy?"
    return Study("endurance", asks, base, parts, log_every=5)


def stabilisers_study(
    rates: Sequence[float] = (3e-5, 1e-4, 3e-4, 1e-3),
    updates: Sequence[int] = (4, 16, 64),
    seeds: Sequence[int] = range(100, 103),
    names: Sequence[str] = ON_THE_MAP,
    max_steps: int = 20,
) -> Study:
    """Every remedy on the map: how much of it stays healthy, and what the remedy costs in updates and seconds."""
    grid = [
        REMEDIES[name] | {"learning_rate": rate, "num_iterations": k // 4}
        for k, rate, name in product(updates, rates, names)
    ]
    asks = "Which remedy keeps most of the map healthy, and at what price?"
    return Study("stabilisers", asks, BASE | {"max_steps": max_steps}, [Part("map", seeds, lambda _: grid)])
