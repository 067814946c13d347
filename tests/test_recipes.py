"""Real models: recipes, the plan before a run, and a recipe from end to end, on a model that fits in a test."""

import functools
import json
import random
import re
import shlex
import socket
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from minicpgd import TrainConfig, UserError, evaluate, load_run, train
from minicpgd.cli.main import COMMANDS, main, parse
from minicpgd.cli.model_card import command
from minicpgd.errors import MissingPackageError
from minicpgd.memory import GIB, predict_recipe
from minicpgd.models import Policy
from minicpgd.models.pretrain import make_tokenizer
from minicpgd.recipes import FOLDER, KNOWN, load_recipe
from minicpgd.tasks import get_task, rewards

PAGE = (Path(__file__).parent.parent / "docs" / "qlora.md").read_text()


def run(*arguments):
    parse([str(a) for a in arguments])()


@pytest.fixture
def no_network(monkeypatch):
    """A test that asks for an address fails."""

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("name", KNOWN)
def test_a_recipe_fits_its_card_and_states_what_it_needs(name):
    """It states its predicted memory to 50 MiB, and leaves a tenth of the card unused."""
    recipe = load_recipe(name)
    predicted = predict_recipe(name).peak / GIB
    assert recipe.peak_gib == pytest.approx(predicted, abs=0.05)
    assert predicted < 0.9 * recipe.card_gib
    assert name.endswith(f"-{recipe.card_gib:g}gb")
    assert "predicted" in recipe.basis
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]
    assert row.endswith(f"| {recipe.card_gib:g} GB | {recipe.peak_gib:g} |")
    assert recipe.config.load_in_4bit
    assert recipe.config.rollout_batch_size


@pytest.mark.parametrize("name", ["qwen2.5-0.5b-8gb", "gemma-3-1b-8gb"])
def test_a_dry_run_states_what_a_run_would_do_and_does_nothing(name, no_network, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("train", "--recipe", name, "--dry-run", "--max-steps", 7)
    out = capsys.readouterr().out
    recipe = load_recipe(name)
    words = " ".join(out.split())
    assert f"{recipe.config.model}; to be downloaded from the hub, about" in words
    assert "openai/gsm8k from the hub" in words
    assert "reward math + 0.1*format steps" in words
    assert "7 rollouts of 8 x 8 responses of at most 512 tokens; 2 updates on each, by cpgd" in words
    total = max(map(float, re.search(r"in all +([\d.]+) +([\d.]+)", out).groups()))
    assert total == pytest.approx(recipe.peak_gib, abs=0.05)
    assert f"expects {recipe.peak_gib:g} GiB of {recipe.card_gib:g}: predicted by" in words
    assert "That is for its own settings; some differ here." in words
    assert not list(tmp_path.iterdir())


def test_a_dry_run_without_math_verify_says_so_and_goes_on(no_network, capsys, tmp_path, monkeypatch):
    reason = "mathematical answers need math-verify: pip install 'minicpgd[math]' (No module named 'math_verify')"

    def missing():
        raise MissingPackageError(reason)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rewards, "need_math_verify", missing)
    run("train", "--recipe", "qwen2.5-0.5b-8gb", "--dry-run")
    words = " ".join(capsys.readouterr().out.split())
    assert f"reward math + 0.1*format ({reason}) steps 200 rollouts" in words
    assert "some differ here" not in words
    assert words.endswith("Nothing was downloaded or written. Without --dry-run it starts.")


