"""Whatever a file of problems contains and whatever a reward function does, it works or is one line."""

import json
import math
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import content, damaged, many, result_or_line, values

from minicpgd.tasks import call_reward, load_reward
from minicpgd.tasks.data_files import find_files, read_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("problems")


# Files of problems ---------------------------------------------------------------------------------------------------

GOOD = '{"prompt": "1+1=", "answer": "2"}\n'


@many(250)
@given(
    content
    | st.lists(values.map(json.dumps), max_size=3).map(lambda lines: "\n".join(lines).encode())
    | st.dictionaries(st.sampled_from(["prompt", "answer", "level"]), values).map(lambda row: json.dumps(row).encode()),
    st.sampled_from([b"", GOOD.encode()]),
)
def test_any_bytes_are_problems_or_a_line_that_names_the_place(folder, written, before):
    path = folder / "mine.jsonl"
    path.write_bytes(before + written)
    rows = result_or_line(read_files, [path])
    if isinstance(rows, str):
        assert rows.startswith((f"{path}, line ", f"{path}: empty"))
    else:
        assert all(isinstance(row[name], str) and row[name].strip() for row in rows for name in ("prompt", "answer"))


@pytest.mark.parametrize(
    ("written", "line"),
    [
        (GOOD.encode("utf-16"), "line 1: not UTF-8"),
        (GOOD.encode() + '{"prompt": "é", "answer": "2"}\n'.encode("latin-1"), "line 2: not UTF-8"),
        (b"", "empty"),
        (b"\0" * 99, "line 1: not JSON"),
        (b'{"prompt": "a", "answer": "1", "answer": "2"}', "line 1: not JSON: 'answer' is there twice"),
        (b'{"prompt": "a", "answer": {"x": 1, "x": 2}}', "'x' is there twice"),
        (b'{"prompt": "a", "answer": NaN}', "line 1: answer is nan"),
        (b'{"prompt": "a", "answer": -Infinity}', "line 1: answer is -inf"),
        (b'{"prompt": "a", "answer": ["1"]}', "line 1: answer is list"),
        (b'{"prompt": "a\\ud800", "answer": "1"}', r"line 1: prompt holds half a character, \ud800"),
        (b'{"prompt": "a", "answer": ' + b"[" * 99999 + b"}", "line 1: not JSON: thousands of brackets"),
        (b'{"prompt": "a", "answer": ' + b"1" * 5000 + b"}", "line 1: not JSON"),
        (
            b'{"prompt": "a", "answer": "1", "completions": 1}',
            "line 1: 'completions' is what a reward function is given",
        ),
        (b'{"prompt": "' + b"a" * 10**7 + b'"}', "line 1: no 'answer'"),
    ],
    ids=range(14),
)
def test_a_file_with_a_bad_row_is_one_line(tmp_path, written, line):
    (tmp_path / "x.jsonl").write_bytes(written)
    error = result_or_line(read_files, [tmp_path / "x.jsonl"])
    assert error.startswith(str(tmp_path / "x.jsonl"))
    assert line in error


def test_byte_order_marks_line_ends_and_long_lines_change_no_problem(tmp_path):
    two = [{"prompt": "1+1=", "answer": "2"}] * 2
    for written in (
        b"\xef\xbb\xbf" + 2 * GOOD.encode(),
        GOOD.replace("\n", "\r\n").encode() * 2,
        GOOD.encode() + b"\n" + GOOD.encode(),
    ):
        (tmp_path / "x.jsonl").write_bytes(written)
        assert read_files([tmp_path / "x.jsonl"]) == two
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "a" * 10**7, "answer": 2}))
    assert len(read_files([tmp_path / "x.jsonl"])[0]["prompt"]) == 10**7


