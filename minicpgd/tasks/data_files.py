r"""Problems from .jsonl, .json and .parquet files, and from compressed .jsonl.gz files.

    {"prompt": "What is 3/4 of 12?", "answer": 9}
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3/4 of 12?"}], "answer": "9"}

A .json file has such lines or one array of such objects. A row in verl's format has `reward_model.ground_truth` in
place of `answer`. In text files, only `\n` ends a line. Suffixes are lower-case.

In: the path of a file or folder. Out: checked rows, which are dicts with a `prompt` (text or messages), an `answer`
(text) and the file's other columns for a reward function. An error is one line with the file, the line and the field.
You may add a suffix: a reader of its files yields (place, row) pairs.
"""

import gzip
import itertools
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minicpgd.errors import ConfigError, UserError, short_repr
from minicpgd.files import parse_json
from minicpgd.tasks.answers import answer_text

Prompt = str | list[dict[str, str]]  # Text, or messages as in TRL: {"role": "user", "content": "3/4 of 12?"}.

SUFFIXES = (".jsonl", ".parquet", ".json")  # of a file that `data` names
FOLDER_SUFFIXES = (*SUFFIXES, ".jsonl.gz")  # of the files in a folder that `data` names
PLACES = ("", "main", "data")  # where a folder may have its files; datasets on the hub use the last two
LONGEST_LINE = 2**28  # Bytes. A line is held in memory.
LARGEST_GZIP = 2**30  # Bytes after decompression. A damaged or hostile file of 1 MB can decompress to 1 GB.

ROLES = ("system", "user", "assistant", "tool")
RESERVED = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}  # as in TRL


def find_files(data: str | None) -> dict[str, list[Path]]:
    """Find the files of `data`: {"all": [...]}, or {"train": [...], "test": [...]} for a folder with both.

    In a folder, a file is `train.jsonl`, `train-00000-of-00002.jsonl` and so on, with any of `FOLDER_SUFFIXES`; the
    same for `test`. If the folder has none, its `main` and then its `data` are searched.

    Raises:
        UserError: there is no such file, it has another suffix, or a folder has no training file or two kinds of them.
        ConfigError: `data` is None.
    """
    if data is None:
        raise ConfigError("data = None: the task jsonl needs a file, as --data problems.jsonl, with prompt and answer")
    path = Path(os.path.expanduser(data))
    if os.path.isfile(path):
        if not path.name.endswith(SUFFIXES):
            hint = "; gunzip it, or name it train.jsonl.gz and give its folder" if data.endswith(".jsonl.gz") else ""
            raise UserError(f"data = {data!r}: {path.suffix or 'no suffix'} is not one of {', '.join(SUFFIXES)}{hint}")
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
    shards = {suffix: "-*" if suffix == ".parquet" else "-*-of-*" for suffix in FOLDER_SUFFIXES}
    patterns = [f"{split}{middle}{suffix}" for suffix in FOLDER_SUFFIXES for middle in ("", shards[suffix])]
    found = [files for files in (sorted(folder.glob(pattern)) for pattern in patterns) if files]
    if len(found) > 1:
        raise UserError(f"{folder}: both {found[0][0].name} and {found[1][0].name} are there; which is meant?")
    return found[0] if found else []


def read_files(paths: list[Path], *, prompt: str = "prompt", answer: str = "answer") -> list[dict[str, Any]]:
    """The rows of one or more files; see `checked`. A file that cannot be read raises UserError, too."""
    readers = {".parquet": _read_parquet, ".json": _read_json}
    parts = (readers.get(path.suffix, _read_jsonl)(path) for path in paths)
    return checked(itertools.chain.from_iterable(parts), ", ".join(map(str, paths)), prompt, answer)


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, one at a time, so that a compressed one is not decompressed as a whole."""
    number, size = 0, 0
    is_gzip = path.suffix == ".gz"
    try:
        if not path.is_file():  # Reading from a pipe would wait forever.
            raise OSError("not a file")
        with gzip.open(path) if is_gzip else path.open("rb") as file:
            while line := file.readline(LONGEST_LINE + 1):  # A file of bytes is split at `\n` alone.
                number, size = number + 1, size + len(line)
                if len(line) > LONGEST_LINE:
                    raise UserError(f"{path}, line {number}: over {LONGEST_LINE} bytes; one problem a line is needed")
                if is_gzip and size > LARGEST_GZIP:
                    raise UserError(f"{path}, line {number}: over {LARGEST_GZIP} decompressed bytes; gunzip it first")
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: not UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged after line {number}, or not gzip: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _read_jsonl(path: Path, lines: Iterable[str] | None = None) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(path) if lines is None else lines, start=1):
        if line.strip():
            try:
                yield f"{path}, line {number}", parse_json(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON: {error}") from error


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """The objects of one array, which may have line breaks anywhere; or those of JSON lines."""
    lines, head = _lines(path), [""]
    while not head[-1].strip() and (line := next(lines, None)):  # Blank lines may come first.
        head.append(line)
    whole = itertools.chain(head[1:], lines)
    if not head[-1].lstrip().startswith("["):
        yield from _read_jsonl(path, whole)
        return
    try:
        rows = parse_json("".join(whole))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


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
        At least one row. Each `prompt` is a `Prompt`, either text in all rows or messages in all rows. Each `answer` is
        text: a number keeps its value, and true becomes "true". No text is empty. All rows have the same columns.

    Raises:
        UserError: a row is wrong, or there is none.
    """
    problems: list[dict[str, Any]] = []
    first_place, first_row = "", dict[str, Any]()
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{place}: a JSON object is needed, as {{{prompt!r}: ..., {answer!r}: ...}}")
        field, verl = answer, row.get("reward_model")
        if answer not in row and isinstance(verl, dict) and "ground_truth" in verl:
            field, row = "reward_model.ground_truth", row | {answer: verl["ground_truth"]}
        first_place, first_row = (first_place, first_row) if problems else (place, row)
        _check_columns(row, place, prompt, answer, first_row, first_place)
        question, reference = _prompt(row[prompt], f"{place}: {prompt}"), _answer(row[answer], f"{place}: {field}")
        if problems and type(question) is not type(problems[0]["prompt"]):
            kind, other = ("text", "messages") if isinstance(question, str) else ("messages", "text")
            raise UserError(f"{place}: {prompt} is {kind}, but {other} in {first_place}; every row needs the same kind")
        problems.append({"prompt": question, "answer": reference})
        problems[-1] |= {name: row[name] for name in row if name not in (prompt, answer, "prompt", "answer")}
    if not problems:
        raise UserError(f"{source}: empty; one problem a line is needed")
    return problems


