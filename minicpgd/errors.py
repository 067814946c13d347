"""The one exception that users read, and the checks of their values.

A mistake that the user can correct (a field, a file, a reward function, a full disk) raises `UserError`. Its one line
says what was wrong, where, and what would be right. The command line prints the line and exits with code 2; Python
callers can catch it. Any other exception is a bug of this package and keeps its traceback.
"""

import difflib
import math
import re
import reprlib
from collections.abc import Iterable
from dataclasses import fields
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

LONGEST = 1000

_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxtuple, _short.maxdict = (
    2,
    4,
    4,
    4,
)  # Aliases in YAML can nest a billion values.
_short.maxstring = _short.maxlong = _short.maxother = 200


class UserError(Exception):
    """What was wrong, where (file, line, field), and what would be right, in one line."""

    def __init__(self, line: str):
        super().__init__(one_line(line))


class ConfigError(UserError):
    """A setting, or a combination of settings, that cannot be run."""


class MissingPackageError(ConfigError):
    """A setting needs an optional package that is not installed."""


class NonFiniteError(UserError):
    """A loss or a gradient is not a number. The policy is as it was before that update."""


def one_line(text: str) -> str:
    """Turn any text into a line that every terminal can show: short, without line breaks and control characters."""
    words = " ".join(text.split())
    words = words if len(words) <= LONGEST else f"{words[: LONGEST // 2]} ... {words[-LONGEST // 3 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def short_repr(value: object) -> str:
    """A short `repr` for such a line. It never fails, not even for integers that are too long to print."""
    try:
        return _short.repr(value)
    except Exception:
        return f"a value of type {type(value).__name__}"


def describe_error(error: BaseException) -> str:
    """Describe another library's exception for such a line, as in `ValueError: no luck`. Its `str` may itself raise."""
    try:
        words = str(error)
    except Exception:
        words = ""
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean 'cpgd'? ` for such a line; empty if no known name is near."""
    names = list(known)

    def distance(other: str) -> tuple[bool, float, int]:  # Swapped letters come first, then the order of `known`.
        likeness = difflib.SequenceMatcher(None, other, name).ratio()
        return sorted(other) != sorted(name), -likeness, names.index(other)

    near = sorted(difflib.get_close_matches(name, names, n=3, cutoff=0.4), key=distance)
    return f"did you mean {near[0]!r}? " if near else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory is full. Python and CUDA have classes for it; torch on a CPU has none."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


class Range(NamedTuple):
    """The values that a number may have; `above` and `below` exclude the ends."""

    least: float
    most: float
    above: bool = False
    below: bool = False

    def check(self, name: str, value: float) -> None:
        """Check a number.

        Raises:
            ConfigError: it lies outside, or is NaN.
        """
        too_low = value <= self.least if self.above else value < self.least
        too_high = value >= self.most if self.below else value > self.most
        if too_low or too_high or value != value:
            wanted = f"{'less than' if self.below else 'at most'} {self.most:g}"
            if not too_high:
                wanted = f"{'more than' if self.above else 'at least'} {self.least:g}"
            raise ConfigError(f"{name} = {short_repr(value)}: it has to be {wanted}")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def check_fields(settings: Any) -> None:
    """Check each field of a dataclass against its annotation: values from Python or JSON have met no parser.

    Raises:
        ConfigError: a value has another type, or lies outside its `Range` or its choices.
    """
    hints = _hints(type(settings))
    for field in fields(settings):
        hint, ranges = hints[field.name], []
        if get_origin(hint) is Annotated:
            hint, *ranges = get_args(hint)
        _check_value(field.name, getattr(settings, field.name), get_args(hint) or (hint,), hint, ranges)


def _check_value(name: str, value: Any, kinds: tuple, hint: Any, ranges: Iterable[Range]) -> None:
    literals = [kind for kind in (hint, *kinds) if get_origin(kind) is Literal]
    choices = [choice for literal in literals for choice in get_args(literal)]
    types = [kind for kind in kinds if isinstance(kind, type) and kind is not NoneType]
    if (value is None and NoneType in kinds) or (isinstance(value, str) and value in choices):
        return
    if not types:
        check_choice(name, value, choices)
    wanted = types[0]
    right_type = type(value) is wanted or (wanted is float and type(value) is int)
    if not right_type or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"{name} = {short_repr(value)}: {' or '.join([wanted.__name__, *choices])} expected")
    if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        raise ConfigError(f"{name} = {short_repr(value)}: it has a character that no text and no file name can hold")
    for allowed in ranges:
        allowed.check(name, value)


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Check a name against those that are known.

    Raises:
        ConfigError: it is none of them.
    """
    if not isinstance(value, str) or value not in known:
        near = did_you_mean(value[:99], known) if isinstance(value, str) else ""
        raise ConfigError(f"{name} = {short_repr(value)}: {near}choose from {', '.join(known)}")
