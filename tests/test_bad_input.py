"""Bad input: one clear line, exit code 2, nothing lost."""

import json
import subprocess
import sys

import pytest
import torch

import minicpgd.cli
from minicpgd import TrainConfig, UserError, evaluate, load_run, train
from minicpgd.errors import ConfigError, NonFiniteError
from minicpgd.learner import Learner
from minicpgd.policy import load_policy
from minicpgd.rewards import call_reward
from minicpgd.trainer import Listener


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"algorithm": "cgpd"}, r"algorithm = 'cgpd': did you mean 'cpgd'\? choose from cpgd, grpo"),
        ({"algorithm": "ppo"}, r"algorithm = 'ppo': did you mean '\w+'\? choose from"),
        ({"algorithm": "q"}, r"algorithm = 'q': choose from"),
        ({"advantage_weight": "sdt"}, r"advantage_weight = 'sdt': did you mean 'std'"),
        ({"aggregation": "mean"}, r"aggregation = 'mean': did you mean '\w+_mean'"),
        ({"importance_level": "tokens"}, r"importance_level = 'tokens': did you mean 'token'"),
        ({"num_prompts": 0}, "num_prompts = 0: it has to be at least 1"),
        ({"max_steps": -1}, "max_steps = -1: it has to be at least 1"),
        ({"chunk_size": 0}, "chunk_size = 0: it has to be at least 1"),
        ({"num_generations": 1}, "num_generations = 1: cpgd compares the responses"),
        ({"num_generations": 1, "algorithm": "rloo"}, "num_generations = 1: rloo compares"),
        ({"num_generations": 1, "num_prompts": 1, "algorithm": "reinforce_pp"}, "needs at least 2"),
        (
            {"num_prompts": 3, "num_generations": 5, "num_minibatches": 4},
            "num_minibatches = 4: does not divide .* = 15",
        ),
        ({"epsilon": 1.0}, "epsilon = 1.0: it has to be between 0 and 1"),
        ({"epsilon": 0}, "epsilon = 0: it has to be between 0 and 1"),
        ({"epsilon_high": -0.1}, "epsilon_high = -0.1: it has to be more than 0"),
        ({"drift_coef": -1.0}, "drift_coef = -1.0: it has to be at least 0"),
        ({"drift_coef": "none"}, "drift_coef = 'none': float expected"),
        ({"drift_coef": 1.0, "algorithm": "grpo"}, "drift_coef = 1.0: grpo has no drift; those with one are cpgd, pgd"),
        ({"drift_clip": 0.0}, "drift_clip = 0.0: it has to be more than 0"),
        ({"temperature": 0.0}, "temperature = 0.0: it has to be at least 1e-06"),
        ({"top_p": 1.5}, "top_p = 1.5: it has to be more than 0 and at most 1"),
        ({"top_k": -1}, "top_k = -1: it has to be at least 0"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0: it has to be more than 0"),
        ({"learning_rate": float("nan")}, "learning_rate = nan: float expected"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm = inf: float expected"),
        ({"num_prompts": "16"}, "num_prompts = '16': int expected"),
        ({"num_prompts": 16.0}, "num_prompts = 16.0: int expected"),
        ({"num_prompts": True}, "num_prompts = True: int expected"),
        ({"disable_dropout": 1}, "disable_dropout = 1: bool expected"),
        ({"model": 3}, "model = 3: str expected"),
    ],
)
def test_a_config_that_cannot_run_is_none(changes, line):
    with pytest.raises(ConfigError, match=line) as caught:
        TrainConfig(**changes)
    assert "\n" not in str(caught.value)


def test_what_is_fine_is_let_through():
    for changes in ({"num_generations": 1, "algorithm": "reinforce_pp"}, {"learning_rate": 1}, {"drift_coef": 0}):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("content", "line"),
    [("{", "not a readable config"), ("[1]", "no JSON object"), ('{"sede": 1}', "unknown fields: sede"),
     ('{"seed": "x"}', "seed = 'x': int expected"), ("\xff", "algorithm|readable")],
)  # fmt: skip
def test_a_config_file_that_cannot_be_read(tmp_path, content, line):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=line) as caught:
        load_run(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_metrics_that_cannot_be_read(small):
    run = train(small())
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "garbage", *lines[2:]]) + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: "):
        load_run(run)


