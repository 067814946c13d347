"""What people's own files of problems hold: conversations, verl's columns, compressed files, shards and numbers."""

import copy
import gzip
import json
import os
import random
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import damaged, many, result_or_line

from minicpgd.tasks import data_files, get_task, is_solution
from minicpgd.tasks.data_files import find_files, read_files
from minicpgd.tasks.jsonl import Jsonl, add_instruction, prompt_key

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "1+1?"}
REPLY = {"role": "assistant", "content": "2"}
TOOL = {"role": "tool", "content": "2"}
TEXT = {"prompt": "a", "answer": "1"}
CHAT = {"prompt": [USER], "answer": "1"}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def text(words):
    return {"type": "text", "text": words}


def said(content):
    return [SYSTEM, {"role": "user", "content": content}]


@pytest.fixture
def read(tmp_path):
    """Write a file and read it. The folder's name is left out of an error line."""

    def write_and_read(content, name="p.jsonl"):
        path = tmp_path / name
        path.write_bytes(content)
        result = result_or_line(read_files, [path])
        return result.replace(f"{tmp_path}{os.sep}", "") if isinstance(result, str) else result

    return write_and_read


# Conversations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "messages"),
    [
        ([USER], [USER]),
        ([SYSTEM, USER], [SYSTEM, USER]),
        ([USER, REPLY, USER], [USER, REPLY, USER]),
        ([USER, REPLY, TOOL], [USER, REPLY, TOOL]),
        (said([text("a "), text("b")]), said("a b")),
        (said([text(" "), text("b")]), said(" b")),
        ([USER | {"name": None, "tool_calls": []}], [USER]),
        (said([text("a") | {"image": None}]), said("a")),
        (said("two\u2028lines\u0085 here"), said("two\u2028lines\u0085 here")),
        (said("{{ braces }} <|im_start|>"), said("{{ braces }} <|im_start|>")),
    ],
    ids=range(10),
)
def test_a_prompt_may_be_a_conversation(read, prompt, messages):
    rows = [{"prompt": messages, "answer": "1", "level": 3}]
    written = json.dumps({"prompt": prompt, "answer": 1, "level": 3}, ensure_ascii=False).encode()
    assert read(written) == rows
    assert read(b"[\n" + written + b"\n]", "p.json") == rows


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        ([], "prompt has no message of the user"),
        ([SYSTEM, TOOL], "prompt has no message of the user"),
        ([USER, REPLY], "prompt, message 2: role is 'assistant'; the last one has to be the user's"),
        ([USER, SYSTEM], "prompt, message 2: role is 'system'; the last one"),
        ([SYSTEM, {"role": "user"}], "prompt, message 2: no 'content'; an object with 'role' and 'content' is needed"),
        ([{"content": "a"}], "prompt, message 1: no 'role'"),
        ([{"from": "human", "value": "a"}], "prompt, message 1: no 'role'"),
        ([USER | {"role": "human"}], "message 1: role is 'human'; choose from system, user, assistant, tool"),
        ([USER | {"role": ["user"]}], "message 1: role is ['user']; choose from"),
        ([USER | {"role": None}], "message 1: role is None; choose from"),
        (["a"], "prompt, message 1 is 'a'; an object with 'role' and 'content' is needed"),
        ([USER, None], "prompt, message 2 is None; an object"),
        ([USER, [USER]], "prompt, message 2 is [{"),
        (said(None), "prompt, message 2: content is null; text is needed"),
        (said(3), "prompt, message 2: content is int; text is needed"),
        (said(" \n"), "prompt, message 2: content is empty"),
        (said([]), "prompt, message 2: content is empty"),
        (said("a\ud800"), r"prompt, message 2: content holds half a character, \ud800"),
        (said([text("a"), {"type": "image"}]), "message 2: content, part 2: type is 'image'; only 'text' is read"),
        (said([{"type": "image_url", "image_url": {"url": "a.png"}}]), "content, part 1: type is 'image_url'; only"),
        (said([text("a") | {"image": "a.png"}]), "content, part 1: 'image' is not read; an object with 'type' and"),
        (said([{"type": "text"}]), "content, part 1: no 'text'"),
        (said([{"text": "a"}]), "content, part 1: no 'type'"),
        (said([text(None)]), "content, part 1: text is null; text is needed"),
        (said(["a"]), "content, part 1 is 'a'; an object with 'type' and 'text' is needed"),
        ([USER | {"images": ["a.png"]}], "message 1: 'images' is not read; an object with 'role' and 'content' is"),
        ([USER | {"tool_calls": [{"id": 1}]}], "message 1: 'tool_calls' is not read"),
        (USER, "prompt is dict; text is needed, or a list of messages"),
        (None, "prompt is null; text is needed, or a list of messages"),
        (True, "prompt is True; text is needed, or a list of messages"),
    ],
    ids=range(30),
)
def test_a_wrong_conversation_is_one_line_with_the_message(read, prompt, line):
    error = read(lines(CHAT, CHAT, {"prompt": prompt, "answer": "1"}))
    place, _, rest = error.partition(": ")
    assert place == "p.jsonl, line 3"
    assert line in rest


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ((TEXT, TEXT, CHAT), "p.jsonl, line 3: prompt is messages, but text in p.jsonl, line 1; every row needs"),
        ((CHAT, TEXT), "p.jsonl, line 2: prompt is text, but messages in p.jsonl, line 1; every row needs the same"),
        ((CHAT | {"images": []}, CHAT | {"images": ["a.png"]}), "p.jsonl, line 2: 'images' is not empty; a prompt"),
        ((CHAT | {"image": {"bytes": "x"}},), "p.jsonl, line 1: 'image' is not empty; a prompt can only be text"),
    ],
)
def test_rows_of_two_kinds_and_rows_with_images_are_one_line(read, rows, line):
    assert read(lines(*rows)).startswith(line)


