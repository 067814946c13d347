"""What is published can be remade: figures from committed logs, commands and files that exist."""

import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from minicpgd import ALGORITHMS, load_run
from minicpgd.demo import ALGORITHMS as SHOWN
from minicpgd.demo import demo_configs
from minicpgd.figures import save_figures
from minicpgd.outcome import outcome
from minicpgd.summary import display_name

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def test_the_published_figures_are_those_of_the_committed_logs(tmp_path):
    """Pixel by pixel, but for a little that fonts and versions may move."""
    runs = [ROOT / "results" / "demo" / "seed0" / name for name in SHOWN]
    for path in save_figures(tmp_path, runs):
        remade, published = (matplotlib.image.imread(p) for p in (path, ROOT / "docs" / "figures" / path.name))
        assert remade.shape == published.shape
        assert np.abs(remade - published).mean() < 0.01


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
