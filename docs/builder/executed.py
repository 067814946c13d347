"""Notebooks: an executed .ipynb goes in, HTML in the look of all other pages comes out."""

import html
import json
import re
from functools import cache
from pathlib import Path

from prose import Place, anchor, listing, render

BADGE = re.compile(r"\[!\[([^]]+)\]\([^)]+\)\]")  # a picture that only the network has; its words will do


@cache
def cells_of(path: Path) -> list[dict]:
    """The cells as the file has them, each source as one text."""
    cells = json.loads(path.read_text())["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def code_of(path: Path) -> str:
    """All its Python but the set-up's, for whoever wants to know what it imports."""
    return "\n".join(cell["source"] for cell in cells_of(path)[2:] if cell["cell_type"] == "code")


def notebook_html(path: Path, place: Place) -> str:
    """The page's body: prose as prose, code with what came out below it, solutions and the set-up folded."""
    shown = []
    for number, cell in enumerate(cells_of(path)):
        if cell["cell_type"] == "markdown":
            shown.append(_marked(render(BADGE.sub(r"[\1]", cell["source"]), place)))
            continue
        body = listing(cell["source"], "python", Place() if number == 1 else place)  # the set-up's is half shell
        body += "".join(map(_output, cell["outputs"]))
        folded = "solution" in cell["metadata"].get("tags", [])
        title = "Set-up" if number == 1 else cell["source"].splitlines()[0].lstrip("# ").strip()
        if folded or number == 1:
            body = f'<details id="{anchor(title)}"><summary>{html.escape(title)}</summary>\n{body}</details>'
        shown.append(f'<div class="cell">{body}</div>\n')
    return "".join(shown)


def _marked(page: str) -> str:
    """A question stands out, so that nobody reads past it."""
    return page.replace("<p><strong>Predict.</strong>", '<p class="predict"><strong>Predict.</strong>')


def _output(output: dict) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        return f'<img class="figure" alt="The figure that this cell draws" src="data:image/png;base64,{picture}">\n'
    if "text/html" in data:
        return f'<div class="table" tabindex="0">{"".join(data["text/html"])}</div>\n'
    text = "".join(output.get("text") or data.get("text/plain", ""))
    return f'<pre class="output" tabindex="0">{html.escape(text.rstrip(), quote=False)}</pre>\n' if text.strip() else ""