def test_the_instruction_stands_below_the_last_message_of_the_user():
    prompt = [SYSTEM, USER, REPLY, {"role": "user", "content": "2+2?"}, TOOL]
    before = copy.deepcopy(prompt)
    longer = add_instruction(prompt, "Think.")
    assert prompt == before
    assert [message["content"] for message in longer] == ["Be brief.", "1+1?", "2", "2+2?\n\nThink.", "2"]
    assert add_instruction("2+2?", "Think.") == "2+2?\n\nThink."


def test_rows_that_a_subclass_shares_stay_as_they_are():
    shared = {"prompt": [USER], "answer": "2"}

    class Mine(Jsonl):
        def _load(self, data):
            return [shared, shared], [shared]

    task = Mine(instruction="Think.")
    assert shared == {"prompt": [USER], "answer": "2"}
    expected = [{"role": "user", "content": "1+1?\n\nThink."}]
    assert [row["prompt"] for row in task.sample(2, random.Random(0)) + task.held_out(9)] == [expected] * 3


def test_equal_conversations_are_on_the_same_side_of_the_split(tmp_path):
    """The checksum is worked out here from the definition: CRC-32 of JSON with sorted keys, one of 16."""
    prompts = [said(f"{i}+1?") for i in range(300)]
    swapped = [[dict(reversed(message.items())) for message in prompt] for prompt in prompts]
    path = tmp_path / "p.jsonl"
    path.write_bytes(lines(*({"prompt": prompt, "answer": "1"} for prompt in prompts + swapped)))
    chosen = [p for p in prompts if zlib.crc32(json.dumps(p, sort_keys=True).encode()) % 16 == 0]
    held_out = [row["prompt"] for row in get_task("jsonl", data=str(path)).held_out(999)]
    assert 5 < len(chosen) < 50
    assert sorted(held_out, key=prompt_key) == sorted(chosen * 2, key=prompt_key)
    instructed = get_task("jsonl", data=str(path), instruction="Think.").held_out(999)
    assert [row["prompt"][1]["content"] for row in instructed] == [p[1]["content"] + "\n\nThink." for p in held_out]
    assert all(row["prompt"][0] == SYSTEM for row in instructed)


