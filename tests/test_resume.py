"""A run that was interrupted, in whatever way, ends as if nothing had happened."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import minicpgd.cli
import minicpgd.commands
from minicpgd import UserError, load_run, train
from minicpgd.checkpoint import load_checkpoint, restore, save_checkpoint, write_atomically
from minicpgd.learner import Learner
from minicpgd.trainer import Listener

FLAGS = (
    "--max-steps 12 --num-prompts 2 --num-generations 4 --num-minibatches 2 --num-iterations 2 --eval-steps 5 "
    "--eval-problems 8 --save-steps 3 --logging-steps 2"
).split()
KILLS = int(os.environ.get("MINICPGD_KILLS", "1"))


def command(*arguments):
    return [sys.executable, "-m", "minicpgd", *map(str, arguments)]


def run_cli(*arguments, **more):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120, **more)


def results(folder):
    names = (
        "metrics.jsonl",
        "samples.jsonl",
        "passes.jsonl",
        "model/model.safetensors",
        "checkpoints/step-000012.safetensors",
    )
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run_cli("train", "--output-dir", folder, *FLAGS)
    assert done.returncode == 0, done.stderr
    return results(folder)


@pytest.mark.parametrize("attempt", range(KILLS))
def test_kill_9_at_a_random_moment(attempt, undisturbed, tmp_path):
    """MINICPGD_KILLS=30 for the long version."""
    rng, folder, kills = random.Random(time.time_ns() + attempt), tmp_path / "run", 0
    while not (folder / "model" / "model.safetensors").exists() and kills < 2:
        if (folder / "config.json").exists():
            process = subprocess.Popen(command("train", "--resume", folder), stdout=subprocess.DEVNULL)
        else:
            process = subprocess.Popen(command("train", "--output-dir", folder, *FLAGS), stdout=subprocess.DEVNULL)
        while not (folder / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)  # most of the time would go into killing imports otherwise
        time.sleep(rng.uniform(0, 1.2))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = run_cli("train", "--resume", folder)
    assert done.returncode == 0, done.stderr
    assert results(folder) == undisturbed
    steps = load_run(folder).metrics["step"].tolist()
    assert steps == list(range(13))
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_says_how_to_go_on(number, undisturbed, tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command("train", "--output-dir", folder, *FLAGS), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert f"minicpgd train --resume {folder}" in out
    assert "Traceback" not in err
    last = int(load_run(folder).metrics["step"][-1])
    assert (folder / "checkpoints" / f"step-{last:06d}.safetensors").exists()
    done = run_cli("train", "--resume", folder)
    assert done.returncode == 0, done.stderr
    assert results(folder) == undisturbed


def stop_at(step):
    seen = []
    return Listener(step=lambda s, *_: seen.append(s), stop=lambda: bool(seen) and seen[-1] >= step - 1)


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_checkpoint_is_passed_over_and_said_so(damage, small, tmp_path):
    whole = train(small("whole", max_steps=6, save_steps=1))
    folder = train(small(max_steps=6, save_steps=1), listener=stop_at(4))
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content[:-100] if damage == "truncate" else content)
    warnings = []
    train(small(max_steps=6, save_steps=1), resume=True, listener=Listener(warn=warnings.append))
    assert len(warnings) == 1
    assert str(newest) in warnings[0]
    assert "\n" not in warnings[0]
    assert damage != "flip" or "damaged (its content does not match its digest)" in warnings[0]
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_all_checkpoints_damaged_starts_over(small):
    folder = train(small(max_steps=4, save_steps=1), listener=stop_at(3))
    whole = (folder / "metrics.jsonl").read_bytes()
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(b"nonsense")
    warnings = []
    train(small(max_steps=4, save_steps=1), resume=True, listener=Listener(warn=warnings.append))
    assert len(warnings) == 3
    assert "beginning again, from step 0" in warnings[2]
    assert (folder / "metrics.jsonl").read_bytes().startswith(whole)


def test_a_torn_last_line_is_made_again(small):
    folder = train(small(max_steps=4, save_steps=2), listener=stop_at(2))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    train(small(max_steps=4, save_steps=2), resume=True)
    assert load_run(folder).metrics["step"].tolist() == [0, 1, 2, 3, 4]


def test_lines_that_are_gone_are_missed(small):
    folder = train(small(max_steps=4, save_steps=2), listener=stop_at(3))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:1] + lines[3:]))
    warnings = []
    train(small(max_steps=4, save_steps=2), resume=True, listener=Listener(warn=warnings.append))
    assert len(warnings) == 1
    assert "metrics.jsonl: the line of step 1 is gone (2 in all)" in warnings[0]
    assert load_run(folder).metrics["step"].tolist() == [0, 3, 4]


def test_a_damaged_checkpoint_does_not_stay(small):
    """Else it would be one of the two that are kept, in the place of a whole one."""
    folder = train(small(max_steps=9, save_steps=4), listener=stop_at(5))
    checkpoints = folder / "checkpoints"
    (checkpoints / "step-000005.safetensors").write_bytes(b"nonsense")
    heard = []
    train(small(max_steps=9, save_steps=4), resume=True, listener=Listener(resumed=heard.append, stop=lambda: True))
    assert heard == [4]
    (checkpoints / "step-000005.safetensors").write_bytes(b"nonsense")
    train(small(max_steps=9, save_steps=4), resume=True, listener=stop_at(8))
    assert sorted(p.name[5:11] for p in checkpoints.iterdir()) == ["000004", "000008"]


def test_a_checkpoint_that_memory_cannot_hold_is_not_damaged(tmp_path, monkeypatch):
    """Passed over, it would be removed."""
    save_checkpoint(tmp_path, 12, *odd(7.0), {"drift_coef": 0.25})

    def full(*_):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr("minicpgd.checkpoint.safe_open", full)
    with pytest.raises(OSError, match="allocate memory"):
        load_checkpoint(tmp_path, pytest.fail)


def test_two_checkpoints_are_kept(small):
    folder = train(small(max_steps=6, save_steps=1))
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == [
        "step-000005.safetensors",
        "step-000006.safetensors",
    ]


def test_a_longer_run_is_the_same_run(small):
    long = train(small("long", max_steps=5, eval_steps=1))
    folder = train(small(max_steps=3, eval_steps=1))
    train(small(max_steps=5, eval_steps=1), resume=True)
    assert load_run(folder).config.max_steps == 5
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (folder / name).read_bytes() == (long / name).read_bytes()


def test_a_longer_run_that_is_stopped_says_so(small, monkeypatch, capsys):
    """Its model/ is there from the first time; that does not make it done."""
    folder = train(small(max_steps=2))
    plain = minicpgd.commands.train_

    def interrupted_at_once(*arguments, **more):
        signal.raise_signal(signal.SIGINT)
        return plain(*arguments, **more)

    monkeypatch.setattr(minicpgd.commands, "train_", interrupted_at_once)
    monkeypatch.setattr(sys, "argv", ["minicpgd", "train", "--resume", str(folder), "--max-steps", "9"])
    with pytest.raises(SystemExit) as leaving:
        minicpgd.cli.main()
    assert leaving.value.code == 128 + signal.SIGINT
    assert "stopped and saved" in capsys.readouterr().out
    assert load_run(folder).metrics["step"][-1] == 3


def test_a_resume_with_other_settings_names_them(small):
    train(small())
    with pytest.raises(UserError, match=r"seed was 0, is 3; learning_rate was 0.0001, is 0.5"):
        train(small(learning_rate=0.5, seed=3), resume=True)
    with pytest.raises(UserError, match=r"max_steps was 3, is 2"):
        train(small(max_steps=2), resume=True)


def test_dropout_is_resumed_too(small, tmp_path, policy):
    """The one thing that draws from the global source of randomness."""
    policy.model.config.attention_dropout = 0.3
    policy.save(tmp_path / "model")
    changes = {"model": str(tmp_path / "model"), "disable_dropout": False, "max_steps": 4, "save_steps": 1}
    whole = train(small("whole", **changes))
    folder = train(small(**changes), listener=stop_at(2))
    train(small(**changes), resume=True)
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    without = train(small("without", **(changes | {"disable_dropout": True})))
    assert (without / "metrics.jsonl").read_bytes() != (whole / "metrics.jsonl").read_bytes()


def test_a_checkpoint_holds_all_that_a_step_needs(small):
    """Bit for bit: weights, moments, and the drift coefficient in force."""
    folder = train(small(max_steps=2))
    learner = Learner.from_config(small())
    checkpoint = load_checkpoint(folder / "checkpoints", pytest.fail)
    trained = [name for name, p in learner.policy.model.named_parameters() if p.requires_grad]
    assert {f"model.{name}" for name in trained} < set(checkpoint.tensors)
    moments = [key for key in checkpoint.tensors if key.startswith("optimizer.")]
    assert len(moments) == 3 * len(trained)
    assert checkpoint.step == 2
    assert checkpoint.extra["drift_coef"] == load_run(folder).metrics["drift_coef"][-1]
    assert load_checkpoint(folder / "nowhere", pytest.fail) is None


def test_ctrl_c_while_torch_is_imported_says_nothing(tmp_path):
    process = subprocess.Popen(command("train", "--output-dir", tmp_path / "run"), stderr=subprocess.PIPE, text=True)
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == -signal.SIGINT
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit on a process's memory")
def test_a_full_memory_is_one_line(tmp_path):
    """On a CPU torch has no exception of its own for it."""
    folder, flags = tmp_path / "run", "--num-prompts 1024 --num-generations 16 --eval-problems 8".split()
    process = subprocess.Popen(command("train", "--output-dir", folder, *flags), stderr=subprocess.PIPE, text=True)
    while not (folder / "config.json").exists():
        assert process.poll() is None
        time.sleep(0.001)
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
    room = pages * resource.getpagesize() + 200_000_000
    resource.prlimit(process.pid, resource.RLIMIT_AS, (room, room))
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert error.count("\n") == 1, error
    assert "the memory is full" in error
    assert "--micro-batch-tokens" in error


class Counting(torch.optim.SGD):
    """With moments of the kinds that bitsandbytes has: numbers, and a code book that all share."""

    def step(self, value=1):
        book = torch.arange(3) * value
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self.state[p] = {"step": value, "counts": torch.tensor([5, value]), "qmap1": book}


def odd(value):
    """One parameter does not lie in order, one is bfloat16, one frozen; the moments are like those of bitsandbytes."""
    turned, plain = torch.full((3, 2), value).cumsum(0).t(), torch.full((2,), value, dtype=torch.bfloat16)
    model = nn.ParameterDict({"turned": turned, "plain": plain})
    model["frozen"] = nn.Parameter(torch.full((2,), value), requires_grad=False)
    optimizer = Counting([model["turned"], model["plain"], nn.Parameter(torch.ones(1))])
    for p in model["turned"], model["plain"]:
        p.grad = torch.ones_like(p)
    optimizer.step(int(value))
    return model, optimizer


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_checkpoint_gives_back_what_it_was_given(device, tmp_path):
    with torch.device(device):
        model, optimizer = odd(7.0)
    path = save_checkpoint(tmp_path / "checkpoints", 12, model, optimizer, {"drift_coef": 0.25})
    checkpoint = load_checkpoint(tmp_path / "checkpoints", pytest.fail)
    assert checkpoint.path == path == tmp_path / "checkpoints" / "step-000012.safetensors"
    assert (checkpoint.step, checkpoint.extra) == (12, {"drift_coef": 0.25})
    with pytest.raises(FrozenInstanceError):
        checkpoint.step = 13
    assert not any(t.requires_grad for t in checkpoint.tensors.values())
    other, its_optimizer = odd(2.0)
    restore(checkpoint, other, its_optimizer)
    assert other["turned"].tolist() == model["turned"].tolist()
    assert other["plain"].tolist() == [7.0, 7.0]
    assert other["frozen"].tolist() == [2.0, 2.0]
    states = list(its_optimizer.state.values())
    assert len(states) == 2
    for state in states:
        assert (state["step"], state["counts"].tolist(), state["qmap1"].tolist()) == (7, [5, 7], [0, 7, 14])
        assert isinstance(state["step"], int)


CHANGES = {
    "nothing": lambda tensors, header: None,
    "the order of the header": lambda tensors, header: header.update(step=header.pop("step")),
    "the step": lambda tensors, header: header.update(step=13),
    "what the loop carries": lambda tensors, header: header["extra"].update(drift_coef=9.0),
    "a name": lambda tensors, header: tensors.update({"model.plain2": tensors.pop("model.plain")}),
    "a shape": lambda tensors, header: tensors.update({"model.plain": tensors["model.plain"][None]}),
    "a type": lambda tensors, header: tensors.update({"model.plain": tensors["model.plain"].view(torch.int16)}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_whose_file_was_written_again_is_whole_only_if_it_says_the_same(change, tmp_path):
    path = save_checkpoint(tmp_path, 12, *odd(7.0), {"drift_coef": 0.25})
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["minicpgd"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    CHANGES[change](tensors, header)
    save_file(tensors, path, metadata={"minicpgd": json.dumps(header)})
    warnings = []
    whole = load_checkpoint(tmp_path, warnings.append) is not None
    assert whole == (change in ("nothing", "the order of the header")) == (not warnings)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts open files in /proc")
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Its content is forced there before it is renamed, the new name after; a failure leaves what was there before."""
    path, forced, opened = tmp_path / "a.bin", [], len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "fsync", lambda file: forced.append((os.fstat(file).st_ino, path.exists())))
    write_atomically(path, lambda temporary: temporary.write_bytes(b"whole"))
    assert forced == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]
    assert len(os.listdir("/proc/self/fd")) == opened

    def half(temporary):
        assert temporary == tmp_path / "a.bin.tmp"  # what a power cut leaves behind is known by its name
        temporary.write_bytes(b"ha")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, half)
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    assert path.read_bytes() == b"whole"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit on file sizes")
def test_a_full_disk(small):
    """A file may not grow beyond 200 kB: the checkpoint cannot be written, one line says so, nothing is lost."""
    folder = train(small(max_steps=6, save_steps=1), listener=stop_at(2))
    before = {p: p.read_bytes() for p in (folder / "checkpoints").iterdir()}
    assert len(before) == 2
    done = run_cli(
        "train", "--resume", folder, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cannot be written" in done.stderr
    assert f"minicpgd train --resume {folder}" in done.stderr
    assert {p: p.read_bytes() for p in (folder / "checkpoints").iterdir()} == before
    assert run_cli("train", "--resume", folder).returncode == 0
    whole = train(small("whole", max_steps=6, save_steps=1))
    torch.testing.assert_close(load_run(folder).metrics, load_run(whole).metrics, equal_nan=True, rtol=0, atol=0)
    assert Path(folder, "model").is_dir()
