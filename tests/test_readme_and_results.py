"""What is published can be remade: figures from committed logs, commands and files that exist."""

import json
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from conftest import load_script

from minicpgd import ALGORITHMS, load_run
from minicpgd.config import TrainConfig
from minicpgd.demo import demo_configs
from minicpgd.figures import save_published
from minicpgd.learner import Learner
from minicpgd.outcome import outcome
from minicpgd.plots.metrics import UNITS
from minicpgd.studies import STUDIES
from minicpgd.summary import SUMMARIES, borne_rate, display_name
from minicpgd.warning import warning_study

ROOT = Path(__file__).parent.parent
results = load_script(ROOT / "docs" / "results.py")
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


@pytest.fixture(scope="module")
def remade(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    made = list(save_published(ROOT / "results", folder))
    for name in ("collapse_in_trl", "faults", "long_run"):
        script = load_script(ROOT / "benchmarks" / f"{name}.py")
        made.append(folder / script.FIGURE.relative_to(ROOT / "docs" / "figures"))
        made[-1].parent.mkdir(exist_ok=True)
        script.draw(pd.read_csv(script.RESULTS)).savefig(made[-1])
    return {str(p.relative_to(folder)): p for p in made}


def test_the_published_figures_are_those_of_the_committed_logs(remade):
    """Pixel by pixel, but for a little that fonts and versions may move."""
    there = ROOT / "docs" / "figures"
    assert set(remade) == {str(path.relative_to(there)) for path in there.rglob("*.png")}
    for name, path in remade.items():
        ours, published = (matplotlib.image.imread(p) for p in (path, there / name))
        assert ours.shape == published.shape
        assert np.abs(ours - published).mean() < 0.01, name


def test_every_published_figure_is_shown(remade):
    pages = README + "".join(page.read_text() for page in (*results.PAGES, ROOT / "results" / "README.md"))
    assert not [name for name in remade if f"figures/{name}" not in pages]


def test_the_numbers_of_the_results_page_are_those_of_the_tables():
    """Every marked number and table; and hardly a number with an interval is there without a mark."""
    for path in results.PAGES:
        assert results.filled(path.read_text()) == path.read_text(), "run `python docs/results.py`"
    page = results.PAGES[0].read_text()
    assert len(results.MARKED.findall(page)) > 20
    assert not re.findall(r"\d \[[-\d., ]+\]", results.MARKED.sub("", page))
    for study in SUMMARIES:
        assert f"<!--{study}-->" in page


def test_what_the_results_page_says_in_words():
    """Sentences without a marked number that lean on one all the same."""
    tables = {name: pd.read_csv(ROOT / "results" / name / "study.csv") for name in STUDIES}
    world, hard = tables["map"], tables["map"].query("updates_per_rollout == 64")
    gentle = world.query("updates_per_rollout == 4 and learning_rate <= 1e-4")
    ends = gentle.groupby(["algorithm", "learning_rate"])["accuracy_final"].mean().round(2)
    assert (ends.min(), ends.max()) == (0.96, 1.0)
    smallest = hard.query("algorithm == 'reinforce_pp' and learning_rate == 3e-5")
    assert (smallest["accuracy_final"] < 0.5).sum() == 4
    cpgd = world[world["algorithm"] == "cpgd"]
    borne = {k: np.exp(np.log(borne_rate(rows)).mean()) for k, rows in cpgd.groupby("updates_per_rollout")}
    assert borne[4] > 2 * borne[64]
    cell = hard[hard["learning_rate"] == 1e-4]
    steps = pd.read_csv(ROOT / "results" / "map" / "steps.csv.gz").merge(cell[["run", "algorithm"]], on="run")
    kl = steps.pivot_table(index="step", columns="algorithm", values="kl_old")
    assert 3 < (kl["grpo"] / kl["cpgd"])[1] < 15
    assert (kl["grpo"] / kl["cpgd"])[11:].mean() > 20
    best = steps.pivot_table(index="step", columns="algorithm", values="reward").idxmax()
    assert max(best["grpo"], best["rloo"]) < best["cpgd"]
    drift = tables["drift"].query("drift_coef == '30.0' and learning_rate == 1e-4")
    assert drift["collapsed"].mean() > 0.5
    assert not tables["fair"].query("part == 'report'")["collapsed"].any()
    assert not tables["anatomy"].query("beta > 0")["collapsed"].any()


def test_every_metric_of_a_run_has_its_section_and_every_section_its_metric():
    """Of a run with a reference, which logs all there are; and each figure's name is that of its metric."""
    settings = {"num_prompts": 2, "num_generations": 2, "max_completion_length": 4, "eval_problems": 2}
    made = Learner.from_config(TrainConfig(**settings, num_minibatches=1, eval_steps=1, beta=0.1)).step(1)
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert re.findall(r"^## `(\w+)`", page, re.MULTILINE) == [*UNITS, *results.TIMINGS]
    assert set(made.metrics) == set(UNITS)
    assert set(made.timings) == set(results.TIMINGS)
    assert re.findall(r"\(figures/metrics/(\w+).png\)", page) == list(UNITS)


def test_the_committed_studies_are_those_of_the_specifications():
    """Each asks today what it asked then, and its table has a row for each run."""
    for name, study in STUDIES.items():
        folder = ROOT / "results" / name
        table = pd.read_csv(folder / "study.csv")
        first = table[table["part"] == study.parts[0].name]
        asked = study.runs(study.parts[0], pd.DataFrame(), Path("pool"))
        assert list(first["run"]) == [config.folder.name for config in asked["config"]]
        if len(study.parts) > 1:
            asked = study.runs(study.parts[1], first, Path("pool"))
            assert list(table["run"][len(first) :]) == [config.folder.name for config in asked["config"]]
        assert set(pd.read_csv(folder / "steps.csv.gz")["run"]) == set(table["run"])
        made = json.loads((folder / "made.json").read_text())
        assert made["command"] == f"minicpgd study {name}"
        assert made["runs"] == len(table)
    assert sum(path.stat().st_size for path in (ROOT / "results").rglob("*") if path.is_file()) < 10_000_000


def test_the_warning_study_is_remade_from_the_others(tmp_path):
    made = warning_study(ROOT / "results", tmp_path / "warning")
    assert (made / "study.csv").read_text() == (ROOT / "results" / "warning" / "study.csv").read_text()


def test_the_committed_logs_are_the_demos():
    """Three seeds; their settings are the demo's own, and their outcomes are those that README tells."""
    for seed in (0, 1, 2):
        for config in demo_configs(Path("runs/demo"), seed):
            folder = ROOT / "results" / "demo" / f"seed{seed}" / config.algorithm
            logged = load_run(folder).config
            assert {**vars(logged), "output_dir": ""} == {**vars(config), "output_dir": ""}
            result = outcome(folder)
            row = f"| {display_name(config.algorithm)} | {seed} | {result.accuracy_before:.2f} | "
            row += f"{result.accuracy_best:.2f} | {result.accuracy_final:.2f} | {'yes' if result.collapsed else 'no'} |"
            assert row in (ROOT / "results" / "README.md").read_text()


def test_the_readme_has_every_row_of_the_table():
    table = re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", README, re.MULTILINE)
    assert {name: shows for name, shows in table if name in ALGORITHMS} == {
        name: row.shows for name, row in ALGORITHMS.items()
    }


def test_the_readme_names_what_exists():
    for target in set(re.findall(r"make ([a-z]+)  ", README)):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target
    named = re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"`(minicpgd/[\w/.]+|tests/[\w/.]+)`", README)
    assert len(named) > 15
    for path in named:
        assert (ROOT / path).exists(), path
    rooms = {p.name for p in (ROOT / "minicpgd").glob("*.py")} - {"__init__.py", "errors.py"}
    assert not {room for room in rooms if f"minicpgd/{room}" not in README}


@pytest.mark.parametrize("line", re.findall(r"^(minicpgd [^#\n]+)", README, re.MULTILINE))
def test_the_readmes_commands_parse(line):
    """Down to the last flag; they are not run here."""
    from minicpgd.cli import parse

    words = line.split()[1:]
    if "--help" not in words:
        assert callable(parse(words))


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_no_mark_begins_a_line_of_a_paragraph(page):
    """There Markdown takes a comment for a block of its own, and cuts the paragraph in two."""
    assert not re.findall(r"^[^\n|]+\n<!--[^>]*\|[^>]*-->", page.read_text(), flags=re.MULTILINE)