def test_models_that_cannot_be_loaded(tmp_path, policy):
    with pytest.raises(UserError, match="neither|cannot be loaded"):
        load_policy("no/such-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no config; config.json is needed"):
        load_policy(str(tmp_path / "empty"))
    folder = tmp_path / "model"
    policy.save(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_policy(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no weights; \*.safetensors is needed"):
        load_policy(str(folder))
    (folder / "model.safetensors").write_bytes(weights)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        load_policy(str(folder))


def test_a_failed_start_leaves_no_folder(small):
    config = small(model="no/such-model")
    with pytest.raises(UserError):
        train(config)
    assert not config.folder.exists()


def test_a_run_folder_that_exists(small):
    run = train(small())
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"exists already.*train --resume"):
        train(small())
    assert (run / "metrics.jsonl").read_bytes() == before


def test_an_unfinished_run_cannot_be_evaluated(small):
    run = train(small(), listener=Listener(stop=lambda: True))
    with pytest.raises(UserError, match="has not finished"):
        evaluate(run)
    with pytest.raises(UserError, match="there is no such task; choose from chain_arithmetic"):
        evaluate("embedded", task="chess")


ROWS = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]


@pytest.mark.parametrize(
    ("returned", "line"),
    [([1.0], "returned 1 rewards for 2 completions"), ([1.0, float("nan")], "returned nan for 'y'"),
     ([float("inf"), 0.0], "returned inf for 'x'"), (["1", 0.0], "returned '1' for 'x'"), (None, "raised TypeError")],
)  # fmt: skip
def test_a_reward_function_that_fails(returned, line):
    def mine(prompts, completions, answer):
        return returned

    with pytest.raises(UserError, match=line) as caught:
        call_reward(mine, ROWS, ["x", "y"])
    assert "mine" in str(caught.value)


def test_a_reward_function_that_raises_in_training(small, tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text("def mine(prompts, completions, **_):\n    raise RuntimeError('no\\nluck')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"reward function bad:mine raised RuntimeError: no"):
        train(small(reward="bad:mine"))
    for name, line in (("bad", "module:function"), ("bad:yours", "yours"), ("absent:mine", "absent")):
        with pytest.raises(UserError, match=line):
            train(small("other", reward=name))


@pytest.mark.parametrize("where", ["weights", "loss"])
def test_a_loss_that_is_not_finite_stops_the_run(small, monkeypatch, where):
    """At step 2: the line names it, what to try, and the checkpoint of step 1 is there and whole."""
    plain, config = Learner.update, small(save_steps=1)

    def poisoned(self, rollout, advantages, ref_logp, rows):
        if len(list((config.folder / "checkpoints").iterdir())) == 2:  # steps 0 and 1 are saved
            if where == "weights":
                with torch.no_grad():
                    next(self.policy.model.parameters())[3] = float("nan")
            else:
                advantages = advantages * float("inf")
        return plain(self, rollout, advantages, ref_logp, rows)

    monkeypatch.setattr(Learner, "update", poisoned)
    with pytest.raises(NonFiniteError, match=r"step 2: .*learning_rate") as caught:
        train(config)
    assert "step-000001" in str(caught.value)
    monkeypatch.setattr(Learner, "update", plain)
    train(config, resume=True)
    whole = train(small("whole", save_steps=1))
    assert (config.folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train --algorithm cgpd", "did you mean 'cpgd'"),
        ("train --epsilon 1.5", "epsilon = 1.5"),
        ("train --num-prompts many", "--num-prompts"),
        ("train --numprompts 3", "--numprompts"),
        ("train --resume nowhere", "no config.json"),
        ("train --model nowhere/at-all", "model = 'nowhere/at-all'"),
        ("trian", "trian"),
        ("evaluate nowhere/at-all", "nowhere/at-all"),
        ("plot nowhere", "not a run"),
        ("demo --max-steps 3", "max_steps = 3"),
        ("", "demo, train"),
    ],
)
def test_the_command_line_says_it_in_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["minicpgd", *arguments.split()])
    with pytest.raises(SystemExit) as leaving:
        minicpgd.cli.main()
    error = capsys.readouterr().err
    assert leaving.value.code == 2
    assert error.count("\n") == 1, error
    assert words in error
    assert not any(tmp_path.rglob("*.json"))


def test_a_resume_on_the_command_line_names_what_changed(small):
    run = train(small())
    done = subprocess.run(
        [sys.executable, "-m", "minicpgd", "train", "--resume", str(run), "--seed", "7", "--epsilon", "0.3"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "seed was 0, is 7" in done.stderr
    assert "epsilon was 0.2, is 0.3" in done.stderr
    assert json.loads((run / "config.json").read_text())["seed"] == 0


def test_a_folder_that_cannot_be_made_is_not_one_to_go_on_with(small, tmp_path):
    """Nothing was begun there; a run that was begun is told how to go on (test_a_full_disk)."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run: cannot be written \(.*\); choose another with --output-dir$"):
        train(small("file/run"))
