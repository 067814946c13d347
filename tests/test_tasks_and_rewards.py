"""Problems from files and from the hub, and the rewards of answers to them."""

import json
import os
import random
import signal
import sys
import threading
import time

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minicpgd import TrainConfig, UserError, load_run, train
from minicpgd.cli.main import main
from minicpgd.errors import ConfigError
from minicpgd.tasks import (
    REWARDS,
    TASKS,
    call_reward,
    chain_arithmetic,
    describe_data,
    get_task,
    is_solution,
    jsonl,
    load_reward,
)
from minicpgd.tasks.answers import boxes, mathematics, plain, reference_answer, stated_answer
from minicpgd.tasks.chain_arithmetic import is_held_out
from minicpgd.tasks.data_files import find_files, read_files
from minicpgd.tasks.rewards import exact, one_box

SECONDS = 300  # An answer takes a second of processor time at most. A busy machine may give it little of that.


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chains(number, seed=0):
    rng = random.Random(seed)
    return [chain_arithmetic.make_problem(rng) for _ in range(number)]


@pytest.fixture
def a_new_judge(monkeypatch):
    """The second process of `mathematics`, and its cache of answers, as in a program that has just begun."""
    mathematics.same_value.cache_clear()
    judge = mathematics._Judge()
    monkeypatch.setattr(mathematics, "_judge", judge)
    yield judge
    mathematics.same_value.cache_clear()
    if judge._process:
        judge._process.kill()
        judge._process.wait()


