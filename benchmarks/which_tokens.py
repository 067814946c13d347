"""Which part of the drift destroys a policy at K = 4, and protects one at K = 64?

    python benchmarks/which_tokens.py            # 114 runs, hours on two cores; you may stop and repeat it
    python benchmarks/which_tokens.py --quick    # a trial with one seed and few rollouts; writes to runs/

Each row below is CPGD with a drift of weight 1 that acts on some tokens only. The rows are not in the package's table:
they answer one question, and nobody should train with them. Out: results/which_tokens/, in the form of a study.
docs/default.md says what each explanation predicts, and `python docs/results.py` fills in what came.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import tyro
from torch import Tensor

from minicpgd.algorithms import ALGORITHMS, Algorithm
from minicpgd.algorithms.advantages import group_centred, inverse_std
from minicpgd.algorithms.aggregation import sequence_mean
from minicpgd.algorithms.divergence import bounded_drift
from minicpgd.algorithms.surrogates import Pair, log_ratio_clip
from minicpgd.cli.study import make_study
from minicpgd.experiments.runner import Part, Settings, Study
from minicpgd.experiments.tables import mean_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "which_tokens"
SECOND_MODEL = Path("runs/which_tokens/second_model")  # from ROOT
RATES = (2e-4, 1e-4)
LORA_RATE = 1e-3
Where = Callable[[Tensor, Tensor, Tensor], Tensor]

PARTS_OF_THE_DRIFT: dict[str, tuple[str, Where]] = {  # name of the row: what the table calls it, and its tokens
    "drift_below": ("tokens with r < 1 − ε", lambda d, A, low: d < low),
    "drift_not_below": ("all but those tokens", lambda d, A, low: d >= low),
    "drift_failed": ("tokens with A < 0", lambda d, A, low: A < 0),
    "drift_succeeded": ("tokens with A > 0", lambda d, A, low: A > 0),
}
ACTS_ON = {"cpg": "nothing", "cpgd": "every token"} | {name: label for name, (label, _) in PARTS_OF_THE_DRIFT.items()}


def with_drift(where: Where) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Pair]:
    """CPGD's surrogate, less a drift of weight 1 on the tokens that `where` chooses by log-ratio, A and lower bound."""

    def surrogate(log_ratio: Tensor, advantage: Tensor, logp: Tensor, low: Tensor, high: Tensor) -> Pair:
        objective, free = log_ratio_clip(log_ratio, advantage, logp, low, high)
        drift = bounded_drift(log_ratio) * where(log_ratio.detach(), advantage, low)
        return objective - drift, free - drift

    return surrogate


def register() -> None:
    """Add the rows to the table of this process. They are not there when another program reads the summaries."""
    for name, (label, where) in PARTS_OF_THE_DRIFT.items():
        ALGORITHMS[name] = Algorithm(
            name, label, group_centred, inverse_std, with_drift(where), sequence_mean, False, "which tokens matter"
        )


if __name__ in ("__main__", "__mp_main__"):  # The second is the name in the processes of a study.
    register()


class TokenStudy(Study):
    """A study whose command is this script."""

    @property
    def command(self) -> str:
        """The command that makes this study."""
        return "python benchmarks/which_tokens.py" + (" --quick" if self.quick else "")


def arm(name: str, **settings: object) -> Settings:
    """A row with a drift of weight 1, if it has one, and without a stop."""
    return {"algorithm": name, "target_kl": None} | ({"drift_coef": 1.0} if name == "cpgd" else {}) | settings


