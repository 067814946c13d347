"""Everything published can be made again: figures and numbers from committed logs, and what README.md shows."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from conftest import load_script

from minicpgd import ALGORITHMS, TrainConfig, load_run
from minicpgd.cli.main import parse
from minicpgd.experiments import STUDIES, SUMMARIES, warning_study
from minicpgd.experiments.catalogue import demo_configs
from minicpgd.experiments.outcome import HEALTHY
from minicpgd.experiments.tables import named_table
from minicpgd.plots.published import save_published
from minicpgd.recipes import save_config
from minicpgd.training import Learner

ROOT = Path(__file__).parent.parent
results = load_script(ROOT / "docs" / "results.py")
COMMITTED = {folder.name for folder in (ROOT / "results").iterdir()}
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL))
CODE = "\n".join([*(text for _, text in BLOCKS), *INLINE])


@pytest.fixture(scope="module")
def remade(tmp_path_factory):
    """Every published figure, drawn again from the committed logs and tables."""
    folder = tmp_path_factory.mktemp("figures")
    paths = list(save_published(ROOT / "results", folder))
    for name in ("collapse_in_trl", "faults", "long_run"):
        script = load_script(ROOT / "benchmarks" / f"{name}.py")
        paths.append(folder / script.FIGURE.relative_to(ROOT / "docs" / "figures"))
        paths[-1].parent.mkdir(exist_ok=True)
        script.draw(pd.read_csv(script.RESULTS)).savefig(paths[-1])
    for metric in results.UNITS:
        paths.append(folder / "metrics" / f"{metric}.png")
        paths[-1].parent.mkdir(exist_ok=True)
        results.metric_traces(ROOT / "results", metric).savefig(paths[-1])
    return {str(path.relative_to(folder)): path for path in paths}


def test_the_published_figures_are_those_of_the_committed_logs(remade):
    """Their pixels agree, except for a little that fonts and versions may move."""
    figures = ROOT / "docs" / "figures"
    assert set(remade) == {str(path.relative_to(figures)) for path in figures.rglob("*.png")}
    for name, path in remade.items():
        ours, published = (matplotlib.image.imread(p) for p in (path, figures / name))
        assert ours.shape == published.shape
        assert np.abs(ours - published).mean() < 0.01, name


def test_every_published_figure_is_on_a_page(remade):
    paths = (*(ROOT / "docs").glob("*.md"), ROOT / "results" / "README.md")
    pages = README + "".join(path.read_text() for path in paths)
    assert not [name for name in remade if f"figures/{name}" not in pages]


def test_the_numbers_of_the_results_page_are_those_of_the_tables():
    """That holds for every marked number and table. No number with an interval is without a mark."""
    for path in results.PAGES:
        assert results.filled(path.read_text()) == path.read_text(), "run `python docs/results.py`"
    page = results.PAGES[0].read_text()
    assert len(results.MARKED.findall(page)) > 20
    assert not re.findall(r"\d \[[-\d., ]+\]", results.MARKED.sub("", page))
    whole = "".join(path.read_text() for path in results.PAGES)
    for study in SUMMARIES:
        assert f"<!--{study}-->" in whole or study not in COMMITTED


def test_what_the_pages_say_of_the_remedies_agrees_with_the_map():
    """README, index, results, teaching and the notebooks say these things in words."""
    runs = named_table(ROOT / "results" / "stabilisers")
    share = runs.groupby("name")["healthy"].mean()
    cell = runs.groupby(["name", "updates_per_rollout", "learning_rate"])["accuracy_final"].mean().unstack("name")
    hard = cell.loc[64, 1e-4]
    stops = [name for name in share.index if "stop" in name or name == "CPGD, default"]
    assert share[stops].min() >= share.drop(stops).max()  # A stop has the largest share,
    updates = runs.query("updates_per_rollout == 64 and learning_rate == 1e-4").groupby("name")["updates_mean"].mean()
    assert updates[["GRPO, stop 0.003", "CPGD, default"]].max() < 6.4  # for a tenth of the updates.
    for one, other in (("CPGD, default", "GRPO, stop 0.003"), ("CPGD, α = 0.01", "GRPO"), ("CPGD, α = 0", "GRPO")):
        assert abs(share[one] - share[other]) < 1 / 12  # CPGD and GRPO do not differ by a cell of the map,
    assert abs(hard["CPGD, default"] - hard["GRPO, stop 0.003"]) < 0.02  # nor with the stop at K = 64.
    assert cell.loc[64, 1e-4][["GRPO", "RLOO", "REINFORCE++", "CPGD, α = 0.01", "CPGD, α = 0"]].max() < HEALTHY
    assert hard[["CPGD, α = 3", "CPGD, α = max A", "GRPO, β = 0.04"]].min() > 0.8  # A penalty protects,
    assert share["GRPO"] < share[["CPGD, α = 3", "CPGD, α = max A", "GRPO, β = 0.04", "GRPO, decay"]].min()
    assert not runs.query("learning_rate == 1e-3")["healthy"].any()  # but nothing does at 1e-3.
    assert share["REINFORCE++"] == share.min()
    assert abs(share["GRPO, stop 0.003"] - 0.75) < 0.02
    assert 0.4 < share["GRPO"] < 0.6
    fair = pd.read_csv(ROOT / "results" / "fair" / "study.csv").query("part == 'report'")
    assert not fair["collapsed"].any()
    assert set(fair["target_kl"]) == {0.003}  # The search chose the stop for each algorithm.


def test_what_the_pages_say_of_the_demo_agrees_with_its_logs():
    """With the stop both runs end well, with each seed; without it, all four collapse."""
    table = results.demo().set_index("run")
    assert [table["collapsed"][run].split()[0] for run in table.index] == ["0", "0", "5", "5", "5", "5"]
    for run in ("CPGD + KL stop", "GRPO + KL stop"):
        assert min(map(float, table["reward, last 5 steps"][run].split(", "))) > 0.8


def test_every_metric_of_a_run_has_its_section_and_every_section_its_metric():
    """The run has a reference, so it logs every metric. The name of each figure is that of its metric."""
    settings = {"num_prompts": 2, "num_generations": 2, "max_completion_length": 4, "eval_problems": 2}
    log = Learner.from_config(TrainConfig(**settings, num_minibatches=1, eval_steps=1, beta=0.1)).step(1)
    page = (ROOT / "docs" / "metrics.md").read_text()
    newer = {"eval_reward", "skipped_updates", "updates"}  # The committed logs were made before a run logged these.
    sections = re.findall(r"^## `(\w+)`", page, re.MULTILINE)
    assert [name for name in sections if name not in newer] == [*results.UNITS, *results.TIMINGS]
    assert set(log.metrics) == {*results.UNITS, *newer} == {*sections} - {*results.TIMINGS}
    assert set(log.timings) == set(results.TIMINGS)
    assert re.findall(r"\(figures/metrics/(\w+).png\)", page) == list(results.UNITS)


def test_the_committed_studies_are_those_of_the_catalogue():
    """Each asks for the same runs today, and its table has a row for each run."""
    for name in COMMITTED & STUDIES.keys():
        study, folder = STUDIES[name], ROOT / "results" / name
        table = pd.read_csv(folder / "study.csv")
        before = table[:0]
        for part in study.parts:
            asked = study.runs(part, before, Path("pool"))
            rows = table[len(before) : len(before) + len(asked)]
            assert list(rows["run"]) == [config.folder.name for config in asked["config"]]
            before = table[: len(before) + len(asked)]
        assert len(before) == len(table)
        assert set(pd.read_csv(folder / "steps.csv.gz")["run"]) == set(table["run"])
        provenance = json.loads((folder / "made.json").read_text())
        assert provenance["command"] == f"minicpgd study {name}"
        assert provenance["runs"] == len(table)
    assert sum(path.stat().st_size for path in (ROOT / "results").rglob("*") if path.is_file()) < 10_000_000


def test_the_warning_study_is_remade_from_the_others(tmp_path):
    remade = warning_study(ROOT / "results", tmp_path / "warning")
    assert (remade / "study.csv").read_text() == (ROOT / "results" / "warning" / "study.csv").read_text()


def test_the_committed_logs_are_those_of_the_demo():
    """They have five seeds and the demo's settings."""
    for seed in results.DEMO_SEEDS:
        for config in demo_configs(ROOT / "results" / "demo" / f"seed{seed}", seed):
            logged = load_run(config.folder).config
            assert {**vars(logged), "output_dir": ""} == {**vars(config), "output_dir": ""}


