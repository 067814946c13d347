"""Bad input gives one clear line and exit code 2, and nothing is lost."""

import io
import json
import shlex
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from minicpgd import TrainConfig, UserError, evaluate, load_run, train
from minicpgd.cli.main import main
from minicpgd.errors import ConfigError, NonFiniteError
from minicpgd.models import load_policy
from minicpgd.tasks import call_reward
from minicpgd.training import Callbacks, Learner
from minicpgd.training.run_folder import resume_command


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """A function that types a command in an empty folder and returns its line on standard error."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def type_command(*words):
        monkeypatch.setattr(sys, "argv", ["minicpgd", *map(str, words)])
        with pytest.raises(SystemExit) as leaving:
            main()
        error = capsys.readouterr().err
        assert leaving.value.code == 2
        assert error.startswith("minicpgd: ")
        assert error.count("\n") == 1, error
        assert not any(folder.iterdir())
        return error

    return type_command


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"algorithm": "cgpd"}, r"algorithm = 'cgpd': did you mean 'cpgd'\? choose from cpgd, grpo"),
        ({"algorithm": "gppo"}, r"algorithm = 'gppo': did you mean 'grpo'\? choose from cpgd, grpo"),
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
            r"num_minibatches = 4: it has to divide num_prompts \* num_generations = 15$",
        ),
        ({"epsilon": 1.0}, "epsilon = 1.0: it has to be less than 1$"),
        ({"epsilon": 0}, "epsilon = 0: it has to be more than 0$"),
        ({"epsilon_high": -0.1}, "epsilon_high = -0.1: it has to be more than 0"),
        ({"drift_coef": -1.0}, "drift_coef = -1.0: it has to be at least 0"),
        ({"drift_coef": "none"}, "drift_coef = 'none': float or max_advantage or adaptive expected"),
        (
            {"drift_coef": 1.0, "algorithm": "grpo"},
            "drift_coef = 1.0: grpo has no drift; these have one: cpgd, pgd, grpo_drift, .*",
        ),
        ({"drift_clip": 0.0}, "drift_clip = 0.0: it has to be more than 0"),
        ({"temperature": 0.0}, "temperature = 0.0: it has to be at least 1e-06"),
        ({"top_p": 1.5}, "top_p = 1.5: it has to be at most 1$"),
        ({"top_p": 0.0}, "top_p = 0.0: it has to be more than 0$"),
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
def test_settings_that_cannot_run_are_refused(changes, line):
    with pytest.raises(ConfigError, match=line) as caught:
        TrainConfig(**changes)
    assert "\n" not in str(caught.value)


def test_unusual_settings_that_can_run_are_accepted():
    for changes in ({"num_generations": 1, "algorithm": "reinforce_pp"}, {"learning_rate": 1}, {"drift_coef": 0}):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("content", "line"),
    [("{", "not a readable config"), ("[1]", "no JSON object"), ('{"sede": 1}', "unknown fields: sede"),
     ('{"seed": "x"}', "seed = 'x': int expected"), ("\xff", "algorithm|readable")],
)  # fmt: skip
def test_a_config_file_that_cannot_be_read_is_named(tmp_path, content, line):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=line) as caught:
        load_run(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_line_of_metrics_that_cannot_be_read_is_named(small):
    run = train(small())
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "garbage", *lines[2:]]) + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: "):
        load_run(run)


def test_a_model_that_cannot_be_loaded_is_one_line_with_the_reason(tmp_path, policy):
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


def test_a_run_does_not_overwrite_another(small):
    run = train(small())
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"exists already.*train --resume"):
        train(small())
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_without_a_checkpoint_cannot_be_evaluated(small):
    run = train(small(), callbacks=Callbacks(should_stop=lambda: True))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint yet. Wait for it, or continue it"):
        evaluate(run)
    with pytest.raises(UserError, match="there is no such task; choose from chain_arithmetic"):
        evaluate("embedded", task="chess")


ROWS = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]


@pytest.mark.parametrize(
    ("returned", "line"),
    [([1.0], "returned 1 rewards for 2 completions"), ([1.0, float("nan")], "returned nan for 'y'"),
     ([float("inf"), 0.0], "returned inf for 'x'"), (["1", 0.0], "returned '1' for 'x'"), (None, "raised TypeError")],
)  # fmt: skip
def test_wrong_rewards_are_named_with_their_function(returned, line):
    def mine(prompts, completions, answer):
        return returned

    with pytest.raises(UserError, match=line) as caught:
        call_reward(mine, ROWS, ["x", "y"])
    assert "mine" in str(caught.value)


def test_a_reward_function_that_raises_or_is_missing_is_named(small, tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text("def mine(prompts, completions, **_):\n    raise RuntimeError('no\\nluck')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"reward function bad:mine raised RuntimeError: no"):
        train(small(reward="bad:mine"))
    for name, line in (("bad", "module:function"), ("bad:yours", "yours"), ("absent:mine", "absent")):
        with pytest.raises(UserError, match=line):
            train(small("other", reward=name))


@pytest.mark.parametrize("where", ["weights", "loss"])
def test_a_loss_that_is_not_finite_stops_the_run(small, monkeypatch, where):
    """The line names step 2, advice, and the checkpoint of step 1, from which the run can continue."""
    update, config = Learner.update, small(save_steps=1)

    def poisoned_update(self, experience, rows):
        if len(list((config.folder / "checkpoints").iterdir())) == 2:  # Steps 0 and 1 have been saved.
            if where == "weights":
                with torch.no_grad():
                    next(self.policy.model.parameters())[3] = float("nan")
            else:
                experience = replace(experience, advantages=experience.advantages * float("inf"))
        return update(self, experience, rows)

    monkeypatch.setattr(Learner, "update", poisoned_update)
    with pytest.raises(NonFiniteError, match=r"step 2: .*learning_rate") as caught:
        train(config)
    assert "step-000001" in str(caught.value)
    monkeypatch.setattr(Learner, "update", update)
    train(config, resume=True)
    uninterrupted = train(small("uninterrupted", save_steps=1))
    assert (config.folder / "metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train --algorithm cgpd", "algorithm = 'cgpd': did you mean 'cpgd'?"),
        ("train --algorithm gppo", "algorithm = 'gppo': did you mean 'grpo'?"),
        ("train --algoritm cpgd", "--algoritm, cpgd; did you mean --algorithm? (see minicpgd train --help)"),
        ("train --dry-ran", "--dry-ran; did you mean --dry-run? (see minicpgd train --help)"),
        ("train --numprompts 3", "--numprompts, 3; did you mean --num-prompts?"),
        ("evaluate --num-problem 3", "did you mean --num-problems? (see minicpgd evaluate --help)"),
        ("train --epsilon 1.5", "epsilon = 1.5: it has to be less than 1"),
        ("train --num-prompts many", "--num-prompts"),
        ("train --resume nowhere", "no config.json"),
        ("train --model nowhere/at-all", "model = 'nowhere/at-all'"),
        ("trian", "trian"),
        ("evaluate nowhere/at-all", "nowhere/at-all"),
        ("plot nowhere", "not a run"),
        ("demo --max-steps 3", "max_steps = 3"),
        ("", "demo, train"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_leaves_no_file(arguments, words, refused):
    assert words in refused(*arguments.split())


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_mistyped_flag_is_a_short_line_on_any_terminal(encoding, refused, monkeypatch):
    """On a terminal without UTF-8, tyro draws another frame around its message."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    line = "minicpgd: Unrecognized options: --dry-ran; did you mean --dry-run? (see minicpgd train --help)\n"
    assert refused("train", "--dry-ran") == line


def test_a_resume_on_the_command_line_names_what_changed(small, refused):
    run = train(small())
    line = refused("train", "--resume", run, "--seed", 7, "--epsilon", 0.3)
    assert "seed was 0, is 7" in line
    assert "epsilon was 0.2, is 0.3" in line
    assert json.loads((run / "config.json").read_text())["seed"] == 0


def test_the_command_that_resumes_a_run_can_be_pasted_into_a_shell(small, refused):
    """Also if the folder's name has spaces and a quotation mark."""
    config = small("Ada's first run")
    run = train(config, callbacks=Callbacks(should_stop=lambda: True))
    hint = resume_command(run)
    assert shlex.split(hint.strip("`")) == ["minicpgd", "train", "--resume", str(run)]
    shutil.rmtree(run / "checkpoints")
    assert hint in refused("evaluate", run)
    with pytest.raises(ConfigError) as caught:
        train(config)
    assert f"continue it with {hint}" in str(caught.value)


def test_a_folder_that_cannot_be_created_gives_no_advice_to_resume(small, tmp_path):
    """A run that has begun gives that advice; see test_resume.py."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run: cannot be written \(.*\); choose another with --output-dir$"):
        train(small("file/run"))
