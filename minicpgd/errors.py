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
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

LONGEST = 1000

_short = reprlib.Repr()
_short.maxlevel = 2  # Aliases in YAML can nest a billion values.
_short.maxlist = _short.maxtuple = _short.maxdict = 4
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
            lowest = f"{'more than' if self.above else 'at least'} {self.least:g}"
            highest = f"{'less than' if self.below else 'at most'} {self.most:g}"
            raise ConfigError(f"{name} = {short_repr(value)}: it has to be {highest if too_high else lowest}")


def check_fields(settings: Any) -> None:
    """Check each field of a dataclass against its annotation: values from Python or JSON have met no parser.

    Raises:
        ConfigError: a value has another type, or lies outside its `Range` or its choices.
    """
    for name, annotation in get_type_hints(type(settings), include_extras=True).items():
        hint, *ranges = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
        _check_value(name, getattr(settings, name), (hint, *get_args(hint)), ranges)


def _check_value(name: str, value: Any, kinds: tuple, ranges: Iterable[Range]) -> None:
    literals = [kind for kind in kinds if get_origin(kind) is Literal]
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
