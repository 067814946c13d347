"""Hypothesis strategies for values that JSON or a file can hold, and helpers for the tests of bad input."""

import math
import pickle
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st

from minicpgd import UserError

ODD = ["auto", "grpo", "", "\0", "\ud800", "a\nb", "x" * 5000, 10**30, 10**400, -(10**400), 1e308, 1e-320, math.nan]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(ODD)
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)
content = st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))


def many(number):
    """Run a test with this number of examples, the same ones each time."""
    return settings(deadline=None, max_examples=number, derandomize=True)


def result_or_line(function, *arguments, **options):
    """Return the function's result, or the line of its UserError. The test fails if it raises anything else."""
    try:
        return function(*arguments, **options)
    except UserError as error:
        line = str(error)
        assert line.isprintable()
        assert 9 < len(line) < 1100
        return line


def damaged(data, whole):
    """Remove up to nine bytes, insert up to nine bytes at the same place, or do both."""
    place, length = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 9))
    return whole[:place] + data.draw(st.binary(min_size=not length, max_size=9)) + whole[place + length :]


class Malicious:
    """An object that creates a file when Python unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def poison(folder, marker, *names):
    """Write pickles to a folder that create the file `marker` if they are unpickled."""
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Malicious(marker)))
    pickle.loads((folder / names[0]).read_bytes())
    assert marker.exists()  # The pickles work.
    marker.unlink()