def test_a_folder_trains_on_no_conversation_that_it_tests(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(*({"prompt": said(str(i)), "answer": "1"} for i in range(5))))
    (tmp_path / "test.jsonl").write_bytes(lines({"prompt": said("3"), "answer": "1"}))
    trained = get_task("jsonl", data=str(tmp_path)).sample(4, random.Random(0))
    assert sorted(row["prompt"][1]["content"] for row in trained) == ["0", "1", "2", "4"]


# Columns -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["p.parquet", "p.jsonl"])
def test_a_row_in_verls_format_has_its_answer_in_reward_model(tmp_path, name):
    rows = [
        {
            "data_source": "openai/gsm8k", "prompt": [{"role": "user", "content": f"{i}+0?"}], "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(i)}, "extra_info": {"index": i, "split": "train"},
        }
        for i in range(2)
    ]  # fmt: skip
    if name == "p.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(lines(*rows))
    assert read_files([tmp_path / name]) == [row | {"answer": str(i)} for i, row in enumerate(rows)]


def test_a_message_of_parquet_may_have_keys_that_are_null(tmp_path):
    rows = [{"prompt": [USER | {"name": None}, REPLY | {"name": None}, USER], "answer": "2"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert read_files([tmp_path / "p.parquet"]) == [{"prompt": [USER, REPLY, USER], "answer": "2"}]
    rows[0]["prompt"][1]["name"] = "Ann"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    line = result_or_line(read_files, [tmp_path / "p.parquet"])
    assert "p.parquet, row 1: prompt, message 2: 'name' is not read" in line


VERL = {"prompt": "a", "reward_model": {"style": "rule", "ground_truth": "72"}}


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        (VERL, "72"),
        (VERL | {"answer": "7"}, "7"),  # The column `answer` comes first.
        (VERL | {"reward_model": {"ground_truth": 72}}, "72"),
        (
            VERL | {"reward_model": {"ground_truth": None}},
            "p.jsonl, line 1: reward_model.ground_truth is null; text or",
        ),
        (VERL | {"reward_model": {"ground_truth": ["7"]}}, "p.jsonl, line 1: reward_model.ground_truth is list; text"),
        (VERL | {"reward_model": {"ground_truth": " "}}, "p.jsonl, line 1: reward_model.ground_truth is empty"),
        (VERL | {"reward_model": {}}, "p.jsonl, line 1: no 'answer'; this one has 'prompt', 'reward_model'"),
        (VERL | {"reward_model": "72"}, "p.jsonl, line 1: no 'answer'; this one has 'prompt', 'reward_model'"),
        ({"question": "a", "solution": "1"}, "p.jsonl, line 1: no 'prompt'; this one has 'question', 'solution'"),
    ],
)
def test_the_answer_is_that_of_the_column_or_of_verl(read, row, answer):
    result = read(lines(row))
    if isinstance(result, list):
        assert result == [row | {"answer": answer}]
    else:
        assert result.startswith(answer)


@pytest.mark.parametrize(
    "name", ["prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"]
)
def test_a_column_with_the_name_of_an_argument_of_reward_functions_is_one_line(read, name):
    line = f"p.jsonl, line 1: {name!r} is what a reward function is given anyway; rename the column"
    assert read(lines(TEXT | {name: 1})) == line


@pytest.mark.parametrize(
    ("number", "text"),
    [
        ("0.1", "0.1"), ("-0.5", "-0.5"), ("1e-7", "0.0000001"), ("2.5e-05", "0.000025"), ("1E3", "1000"),
        ("0.30000000000000004", "0.30000000000000004"), ("9007199254740993", "9007199254740993"),
        ("1" + "0" * 50 + "1", "1" + "0" * 50 + "1"), ("-0.0", "0"), ("0", "0"), ("3.0", "3"), ("true", "true"),
        ("false", "false"), ('"True"', "True"), ('"1e-7"', "1e-7"), ('"007"', "007"),
    ],
)  # fmt: skip
def test_a_number_keeps_its_value_and_a_label_its_spelling(read, number, text):
    assert read(f'{{"prompt": "a", "answer": {number}}}'.encode())[0]["answer"] == text
    if number[0] in "-0123456789":
        assert float(text) == float(number)
        assert is_solution(rf"\boxed{{{text}}}", text)


