"""The generated part of docs/rewards.md: which answers are equal, with examples.

In: the pairs of tests/answer_pairs.py, which the tests run, and RULES of tasks/answers/stated.py. Out: Markdown.
"""

import importlib.util
import itertools
from pathlib import Path
from typing import Any

from minicpgd.tasks.answers import RULES

PAIRS = Path(__file__).resolve().parent.parent.parent / "tests" / "answer_pairs.py"


def reward_tables() -> str:
    """A section with a table for each kind of answer, then the table of the rules, then that of whole responses."""
    spec: Any = importlib.util.spec_from_file_location("answer_pairs_of_the_page", PAIRS)
    pairs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pairs)
    sections = []
    for kind in pairs.KINDS:
        rows = itertools.zip_longest(kind.equal, kind.different)
        cells = [[_relation(equal, "="), _relation(different, "≠")] for equal, different in rows]
        sections.append(f"### {kind.name}\n\n{kind.rule}\n\n{_table(['equal', 'not equal'], cells)}")
    rules = [[rule.what, _code(rule.example), _code(rule.result)] for rule in RULES]
    responses = [[_code(response), _code(answer) if answer else "none"] for response, answer in pairs.RESPONSES]
    return "\n\n".join([
        *sections,
        f"## The rules of spelling\n\nThey run in this order.\n\n{_table(['what', 'from', 'to'], rules)}",
        f"## Examples of responses\n\n{_table(['response', 'its answer'], responses)}",
    ])  # fmt: skip


def _relation(pair: tuple[str, Any] | None, sign: str) -> str:
    return f"{_code(pair[0])} {sign} {_code(str(pair[1]))}" if pair else ""


def _code(text: str) -> str:
    """A text between backticks, for a cell of a table. A character that cannot be seen gets its number."""
    text = "".join(c if c.isprintable() else r"\n" if c == "\n" else f"\\u{ord(c):04x}" for c in text)
    mark = "``" if "`" in text else "`"
    space = " " if "`" in text or text != text.strip() else ""
    return f"{mark}{space}{text}{space}{mark}".replace("|", r"\|")


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
