"""Whatever a config, a recipe or a command line contains, it works or is one line."""

import functools
import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from strategies import content, many, result_or_line, values

from minicpgd import TrainConfig, train
from minicpgd.cli.main import COMMANDS, main
from minicpgd.recipes import KNOWN, load_config, load_recipe

FIELDS = {field.name: field.default for field in fields(TrainConfig)}
TINY = {
    "num_prompts": 2,
    "num_generations": 2,
    "max_steps": 1,
    "max_completion_length": 4,
    "eval_problems": 2,
    "num_minibatches": 2,
}
objects = st.dictionaries(st.sampled_from(sorted(FIELDS)) | st.text(max_size=9), values, max_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("any_input")


# Configs and recipes -------------------------------------------------------------------------------------------------


@many(100)
@given(objects)
def test_any_object_is_a_config_or_a_line_that_names_its_field(folder, settings):
    path = folder / "config.json"
    path.write_text(json.dumps(settings))
    config = result_or_line(load_config, path)
    if isinstance(config, str):
        assert config.startswith(f"{path}: ")
        assert "unknown fields" in config or any(name in config for name in settings)
    else:
        assert all(getattr(config, name) == value for name, value in settings.items())


@many(100)
@given(content | values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_config_or_a_line_that_names_the_file(folder, written):
    path = folder / "config.json"
    path.write_bytes(written)
    config = result_or_line(load_config, path)
    assert isinstance(config, TrainConfig) or str(path) in config


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"seed": 1, "seed": 2}', "'seed' is there twice"),
        ("[" * 99999, "thousands of brackets"),
        ('{"seed": ' + "1" * 5000 + "}", "not a readable config"),
        ('{"seed": 1' + "0" * 30 + "}", "at most 9"),
    ],
)
def test_a_config_that_json_would_misread_is_one_line(tmp_path, text, line):
    (tmp_path / "config.json").write_text(text)
    assert line in result_or_line(load_config, tmp_path / "config.json")


def test_a_number_that_is_too_long_to_be_printed_is_one_line():
    assert result_or_line(TrainConfig, seed=10**5000).startswith("seed = a value of type int: it has to be at most")


@many(75)
@given(
    content
    | objects.map(lambda o: yaml.safe_dump({"train": o}).encode())
    | values.map(lambda v: yaml.safe_dump(v).encode())
)
def test_anything_is_a_recipe_or_a_line_that_names_the_file(folder, written):
    path = folder / "mine.yaml"
    path.write_bytes(written)
    recipe = result_or_line(load_recipe, str(path))
    assert not isinstance(recipe, str) or recipe.startswith(f"{path}: ")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        "train: {seed: 2001-99-99}",
        "train: {seed: !!int ''}",
        "train: {seed: !!timestamp x}",
        "train: {seed: !!bool x}",
        "train: {seed: 0x" + "f" * 9999 + "}",
        "train: {0x" + "f" * 9999 + ": 1}",
        "? [1]\n: 2",
        "train: {[1]: 2}",
        "0x" + "f" * 9999 + ": 1",
        "train: &a {seed: *a}",
        "train: &a {seed: [*a]}",
        "[" * 9999,
        "train: {seed: 1}\nexpect: {peak_gib: .nan}",
        BOMB + "train: {seed: *i}",
        "train: {model: !!python/object/apply:os.system ['touch ran']}",
        "train: {seed: !!python/name:os.system }",
    ],
    ids=range(16),
)
def test_yaml_that_is_no_recipe_is_one_line_and_runs_no_code(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(text)
    assert result_or_line(load_recipe, "mine.yaml").startswith("mine.yaml: ")
    assert not Path("ran").exists()


EXTREME = {
    "model": ["\n", "/", "..", "~", "a/b/c", "x" * 200, "http://x"],
    "task": ["", "\n"],
    "data": ["", "/", "~nobody/x", "\n", "x" * 200],
    "output_dir": ["", "/", ".", "/dev/null/x", "/proc/x/y", "\n" * 200],
    "reward": [
        "",
        "+",
        "os:system",
        "builtins:exit",
        ".:.",
        ":",
        "a" * 999 + ":b",
        "exact*1e999",
        "1e308*format + 1e308*format",
    ],
    "attn_implementation": ["", "x/y", "eager\n"],
    "lora_target_modules": ["", ",", ".*", "q_proj,"],
    "seed": [2**63 - 1],
    "top_k": [10**9],
    "lora_r": [10**4],
    "lora_alpha": [10**9],
    "rollout_batch_size": [10**9],
    "micro_batch_size": [10**9],
    "micro_batch_tokens": [1, 10**9],
    "chunk_size": [1, 10**9],
    "temperature": [1e-6, 1e30],
    "top_p": [1e-320],
    "learning_rate": [1e-320, 1e30],
    "max_grad_norm": [1e-320, 1e30],
    "epsilon": [1e-320, 1 - 1e-16],
    "epsilon_high": [1e-320, 1e30],
    "drift_coef": [1e-320, 1e30],
    "drift_clip": [1e-320, 1e30],
    "beta": [1e-320, 1e30],
}


@pytest.mark.parametrize("name", EXTREME)
def test_the_ends_of_every_range_can_be_trained_with_or_are_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for number, value in enumerate(EXTREME[name]):
        more = {"lora_r": 2} if name.startswith("lora") else {"task": "jsonl"} if name == "data" else {}
        settings = {"output_dir": f"run{number}"} | TINY | more | {name: value}
        result_or_line(lambda settings=settings: train(TrainConfig(**settings)))


# Command lines -------------------------------------------------------------------------------------------------------

FLAGS = ["--" + name.replace("_", "-") for name in FIELDS]
WORDS = [
    *COMMANDS,
    "dry_run",
    "--help",
    "-h",
    "--resume",
    "--recipe",
    "--dry-run",
    "--gpu",
    "--folder",
    "--",
    "-",
    "--=",
    "--seed=",
    "--resume=",
    "--recipe=x",
    "0",
    "-1",
    "1e999",
    "nan",
    "9" * 5000,
    "None",
    "True",
    "cpgd",
    "max_advantage",
    "fair",
    "{",
    "[1]",
    "\x1b[31m",
    "é",
    "漢\u2028",
    "a\nb",
    "\udcff",
    "--num_prompts",
    "─" * 9,
    "│",
    KNOWN[0],
]


@pytest.fixture(scope="module")
def empty_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("empty")


def typed(words, empty_folder):
    """Run a command line whose command does nothing. Return its exit code, standard output and standard error."""
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
    ):
        patch.chdir(empty_folder)
        for name, command in COMMANDS.items():
            patch.setitem(COMMANDS, name, functools.wraps(command)(lambda *_, **__: None))
        patch.setattr(sys, "argv", ["minicpgd", *words])
        patch.setattr(sys, "path", [*sys.path])
        try:
            main()
            code = 0
        except SystemExit as leaving:
            code = leaving.code
    return code, out.getvalue(), err.getvalue()


