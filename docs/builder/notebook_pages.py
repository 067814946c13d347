"""Notebooks: an executed .ipynb goes in, and HTML in the style of all other pages comes out."""

import html
import json
import re
from functools import cache
from pathlib import Path

from prose import Place, anchor, listing, render

BADGE = re.compile(r"\[!\[([^]]+)\]\([^)]+\)\]")  # The picture needs a network, so the page keeps only its words.


@cache
def cells_of(path: Path) -> list[dict]:
    """The cells of the file, each with its source as one text."""
    cells = json.loads(path.read_text())["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def title_of(path: Path) -> str:
    """The first line of the first cell, without its hash."""
    return cells_of(path)[0]["source"].splitlines()[0].lstrip("# ")


def code_of(path: Path) -> str:
    """All of its Python but the set-up cell, for finding what it imports."""
    return "\n".join(cell["source"] for cell in cells_of(path)[2:] if cell["cell_type"] == "code")


def notebook_html(path: Path, place: Place) -> str:
    """The page's body: prose, and code with its output below it. The set-up and the solutions are folded."""
    sections = []
    for number, cell in enumerate(cells_of(path)):
        if cell["cell_type"] == "markdown":
            sections.append(_highlight_questions(render(BADGE.sub(r"[\1]", cell["source"]), place)))
            continue
        is_setup = number == 1  # Half of the set-up cell is shell, in which no name has a definition here.
        body = listing(cell["source"], "python", Place() if is_setup else place)
        body += "".join(map(_output_html, cell["outputs"]))
        if is_setup or "solution" in cell["metadata"].get("tags", []):
            title = "Set-up" if is_setup else cell["source"].splitlines()[0].lstrip("# ").strip()
            body = f'<details id="{anchor(title)}"><summary>{html.escape(title)}</summary>\n{body}</details>'
        sections.append(f'<div class="cell">{body}</div>\n')
    return "".join(sections)


def _highlight_questions(page: str) -> str:
    """Give each question a background, so that nobody reads past it."""
    return page.replace("<p><strong>Predict.</strong>", '<p class="predict"><strong>Predict.</strong>')


def _output_html(output: dict) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        return f'<img class="figure" alt="The figure that this cell draws" src="data:image/png;base64,{picture}">\n'
    if "text/html" in data:
        return f'<div class="table" tabindex="0">{"".join(data["text/html"])}</div>\n'
    text = "".join(output.get("text") or data.get("text/plain", ""))
    return f'<pre class="output" tabindex="0">{html.escape(text.rstrip(), quote=False)}</pre>\n' if text.strip() else ""
