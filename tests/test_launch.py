"""Our tasks on TRL's engine from the command line: what it leaves, what it refuses, and what docs/scale.md types."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from anything import many, poison, told
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.run import get_args_parser

from minicpgd import UserError, evaluate
from minicpgd.integrations import launch
from minicpgd.policy import EMBEDDED

pytest.importorskip("trl", reason="needs the extra trl: pip install -e '.[trl]'")

ROOT = Path(__file__).parent.parent
FLAGS = ["--use_cpu", "--bf16", "false", "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true"]
SMALL = ["--per_device_train_batch_size", "8", "--num_generations", "4", "--max_completion_length", "16"]


def test_launched_with_an_adapter_it_leaves_a_model(tmp_path):
    adapter = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear"]
    launch.main([*FLAGS, *SMALL, *adapter, "--output_dir", str(tmp_path / "out"), "--max_steps", "2"])
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_line_per_rollout_is_what_one_sees(tmp_path, capsys):
    shown = FLAGS[: FLAGS.index("--disable_tqdm")]
    flags = [*shown, *SMALL, "--output_dir", str(tmp_path), "--max_steps", "2", "--logging_steps", "1"]
    launch.main([*flags, "--num_iterations", "2"])
    out, _ = capsys.readouterr()
    assert re.findall(r"^update \d+: reward [\d.]+  length [\d.]+  kl_old [-\de.]+  loss [-\de.]+$", out, re.MULTILINE)
    assert "completions/min_length" not in out


def test_launched_without_one_its_model_can_be_evaluated(tmp_path):
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
def test_bad_flags_are_one_line(tmp_path, flags, line):
    with pytest.raises(UserError, match=line) as caught:
        launch.main([*FLAGS, "--output_dir", str(tmp_path / "out"), "--max_steps", "1", *flags])
    assert "\n" not in str(caught.value)


PAGE = (ROOT / "docs" / "scale.md").read_text()
TYPED = [
    shlex.split(line) for line in re.findall(r"^(?:torchrun|accelerate) .*", PAGE.replace("\\\n", " "), re.MULTILINE)
]
ADDED = re.findall(r"^- [^`]+: `(--[^`]+)`$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("typed", TYPED, ids=lambda typed: " ".join(typed[:4]))
def test_the_commands_of_the_page_are_ones_that_their_programs_read(typed, monkeypatch):
    """What stands before `-m` by the launcher's own parser, what comes after by ours."""
    monkeypatch.chdir(ROOT)
    cut = typed.index("-m")
    before, (_, module, *flags) = typed[:cut], typed[cut:]
    parser = launch_command_parser() if before[:2] == ["accelerate", "launch"] else get_args_parser()
    parser.parse_args([*before[2 if before[0] == "accelerate" else 1 :], "script.py"])
    assert module == "minicpgd.integrations.launch"
    _, args, _ = launch.settings([*flags, "--use_cpu", "--bf16", "false"])
    assert args.algorithm == "cpgd"


@pytest.mark.parametrize("flags", ADDED)
def test_what_the_page_says_to_add_can_be_added(flags, monkeypatch):
    monkeypatch.chdir(ROOT)
    launch.settings(["--config", "docs/scale/gsm8k.yaml", "--use_cpu", "--bf16", "false", *flags.split()])


def test_the_page_has_commands():
    assert (len(TYPED), len(ADDED)) == (4, 4)


def test_prompts_are_messages_where_the_tokenizer_has_a_template():
    task = launch.get_task("chain_arithmetic")
    plain, chat = (launch.rows_of(task, 3, seed=0, chat=chat) for chat in (False, True))
    assert [row["prompt"] for row in chat] == [[{"role": "user", "content": row["prompt"]}] for row in plain]
    answers = [row["answer"] for row in plain]
    completions = [[{"role": "assistant", "content": f"#{answer}"}] for answer in answers]
    read = launch.of_text(task.reward)
    assert read([row["prompt"] for row in chat], completions, answer=answers) == [1.0, 1.0, 1.0]
    assert read([row["prompt"] for row in plain], [f"#{a}" for a in answers], answer=answers) == [1.0, 1.0, 1.0]
    assert read.__name__ == "exact_answer"


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
    """A flag that is none comes last, so nothing is ever trained."""
    refused = told(launch.main, [*FLAGS, *words, "--there-is-no-such-flag"])
    assert isinstance(refused, str)


def theirs(folder, ran):
    """The embedded model, with a tokenizer that brings Python of its own."""
    shutil.copytree(EMBEDDED, folder)
    (folder / "theirs.py").write_text(f"open({str(ran)!r}, 'w')\nraise ValueError('and no further')\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["theirs.A", "theirs.B"]}, "tokenizer_class": "Theirs"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ["--model_name_or_path", str(folder), "--output_dir", str(folder / "out")]


def test_code_of_a_models_own_runs_only_where_it_is_asked_for_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    flags = [*FLAGS, *SMALL, *theirs(tmp_path / "model", tmp_path / "ran"), "--max_steps", "1"]
    assert "contains custom code" in told(launch.main, flags)
    assert not (tmp_path / "ran").exists()
    assert "warning" not in capsys.readouterr().err
    assert "and no further" in told(launch.main, [*flags, "--trust_remote_code"])
    assert (tmp_path / "ran").exists()
    warning = capsys.readouterr().err
    assert warning == f"warning: --trust_remote_code: Python code that comes with {tmp_path / 'model'} is run\n"


def test_a_checkpoint_with_pickles_is_not_run(tmp_path):
    """TRL's checkpoints hold some: torch takes numbers from them, and nothing else."""
    flags = [*FLAGS, *SMALL, "--save_strategy", "steps", "--save_steps", "1", "--output_dir", str(tmp_path / "out")]
    launch.main([*flags, "--max_steps", "1"])
    checkpoint = tmp_path / "out" / "checkpoint-1"
    poison(checkpoint, tmp_path / "ran", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")
    refused = told(launch.main, [*flags, "--max_steps", "2", "--resume_from_checkpoint", str(checkpoint)])
    assert refused.startswith(f"resume_from_checkpoint = '{checkpoint}': ")
    assert not (tmp_path / "ran").exists()
