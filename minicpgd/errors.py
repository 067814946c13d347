"""The one exception a user is meant to read.

Whatever the user can put right (a field, a file, a reward function, a full disk) raises `UserError` with one line that
says what was wrong, where, and what would be right. The command line prints that line and exits with code 2; Python
callers can catch it. Anything else that escapes is a bug of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What was wrong, where (file, line, field), and what would be right, in one line."""


class ConfigError(UserError):
    """A setting, or a combination of settings, that cannot be run."""


class NonFiniteError(UserError):
    """A loss or a gradient stopped being a number; the policy was left as it was before that update."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean 'cpgd'? `, to go into such a line; empty where nothing known is near."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    near.sort(key=lambda other: sorted(other) != sorted(name))  # swapped letters first
    return f"did you mean {near[0]!r}? " if near else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is full: Python has a class for it, a card another, torch on a CPU none."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)