def test_a_small_number_equals_its_other_spellings(read):
    answer = read(b'{"prompt": "a", "answer": 1e-7}')[0]["answer"]
    assert is_solution(r"\boxed{10^{-7}}", answer)
    assert not is_solution(r"\boxed{10^{-6}}", answer)


# Files ---------------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": f"q{i}", "answer": str(i)} for i in range(3)]
LONG = [{"prompt": f"q{i}" * 50, "answer": str(i)} for i in range(300)]
ZIPPED = gzip.compress(lines(*LONG), mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.json", lines(*ROWS), ROWS),
        ("p.json", json.dumps(ROWS).encode(), ROWS),
        ("p.json", b"\xef\xbb\xbf\r\n\n " + json.dumps(ROWS, indent=2).encode(), ROWS),
        ("p.json", b"\n" + lines(*ROWS), ROWS),
        ("p.json", b"", "p.json: empty"),
        ("p.json", b"[]", "p.json: empty"),
        ("p.json", b'[{"prompt": "a",\n "answer": "1"},\n]', "p.json: not JSON: "),
        ("p.json", json.dumps([TEXT, 3]).encode(), "p.json, row 2: a JSON object is needed, as"),
        ("p.json", json.dumps([TEXT, {"prompt": "a"}]).encode(), "p.json, row 2: no 'answer'"),
        ("p.json", b'[{"prompt": "a", "answer": "1", "answer": "2"}]', "p.json: not JSON: 'answer' is there twice"),
        ("p.json", b'{"data": []}', "p.json, line 1: no 'prompt'; this one has 'data'"),
        ("p.json", b"\n" + lines(TEXT) + b"{", "p.json, line 3: not JSON"),
        ("p.jsonl", json.dumps(ROWS).encode(), "p.jsonl, line 1: a JSON object is needed, as"),
        ("p.jsonl.gz", gzip.compress(lines(*ROWS)), ROWS),
        ("p.jsonl.gz", gzip.compress(lines(*ROWS[:1])) + gzip.compress(lines(*ROWS[1:])), ROWS),
        ("p.jsonl.gz", gzip.compress(b"\xef\xbb\xbf" + lines(*ROWS).replace(b"\n", b"\r\n\n")), ROWS),
        ("p.jsonl.gz", ZIPPED, LONG),
        ("p.jsonl.gz", gzip.compress(lines(TEXT) + b'{"prompt": "\xff"}'), "p.jsonl.gz, line 2: not UTF-8"),
        ("p.jsonl.gz", gzip.compress(lines(TEXT, {"answer": 1})), "p.jsonl.gz, line 2: no 'prompt'"),
        ("p.jsonl.gz", gzip.compress(b""), "p.jsonl.gz: empty"),
        ("p.jsonl.gz", lines(*ROWS), "p.jsonl.gz: damaged after line 0, or not gzip: Not a gzipped file"),
        ("p.jsonl.gz", ZIPPED[: len(ZIPPED) // 2], "p.jsonl.gz: damaged after line "),
        ("p.jsonl.gz", ZIPPED[:-4], "p.jsonl.gz: damaged after line 300, or not gzip: Compressed file ended"),
        ("p.jsonl.gz", ZIPPED[:-8] + b"\0" * 8, "p.jsonl.gz: damaged after line 300, or not gzip: CRC check failed"),
        ("p.jsonl.gz", ZIPPED[:10] + b"\xff" * 50, "p.jsonl.gz: damaged after line 0, or not gzip: Error -3"),
    ],
    ids=range(25),
)  # fmt: skip
def test_what_a_json_file_and_a_compressed_file_hold(read, name, content, expected):
    result = read(content, name)
    assert result == expected if isinstance(expected, list) else result.startswith(expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compressed")


@many(60)
@given(st.data())
def test_any_damage_to_a_compressed_file_is_rows_or_one_line(folder, data):
    path = folder / "p.jsonl.gz"
    path.write_bytes(damaged(data, gzip.compress(lines(*ROWS), mtime=0)))
    result = result_or_line(read_files, [path])
    assert result == ROWS or result.startswith(str(path))


def test_a_compressed_file_is_read_up_to_a_limit(read, monkeypatch):
    """The limits are low here. A compressed gigabyte of zeros would be one megabyte."""
    size = len(lines(*LONG))
    monkeypatch.setattr(data_files, "LARGEST_GZIP", size)
    assert read(ZIPPED, "p.jsonl.gz") == LONG
    monkeypatch.setattr(data_files, "LARGEST_GZIP", size - 1)
    line = f"p.jsonl.gz, line 300: over {size - 1} decompressed bytes; gunzip it first"
    assert read(ZIPPED, "p.jsonl.gz") == line
    assert read(lines(*LONG)) == LONG  # A file that is not compressed has no such limit.
    monkeypatch.setattr(data_files, "LONGEST_LINE", 1000)
    for name, content in (("p.jsonl.gz", gzip.compress(bytes(10**6))), ("p.jsonl", bytes(10**6))):
        assert read(content, name) == f"{name}, line 1: over 1000 bytes; one problem a line is needed"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz"])
@pytest.mark.parametrize("place", ["", "data"])
def test_a_folder_may_have_one_file_or_shards_of_any_kind(tmp_path, suffix, place):
    compress = gzip.compress if suffix.endswith(".gz") else bytes
    (tmp_path / place).mkdir(exist_ok=True)
    for i in range(3):
        content = compress(lines({"prompt": f"train {i}", "answer": i}))
        (tmp_path / place / f"train-0000{i}-of-00003{suffix}").write_bytes(content)
    (tmp_path / place / f"test{suffix}").write_bytes(compress(lines({"prompt": "test", "answer": 1})))
    (tmp_path / place / "train-notes.json").write_text("{}")  # This name is not that of a shard.
    task = get_task("jsonl", data=str(tmp_path))
    assert sorted(row["prompt"] for row in task.sample(3, random.Random(0))) == ["train 0", "train 1", "train 2"]
    assert [row["prompt"] for row in task.held_out(9)] == ["test"]


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (("train.jsonl", "train.jsonl.gz"), "both train.jsonl and train.jsonl.gz are there; which is meant?"),
        (("train.jsonl", "train-00000-of-00001.jsonl"), "both train.jsonl and train-00000-of-00001.jsonl are there"),
        (("train.json", "train.parquet"), "both train.parquet and train.json are there"),
        (("TRAIN.JSONL",), "no train.jsonl or train.parquet in this folder"),
        (("train.JSONL",), "no train.jsonl or train.parquet in this folder"),
    ],
)
def test_a_folder_with_two_kinds_or_capital_letters_is_one_line(tmp_path, names, line):
    for name in names:
        (tmp_path / name).write_bytes(lines(TEXT))
    assert line in result_or_line(find_files, str(tmp_path))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("p.JSONL", ".JSONL is not one of .jsonl, .parquet, .json"),
        ("p.Parquet", ".Parquet is not one of .jsonl, .parquet, .json"),
        ("p.txt", ".txt is not one of .jsonl, .parquet, .json"),
        ("p.jsonl.gz", ".gz is not one of .jsonl, .parquet, .json; gunzip it, or name it train.jsonl.gz and give"),
    ],
)
def test_a_file_with_another_suffix_is_one_line(tmp_path, name, line):
    (tmp_path / name).write_bytes(lines(TEXT))
    assert line in result_or_line(find_files, str(tmp_path / name))
