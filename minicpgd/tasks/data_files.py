"""Problems from .jsonl and .parquet files.

In: the path of a file or folder. Out: checked rows, which are dicts with `prompt` and `answer` as text and with the
file's other columns for a reward function. An error is one line with the file, the line and the field. You may add a
suffix: a reader of its files yields (place, row) pairs.
"""

import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minicpgd.errors import ConfigError, UserError
from minicpgd.files import parse_json

SUFFIXES = (".jsonl", ".parquet")
PLACES = ("", "main", "data")  # where a folder may have its files; datasets on the hub use the last two


def find_files(data: str | None) -> dict[str, list[Path]]:
    """Find the files of `data`: {"all": [...]}, or {"train": [...], "test": [...]} for a folder with both.

    In a folder, a file is `train.jsonl`, `train.parquet`, or `train-00000-of-00002.parquet` and so on; the same for
    `test`. If the folder has none, its `main` and then its `data` are searched.

    Raises:
        UserError: there is no such file, it has another suffix, or a folder has no training file or two kinds of them.
        ConfigError: `data` is None.
    """
    if data is None:
        raise ConfigError("data = None: the task jsonl needs a file, as --data problems.jsonl, with prompt and answer")
    path = Path(os.path.expanduser(data))
    if os.path.isfile(path):
        if path.suffix not in SUFFIXES:
            raise UserError(f"data = {data!r}: {path.suffix or 'no suffix'} is not one of {', '.join(SUFFIXES)}")
        return {"all": [path]}
    if not os.path.isdir(path):
        wanted = "a .jsonl or .parquet file is needed, or a folder with a train.jsonl or train.parquet in it"
        raise UserError(f"data = {data!r}: there is no such file; {wanted}")
    for folder in (path / place for place in PLACES):
        train, test = _split_files(folder, "train"), _split_files(folder, "test")
        if train:
            return {"train": train, "test": test} if test else {"all": train}
    raise UserError(f"data = {data!r}: no train.jsonl or train.parquet in this folder, nor in its main/ or data/")


def _split_files(folder: Path, split: str) -> list[Path]:
    patterns = (f"{split}.jsonl", f"{split}.parquet", f"{split}-*.parquet")
    found = [files for files in (sorted(folder.glob(pattern)) for pattern in patterns) if files]
    if len(found) > 1:
        raise UserError(f"{folder}: both {found[0][0].name} and {found[1][0].name} are there; which is meant?")
    return found[0] if found else []


def read_files(paths: list[Path], *, prompt: str = "prompt", answer: str = "answer") -> list[dict[str, Any]]:
    """The rows of one or more files; see `checked`. A file that cannot be read raises UserError, too."""
    parts = (_read_jsonl(path) if path.suffix == ".jsonl" else _read_parquet(path) for path in paths)
    return checked(itertools.chain.from_iterable(parts), ", ".join(map(str, paths)), prompt, answer)


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        if not path.is_file():  # Reading from a pipe would wait forever.
            raise OSError("not a file")
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {content[: error.start].count(10) + 1}: not UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() also splits at U+2028, which JSON allows.
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
        if len(set(table.column_names)) < table.num_columns:  # to_pylist would keep the last one.
            raise ValueError(f"a column is there twice, of {', '.join(table.column_names)}")
        rows = table.to_pylist()
    except (ArrowException, OSError, ValueError, OverflowError) as error:  # Python cannot hold every date of parquet.
        raise UserError(f"{path}: not a readable parquet file: {error}") from error
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def checked(rows: Iterable[tuple[str, Any]], source: str, prompt: str, answer: str) -> list[dict[str, Any]]:
    """Turn (place, row) pairs into rows that a run can use.

    Args:
        rows: a place is the file and line that messages name.
        source: where all rows come from, for messages.
        prompt, answer: the names of these columns in the source; they are renamed.

    Returns:
        At least one row; `prompt` and `answer` are text that is not empty, and all rows have the same columns.

    Raises:
        UserError: a row is wrong, or there is none.
    """
    problems: list[dict[str, Any]] = []
    first_place, first_row = "", {}
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{place}: a JSON object is needed, as {{{prompt!r}: ..., {answer!r}: ...}}")
        for name in (prompt, answer):
            if name not in row:
                raise UserError(f"{place}: no {name!r}; this one has {', '.join(map(repr, row)) or 'nothing'}")
        if reserved := {"prompts", "completions"} & row.keys():
            raise UserError(f"{place}: {min(reserved)!r} is what a reward function is given anyway; rename the column")
        if not problems:
            first_place, first_row = place, row
        if missing := first_row.keys() - row.keys():
            raise UserError(f"{place}: no {min(missing)!r}, which {first_place} has; every row needs the same columns")
        if extra := row.keys() - first_row.keys():
            raise UserError(f"{first_place}: no {min(extra)!r}, which {place} has; every row needs the same columns")
        texts = {"prompt": _text(row[prompt], place, prompt), "answer": _text(_digits(row[answer]), place, answer)}
        problems.append(texts | {name: row[name] for name in row if name not in (prompt, answer, *texts)})
    if not problems:
        raise UserError(f"{source}: empty; one problem a line is needed")
    return problems


def _digits(answer: Any) -> Any:
    """A finite number as text, where 3.0 is "3"; anything else as it is."""
    if type(answer) is float and answer.is_integer():
        answer = int(answer)
    return repr(answer) if type(answer) is int or (type(answer) is float and math.isfinite(answer)) else answer


def _text(value: Any, place: str, name: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else value if isinstance(value, (bool, float)) else type(value).__name__
        raise UserError(f"{place}: {name} is {kind}; text{' or a number' if name == 'answer' else ''} is needed")
    if not value.strip():
        raise UserError(f"{place}: {name} is empty")
    if half := re.search("[\ud800-\udfff]", value):
        raise UserError(f"{place}: {name} holds half a character, \\u{ord(half[0]):x}")
    return value