@many(100)
@given(
    st.lists(st.sampled_from(WORDS + FLAGS) | st.text(max_size=9), max_size=5)
    | st.tuples(st.sampled_from(list(COMMANDS)), st.sampled_from(FLAGS), st.sampled_from(WORDS)).map(list)
)
def test_any_words_are_a_command_or_one_line(empty_folder, words):
    code, _, err = typed(words, empty_folder)
    assert code in (0, 2)
    assert err.count("\n") == (1 if code else 0), err
    assert not code or (err.startswith("minicpgd: ") and err[:-1].isprintable()), err


@pytest.mark.parametrize(
    ("words", "code", "word"),
    [
        ("train --seed 3", 0, ""),
        ("train --help", 0, "--num-generations"),
        ("train --seed x", 2, "x"),
        ("train x", 2, "x"),
    ],
)
def test_right_words_call_a_command_and_wrong_words_are_named(words, code, word, empty_folder):
    exit_code, out, err = typed(words.split(), empty_folder)
    assert exit_code == code
    assert word in (err if code else out)


HUGE = "9" * 30


@pytest.mark.parametrize(
    "words",
    [
        "evaluate embedded --num-problems -1", "evaluate embedded --num-samples -3",
        "evaluate embedded --num-samples 0", f"evaluate embedded --seed {HUGE}", "evaluate embedded --seed -1",
        f"evaluate embedded --num-samples {HUGE}", f"evaluate embedded --num-problems {HUGE}",
        "evaluate embedded --task jsonl", "sample embedded --temperature nan", "sample embedded --temperature -1",
        "sample embedded --temperature 1e-320", f"sample --seed {HUGE}", "sample " + "x" * 5000, "export embedded",
        "export .", "plot . .", "plot --all --results /dev/null", "plot / --out /dev/null", f"demo --seed {HUGE}",
        "demo --seed -1", f"demo --max-steps {HUGE}", "demo --folder / --seed -1", "demo --num-iterations 0",
        "pretrain --steps 0", f"pretrain --seed {HUGE}", "pretrain --folder /dev/null/x --steps 0",
        f"study fair --jobs {HUGE}", "study warning", "memory --gpu nan", "memory --gpu -1",
        "memory --prompt-length 0", f"memory --prompt-length {HUGE}", "memory --model /dev/null", "memory --model .",
        "train --dry-run --model " + "x/" * 5000, "train --resume " + "x" * 5000, "train --recipe " + "x" * 5000,
        "train --recipe /dev/null", "train --recipe /", "memory --recipe .",
    ],
)  # fmt: skip
def test_a_command_with_impossible_values_is_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["minicpgd", *words.split()])
    with pytest.raises(SystemExit) as leaving:
        main()
    _, err = capsys.readouterr()
    assert leaving.value.code == 2
    assert err.startswith("minicpgd: ")
    assert err.count("\n") == 1
    assert len(err) < 1200