def test_the_page_of_algorithms_has_every_row_of_the_table():
    """A row has its name, its label with its paper, whether it has a drift, and what it shows."""
    page = (ROOT / "docs" / "algorithms.md").read_text()
    rows = [line[2:-2].split(" | ") for line in page.splitlines() if re.match(r"\| `\w+` \|.*\|$", line)]
    assert [(cells[0], cells[1].rpartition(", ")[0], cells[-2], cells[-1]) for cells in rows] == [
        (f"`{row.name}`", row.label, "yes" if row.drift else "", row.shows) for row in ALGORITHMS.values()
    ]


# README.md -----------------------------------------------------------------------------------------------------------


def test_the_readme_has_at_most_1000_words():
    assert len(README.split()) <= 1000


def test_the_readme_names_what_exists():
    targets = set(re.findall(r"^make ([\w-]+)", CODE, re.MULTILINE))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target
    for extras in re.findall(r"\.\[([\w,]+)\]", CODE):
        assert set(extras.split(",")) <= set(PYPROJECT["project"]["optional-dependencies"]), extras
    folders = "minicpgd|tests|notebooks|benchmarks|results"
    files = [w for w in INLINE if re.fullmatch(rf"[\w./-]+\.(py|md|cff|lock|toml|ya?ml)|({folders})/[\w./-]*", w)]
    for path in files:
        assert (ROOT / path).exists(), path


