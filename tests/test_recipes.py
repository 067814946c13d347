"""Real models: recipes, the plan before a run, and a recipe from end to end on a model that fits in a test."""

import json
import random
import re
import socket
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from minicpgd import TrainConfig, UserError, evaluate, load_run, memory, train
from minicpgd.card import command
from minicpgd.cli import main, parse
from minicpgd.policy import Policy
from minicpgd.pretrain import make_tokenizer
from minicpgd.recipes import FOLDER, KNOWN, load_recipe
from minicpgd.tasks import get_task

README = (Path(__file__).parent.parent / "README.md").read_text()


def run(*arguments):
    parse([str(a) for a in arguments])()


@pytest.fixture
def no_network(monkeypatch):
    """Whoever asks for an address fails."""

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("name", KNOWN)
def test_a_recipe_fits_its_card_and_says_what_it_needs(name):
    """What it expects is what is predicted for it, to 50 MiB; and a tenth of the card stays free."""
    recipe = load_recipe(name)
    predicted = memory.of_recipe(name).peak / 2**30
    assert recipe.peak_gib == pytest.approx(predicted, abs=0.05)
    assert predicted < 0.9 * recipe.card_gib
    assert name.endswith(f"-{recipe.card_gib:g}gb")
    assert "predicted" in recipe.basis
    (row,) = [line for line in README.splitlines() if line.startswith(f"| `{name}` |")]
    assert row.endswith(f"| {recipe.card_gib:g} GB | {recipe.peak_gib:g} |")
    assert recipe.config.load_in_4bit
    assert recipe.config.rollout_batch_size


