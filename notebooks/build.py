"""Build the notebooks: from percent scripts, executed .ipynb files beside them.

    python notebooks/build.py          all of them
    python notebooks/build.py 02 03    some

Edit the scripts, never the .ipynb files. A cell begins with one of these lines:

    # %% [markdown]    prose, each line after a "# "
    # %%               code
    # %% solution      code that stays folded until the reader opens it

This file adds the badge and the set-up cell. A line `STEPS = 20  # fast: 4` is 20 in the published notebook, and 4 in the
tests, which run all notebooks. The same script gives the same bytes: a notebook contains no times and no machine, and
cell ids are positions.
"""

import base64
import io
import os
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

HERE = Path(__file__).parent
SCRIPTS = sorted(HERE.glob("[0-9][0-9]_*.py"))
ADDRESS = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
REPOSITORY = ADDRESS.removeprefix("https://github.com/")  # Colab needs this form.
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{}/blob/main/notebooks/{}.ipynb)"
SET_UP = f"""\
import importlib.util

if importlib.util.find_spec("minicpgd") is None:  # This installs minicpgd where it is missing, as on Colab.
    !git clone --quiet --depth 1 {ADDRESS}
    %pip install --quiet -e "./{REPOSITORY.split("/")[1]}[qlora]"
    %cd {REPOSITORY.split("/")[1]}/notebooks

%matplotlib inline"""
FOLDED = {"cellView": "form", "jupyter": {"outputs_hidden": True, "source_hidden": True}, "tags": ["solution"]}
FAST = re.compile(r"^(\w+ = ).*?  # fast: (.+)$", re.MULTILINE)


def read(script: Path) -> NotebookNode:
    """Turn a percent script into a notebook that has not run yet."""
    pieces = re.split(r"^# %%(.*)\n", script.read_text(), flags=re.MULTILINE)
    cells = []
    for kind, text in zip(map(str.strip, pieces[1::2]), pieces[2::2], strict=True):
        if kind == "[markdown]":
            cells.append(new_markdown_cell(re.sub(r"^# ?", "", text.strip(), flags=re.MULTILINE)))
        elif kind in ("", "solution"):
            cells.append(new_code_cell(text.strip(), metadata=FOLDED if kind else {}))
        else:
            raise SystemExit(f"{script}: a cell begins with '# %%', '# %% [markdown]' or '# %% solution', not {kind!r}")
    if pieces[0].strip() or not cells or cells[0].cell_type != "markdown":
        raise SystemExit(f"{script}: the first cell has to be a '# %% [markdown]' cell")
    cells[0].source += "\n\n" + BADGE.format(REPOSITORY, script.stem)
    cells.insert(1, new_code_cell(SET_UP))
    for number, cell in enumerate(cells):
        cell.id = f"{script.stem[:2]}-{number:02}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


def run(notebook: NotebookNode, *, fast: bool = False, on_cell: Callable[..., None] | None = None) -> NotebookNode:
    """Execute a notebook in place, in the folder of the notebooks.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    if fast:
        for cell in notebook.cells:
            cell.source = FAST.sub(r"\1\2", cell.source)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}  # Sums then have one order on any machine.
    resources = {"metadata": {"path": str(HERE)}}
    client = NotebookClient(
        notebook,
        timeout=600,
        record_timing=False,
        coalesce_streams=True,  # Otherwise the clock decides how the printed text is split.
        extra_arguments=["--IPKernelApp.log_level=40"],
        resources=resources,
        on_cell_executed=on_cell,
    )
    client.execute()
    notebook.metadata.pop("language_info", None)
    for output in [output for cell in notebook.cells for output in cell.get("outputs", [])]:
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = _lighter(output.data["image/png"])
    return notebook


def _lighter(picture: str) -> str:
    """Reduce a PNG to 256 colours and a third of its size, since a repository keeps every version of a notebook."""
    smaller = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(smaller, "PNG", optimize=True)
    return base64.b64encode(smaller.getvalue()).decode()


def text_of(notebook: NotebookNode) -> str:
    """The text of the .ipynb file."""
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def main(wanted: list[str]) -> None:
    """Build the notebooks whose names begin with one of `wanted`, or all if it is empty."""
    chosen = [script for script in SCRIPTS if not wanted or script.name.startswith(tuple(wanted))]
    if not chosen:
        raise SystemExit(f"none of {', '.join(script.stem for script in SCRIPTS)} begins with {' or '.join(wanted)}")
    notebooks = {script: read(script) for script in chosen}
    columns = (TextColumn("{task.description:<28}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=sum(len(notebook.cells) for notebook in notebooks.values()))
        for script, notebook in notebooks.items():
            progress.update(bar, description=script.stem)
            run(notebook, on_cell=lambda **_: progress.advance(bar))
            progress.advance(bar, sum(cell.cell_type == "markdown" for cell in notebook.cells))
            script.with_suffix(".ipynb").write_text(text_of(notebook))


if __name__ == "__main__":
    main(sys.argv[1:])