def test_the_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)(#[^)]+)?\)", README)
    assert len(links) > 15
    for path, anchor in links:
        assert (ROOT / path).exists(), path
        if anchor:  # The address of a heading has hyphens for spaces, and no punctuation.
            headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.MULTILINE)
            assert anchor[1:] in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, anchor


@pytest.mark.parametrize("line", re.findall(r"^(minicpgd [^#\n]+)", CODE, re.MULTILINE))
def test_the_commands_of_the_readme_parse(line, tmp_path, monkeypatch):
    """All words are accepted, down to the last flag. The commands are not run here."""
    monkeypatch.chdir(tmp_path)
    words = line.split()[1:]
    if "--resume" in words:
        run = TrainConfig(output_dir=words[words.index("--resume") + 1])
        run.folder.mkdir(parents=True)
        save_config(run.folder / "config.json", run)
    if "--help" not in words:
        assert callable(parse(words))


def test_the_python_of_the_readme_prints_what_follows_it(tmp_path):
    """The numbers may differ by a tenth, because another processor rounds sums in another way."""
    kinds = [kind for kind, _ in BLOCKS]
    if "python" not in kinds:
        pytest.skip("README.md has no block of Python yet")
    (_, code), (_, expected) = BLOCKS[kinds.index("python") :][:2]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 10
    program = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert program.returncode == 0, program.stderr
    number = re.compile(r"\d+(?:\.\d+)?")
    assert number.sub("#", program.stdout) == number.sub("#", expected)
    printed, promised = ([float(n) for n in number.findall(text)] for text in (program.stdout, expected))
    assert promised
    assert printed == pytest.approx(promised, rel=0.1)


# Other pages ---------------------------------------------------------------------------------------------------------


def test_the_page_of_the_code_names_every_package():
    """The order is that in which a package may import from those before it."""
    page = (ROOT / "docs" / "code.md").read_text()
    table = page.partition("## The packages")[2].partition("\n## ")[0]
    named = re.findall(r"`(\w+)(?:/|\.py)`", table)
    (contract,) = PYPROJECT["tool"]["importlinter"]["contracts"]
    lowest_first = [name.removeprefix("minicpgd.") for name in reversed(contract["layers"])]
    assert named == lowest_first
    package = ROOT / "minicpgd"
    parts = {path.parent.name for path in package.glob("*/__init__.py")} | {path.stem for path in package.glob("*.py")}
    assert set(named) == parts - {"__init__", "__main__"}


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_no_mark_begins_a_line_of_a_paragraph(page):
    """There a comment would be a block of its own, and Markdown would cut the paragraph in two."""
    assert not re.findall(r"^[^\n|]+\n<!--[^>]*\|[^>]*-->", page.read_text(), flags=re.MULTILINE)
