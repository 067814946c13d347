"""The notebooks are what their scripts say, they run, and they keep their promises to a reader."""

import ast
import re
from functools import cache
from pathlib import Path

import nbformat
import pytest
from conftest import load_script

ROOT = Path(__file__).parent.parent
build = load_script(ROOT / "notebooks" / "build.py")

ONE_PAGE = "00_cpgd_on_one_page"  # It implements CPGD without the package; see test_one_page.py.
LESSONS = [script for script in build.SCRIPTS if script.stem != ONE_PAGE]

each = pytest.mark.parametrize("script", build.SCRIPTS, ids=lambda script: script.stem)
each_lesson = pytest.mark.parametrize("script", LESSONS, ids=lambda script: script.stem)


@cache
def fast(script):
    """Run a notebook in the fast setting, once in this process."""
    return build.run(build.read(script), fast=True)


def committed(script):
    return nbformat.read(script.with_suffix(".ipynb"), as_version=4)


@each
def test_script_and_notebook_agree(script):
    """`make notebooks` writes a notebook after its script was edited."""
    expected, notebook = build.read(script), committed(script)
    assert [(c.cell_type, c.id, c.source, c.metadata) for c in notebook.cells] == [
        (c.cell_type, c.id, c.source, c.metadata) for c in expected.cells
    ]
    assert notebook.metadata == expected.metadata


@each
def test_a_committed_notebook_ran_without_error_or_warning(script):
    code = [cell for cell in committed(script).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not code[0].outputs  # The set-up does nothing where minicpgd is installed.
    text = "".join(str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", "")) for o in outputs)
    assert not re.search(r"0x[0-9a-f]{8}|/[a-z]+/|site-packages", text)  # No address, and no folder of any machine.


@each
def test_a_notebook_runs(script):
    """It runs in the fast setting, so every claim that a cell asserts holds."""
    assert not [o for cell in fast(script).cells for o in cell.get("outputs", []) if o.get("name") == "stderr"]


@each
def test_a_notebook_opens_with_its_number_and_a_badge(script):
    opening = build.read(script).cells[0].source
    assert opening.startswith(f"# {int(script.stem[:2])}. ")
    assert f"/notebooks/{script.stem}.ipynb)" in opening


@each_lesson
def test_a_lesson_keeps_its_promises(script):
    """It says what it teaches, asks before it answers, and has three exercises with folded solutions."""
    cells = build.read(script).cells
    assert "**After this notebook you can**" in cells[0].source
    prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
    assert sum(text.count("**Predict.**") for text in prose) >= 4
    exercises = next(text for text in prose if "## Exercises" in text).partition("## Exercises")[2]
    assert re.findall(r"^(\d)\. ", exercises, flags=re.MULTILINE) == ["1", "2", "3"]
    folded = [cell.source for cell in cells if "solution" in cell.metadata.get("tags", [])]
    assert [re.match(r"# Solution (\d)", source)[1] for source in folded] == ["1", "2", "3"]
    assert all(cell.metadata.get("jupyter", {}).get("source_hidden") for cell in cells[-3:])


def test_every_notebook_is_listed():
    for page in ("README.md", "docs/index.md"):
        assert not [s.stem for s in build.SCRIPTS if f"notebooks/{s.stem}.ipynb" not in (ROOT / page).read_text()]
    assert [int(script.stem[:2]) for script in build.SCRIPTS] == list(range(len(build.SCRIPTS)))


@each_lesson
def test_a_lesson_imports_the_package_and_redefines_nothing(script):
    source = "\n".join(cell.source for cell in build.read(script).cells[2:] if cell.cell_type == "code")
    tree = ast.parse(source)
    assert [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module.startswith("minicpgd")]
    public = set()
    for path in (ROOT / "minicpgd").rglob("*.py"):
        public |= {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    methods = {m for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for m in node.body}
    defined = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef) and n not in methods]
    assert not {node.name for node in defined} & public


def test_a_second_build_makes_the_same_bytes():
    """The bytes do not depend on the clock. One notebook is enough to show it."""
    first = LESSONS[0]
    assert build.text_of(build.run(build.read(first), fast=True)) == build.text_of(fast(first))