# Final answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "stated"),
    [
        (r"so \boxed{72}", "72"),
        (r"first \boxed{1}, then \boxed{ 2 } and done", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{4} and \boxed{5", None),
        (r"} \boxed{4}", "4"),
        (r"\boxed{72} #### 73", "72"),
        (r"\boxed{72", None),
        (r"\boxed{}", None),
        ("It is 6 * 12.\n#### 72", "72"),
        ("#### 1\n#### 72\nI hope this helps.", "72"),
        ("####\n72", "72"),
        ("#### ", None),
        ("7+5=2,2*3=6#6", "6"),
        ("1#2#3", None),
        ("72", None),
        ("", None),
    ],
)
def test_the_final_answer_is_found_where_a_response_states_it(completion, stated):
    assert stated_answer(completion) == stated


def test_a_reference_may_have_its_reasoning_before_it():
    assert reference_answer("6 * 12 = <<6*12=72>>72\n#### 72") == "72"
    assert reference_answer(r"Thus \boxed{72}.") == "72"
    assert reference_answer("72") == "72"
    assert reference_answer("# 5") == "# 5"  # One `#` marks answers of chain arithmetic, whose references have none.


@pytest.mark.parametrize(
    ("text", "same"),
    [(" 72 ", "72"), ("72.", "72"), ("$72", "72"), ("$72$", "72"), (r"\$72", "72"), ("1,234,567.5", "1234567.5"),
     ("-1,000", "-1000"), ("1,23", "1,23"), ("1,2345", "1,2345"), ("(1,234)", "(1,234)"), (r"\frac12", r"\frac12"),
     ("0.5", "0.5"), ("Paris.", "Paris")],
)  # fmt: skip
def test_what_does_not_change_an_answer_is_removed(text, same):
    assert plain(text) == same


def test_the_reward_exact_compares_characters():
    completions = [r"\boxed{1,000}", "#### $1000.", "#1000", "1000", r"\boxed{1000.0}", r"\boxed{10^3}", "#### 1001"]
    assert exact(["?"] * 7, completions, ["1000"] * 7) == [1, 1, 1, 0, 0, 0, 0]
    assert exact(["?"], [r"\boxed{1000}"], ["so\n#### 1,000"]) == [1]


EQUAL = [  # reference, answer
    ("1/2", "0.5"),
    ("1/2", r"\frac{1}{2}"),
    ("0.5", r"\frac12"),
    ("0.5", r"\dfrac{2}{4}"),
    ("0.25", "1/4"),
    ("72", "72.0"),
    ("72", r"72\text{ dollars}"),
    ("1234", "1,234"),
    ("-3", "-6/2"),
    ("1.5", r"1\frac{1}{2}"),
    ("8", "2^3"),
    ("10000000000", "10^{10}"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    ("2", r"\sqrt{4}"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
    (r"2\pi", r"\pi + \pi"),
    ("x+1", "1+x"),
    ("x^2-1", "(x-1)(x+1)"),
    ("3", "x = 3"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("(1,2)", r"\left(1, 2\right)"),
    ("x<3", "3>x"),
    ("90", r"90^\circ"),
    ("50%", r"50\%"),
    ("Paris", r"\text{Paris}"),
    ("4", "9-5"),
    ("72", "72."),
    ("Paris", "Paris."),
]
DIFFERENT = [
    ("1/2", "2"),
    ("1/2", "0.51"),
    ("1/3", "0.33"),
    ("72", "-72"),
    ("72", "72.5"),
    ("72", "7 2"),
    ("72", "720"),
    ("72", "72, 73"),
    ("72", "72 or 73"),
    ("72", "1,2,72"),
    ("72", ""),
    ("72", "seventy"),
    ("8", "3^2"),
    (r"\sqrt{2}", "1.5"),
    ("(1,2)", "(2,1)"),
    ("[1,2)", "(1,2]"),
    ("x<3", "x>3"),
    ("x+1", "x-1"),
    ("x = 3", "x = 4"),
    ("Paris", "London"),
    (r"\infty", r"-\infty"),
    ("12", r"\frac{1}{"),
]


@pytest.mark.parametrize(("pairs", "same"), [(EQUAL, True), (DIFFERENT, False)])
def test_answers_are_compared_by_value(pairs, same):
    """We decided by hand which pairs are equal."""
    wrong = [pair for pair in pairs if is_solution(rf"Therefore \boxed{{{pair[1]}}}.", pair[0]) is not same]
    assert not wrong


def test_an_equation_answers_a_number_but_a_number_does_not_answer_an_equation():
    """math-verify takes the reference first. If the two were swapped, this test would fail."""
    assert is_solution(r"\boxed{x = y + 1 = 3}", "3")
    assert not is_solution(r"\boxed{3}", "2x + z = 3")
    assert is_solution(r"\boxed{2x + z = 3}", "3")


def test_the_reward_math_is_1_for_an_equal_value_and_else_0():
    completions = ["#### 0.5", "#1/2", r"\boxed{0.4}", "nothing", r"\boxed{\frac{1}{2}"]
    assert REWARDS["math"](["?"] * 5, completions, ["half of it\n#### 1/2"] * 5, level=[1] * 5) == [1, 1, 0, 0, 0]


HOSTILE = [
    "9**9**9", "9^9^9^9", "9^{9^{9}}", "2^{10^{11}}", r"\prod_{i=1}^{10^8} i", "x^" * 90 + "x",
    "(" * 99 + "1" + ")" * 99, "{" * 99 + "1" + "}" * 99,
    r"\frac{1}{" * 5000 + "2" + "}" * 5000, "{" * 5000 + "}" * 5000, "9" * 1_000_000, "\ud800", "\x00", "1\n2", '"]',
]  # fmt: skip


def test_hostile_answers_are_wrong_and_do_not_take_long(a_new_judge, monkeypatch):
    monkeypatch.setattr(mathematics, "SECONDS", 0.3)
    for n, answer in enumerate(HOSTILE, start=2):
        started = time.perf_counter()
        assert is_solution(rf"\boxed{{{answer}}}", "72") is False, answer[:40]
        assert is_solution(f"#### {answer}", "72") is False, answer[:40]
        assert time.perf_counter() - started < SECONDS, answer[:40]
        assert is_solution(rf"\boxed{{{n * 72}/{n}}}", "72")  # The next answer is judged as always.
    a_new_judge._process.kill()
    a_new_judge._process.wait()
    assert not is_solution(rf"\boxed{{{'1+' * 100}1}}", "101")  # It has more than LONGEST characters.
    assert a_new_judge._process.poll() is not None
    for text in (r"\boxed{" * 200_000, "#" * 1_000_000, "}" * 1_000_000, "$" * 1_000_000, "1," * 500_000):
        started = time.process_time()
        assert stated_answer(text) in (None, "")
        assert one_box(["?"], [text]) == [0.0]
        assert time.process_time() - started < 60  # An algorithm with quadratic time would take hours.


def test_several_threads_may_compare_answers_and_no_alarm_is_lost(a_new_judge):
    """The timeouts of math-verify itself would raise in a thread."""
    handler = signal.getsignal(signal.SIGALRM)
    answers = {}
    threads = [
        threading.Thread(target=lambda n=n: answers.update({n: is_solution(rf"\boxed{{{n}/4}}", f"{n * 0.25}")}))
        for n in range(1, 9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == dict.fromkeys(range(1, 9), True)
    assert signal.getsignal(signal.SIGALRM) is handler


def test_the_second_process_belongs_to_one_process_and_gets_no_ctrl_c(a_new_judge):
    assert is_solution(r"\boxed{2/4}", "0.5")
    ours = a_new_judge._process
    assert os.getsid(ours.pid) == ours.pid
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        right = a_new_judge.ask("0.25", "1/4") and a_new_judge._process.pid != ours.pid
        os.write(writing, b"y" if right else b"n")
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    assert os.read(reading, 1) == b"y"
    assert a_new_judge._process is ours
    ours.kill()
    ours.wait()
    assert a_new_judge.ask("0.25", "1/4")  # It was killed between two questions, so another one answers.


@pytest.mark.parametrize("use", ["reward", "sum", "jsonl", "is_solution"])
def test_without_math_verify_one_line_names_the_package_to_install(a_new_judge, tmp_path, monkeypatch, use):
    (tmp_path / "math_verify.py").write_text("raise ImportError('No module\\nnamed math_verify')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    data = write(tmp_path / "problems.jsonl", chains(40))
    calls = {
        "reward": lambda: load_reward("math"),
        "sum": lambda: load_reward("exact + 0.5*math"),
        "jsonl": lambda: get_task("jsonl", data=data),
        "is_solution": lambda: is_solution(r"\boxed{1/2}", "0.5"),
    }
    with pytest.raises(ConfigError, match=r"pip install 'minicpgd\[math\]' \(No module named math_verify\)") as caught:
        calls[use]()
    assert "\n" not in str(caught.value)
    assert is_solution(r"\boxed{1}", "1")  # The characters agree, so math-verify is not needed.


# Rewards by name and weight ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "reward"),
    [(r"So \boxed{72}", 1), (r"So $\boxed{72}$.", 1), (r"\[ x = \boxed{\frac{1}{2}} \]", 1), (r"**\boxed{72}**", 1),
     ("\\boxed{72}\n\n", 1), (r"\boxed{\{1\}}", 1), (r"\boxed{72} it is", 0), (r"\boxed{1}, \boxed{2}", 0),
     (r"\boxed{72} \boxed{", 0), (r"\boxed{7 so \boxed{72}", 0),
     (r"\boxed{}", 0), (r"\boxed{ }", 0), (r"\boxed{72", 0), ("#### 72", 0), ("", 0),
     (r"\boxed{\boxed{72}}", 0)],
)  # fmt: skip
def test_the_reward_format_is_1_for_one_box_at_the_end(response, reward):
    assert one_box(["?"], [response]) == [reward]
    assert len(boxes(response)) <= response.count("boxed")


ROWS = [{"prompt": "a", "answer": "1/2", "level": 3}, {"prompt": "b", "answer": "2", "level": 4}]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A user's module of reward functions."""
    (tmp_path / "mine_too.py").write_text(
        "def level(prompts, completions, level, **_):\n    return level\n"
        "def broken(prompts, completions, **_):\n    raise RuntimeError('no luck')\n"
        "def short(prompts, completions, **_):\n    return [1.0]\n"
        "def nan(prompts, completions, **_):\n    return [float('nan')] * len(completions)\n"
        "three = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "mine_too"
    sys.modules.pop("mine_too", None)


@pytest.mark.parametrize(
    ("text", "rewards"),
    [("math", [1, 0]), ("exact", [0, 0]), ("format", [1, 1]), ("math + 0.2*format", [1.2, 0.2]),
     ("0.5 * mine_too:level+exact", [1.5, 2]), ("math+-1*format", [0, -1]), ("2*math", [2, 0]), (" math ", [1, 0]),
     ("1e-1*format + 0*exact", [0.1, 0.1]), ("mine_too:level", [3, 4]), ("math + math + math", [3, 0])],
)  # fmt: skip
def test_rewards_add_up_by_weight(mine, text, rewards):
    function = load_reward(text)
    assert call_reward(function, ROWS, [r"\boxed{0.5}", r"\boxed{3}"]) == pytest.approx(rewards)
    with_trls_keywords = function(
        prompts=["a", "b"], completions=[r"\boxed{0.5}", r"\boxed{3}"], answer=["1/2", "2"], level=[3, 4], trainer=None
    )
    assert with_trls_keywords == pytest.approx(rewards)


def test_one_name_alone_is_the_function_itself(mine):
    assert load_reward("exact") is exact
    assert load_reward("mine_too:level").__name__ == "level"
    assert load_reward("math + 0.2*format").__name__ == "math + 0.2*format"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "mth",
            r"there is no reward 'mth'; did you mean 'math'\? choose from exact, "
            "math, last_number, number_in_text, format, or .*module:function",
        ),
        ("math + fromat", r"reward = 'math \+ fromat': there is no reward 'fromat'; did you mean 'format'\?"),
        ("math +", "there is no reward ''; choose from"),
        ("", "there is no reward ''; choose from"),
        ("math*0.2", r"'math' is not a weight; write a number, \* and a name"),
        ("nan*math", "'nan' is not a weight"),
        ("inf*math", "'inf' is not a weight"),
        ("*math", "'' is not a weight"),
        ("math - 0.1*format", r"'math - 0.1' is not a weight; .* even before a negative number"),
        ("0.5*0.5*math", r"'0.5\*0.5' is not a weight"),
        ("mine_too:absent", "absent"),
        ("no_such_module:f", "No module named 'no_such_module'; is the module's folder on PYTHONPATH"),
        (":f", "reward = ':f'"),
        ("mine_too:three", "three is not a function"),
    ],
)
def test_a_reward_that_cannot_be_read_is_one_line(mine, text, line):
    with pytest.raises(ConfigError, match=line) as caught:
        load_reward(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("math + 0.5*mine_too:broken", "reward function mine_too:broken raised RuntimeError: no luck"),
        ("math + 0.5*mine_too:short", "reward function mine_too:short returned 1 rewards for 2 completions"),
        ("math + 0.5*mine_too:nan", "reward function mine_too:nan returned nan"),
        ("math + 0.5*mine_too:level", "reward function mine_too:level raised TypeError: .*'level'"),
        ("mine_too:broken", "reward function mine_too:broken raised RuntimeError: no luck"),
    ],
)
def test_a_part_of_a_sum_that_fails_is_named(mine, text, line):
    with pytest.raises(UserError, match=f"^{line}"):
        call_reward(load_reward(text), [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}], ["x", "y"])


# Files ---------------------------------------------------------------------------------------------------------------


def test_rows_of_jsonl_and_parquet_are_the_same(tmp_path):
    rows = [
        {"prompt": "1+2?", "answer": "3", "level": 1, "tags": ["a"]},
        {"prompt": "2\u2028 lines?\u0085", "answer": "ä", "level": None, "tags": []},
    ]
    text = "\ufeff" + "\r\n\n  \n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_files([tmp_path / "a.jsonl"]) == rows
    assert read_files([tmp_path / "a.parquet"]) == rows
    assert read_files([tmp_path / "a.parquet", tmp_path / "a.jsonl"]) == rows + rows


@pytest.mark.parametrize(
    ("number", "text"),
    [(3, "3"), (3.0, "3"), (-0.5, "-0.5"), (10**30, "1" + "0" * 30), ("3.0", "3.0"), ("x", "x"), (1e300, None)],
)
def test_an_answer_may_be_a_number(tmp_path, number, text):
    path = write(tmp_path / "a.jsonl", [{"prompt": "?", "answer": number}])
    assert read_files(find_files(path)["all"])[0]["answer"] == (text or str(int(1e300)))


GOOD = b'{"prompt": "a", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "a.jsonl: empty; one problem a line is needed"),
        (b"\n  \n", "a.jsonl: empty"),
        (GOOD + b"\n" + b'{"prompt": "\xff"}', "a.jsonl, line 3: not UTF-8"),
        (GOOD + b"\nprompt,answer", "a.jsonl, line 3: not JSON: "),
        (b"[" * 100_000, "a.jsonl, line 1: not JSON"),
        (GOOD + b"[1, 2]", r"a.jsonl, line 2: a JSON object is needed, as \{'prompt': \.\.\., 'answer': \.\.\.\}"),
        (GOOD + b'{"prompt": "b"}', "a.jsonl, line 2: no 'answer'; this one has 'prompt'"),
        (b'{"question": "b", "answer": "1"}', "a.jsonl, line 1: no 'prompt'; this one has 'question', 'answer'"),
        (b"{}", "a.jsonl, line 1: no 'prompt'; this one has nothing"),
        (GOOD + b'{"prompt": 3, "answer": "1"}', "a.jsonl, line 2: prompt is int; text is needed"),
        (b'{"prompt": [{"role": "user"}], "answer": 1}', "line 1: prompt, message 1: no 'content'"),
        (b'{"prompt": " ", "answer": "1"}', "a.jsonl, line 1: prompt is empty"),
        (b'{"prompt": "\\ud800", "answer": "1"}', r"line 1: prompt holds half a character, .ud800"),
        (b'{"prompt": "a", "answer": ""}', "a.jsonl, line 1: answer is empty"),
        (b'{"prompt": "a", "answer": NaN}', "a.jsonl, line 1: answer is nan; text or a number is needed"),
        (b'{"prompt": "a", "answer": -Infinity}', "line 1: answer is -inf; text or a number"),
        (b'{"prompt": "a", "answer": null}', "line 1: answer is null; text or a number"),
        (b'{"prompt": "a", "answer": {"b": true}}', "line 1: answer is dict; text or a number"),
        (b'{"prompt": "a", "answer": ["1"]}', "line 1: answer is list; text or a number"),
        (b'{"prompt": "a", "answer": 1, "x": 1}\n' + GOOD, "a.jsonl, line 2: no 'x', which .*a.jsonl, line 1 has"),
        (GOOD + b'{"prompt": "a", "answer": 1, "x": 1}', "a.jsonl, line 1: no 'x', which .*a.jsonl, line 2 has"),
    ],
)
def test_a_wrong_file_is_one_line_with_the_place(tmp_path, content, line):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=line) as caught:
        get_task("jsonl", data=str(tmp_path / "a.jsonl"))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_wrong_parquet_file_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not")
    with pytest.raises(UserError, match=r"a.parquet: not a readable parquet file"):
        get_task("jsonl", data=str(path))
    pq.write_table(pa.table({"prompt": ["a", "b"], "answer": [1.0, None]}), path)
    with pytest.raises(UserError, match=r"a.parquet, row 2: answer is null; text or a number is needed"):
        get_task("jsonl", data=str(path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"a.parquet: parquet needs pyarrow: pip install 'minicpgd\[data\]'") as caught:
        get_task("jsonl", data=str(path))
    assert "\n" not in str(caught.value)


def test_missing_or_ambiguous_data_is_one_line(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,answer")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "two" / "train.jsonl", chains(2))
    pq.write_table(pa.Table.from_pylist(chains(2)), tmp_path / "two" / "train.parquet")
    for name, line in (
        ("absent.jsonl", "there is no such file; a .jsonl or .parquet file is needed, or a folder with"),
        ("a.csv", r"\.csv is not one of \.jsonl, \.parquet"),
        ("folder", "no train.jsonl or train.parquet in this folder, nor in its main/ or data/"),
        ("two", "both train.jsonl and train.parquet are there; which is meant"),
    ):
        for task in ("jsonl", "gsm8k"):
            with pytest.raises(UserError, match=line) as caught:
                get_task(task, data=str(tmp_path / name))
            assert str(tmp_path / name) in str(caught.value)
            with pytest.raises(UserError, match=line):
                describe_data(TrainConfig(task=task, data=str(tmp_path / name)))
    with pytest.raises(ConfigError, match=r"data = None: .* --data problems.jsonl, with prompt and answer"):
        get_task("jsonl")


# Tasks ---------------------------------------------------------------------------------------------------------------


def test_one_file_holds_out_the_prompts_that_the_checksum_chooses(tmp_path):
    rows = chains(600)
    rows += rows[:300]  # Equal prompts are on the same side.
    data = write(tmp_path / "a.jsonl", rows)
    task = get_task("jsonl", data=data)
    everything = task.sample(10_000, random.Random(0))
    held_out = task.held_out(10_000)
    prompts = {row["prompt"] for row in held_out}
    assert not prompts & {row["prompt"] for row in everything}
    assert prompts == {row["prompt"] for row in rows if is_held_out(row["prompt"])}
    assert len(held_out) == sum(is_held_out(row["prompt"]) for row in rows)
    assert 20 < len(prompts) < 60
    instructed = get_task("jsonl", data=data, instruction="Think.")  # The instruction does not change the split.
    assert [row["prompt"] for row in instructed.held_out(10_000)] == [row["prompt"] + "\n\nThink." for row in held_out]


def test_one_file_that_leaves_no_problems_to_train_on_or_to_hold_out_is_refused(tmp_path):
    trained = next(row for row in chains(99) if not is_held_out(row["prompt"]))
    tested = next(row for row in chains(99) if is_held_out(row["prompt"]))
    with pytest.raises(UserError, match=r"its 2 problems leave none to hold out, as one prompt in 16 .* give more"):
        get_task("jsonl", data=write(tmp_path / "a.jsonl", [trained, trained]))
    with pytest.raises(UserError, match="its 1 problems leave none to train on"):
        get_task("jsonl", data=write(tmp_path / "b.jsonl", [tested]))


@pytest.mark.parametrize("place", ["", "main", "data"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_a_folder_has_files_to_train_on_and_files_to_hold_out(tmp_path, place, kind):
    train, test = chains(6, seed=1), chains(3, seed=2)
    folder = tmp_path / "folder" / place
    for name, rows in (("train", train + test[:1]), ("test", test)):
        if kind == "jsonl":
            write(folder / f"{name}.jsonl", rows)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        parts = [rows] if kind == "parquet" else [rows[:2], rows[2:]]
        for i, part in enumerate(parts):
            file = f"{name}.parquet" if kind == "parquet" else f"{name}-{i:05d}-of-00002.parquet"
            pq.write_table(pa.Table.from_pylist(part), folder / file)
    task = get_task("jsonl", data=str(tmp_path / "folder"))
    assert sorted(row["prompt"] for row in task.held_out(99)) == sorted(row["prompt"] for row in test)
    assert sorted(row["prompt"] for row in task.sample(6, random.Random(0))) == sorted(row["prompt"] for row in train)
    line = describe_data(TrainConfig(task="jsonl", data=str(tmp_path / "folder")))
    assert "; held out: " in line
    assert str(folder / "test") in line


def test_a_folder_without_a_test_file_is_split_and_one_without_other_problems_is_refused(tmp_path):
    write(tmp_path / "a" / "train.jsonl", chains(99))
    task = get_task("jsonl", data=str(tmp_path / "a"))
    assert all(is_held_out(row["prompt"]) for row in task.held_out(99))
    for name in ("train", "test"):
        write(tmp_path / "b" / f"{name}.jsonl", chains(3))
    with pytest.raises(UserError, match="every training problem is among the test problems"):
        get_task("jsonl", data=str(tmp_path / "b"))


def test_the_seed_decides_the_samples_and_no_problem_repeats_before_all_have_come(tmp_path):
    for name, seed in (("train", 1), ("test", 2)):
        write(tmp_path / f"{name}.jsonl", chains(20, seed))
    task = get_task("jsonl", data=str(tmp_path))
    first = task.sample(12, random.Random(5))
    assert first == task.sample(12, random.Random(5))
    assert first != task.sample(12, random.Random(6))
    assert len({row["prompt"] for row in first}) == 12
    counts = [row["prompt"] for row in task.sample(45, random.Random(5))]
    assert sorted({counts.count(prompt) for prompt in counts}) == [2, 3]
    assert len(set(counts)) == 20
    assert task.held_out(5, seed=1) == task.held_out(5, seed=1) == task.held_out(20, seed=1)[:5]
    assert task.held_out(5, seed=1) != task.held_out(5, seed=2)
    assert len(task.held_out(99)) == 20


def test_a_task_has_a_reward_and_describes_its_data(tmp_path):
    data = write(tmp_path / "a.jsonl", chains(99))
    task = get_task("jsonl", data=data)
    assert task.reward is REWARDS["math"]
    assert task.is_correct({"prompt": "?", "answer": "1/2"}, r"\boxed{0.5}")
    assert not task.is_correct({"prompt": "?", "answer": "1/2"}, "0.5")
    assert describe_data(TrainConfig(task="jsonl", data=data)) == f"{data}, one problem in 16 held out"
    assert describe_data(TrainConfig()) == "made on the spot"
    assert describe_data(TrainConfig(task="gsm8k")) == "openai/gsm8k from the hub, its train and test splits"
    with pytest.raises(ConfigError, match="there is no such task; choose from chain_arithmetic, gsm8k, jsonl"):
        describe_data(TrainConfig(task="gsm"))
    assert list(TASKS) == ["chain_arithmetic", "gsm8k", "jsonl", "reasoning_gym"]


# GSM8K ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path):
    """A copy of the hub's repository, with fewer problems."""
    card = []
    for config in ("main", "socratic"):
        (tmp_path / "gsm8k" / config).mkdir(parents=True)
        for split, number in (("train", 5), ("test", 3)):
            rows = [
                {"question": f"{config} {split} {i}?", "answer": f"It is <<{i}*1000={i}000>>so.\n#### {i},000"}
                for i in range(1, number + 1)
            ]
            file = tmp_path / "gsm8k" / config / f"{split}-00000-of-00001.parquet"
            pq.write_table(pa.Table.from_pylist(rows), file)
            card.append((config, split))
    lines = ["---", "configs:"]
    for config in ("main", "socratic"):
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in ("train", "test"):
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (tmp_path / "gsm8k" / "README.md").write_text("\n".join([*lines, "---", ""]))
    return tmp_path / "gsm8k"


def test_gsm8k_from_the_hub_and_from_a_copy_of_it_are_the_same(published, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jsonl, "HUB_NAME", str(published))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub, copy = get_task("gsm8k"), get_task("gsm8k", data=str(published))
    assert capsys.readouterr().err == ""  # tests/conftest.py has called quiet().
    for task in (hub, copy):
        rows = task.held_out(99)
        assert sorted(row["answer"] for row in rows) == ["1000", "2000", "3000"]
        assert all(set(row) == {"prompt", "answer"} for row in rows)
        assert all(row["prompt"].startswith("main test ") for row in rows)
        assert all(
            row["prompt"].endswith("?\n\nReason step by step, and put the final answer in \\boxed{}.") for row in rows
        )
        assert {row["prompt"][:12] for row in task.sample(5, random.Random(0))} == {
            f"main train {i}" for i in range(1, 6)
        }
    assert hub.held_out(99) == copy.held_out(99)
    assert hub.sample(5, random.Random(0)) == copy.sample(5, random.Random(0))
    assert hub.reward is REWARDS["math"]
    assert hub.is_correct(rows[0], f"\\boxed{{{rows[0]['answer']}.0}}")
    assert "main/train-00000-of-00001.parquet" in describe_data(TrainConfig(task="gsm8k", data=str(published)))


def test_gsm8k_in_the_files_of_its_authors_is_read(tmp_path):
    for split, number in (("train", 4), ("test", 2)):
        write(
            tmp_path / f"{split}.jsonl",
            [{"question": f"{split} {i}?", "answer": f"So.\n#### {i}"} for i in range(number)],
        )
    task = get_task("gsm8k", data=str(tmp_path), instruction="")
    assert sorted((row["prompt"], row["answer"]) for row in task.held_out(9)) == [("test 0?", "0"), ("test 1?", "1")]
    write(tmp_path / "train.jsonl", chains(3))
    with pytest.raises(
        UserError, match=r"train.jsonl, line 1: no 'question'; this one has 'prompt', 'answer', 'worked'"
    ):
        get_task("gsm8k", data=str(tmp_path))


def test_gsm8k_without_a_network_or_a_library_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    command = "hf download openai/gsm8k --repo-type dataset --local-dir gsm8k"
    with pytest.raises(UserError, match=r"^openai/gsm8k cannot be had from the hub \(\w+\): ") as caught:
        get_task("gsm8k")
    assert f"`{command}`; then --data gsm8k" in str(caught.value)
    assert len(str(caught.value)) < 250
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match=r"needs datasets: pip install 'minicpgd\[data\]'; or, .*--data gsm8k"
    ) as caught:
        get_task("gsm8k")
    assert command in str(caught.value)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["minicpgd", "train", "--task", "gsm8k", "--output-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as leaving:
        main()
    assert leaving.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()


# Runs ----------------------------------------------------------------------------------------------------------------


def test_a_run_on_a_file_is_a_run_like_any_other(small, tmp_path):
    """The embedded model solves some of the problems, because they are of the kind that it knows."""
    data = write(tmp_path / "chains.jsonl", chains(200))
    config = small(task="jsonl", data=data, max_steps=2, num_prompts=8)
    run = train(config)
    metrics = load_run(run).metrics
    assert 0 < metrics["accuracy"].max() < 1
    assert (metrics["accuracy"] == metrics["reward"]).all()
    again = train(small("again", task="jsonl", data=data, max_steps=2, num_prompts=8))
    assert (run / "metrics.jsonl").read_bytes() == (again / "metrics.jsonl").read_bytes()
    prompts = {json.loads(line)["prompt"] for line in (config.folder / "samples.jsonl").read_text().splitlines()}
    assert prompts <= {row["prompt"] for row in chains(200) if not is_held_out(row["prompt"])}


def test_a_run_may_be_rewarded_with_a_sum_that_has_a_function_of_the_current_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    write(tmp_path / "chains.jsonl", chains(200))
    (tmp_path / "by_length.py").write_text(
        "def f(completions, **_):\n    return [len(c) for c in completions]\n"  # TRL passes keywords, too.
    )
    words = "--task jsonl --data chains.jsonl --max-steps 2 --num-prompts 2 --num-generations 4 --num-minibatches 2"
    words += " --eval-problems 4 --output-dir run --max-completion-length 32 --reward"
    monkeypatch.setattr(sys, "argv", ["minicpgd", "train", *words.split(), "math + 0.001*by_length:f"])
    main()
    metrics = load_run(tmp_path / "run").metrics
    lengths = 1000 * (metrics["reward"] - metrics["accuracy"])[1:]
    assert ((lengths > 0) & (lengths <= 32)).all()  # A token of the embedded model is one character.
    monkeypatch.setattr(sys, "argv", ["minicpgd", "train", *words.split(), "math + 0.1*fromat", "--output-dir", "b"])
    with pytest.raises(SystemExit):
        main()
    assert "did you mean 'format'" in capsys.readouterr().err
