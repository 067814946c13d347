r"""Puts the numbers into docs/results.md: `python docs/results.py`. A test checks that they are the tables' own.

In the page, a number stands between marks that say where it comes from, and so does a table:

    <!--map | CPGD | healthy share of the map-->58 % [50, 67]<!--/-->      a cell: study | row | column
    <!--map-->...<!--/-->                                                  the whole summary of a study
    <!--made-->...<!--/-->                                                 what each study took
"""

import json
import re
from functools import cache
from pathlib import Path

import pandas as pd

from minicpgd.summary import SUMMARIES

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"
MARKED = re.compile(r"<!--(?P<source>[^>]+?)-->(?P<value>.*?)<!--/-->", re.DOTALL)


@cache
def summary(study: str) -> pd.DataFrame:
    """A study's summary, by row."""
    return SUMMARIES[study](ROOT / "results" / study)


def value_of(source: str) -> str:
    """What has to stand at a mark.

    Raises:
        KeyError: no such study, row or column.
    """
    if source == "made":
        return markdown(made())
    study, *cell = (part.strip() for part in source.split(" | "))
    table = summary(study)
    if cell:
        row, column = cell
        return str(table.set_index(table.columns[0]).loc[row, column])
    return markdown(table)


def made() -> pd.DataFrame:
    """What each study took."""
    rows = []
    for study in SUMMARIES:
        told = json.loads((ROOT / "results" / study / "made.json").read_text())
        minutes = f"{told['core_minutes']:.0f}" if "core_minutes" in told else "none"
        runs = told.get("runs", f"looks through {told.get('fitted_on', 0) + told.get('judged_on', 0)}")
        rows.append({"command": f"`{told['command']}`", "runs": runs, "core-minutes": minutes})
        rows[-1]["versions"] = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    """A table as GitHub draws it, on lines of its own."""
    lines = [list(table.columns), ["---"] * table.shape[1], *table.astype(str).to_numpy().tolist()]
    return "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


def filled(page: str) -> str:
    """The page with the tables' numbers."""
    return MARKED.sub(lambda mark: f"<!--{mark['source']}-->{value_of(mark['source'])}<!--/-->", page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
