"""The list of all figures, the data of each, and the file that it is written to.

In: run folders, or a study's. Out: PNG files. `minicpgd plot --all` remakes every published one from committed logs.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from minicpgd import plots
from minicpgd.errors import UserError
from minicpgd.experiments.catalogue import demo_configs
from minicpgd.memory.predict import predict_recipe
from minicpgd.recipes import KNOWN, load_recipe

RUN_FIGURES = {"curves": plots.training_curves, "ratios": plots.ratio_ranges}
STUDY_FIGURES: dict[str, dict[str, Callable[[Path], Figure]]] = {
    "stabilisers": {"stabilisers": plots.stabilisers_price, "map": plots.map_heat, "passes": plots.rollout_passes},
    "endurance": {"endurance": plots.endurance_survival, "fates": plots.endurance_fates},
    "fair": {"fair": plots.fair_search},
    "default": {"clip_against_drift": plots.clip_against_drift},
    "warning": {"warning": plots.warning_signals},
}


def save_figures(folder: Path, runs: Sequence[Path]) -> Iterator[Path]:
    """Draw every figure of `RUN_FIGURES` from some runs, and yield their paths."""
    yield from _save(folder, {name: draw(runs) for name, draw in RUN_FIGURES.items()})


def save_published(results: Path, folder: Path) -> Iterator[Path]:
    """Draw every published figure, from the committed logs and from the predicted memory of the recipes.

    Raises:
        UserError: a log is missing.
    """
    studies = [name for name in STUDY_FIGURES if (results / name).is_dir()]
    demo_runs = [config.folder for config in demo_configs(results / "demo" / "seed0")]
    for needed in (*demo_runs, *(results / name / "study.csv" for name in studies)):
        if not needed.exists():
            raise UserError(f"{needed}: missing; --results names the folder of committed logs in the repository")
    yield from save_figures(folder, demo_runs)
    for name in studies:
        yield from save_study_figures(results / name, name, folder)
    recipes = {load_recipe(name).config.model: name for name in KNOWN if name.startswith("qwen")}
    cards = {model: load_recipe(name).card_gib or 0.0 for model, name in recipes.items()}
    yield from _save(folder, {"memory": plots.memory_bars({m: predict_recipe(n) for m, n in recipes.items()}, cards)})


def save_study_figures(study: Path, name: str, folder: Path) -> Iterator[Path]:
    """Draw a study's figures from its tables, and yield their paths."""
    yield from _save(folder, {figure: draw(study) for figure, draw in STUDY_FIGURES[name].items()})


def _save(folder: Path, figures: dict[str, Figure]) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png")
        yield folder / f"{name}.png"