@pytest.mark.parametrize("name", ["qwen2.5-0.5b-8gb", "gemma-3-1b-8gb"])
def test_a_dry_run_says_what_would_be_done(name, no_network, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("train", "--recipe", name, "--dry-run", "--max-steps", 7)
    told = capsys.readouterr().out
    recipe = load_recipe(name)
    words = " ".join(told.split())
    assert f"{recipe.config.model}; to be downloaded from the hub, about" in words
    assert "openai/gsm8k from the hub" in words
    assert "7 rollouts of 8 x 8 responses of at most 512 tokens; 2 updates on each, by cpgd" in words
    total = max(map(float, re.search(r"in all +([\d.]+) +([\d.]+)", told).groups()))
    assert total == pytest.approx(recipe.peak_gib, abs=0.05)
    assert f"expects {recipe.peak_gib:g} GiB of {recipe.card_gib:g}: predicted by" in words
    assert "some are changed here" in words
    assert not list(tmp_path.iterdir())


def test_the_size_of_a_download(capsys):
    run("train", "--recipe=qwen2.5-7b-24gb", "--dry-run")
    assert "about 15.2 GB" in " ".join(capsys.readouterr().out.split())  # as the files on the hub are


BAD = {
    "train: [1, 2]": "a recipe has a section `train:`",
    "- 1": "a recipe has a section `train:`",
    "train: {lora_rr: 3}": "train: lora_rr: no such setting; lora_r?",
    "train: {lora_r: many}": "train: lora_r = 'many': int expected",
    "train: {seed: 1}\nexpects: {}": "expects: sections are `train:` and `expect:`",
    "train: {seed: 1}\nexpect: {peak: 3}": "expect: peak: no such setting; peak_gib?",
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


def test_an_unknown_recipe_and_two_masters():
    with pytest.raises(UserError, match=r"did you mean 'qwen2.5-3b-16gb'\? choose from gemma"):
        run("train", "--recipe", "qwen2.5-3b-8gb")
    with pytest.raises(UserError, match="--resume and --recipe"):
        run("train", "--recipe", "qwen2.5-3b-16gb", "--resume", "somewhere")


def test_yaml_reads_1e5_as_text_and_we_do_not(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train: {learning_rate: 2e-5, drift_coef: auto, beta: 1e-2}")
    config = load_recipe(str(path)).config
    assert (config.learning_rate, config.drift_coef, config.beta) == (2e-5, "auto", 0.01)


def problems(path, n=40):
    """Sums in the form that gsm8k is published in."""
    rows = [
        {"question": f"{i}+{i}=", "answer": f"{i} and {i} make <<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"}
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    """A folder with a small Qwen3 of random weights, with a chat template, and problems."""
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
    problems(tmp_path / "gsm8k.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as the command line does
    return tmp_path


def test_a_recipe_from_end_to_end(somewhere, no_network, capsys):
    """Its own settings but for sizes; then evaluated, exported, and the adapter's card says how it was made."""
    (somewhere / "my_rewards.py").write_text(
        "def lengths(prompts, completions, **_):\n    return [len(c) for c in completions]\n"
    )
    smaller = "--max-steps 2 --max-completion-length 12 --num-prompts 2 --num-generations 4 --eval-problems 4".split()
    given = [
        "--recipe",
        "qwen2.5-0.5b-8gb",
        "--model",
        "my-qwen",
        "--data",
        "gsm8k.jsonl",
        "--output-dir",
        "r",
        *smaller,
    ]
    run("train", *given, "--dry-run")
    assert "my-qwen; a local folder" in capsys.readouterr().out
    run("train", *given, "--reward", "math + 0.1*my_rewards:lengths")
    config, metrics, _ = load_run("r")
    assert metrics["step"].tolist() == [0, 1, 2]
    assert metrics["reward_std"][1] > 0
    assert metrics["grad_norm"][1] > 0
    assert config.load_in_4bit
    card = (somewhere / "r" / "adapter" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "my-qwen"
    assert front["library_name"] == "peft"
    assert command(config) in card
    parse(
        command(config).split(" ", 1)[1].replace("'", "").split(" --reward ")[0].split()
    )  # what the card says, parses
    assert f"{metrics['eval_accuracy'][0]:.3f}" in card
    assert (somewhere / "r" / "adapter" / "curves.png").stat().st_size > 10_000

    run("evaluate", "r", "--num-problems", 4, "--num-samples", 2)
    run("sample", "r", "--num-problems", 2)
    run("export", "r")
    told = capsys.readouterr().out
    assert "same answers       100.0%" in told
    assert (
        yaml.safe_load((somewhere / "r/exported/README.md").read_text().split("---")[1])["library_name"]
        == "transformers"
    )
    AutoModelForCausalLM.from_pretrained(somewhere / "r" / "exported")


def test_without_a_network_one_line_says_what_to_fetch(somewhere):
    """The problems first; with a copy of those, the model."""
    for given, told in (
        ([], r"hf download openai/gsm8k --repo-type dataset .*--data gsm8k"),
        (
            ["--data", "gsm8k.jsonl"],
            r"hf download Qwen/Qwen2.5-0.5B-Instruct --local-dir Qwen2.5-0.5B-Instruct`, then `--model Qwen2.5-0.5B",
        ),
    ):
        with pytest.raises(UserError, match=told) as caught:
            run("train", "--recipe", "qwen2.5-0.5b-8gb", *given)
        assert "\n" not in str(caught.value)
        assert not (somewhere / "runs").exists()


def test_the_cards_command_makes_the_same_run():
    config = TrainConfig(chat_template=False, lora_r=4, instruction="Think twice.", drift_coef=3.0)
    assert command(config) == (
        "minicpgd train --lora-r 4 --instruction 'Think twice.' --no-chat-template --drift-coef 3.0"
    )


def test_recipes_are_all_there():
    assert {path.stem for path in FOLDER.glob("*.yaml")} - set(KNOWN) == {"architectures"}
    assert {name.split("-")[0] for name in KNOWN} == {"qwen2.5", "llama", "gemma"}


def test_a_file_with_fewer_problems_than_asked_for(tmp_path):
    """Shares are of those there are: pass@1 is the sampled accuracy."""
    task = get_task("chain_arithmetic")
    rows = task.sample(100, random.Random(0)) + task.held_out(30)  # the file holds out by the rule that the task does
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(
        task="jsonl", data=str(tmp_path / "mine.jsonl"), output_dir=str(tmp_path / "run"), max_steps=1, num_prompts=2,
        num_generations=4, eval_problems=1000,
    )  # fmt: skip
    result = evaluate(train(config), num_problems=1000, num_samples=4)
    assert result["sampled_accuracy"] > 0.1
    assert result["pass@1"] == pytest.approx(result["sampled_accuracy"])


def test_a_full_card_is_one_line(monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9.96 GiB")

    monkeypatch.setattr("minicpgd.commands.train", full)
    monkeypatch.setattr("sys.argv", ["minicpgd", "train"])
    with pytest.raises(SystemExit) as left:
        main()
    told = capsys.readouterr().err
    assert left.value.code == 2
    assert told.count("\n") == 1
    assert "--micro-batch-tokens" in told
