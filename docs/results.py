r"""Puts the numbers into the pages of docs/: `python docs/results.py`. A test checks that they are the tables' own.

In a page, a number stands between marks that say where it comes from, and so does a table:

    <!--map | CPGD | healthy share of the map-->58 % [50, 67]<!--/-->      a cell: study | row | column
    <!--map-->...<!--/-->                                                  the whole summary of a study
    <!--made-->...<!--/-->                                                 what each study took
    <!--merging-->...<!--/-->, memory, generation                          a benchmark, from benchmarks/results/
"""

import json
import re
from functools import cache
from pathlib import Path

import pandas as pd

from minicpgd.summary import SUMMARIES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "docs" / "results.md", ROOT / "docs" / "qlora.md"]
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
    if source in BENCHMARKS:
        return markdown(BENCHMARKS[source]())
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


def merging() -> pd.DataFrame:
    """What becomes of an adapter, by learning rate and where it was merged: means over the seeds."""
    table = pd.read_csv(ROOT / "benchmarks" / "results" / "merging.csv")
    rows = table.groupby(["learning_rate", "merged into"], sort=False).mean().reset_index()
    return pd.DataFrame(
        {
            "learning rate": rows["learning_rate"].map("{:g}".format),
            "merged into": rows["merged into"],
            "same answers": rows["same answers"].map("{:.0%}".format),
            "accuracy, trained": rows["accuracy trained"].map("{:.2f}".format),
            "accuracy, merged": rows["accuracy merged"].map("{:.2f}".format),
            "off by": rows["off by"].map("{:.2f}".format),
        }
    )


def memory() -> pd.DataFrame:
    """Predicted and measured peaks of both phases."""
    table = pd.read_csv(ROOT / "benchmarks" / "results" / "memory.csv")
    rows = []
    for case, parts in table[table["part"].isin(["rollout", "update"])].groupby("case", sort=False):
        row = {"settings": case}
        for _, part in parts.iterrows():
            row[f"{part['part']}, MiB"] = f"{part['measured_bytes'] / 2**20:.0f}"
            row[f"{part['part']}, predicted"] = f"{part['predicted_bytes'] / 2**20:.0f} ({_percent(part['error'])})"
        rows.append(row)
    return pd.DataFrame(rows)


def _percent(share: float) -> str:
    rounded = round(100 * share)
    return f"{rounded:+d} %" if rounded else "0 %"


def generation() -> pd.DataFrame:
    """Sampling, ours and transformers'."""
    return pd.read_csv(ROOT / "benchmarks" / "results" / "generation.csv", dtype=str)


BENCHMARKS = {"made": made, "merging": merging, "memory": memory, "generation": generation}


def markdown(table: pd.DataFrame) -> str:
    """A table as GitHub draws it, on lines of its own."""
    lines = [list(table.columns), ["---"] * table.shape[1], *table.astype(str).to_numpy().tolist()]
    return "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


def filled(page: str) -> str:
    """The page with the tables' numbers."""
    return MARKED.sub(lambda mark: f"<!--{mark['source']}-->{value_of(mark['source'])}<!--/-->", page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path.read_text()))