def token_study(
    seeds: Sequence[int] = range(100, 105),
    few_seeds: Sequence[int] = range(100, 103),
    max_steps: int = 300,
    quick: bool = False,
) -> Study:
    """Parts of the drift at K = 4 and K = 64; with fewer seeds another rate, an adapter, another model, other clips."""
    all_rows, three = tuple(ACTS_ON), ("cpgd", "drift_below", "drift_not_below")
    reused: Settings = {"max_steps": min(20, max_steps), "num_iterations": 16, "eval_steps": 5, "logging_steps": 5}

    def few(names: Sequence[str], **settings: object) -> list[Settings]:
        return [arm(name, **settings, max_steps=max_steps) for name in names]

    def no_drift(**settings: object) -> Settings:
        # Its runs are those of the study `default`. The summary reads as many of their rollouts as the others have.
        return arm("cpg", **settings, max_steps=max_steps if quick else 500)

    grids: dict[str, list[Settings]] = {
        "K = 4, 2e-4": [no_drift(learning_rate=2e-4), *few(all_rows[1:], learning_rate=2e-4)],
        "K = 64, 1e-4": [arm(name, learning_rate=1e-4) | reused for name in all_rows],
        "K = 4, 1e-4": [no_drift(learning_rate=1e-4), *few(three, learning_rate=1e-4)],
        "K = 4, LoRA, 1e-3": few(("cpg", *three), learning_rate=LORA_RATE, lora_r=16),
        "K = 4, second model, 2e-4": few(("cpg", *three), learning_rate=2e-4, model=str(SECOND_MODEL)),
        "other clip": [
            setting
            for epsilon in (0.1, 0.4, 0.8)
            for setting in few(("cpg", "cpgd"), learning_rate=2e-4, epsilon=epsilon)
        ],
    }
    base: Settings = {"num_prompts": 8, "num_generations": 8, "eval_steps": 10, "logging_steps": 50, "save_steps": 100}
    main_parts = ("K = 4, 2e-4", "K = 64, 1e-4")
    parts = [
        Part(name, seeds if name in main_parts else few_seeds, lambda _, grid=grid: grid)
        for name, grid in grids.items()
    ]
    asks = "Which part of the drift destroys a policy at K = 4, and protects one at K = 64?"
    return TokenStudy("which_tokens", asks, base, parts, quick=quick, log_every=10)


def late(folder: Path) -> pd.DataFrame:
    """The runs, each with `late`: the greedy accuracy over rollouts 201 to 300, or at K = 64 the final one."""
    table, steps = pd.read_csv(folder / "study.csv"), pd.read_csv(folder / "steps.csv.gz")
    few = table.loc[table["updates_per_rollout"] == 4, "max_steps"].min()
    last = steps[(steps["step"] > few * 2 / 3) & (steps["step"] <= few)].groupby("run")["eval_accuracy"].mean()
    at_end = table["updates_per_rollout"] > 4
    return table.assign(late=table["accuracy_final"].where(at_end, table["run"].map(last)))


def parts_summary(folder: Path = RESULTS) -> pd.DataFrame:
    """The accuracy for each part of the drift, a row each, in each setting: the mean over seeds and its interval."""
    table = late(folder)
    table = table[table["part"] != "other clip"]
    names = table["algorithm"].map(ACTS_ON)
    cells = table.groupby([names, "part"], sort=False)["late"].apply(mean_text).unstack(fill_value="")
    shown = cells.reindex(index=list(ACTS_ON.values()), columns=table["part"].unique())
    return shown.reset_index().rename(columns={"algorithm": "the drift acts on"})


def clip_summary(folder: Path = RESULTS) -> pd.DataFrame:
    """The same with and without the drift for each epsilon, at K = 4 and 2e-4."""
    table = late(folder)
    table = table[(table["part"].isin(["other clip", "K = 4, 2e-4"])) & table["algorithm"].isin(["cpg", "cpgd"])]
    names = table["algorithm"].map({"cpg": "no drift", "cpgd": "drift on every token"})
    cells = table.groupby([table["epsilon"].fillna(0.2), names], sort=True)["late"].apply(mean_text).unstack()
    return cells.reset_index().rename(columns={"epsilon": "ε"})


def main(quick: bool = False) -> None:
    """Make the runs that are missing, and the study's tables.

    Args:
        quick: one seed and few rollouts.
    """
    os.chdir(ROOT)
    if not SECOND_MODEL.exists():
        steps = "20" if quick else "2250"
        command = ["pretrain", "--seed", "1", "--steps", steps, "--folder", str(SECOND_MODEL)]
        subprocess.run([sys.executable, "-m", "minicpgd", *command], check=True)
    study = token_study(range(100, 101), range(100, 101), 12, quick=True) if quick else token_study()
    folder = ROOT / "runs" / "which_tokens" / "quick" if quick else RESULTS
    make_study(study, folder, Path("runs/studies/runs"))
    print(parts_summary(folder).to_string(index=False))
    print(clip_summary(folder).to_string(index=False))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
