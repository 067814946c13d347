"""TRL's engine trains on our tasks from the command line, refuses bad flags, and accepts those of docs/scale.md."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from hypothesis import given
from hypothesis import strategies as st
from strategies import many, poison, result_or_line
from torch.distributed.run import get_args_parser

from minicpgd import UserError, evaluate
from minicpgd.integrations import launch
from minicpgd.models import EMBEDDED

pytest.importorskip("trl", reason="needs the extra trl: pip install -e '.[trl]'")

ROOT = Path(__file__).parent.parent
FLAGS = ["--use_cpu", "--bf16", "false", "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true"]
SMALL = ["--per_device_train_batch_size", "8", "--num_generations", "4", "--max_completion_length", "16"]


def test_a_run_with_an_adapter_saves_the_adapter(tmp_path):
    adapter = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear"]
    launch.main([*FLAGS, *SMALL, *adapter, "--output_dir", str(tmp_path / "out"), "--max_steps", "2"])
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_rollout_prints_one_line(tmp_path, capsys):
    with_bar = FLAGS[: FLAGS.index("--disable_tqdm")]
    flags = [*with_bar, *SMALL, "--output_dir", str(tmp_path), "--max_steps", "2", "--logging_steps", "1"]
    launch.main([*flags, "--num_iterations", "2"])
    out, _ = capsys.readouterr()
    assert re.findall(r"^update \d+: reward [\d.]+  length [\d.]+  kl_old [-\de.]+  loss [-\de.]+$", out, re.MULTILINE)
    assert "completions/min_length" not in out


def test_the_model_of_a_run_without_an_adapter_can_be_evaluated(tmp_path):
    launch.main(
        [*FLAGS, *SMALL, "--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--algorithm", "grpo_drift"]
    )
    assert "kl_old" in (tmp_path / "out" / "trainer_state.json").read_text()
    assert 0 <= evaluate(tmp_path / "out", num_problems=8, num_samples=1)["accuracy"] <= 1


def test_a_file_that_does_not_parse_is_one_line(tmp_path):
    (tmp_path / "run.yaml").write_text("task: [")
    with pytest.raises(UserError, match="^[^\n]*parsing"):
        launch.main(["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--algorithm", "gpro"], "algorithm = 'gpro': did you mean 'grpo'"),
        (["--nonsense", "3"], "--nonsense"),
        (["--task", "foo"], "task = 'foo': there is no such task"),
        (["--reward", "foo"], "there is no reward 'foo'"),
        (["--model_name_or_path", "./nowhere"], r"model_name_or_path = './nowhere': "),
        (["--per_device_train_batch_size", "7"], "must be divisible by"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config"], "name a YAML file after --config"),
        (["--algoritm", "cpgd"], "--algoritm: there is no such flag; did you mean '--algorithm'"),
        (["--resume_from_checkpoint", "nowhere"], "resume_from_checkpoint = 'nowhere': there is no such folder"),
        (["--num_problems", "0"], "num_problems = 0: a rollout takes 1"),
        (["--output_dir", str(EMBEDDED)], "output_dir = .*: a trained model is there"),
        (["--use_vllm"], "vLLM"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, monkeypatch, flags, line):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=line) as caught:
        launch.main([*FLAGS, "--output_dir", str(tmp_path / "out"), "--max_steps", "1", *flags])
    assert "\n" not in str(caught.value)


PAGE = (ROOT / "docs" / "scale.md").read_text()
COMMANDS = [
    shlex.split(line) for line in re.findall(r"^(?:torchrun|accelerate) .*", PAGE.replace("\\\n", " "), re.MULTILINE)
]
ADDITIONS = re.findall(r"^- [^`]+: `(--[^`]+)`$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:4]))
def test_the_commands_of_the_page_can_be_parsed(words, monkeypatch):
    """The launcher's own parser reads the words before `-m`, and our parser reads the others."""
    monkeypatch.chdir(ROOT)
    place = words.index("-m")
    before, (_, module, *flags) = words[:place], words[place:]
    parser = launch_command_parser() if before[:2] == ["accelerate", "launch"] else get_args_parser()
    parser.parse_args([*before[2 if before[0] == "accelerate" else 1 :], "script.py"])
    assert module == "minicpgd.integrations.launch"
    _, args, _ = launch.settings([*flags, "--use_cpu", "--bf16", "false"])
    assert args.algorithm == "cpgd"


