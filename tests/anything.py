"""What the tests of bad input share: anything that JSON can hold, and what may become of it."""

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
    """So many examples, the same ones each time."""
    return settings(deadline=None, max_examples=number, derandomize=True)


def told(function, *arguments, **more):
    """What it returns, or the line in which it refused; whatever else it raises is a failure."""
    try:
        return function(*arguments, **more)
    except UserError as error:
        line = str(error)
        assert line.isprintable()
        assert 9 < len(line) < 1100
        return line


def damaged(data, whole):
    """Bytes with one to nine of them cut out, others put in their place, or both."""
    place, length = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 9))
    return whole[:place] + data.draw(st.binary(min_size=not length, max_size=9)) + whole[place + length :]


class Malicious:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def poison(folder, ran, *names):
    """Write files into a folder that, unpickled, leave a file."""
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Malicious(ran)))
    pickle.loads((folder / names[0]).read_bytes())
    assert ran.exists()  # it would
    ran.unlink()
