"""Problems from files: .jsonl and .parquet in, checked rows out.

A row is a dict with `prompt` and `answer`, both text, and whatever else the file has for a reward function to use. What
a file does wrong is told in one line, with the file, the line and the field.
"""

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minicpgd.errors import UserError
from minicpgd.files import parse_json

SUFFIXES = (".jsonl", ".parquet")
PLACES = ("", "main", "data")  # inside a folder; the last two are how data sets lie on the hub


def find_files(data: str) -> dict[str, list[Path]]:
    """The files that `data` stands for, as {"all": [...]}, or {"train": [...], "test": [...]} for a folder with both.

    In a folder, or in its `main` or `data`, whichever is the first to have one, a file is `train.jsonl`,
    `train.parquet`, or `train-00000-of-00002.parquet` and so on; and the same for `test`.

    Raises:
        UserError: there is no such file, or it has another suffix; a folder has no training file, or two kinds of one.
    """
    path = Path(os.path.expanduser(data))
    if os.path.isfile(path):
        if path.suffix not in SUFFIXES:
            raise UserError(f"data = {data!r}: {path.suffix or 'no suffix'} is not one of {', '.join(SUFFIXES)}")
        return {"all": [path]}
    if not os.path.isdir(path):
        raise UserError(
            f"data = {data!r}: there is no such file; a .jsonl or .parquet file is needed, or a folder with a "
            "train.jsonl or train.parquet in it"
        )
    for folder in (path / place for place in PLACES):
        found = {split: _split_files(folder, split) for split in ("train", "test")}
        if found["train"]:
            return found if found["test"] else {"all": found["train"]}
    raise UserError(f"data = {data!r}: no train.jsonl or train.parquet in this folder, nor in its main/ or data/")


def _split_files(folder: Path, split: str) -> list[Path]:
    kinds = [sorted(folder.glob(name)) for name in (f"{split}.jsonl", f"{split}.parquet", f"{split}-*.parquet")]
    found = [files for files in kinds if files]
    if len(found) > 1:
        raise UserError(f"{folder}: both {found[0][0].name} and {found[1][0].name} are there; which is meant?")
    return found[0] if found else []


def read_files(paths: list[Path], *, prompt: str = "prompt", answer: str = "answer") -> list[dict[str, Any]]:
    """The rows of one or more files; see `checked`.

    Raises:
        UserError: a file cannot be read, or a row is not a problem.
    """
    return checked((row for path in paths for row in _read(path)), ", ".join(map(str, paths)), prompt, answer)


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    return _read_jsonl(path) if path.suffix == ".jsonl" else _read_parquet(path)


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        if not path.is_file():  # a pipe would keep us waiting
            raise OSError("not a file")
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {content[: error.start].count(10) + 1}: not UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() also splits at U+2028, which JSON allows
        if line.strip():
            try:
                yield f"{path}, line {number}", parse_json(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON: {error}") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"{path}: parquet needs pyarrow: pip install 'minicpgd[data]' ({error})") from error
    try:
        table = ParquetFile(path).read()
        if len(set(table.column_names)) < table.num_columns:  # to_pylist would keep the last
            raise ValueError(f"a column is there twice, of {', '.join(table.column_names)}")
        rows = table.to_pylist()
    except (ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: dates that Python has not
        raise UserError(f"{path}: not a readable parquet file: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def checked(rows: Iterable[tuple[str, Any]], source: str, prompt: str, answer: str) -> list[dict[str, Any]]:
    """Rows that a run can use, from (place, row) pairs.

    Args:
        rows: place is the file and line, for the user to find.
        source: where they all come from.
        prompt, answer: the names of these columns there; they are renamed.

    Returns:
        At least one; `prompt` and `answer` are text that is not empty, and all rows have the same columns.

    Raises:
        UserError: a row is not so.
    """
    made: list[dict[str, Any]] = []
    first_place, first_columns = "", set()
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{place}: a JSON object is needed, as {{{prompt!r}: ..., {answer!r}: ...}}")
        for name in (prompt, answer):
            if name not in row:
                raise UserError(f"{place}: no {name!r}; this one has {', '.join(map(repr, row)) or 'nothing'}")
        if taken := {"prompts", "completions"} & row.keys():
            raise UserError(f"{place}: {min(taken)!r} is what a reward function is given anyway; rename the column")
        if not made:
            first_place, first_columns = place, set(row)
        if missing := first_columns - set(row):
            raise UserError(f"{place}: no {min(missing)!r}, which {first_place} has; every row needs the same columns")
        if extra := set(row) - first_columns:
            raise UserError(f"{first_place}: no {min(extra)!r}, which {place} has; every row needs the same columns")
        others = {name: value for name, value in row.items() if name not in (prompt, answer)}
        texts = {"prompt": _text(row[prompt], place, prompt), "answer": _text(_digits(row[answer]), place, answer)}
        made.append(texts | {name: value for name, value in others.items() if name not in texts})
    if not made:
        raise UserError(f"{source}: empty; one problem a line is needed")
    return made


def _digits(answer: Any) -> Any:
    """A number as it is written: 3 and 3.0 are "3". Anything else, NaN too, as it is."""
    if type(answer) is float and answer.is_integer():
        answer = int(answer)
    return repr(answer) if type(answer) is int or (type(answer) is float and math.isfinite(answer)) else answer


def _text(value: Any, place: str, name: str) -> str:
    if not isinstance(value, str):
        shown = "null" if value is None else value if isinstance(value, (bool, float)) else type(value).__name__
        raise UserError(f"{place}: {name} is {shown}; text{' or a number' if name == 'answer' else ''} is needed")
    if not value.strip():
        raise UserError(f"{place}: {name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: {name} holds half a character, \\u{ord(value[error.start]):x}") from error
    return value
