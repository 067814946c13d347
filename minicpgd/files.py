"""Small files: JSON without repeated keys, writes that cannot be half done, and the versions behind a result."""

import json
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minicpgd.errors import short_repr


def parse_json(text: str | bytes) -> Any:
    """Read JSON in which no object has the same key twice. `json.loads` would silently keep the last one.

    Raises:
        ValueError: the text is not such JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise ValueError("thousands of brackets inside each other") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{short_repr(max(names, key=names.count))} is there twice")
    return values


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, force it to disk, and rename it to `path`. A reader sees all or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # The rename itself has to survive a power cut.
        os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def versions(*more: str) -> dict[str, str]:
    """The versions of Python, of the packages that decide what a run does, and of `more` packages."""
    packages = ("minicpgd", "torch", "transformers", "numpy", *more)
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