def test_a_dry_run_states_the_size_of_a_download(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("train", "--recipe=qwen2.5-7b-24gb", "--dry-run")
    assert "about 15.2 GB" in " ".join(capsys.readouterr().out.split())  # The files on the hub have this size.


BAD = {
    "train: [1, 2]": "a recipe has a section `train:`",
    "- 1": "a recipe has a section `train:`",
    "train: {lora_rr: 3}": "train: lora_rr: no such setting; did you mean 'lora_r'?",
    "train: {lora_r: many}": "train: lora_r = 'many': int expected",
    "train: {seed: 1}\nexpects: {}": "expects: sections are `train:` and `expect:`",
    "train: {seed: 1}\nexpect: {peak: 3}": "expect: peak: no such setting; did you mean 'peak_gib'?",
    "train: {seed: 1}\nexpect: {peak_gib: lots}": "expect: peak_gib = 'lots': a number of GiB expected",
    "train: {seed: 1": "not readable as YAML: while parsing a flow mapping",
    "train: {model: !!python/object/apply:os.getcwd []}": "not readable as YAML",
    "train:\n  seed: 1\n  model: embedded\n  seed: 2": "not readable as YAML: line 4: 'seed' is there twice",
    "train: {seed: 1}\ntrain: {seed: 2}": "not readable as YAML: line 2: 'train' is there twice",
    "train: {load_in_4bit: true}": "train: lora_r = 0: 4-bit weights cannot be trained",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_recipe_is_one_line(text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert BAD[text] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_and_a_recipe_for_a_run_that_continues_are_refused():
    with pytest.raises(UserError, match=r"did you mean 'qwen2.5-3b-16gb'\? choose from gemma"):
        run("train", "--recipe", "qwen2.5-3b-8gb")
    with pytest.raises(UserError, match="--resume and --recipe"):
        run("train", "--recipe", "qwen2.5-3b-16gb", "--resume", "somewhere")


def test_a_number_that_yaml_reads_as_text_is_a_number_in_a_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train: {learning_rate: 2e-5, drift_coef: max_advantage, beta: 1e-2}")
    config = load_recipe(str(path)).config
    assert (config.learning_rate, config.drift_coef, config.beta) == (2e-5, "max_advantage", 0.01)


def write_problems(path, n=40):
    """Write sums in the form of the published gsm8k."""
    rows = [
        {"question": f"{i}+{i}=", "answer": f"{i} and {i} make <<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"}
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with problems and a small Qwen3 that has random weights and a chat template."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=18, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, pad_token_id=0, eos_token_id=1, bos_token_id=None,
            initializer_range=0.3,
        )
    )  # fmt: skip
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}="
    Policy(model, tokenizer).save(tmp_path / "my-qwen")
    write_problems(tmp_path / "gsm8k.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # The command line does this, too.
    return tmp_path


def test_a_recipe_from_end_to_end(folder, no_network, capsys):
    """All settings but the sizes are the recipe's. The run is evaluated and exported, and its card repeats it."""
    (folder / "my_rewards.py").write_text(
        "def lengths(prompts, completions, **_):\n    return [len(c) for c in completions]\n"
    )
    words = "--recipe qwen2.5-0.5b-8gb --model my-qwen --data gsm8k.jsonl --output-dir run --max-steps 2 "
    words += "--max-completion-length 12 --num-prompts 2 --num-generations 4 --eval-problems 4"
    run("train", *words.split(), "--dry-run")
    assert "my-qwen; a local folder" in capsys.readouterr().out
    run("train", *words.split(), "--reward", "math + 0.1*my_rewards:lengths")
    config, metrics, _ = load_run("run")
    assert metrics["step"].tolist() == [0, 1, 2]
    assert metrics["reward_std"][1] > 0
    assert metrics["grad_norm"][1] > 0
    assert config.load_in_4bit
    card = (folder / "run" / "adapter" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == config.model == str(folder / "my-qwen")
    assert front["library_name"] == "peft"
    assert command(config) in card
    assert callable(parse(shlex.split(command(config))[1:]))
    assert f"{metrics['eval_accuracy'][0]:.3f}" in card
    assert (folder / "run" / "adapter" / "curves.png").stat().st_size > 10_000

    run("evaluate", "run", "--num-problems", 4, "--num-samples", 2)
    run("sample", "run", "--num-problems", 2)
    run("export", "run")
    assert "same answers       100.0%" in capsys.readouterr().out
    front = yaml.safe_load((folder / "run" / "exported" / "README.md").read_text().split("---")[1])
    assert front["library_name"] == "transformers"
    AutoModelForCausalLM.from_pretrained(folder / "run" / "exported")


def test_without_a_network_one_line_says_what_to_download(folder):
    """It names the problems first, and the model once there is a copy of the problems."""
    for more, line in (
        ([], r"hf download openai/gsm8k --repo-type dataset .*--data gsm8k"),
        (
            ["--data", "gsm8k.jsonl"],
            r"hf download Qwen/Qwen2.5-0.5B-Instruct --local-dir Qwen2.5-0.5B-Instruct`, then `--model Qwen2.5-0.5B",
        ),
    ):
        with pytest.raises(UserError, match=line) as caught:
            run("train", "--recipe", "qwen2.5-0.5b-8gb", *more)
        assert "\n" not in str(caught.value)
        assert not (folder / "runs").exists()


def test_the_command_of_a_card_makes_the_same_run():
    config = TrainConfig(chat_template=False, lora_r=4, instruction="Think twice.", drift_coef=3.0)
    assert command(config) == (
        "minicpgd train --drift-coef 3.0 --instruction 'Think twice.' --lora-r 4 --no-chat-template"
    )


def test_every_file_of_recipes_is_known():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(KNOWN)
    assert {name.split("-")[0] for name in KNOWN} == {"qwen2.5", "llama", "gemma"}


def test_shares_count_only_the_problems_that_a_file_has(tmp_path):
    """So pass@1 is the sampled accuracy, though more problems are asked for."""
    task = get_task("chain_arithmetic")
    rows = task.sample(100, random.Random(0)) + task.held_out(30)  # A file holds out by the same rule as the task.
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(
        task="jsonl", data=str(tmp_path / "mine.jsonl"), output_dir=str(tmp_path / "run"), max_steps=1, num_prompts=2,
        num_generations=4, eval_problems=1000,
    )  # fmt: skip
    result = evaluate(train(config), num_problems=1000, num_samples=4)
    assert result["sampled_accuracy"] > 0.1
    assert result["pass@1"] == pytest.approx(result["sampled_accuracy"])


def test_a_card_that_is_full_is_one_line_with_advice(monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9.96 GiB")

    monkeypatch.setitem(COMMANDS, "train", functools.wraps(COMMANDS["train"])(full))
    monkeypatch.setattr(sys, "argv", ["minicpgd", "train"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as leaving:
        main()
    line = capsys.readouterr().err
    assert leaving.value.code == 2
    assert line.count("\n") == 1
    assert "--micro-batch-tokens" in line