@pytest.mark.parametrize("flags", ADDITIONS)
def test_the_additional_flags_of_the_page_can_be_parsed(flags, monkeypatch):
    monkeypatch.chdir(ROOT)
    launch.settings(["--config", "docs/scale/gsm8k.yaml", "--use_cpu", "--bf16", "false", *flags.split()])


def test_the_page_has_four_commands_and_four_additions():
    assert (len(COMMANDS), len(ADDITIONS)) == (4, 4)


def test_prompts_are_messages_if_the_tokenizer_has_a_template():
    task = launch.get_task("chain_arithmetic")
    plain, chat = (launch.rows_of(task, 3, seed=0, chat=chat) for chat in (False, True))
    assert [row["prompt"] for row in chat] == [[{"role": "user", "content": row["prompt"]}] for row in plain]
    answers = [row["answer"] for row in plain]
    completions = [[{"role": "assistant", "content": f"#{answer}"}] for answer in answers]
    reward = launch.accept_messages(task.reward)
    assert reward([row["prompt"] for row in chat], completions, answer=answers) == [1.0, 1.0, 1.0]
    assert reward([row["prompt"] for row in plain], [f"#{a}" for a in answers], answer=answers) == [1.0, 1.0, 1.0]
    assert reward.__name__ == "exact_answer"  # TRL logs the reward under this name.


WORDS = [
    "--model_name_or_path",
    "--config",
    "--learning_rate",
    "--seed",
    "--task",
    "--bf16",
    "x",
    "",
    "-1",
    "nan",
    "\0",
    "é\n",
    "9" * 30,
    "--",
]


@many(40)
@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=5), max_size=4))
def test_any_words_are_one_line(words):
    """The last flag does not exist, so nothing is ever trained."""
    line = result_or_line(launch.main, [*FLAGS, *words, "--there-is-no-such-flag"])
    assert isinstance(line, str)


def model_with_code(folder, marker):
    """Copy the embedded model, add Python code to its tokenizer that creates a file, and return flags for it."""
    shutil.copytree(EMBEDDED, folder)
    (folder / "theirs.py").write_text(f"open({str(marker)!r}, 'w')\nraise ValueError('and no further')\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["theirs.A", "theirs.B"]}, "tokenizer_class": "Theirs"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ["--model_name_or_path", str(folder), "--output_dir", str(folder / "out")]


def test_code_that_comes_with_a_model_runs_only_with_the_flag_for_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asked on the terminal"))
    flags = [*FLAGS, *SMALL, *model_with_code(tmp_path / "model", tmp_path / "ran"), "--max_steps", "1"]
    assert "contains custom code" in result_or_line(launch.main, flags)
    assert not (tmp_path / "ran").exists()
    assert "warning" not in capsys.readouterr().err
    assert "and no further" in result_or_line(launch.main, [*flags, "--trust_remote_code"])
    assert (tmp_path / "ran").exists()
    warning = capsys.readouterr().err
    assert warning == f"warning: --trust_remote_code: Python code that comes with {tmp_path / 'model'} is run\n"


def test_the_pickles_of_a_checkpoint_cannot_run_code(tmp_path):
    """TRL's checkpoints have pickles. torch reads numbers from them, and nothing else."""
    flags = [*FLAGS, *SMALL, "--save_strategy", "steps", "--save_steps", "1", "--output_dir", str(tmp_path / "out")]
    launch.main([*flags, "--max_steps", "1"])
    checkpoint = tmp_path / "out" / "checkpoint-1"
    poison(checkpoint, tmp_path / "ran", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")
    line = result_or_line(launch.main, [*flags, "--max_steps", "2", "--resume_from_checkpoint", str(checkpoint)])
    assert line.startswith(f"resume_from_checkpoint = '{checkpoint}': ")
    assert not (tmp_path / "ran").exists()