def test_what_is_no_file_is_one_line_and_a_pipe_is_not_opened(tmp_path):
    """Opening the pipe would block until somebody writes to it."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("pipe.jsonl", "loop.jsonl", "folder.jsonl", "x\0.jsonl", "x" * 5000, "~nobody-of-that-name/x.jsonl"):
        assert result_or_line(find_files, str(tmp_path / name) if name[0] != "~" else name).startswith("data = ")
    (tmp_path / "folder.jsonl" / "train.jsonl").symlink_to("../pipe.jsonl")
    (tmp_path / "folder.jsonl" / "test.jsonl").symlink_to("../loop.jsonl")
    for paths in find_files(str(tmp_path / "folder.jsonl")).values():
        assert "cannot be read" in result_or_line(read_files, paths)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_to_read_is_one_line(tmp_path):
    (tmp_path / "x.jsonl").write_text(GOOD)
    (tmp_path / "x.jsonl").chmod(0)
    assert "Permission denied" in result_or_line(read_files, [tmp_path / "x.jsonl"])


COLUMNS = {
    "prompt": ["1+1=", "1+2="],
    "answer": [2, 3.5],
    "none": [None, 1],
    "bytes": [b"\xff", b""],
    "nested": [{"a": [1]}, None],
    "nan": [math.nan, math.inf],
}


@many(75)
@given(st.data())
def test_any_damage_to_a_parquet_file_is_rows_or_one_line(folder, data):
    path = folder / "mine.parquet"
    pq.write_table(pa.table(COLUMNS), path)
    path.write_bytes(damaged(data, path.read_bytes()))
    rows = result_or_line(read_files, [path])
    assert isinstance(rows, list) or rows.startswith(str(path))


@pytest.mark.parametrize("flaw", ["column twice", "latin-1", "decimal", "date"])
def test_a_parquet_file_with_a_flaw_is_one_line(tmp_path, flaw):
    columns, names = [pa.array(["a"]), pa.array(["1"]), pa.array(["2"])], ["prompt", "answer", "level"]
    if flaw == "column twice":
        names[2] = "answer"
    elif flaw == "latin-1":
        columns[0] = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
    else:
        columns[1] = (
            pa.array([1], pa.int64()).cast(pa.decimal128(20))
            if flaw == "decimal"
            else pa.array([10**18], pa.timestamp("ms"))
        )
    pq.write_table(pa.Table.from_arrays(columns, names=names), tmp_path / "x.parquet")
    assert result_or_line(read_files, [tmp_path / "x.parquet"]).startswith(str(tmp_path / "x.parquet"))


# Rewards -------------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]


class Odd(float):
    def __float__(self):
        raise RuntimeError("not today")

    def __repr__(self):
        raise RuntimeError("nor tomorrow")


def endless():
    while True:
        yield 1.0


class SilentError(Exception):
    def __str__(self):
        raise ValueError


RETURNED = {
    "none": None,
    "endless": endless(),
    "text": "12",
    "bytes": b"12",
    "dict": {1.0: 2, 3.0: 4},
    "set": {1.0, 2.0},
    "number": 1.0,
    "nested": [[1.0], [2.0]],
    "short": [1.0],
    "long": [1.0] * 3,
    "huge": [10**400, 1],
    "odd": [Odd(1), 1],
    "nan": [math.nan, 1],
    "complex": [1j, 2],
    "words": ["1", "2"],
    "matrix": torch.ones(2, 2),
    "scalar": torch.ones(()),
    "module": math,
    "object": object(),
    "array": np.ones((2, 2)),
    "type": list,
    "inf": [1, -math.inf],
    "raises": (1 / 0 for _ in "ab"),
}
NUMBERS = {
    "tensor": torch.tensor([1.0, 0.5]),
    "array": np.array([1, 0.5], dtype=np.float16),
    "tensors": [torch.tensor(1), torch.tensor([0.5])],
    "bools": [True, 0.5],
    "generator": (x for x in (1, 0.5)),
    "tuple": (1, 0.5),
    "halves": np.array([True, 0.5]),
}


@pytest.mark.parametrize("name", RETURNED)
def test_returned_values_that_are_no_rewards_are_one_line(name):
    line = result_or_line(call_reward, lambda prompts, completions, answer: RETURNED[name], ROWS, ["x", "y"])
    assert line.startswith(f"reward function {__name__}:<lambda> r")


@pytest.mark.parametrize("name", NUMBERS)
def test_returned_values_that_are_numbers_are_rewards(name):
    """TRL accepts the same values, because it passes them to torch.tensor."""
    assert call_reward(lambda prompts, completions, answer: NUMBERS[name], ROWS, ["x", "y"]) == [1.0, 0.5]


RAISED = [
    Exception(),
    ValueError("a\nb\0"),
    KeyError("x"),
    SilentError(),
    SystemExit(),
    SystemExit(0),
    RuntimeError(b"\xff", 3),
    MemoryError(),
    RecursionError("x" * 10**6),
    StopIteration(),
    OSError(2, "no", "a\nb"),
    UnicodeDecodeError("u", b"", 0, 1, "\ud800"),
    AssertionError,
]


@pytest.mark.parametrize("error", RAISED, ids=range(len(RAISED)))
def test_any_error_of_a_reward_function_is_one_line(error):
    def mine(prompts, completions, answer):
        raise error

    name = (error if isinstance(error, type) else type(error)).__name__
    assert result_or_line(call_reward, mine, ROWS, ["x", "y"]).startswith(
        f"reward function {__name__}:mine raised {name}"
    )


def test_a_module_that_exits_when_it_is_imported_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "exits_at_once.py").write_text("import sys\nsys.exit()\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert result_or_line(load_reward, "exits_at_once:f") == "reward = 'exits_at_once:f': SystemExit"


@many(100)
@given(
    st.text()
    | st.lists(
        st.sampled_from(["math", "exact", "format", "+", "*", ":", "1e9", "-", "os", ".", "path", " ", "\0"])
    ).map("".join)
)
def test_any_text_is_a_reward_or_one_line(text):
    function = result_or_line(load_reward, text)
    assert callable(function) or function.startswith("reward = ")