def _check_columns(row: dict, place: str, prompt: str, answer: str, first_row: dict, first_place: str) -> None:
    for name in (prompt, answer):
        if name not in row:
            raise UserError(f"{place}: no {name!r}; this one has {', '.join(map(repr, row)) or 'nothing'}")
    for name in ("image", "images"):
        if isinstance(row[prompt], list) and row.get(name):
            raise UserError(f"{place}: {name!r} is not empty; a prompt can only be text or messages of text")
    if reserved := RESERVED & row.keys():
        raise UserError(f"{place}: {min(reserved)!r} is what a reward function is given anyway; rename the column")
    if missing := first_row.keys() - row.keys():
        raise UserError(f"{place}: no {min(missing)!r}, which {first_place} has; every row needs the same columns")
    if extra := row.keys() - first_row.keys():
        raise UserError(f"{first_place}: no {min(extra)!r}, which {place} has; every row needs the same columns")


def _answer(value: Any, where: str) -> str:
    is_number = type(value) in (bool, int) or (type(value) is float and math.isfinite(value))
    return answer_text(value) if is_number else _text(value, where, "text or a number is needed")


def _text(value: Any, where: str, wanted: str = "text is needed") -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else value if isinstance(value, bool | float) else type(value).__name__
        raise UserError(f"{where} is {kind}; {wanted}")
    if not value.strip():
        raise UserError(f"{where} is empty")
    if half := re.search("[\ud800-\udfff]", value):
        raise UserError(f"{where} holds half a character, \\u{ord(half[0]):x}")
    return value


def _prompt(value: Any, where: str) -> Prompt:
    if not isinstance(value, list):
        return _text(value, where, "text is needed, or a list of messages")
    messages = [_message(message, f"{where}, message {number}") for number, message in enumerate(value, start=1)]
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise UserError(f"{where} has no message of the user")
    if roles[-1] not in ("user", "tool"):
        raise UserError(f"{where}, message {len(roles)}: role is {roles[-1]!r}; the last one has to be the user's")
    return messages


def _message(message: Any, where: str) -> dict[str, str]:
    """A message with `role` and `content` alone. Parquet gives every message all keys, so further keys may be null."""
    _check_keys(message, where, ("role", "content"))
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise UserError(f"{where}: role is {short_repr(role)}; choose from {', '.join(ROLES)}")
    if isinstance(content, list):
        parts = [(part, f"{where}: content, part {number}") for number, part in enumerate(content, start=1)]
        content = "".join(_part(part, place) for part, place in parts)
    return {"role": role, "content": _text(content, f"{where}: content")}


def _part(part: Any, where: str) -> str:
    """The text of {"type": "text", "text": ...}, which is how models that see images have their messages."""
    if isinstance(part, dict) and part.get("type", "text") != "text":
        raise UserError(f"{where}: type is {short_repr(part['type'])}; only 'text' is read")
    _check_keys(part, where, ("type", "text"))
    return part["text"] if isinstance(part["text"], str) else _text(part["text"], f"{where}: text")


def _check_keys(value: Any, where: str, keys: tuple[str, str]) -> None:
    wanted = f"an object with {' and '.join(map(repr, keys))} is needed"
    if not isinstance(value, dict):
        raise UserError(f"{where} is {short_repr(value)}; {wanted}")
    if missing := [key for key in keys if key not in value]:
        raise UserError(f"{where}: no {missing[0]!r}; {wanted}")
    if unread := [key for key in value if key not in keys and value[key] not in (None, "", [], {})]:
        raise UserError(f"{where}: {short_repr(unread[0])} is not read; {wanted}, and nothing else")
