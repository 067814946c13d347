"""The one exception a user is meant to read.

Whatever the user can put right (a field, a file, a reward function, a full disk) raises `UserError` with one line that
says what was wrong, where, and what would be right. The command line prints that line and exits with code 2; Python
callers can catch it. Anything else that escapes is a bug of ours and keeps its traceback.
"""

import difflib
import reprlib
from collections.abc import Iterable

LONGEST = 1000

_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxtuple, _short.maxdict = 2, 4, 4, 4  # YAML's aliases can nest a billion
_short.maxstring = _short.maxlong = _short.maxother = 200


class UserError(Exception):
    """What was wrong, where (file, line, field), and what would be right, in one line."""

    def __init__(self, line: str):
        super().__init__(one_line(line))


class ConfigError(UserError):
    """A setting, or a combination of settings, that cannot be run."""


class NonFiniteError(UserError):
    """A loss or a gradient stopped being a number; the policy was left as it was before that update."""


def one_line(text: str) -> str:
    """A text of any origin as a line that any terminal can show: no line breaks, no control characters, not endless."""
    words = " ".join(text.split())
    words = words if len(words) <= LONGEST else f"{words[: LONGEST // 2]} ... {words[-LONGEST // 3 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def shown(value: object) -> str:
    """`repr` of a value, for such a line: short, and there for every value, as for integers too long to be written."""
    try:
        return _short.repr(value)
    except Exception:
        return f"a value of type {type(value).__name__}"


def said(error: BaseException) -> str:
    """`ValueError: no luck`, for such a line, of an exception of somebody else's, whose `str` may itself raise."""
    try:
        words = str(error)
    except Exception:
        words = ""
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean 'cpgd'? `, to go into such a line; empty where nothing known is near."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    near.sort(key=lambda other: sorted(other) != sorted(name))  # swapped letters first
    return f"did you mean {near[0]!r}? " if near else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is full: Python has a class for it, a card another, torch on a CPU none."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)
