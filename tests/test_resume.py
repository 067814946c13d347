"""A run that was interrupted, in whatever way, ends with the same files as one that was not."""

import errno
import functools
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
from programs import SECONDS, Program, minicpgd
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from minicpgd import UserError, evaluate, load_run, train
from minicpgd.cli.main import main
from minicpgd.files import write_atomically
from minicpgd.training import Callbacks, Learner
from minicpgd.training.checkpoint import load_checkpoint, restore, save_checkpoint
from minicpgd.training.export import export

FLAGS = (
    "--max-steps 12 --num-prompts 2 --num-generations 4 --num-minibatches 2 --num-iterations 2 --eval-steps 5 "
    "--eval-problems 8 --save-steps 3 --logging-steps 2"
).split()
KILLS = int(os.environ.get("MINICPGD_KILLS", "1"))


def command(*arguments):
    return [sys.executable, "-m", "minicpgd", *map(str, arguments)]


def resume(folder, **options):
    """Continue a run in another process, and return its exit code and its two outputs."""
    program = Program(folder.parent, functools.partial(minicpgd, **options), ["train", "--resume", folder])
    out, err = program.communicate()
    return program.poll(), out, err


WAITING_REWARD = """
import time
from pathlib import Path
from minicpgd.tasks.rewards import exact_answer

def reward(prompts, completions, **columns):
    log = Path({log!r})
    if (len(log.read_text().splitlines()) if log.exists() else 0) >= {lines}:
        Path({waits!r}).touch()
        while not Path({goes_on!r}).exists():
            time.sleep(0.01)
    return exact_answer(prompts=prompts, completions=completions, **columns)
"""


def await_file(file, process):
    while not file.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


@pytest.fixture
def start_training(tmp_path):
    """Return a function that starts a training, which waits in its reward function once `lines` lines are logged.

    So a test can act at one moment of the run, however slow the machine is. The training continues when the file
    `continue` exists.
    """

    programs = []

    def start_program(*flags, lines):
        log, waits = tmp_path / "run" / "metrics.jsonl", tmp_path / "waits"
        names = {"log": str(log), "waits": str(waits), "goes_on": str(tmp_path / "continue")}
        (tmp_path / "waiting.py").write_text(WAITING_REWARD.format(lines=lines, **names))
        words = ["train", "--output-dir", tmp_path / "run", "--reward", "waiting:reward", *flags]
        programs.append(Program(tmp_path, minicpgd, words, tmp_path))
        await_file(waits, programs[-1])
        return programs[-1]

    yield start_program
    for program in programs:
        program.kill()
        program.wait()


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
    """The files of a run that a new interpreter has made, as a user starts it."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    words = command("train", "--output-dir", folder, *FLAGS)
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return results(folder)


def count_lines(path):
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.parametrize("attempt", range(KILLS))
def test_kill_9_at_a_random_moment(attempt, undisturbed, tmp_path):
    """The moments are random lines of the log, and a random time after them. MINICPGD_KILLS=30 tries more of them."""
    rng, folder, kills = random.Random(time.time_ns() + attempt), tmp_path / "run", 0
    log = folder / "metrics.jsonl"
    while not (folder / "model" / "model.safetensors").exists() and kills < 2:
        words = ["--resume", folder] if (folder / "config.json").exists() else ["--output-dir", folder, *FLAGS]
        process = Program(tmp_path, minicpgd, ["train", *words])
        lines = rng.randint(min(count_lines(log), 11), 12)
        while count_lines(log) < lines and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        kills += process.poll() is None
        process.kill()
        process.wait()
    code, _, err = resume(folder)
    assert code == 0, err
    assert results(folder) == undisturbed
    steps = load_run(folder).metrics["step"].tolist()
    assert steps == list(range(13))
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_prints_how_to_continue(number, undisturbed, start_training, tmp_path):
    folder, process = tmp_path / "run", start_training(*FLAGS, lines=3)
    process.send_signal(number)
    (tmp_path / "continue").touch()
    out, err = process.communicate()
    assert process.poll() == 128 + number, err
    assert f"minicpgd train --resume {folder}" in out
    assert "Traceback" not in err
    assert load_run(folder).metrics["step"].tolist() == [0, 1, 2, 3]
    assert (folder / "checkpoints" / "step-000003.safetensors").exists()
    code, _, err = resume(folder, modules=tmp_path)
    assert code == 0, err
    assert results(folder) == undisturbed


def test_a_second_signal_stops_at_once(start_training, tmp_path):
    process = start_training(*FLAGS, lines=3)
    process.send_signal(signal.SIGINT)
    while "press Ctrl-C again to stop at once" not in process.out.read_text():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()  # The reward function still waits.
    assert (process.poll(), err) == (130, "minicpgd: stopped. Finished work is kept\n")
    assert load_run(tmp_path / "run").metrics["step"].tolist() == [0, 1, 2]


def stop_at(step):
    """Return callbacks that end a run after this step."""
    steps = []
    return Callbacks(
        on_step=lambda step, *_: steps.append(step), should_stop=lambda: bool(steps) and steps[-1] >= step - 1
    )


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(damage, small):
    whole = train(small("whole", max_steps=6, save_steps=1))
    folder = train(small(max_steps=6, save_steps=1), callbacks=stop_at(4))
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content[:-100] if damage == "truncate" else content)
    warnings = []
    train(small(max_steps=6, save_steps=1), resume=True, callbacks=Callbacks(on_warning=warnings.append))
    assert len(warnings) == 1
    assert str(newest) in warnings[0]
    assert "\n" not in warnings[0]
    assert damage != "flip" or "damaged (its content does not match its digest)" in warnings[0]
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_a_run_without_an_intact_checkpoint_begins_again(small):
    folder = train(small(max_steps=4, save_steps=1), callbacks=stop_at(3))
    whole = (folder / "metrics.jsonl").read_bytes()
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(b"nonsense")
    warnings = []
    train(small(max_steps=4, save_steps=1), resume=True, callbacks=Callbacks(on_warning=warnings.append))
    assert len(warnings) == 3
    assert "the run begins again, from step 0" in warnings[2]
    assert (folder / "metrics.jsonl").read_bytes().startswith(whole)


def test_a_half_written_last_line_is_written_again(small):
    folder = train(small(max_steps=4, save_steps=2), callbacks=stop_at(2))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    train(small(max_steps=4, save_steps=2), resume=True)
    assert load_run(folder).metrics["step"].tolist() == [0, 1, 2, 3, 4]


def test_a_missing_line_of_the_log_is_a_warning(small):
    folder = train(small(max_steps=4, save_steps=2), callbacks=stop_at(3))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:1] + lines[3:]))
    warnings = []
    train(small(max_steps=4, save_steps=2), resume=True, callbacks=Callbacks(on_warning=warnings.append))
    assert len(warnings) == 1
    assert "metrics.jsonl: lines are missing: 2; the first is that of step 1" in warnings[0]
    assert load_run(folder).metrics["step"].tolist() == [0, 3, 4]


def test_a_damaged_checkpoint_does_not_stay(small):
    """Otherwise it would be one of the two newest, and an intact one would be removed."""
    folder = train(small(max_steps=9, save_steps=4), callbacks=stop_at(5))
    checkpoints = folder / "checkpoints"
    (checkpoints / "step-000005.safetensors").write_bytes(b"nonsense")
    steps = []
    callbacks = Callbacks(on_resume=steps.append, should_stop=lambda: True)
    train(small(max_steps=9, save_steps=4), resume=True, callbacks=callbacks)
    assert steps == [4]
    (checkpoints / "step-000005.safetensors").write_bytes(b"nonsense")
    train(small(max_steps=9, save_steps=4), resume=True, callbacks=stop_at(8))
    assert sorted(p.name[5:11] for p in checkpoints.iterdir()) == ["000004", "000008"]


def test_a_checkpoint_that_memory_cannot_hold_is_not_damaged(tmp_path, monkeypatch):
    """If it counted as damaged, it would be removed."""
    save_checkpoint(tmp_path, 12, *odd(7.0), {"drift_coef": 0.25})

    def full(*_):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr("minicpgd.training.checkpoint.safe_open", full)
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


def test_a_stopped_run_is_evaluated_at_its_newest_checkpoint_and_may_be_ended_there(small):
    whole = train(small("whole", max_steps=4, eval_steps=1, save_steps=2))
    folder = train(small(max_steps=6, eval_steps=1, save_steps=2), callbacks=stop_at(4))
    assert not (folder / "model").exists()
    assert evaluate(folder, num_problems=16) == evaluate(whole, num_problems=16)
    train(small(max_steps=4, eval_steps=1, save_steps=2), resume=True)
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_the_adapter_of_a_stopped_run_can_be_exported(small, tmp_path):
    settings = {"lora_r": 4, "learning_rate": 1e-2, "save_steps": 1}
    folder = train(small(max_steps=6, **settings), callbacks=stop_at(2))
    before = sorted(folder.rglob("*"))
    report = export(folder, tmp_path / "exported", num_problems=16)
    assert report.same_answers == 1
    assert report.rounding < 1e-3
    assert sorted(folder.rglob("*")) == before
    assert evaluate(tmp_path / "exported", num_problems=16)["accuracy"] == report.accuracy_trained


def test_a_longer_run_that_is_stopped_says_that_it_was_stopped(small, monkeypatch, capsys):
    """Its folder model/ exists since the first time, but the run is not done."""
    folder = train(small(max_steps=2))

    def interrupt_at_once(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        return train(*arguments, **options)

    monkeypatch.setattr("minicpgd.training.train", interrupt_at_once)
    monkeypatch.setattr(sys, "path", [*sys.path])  # The program adds the current folder.
    monkeypatch.setattr(sys, "argv", ["minicpgd", "train", "--resume", str(folder), "--max-steps", "9"])
    with pytest.raises(SystemExit) as leaving:
        main()
    assert leaving.value.code == 128 + signal.SIGINT
    assert "stopped and saved" in capsys.readouterr().out
    assert load_run(folder).metrics["step"][-1] == 3


def test_a_resume_with_other_settings_names_them(small):
    train(small())
    with pytest.raises(UserError, match=r"seed was 0, is 3; learning_rate was 0.0001, is 0.5"):
        train(small(learning_rate=0.5, seed=3), resume=True)
    with pytest.raises(UserError, match=r"with max_steps = 2: step 3 is made already"):
        train(small(max_steps=2), resume=True)


def test_a_resumed_run_repeats_its_dropout(small, tmp_path, policy):
    """Dropout alone draws from torch's global generator."""
    policy.model.config.attention_dropout = 0.3
    policy.save(tmp_path / "model")
    changes = {"model": str(tmp_path / "model"), "disable_dropout": False, "max_steps": 4, "save_steps": 1}
    whole = train(small("whole", **changes))
    folder = train(small(**changes), callbacks=stop_at(2))
    train(small(**changes), resume=True)
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    without = train(small("without", **(changes | {"disable_dropout": True})))
    assert (without / "metrics.jsonl").read_bytes() != (whole / "metrics.jsonl").read_bytes()


def test_a_checkpoint_holds_all_that_a_step_needs(small):
    """It has weights, moments, and the newest drift coefficient."""
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


@pytest.mark.parametrize("flags", [[], ["--algorithm", "grpo"]], ids=["in the command", "in the check of settings"])
def test_ctrl_c_while_torch_is_imported_prints_nothing(flags, tmp_path):
    """A module of that name takes torch's place. Its import lasts until the process ends."""
    started = tmp_path / "started"
    (tmp_path / "torch.py").write_text(
        f"import pathlib, time\npathlib.Path({str(started)!r}).touch()\nwhile True:\n    time.sleep(0.01)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    words = command("train", "--output-dir", tmp_path / "run", *flags)
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            await_file(started, process)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=SECONDS)[1] == ""
        finally:
            process.kill()
    assert process.returncode == -signal.SIGINT
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit on a process's memory")
def test_a_full_memory_is_one_line(start_training, tmp_path):
    """On a CPU torch has no exception of its own for it. The process gets 200 MB more than it has in step 0."""
    flags = "--num-prompts 1024 --num-generations 16 --eval-problems 8".split()
    process = start_training(*flags, lines=0)
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 200_000_000
    resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))
    (tmp_path / "continue").touch()
    _, error = process.communicate()
    assert process.poll() == 2
    assert error.count("\n") == 1, error
    assert "the memory is full" in error
    assert "--micro-batch-tokens" in error


class Counting(torch.optim.SGD):
    """An optimizer with the kinds of moments that bitsandbytes has: numbers, and a code book that all share."""

    def step(self, value=1):
        book = torch.arange(3) * value
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self.state[p] = {"step": value, "counts": torch.tensor([5, value]), "qmap1": book}


def odd(value):
    """Return a model with a transposed, a bfloat16 and a frozen parameter, and moments like those of bitsandbytes."""
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
    "the extra values": lambda tensors, header: header["extra"].update(drift_coef=9.0),
    "a name": lambda tensors, header: tensors.update({"model.plain2": tensors.pop("model.plain")}),
    "a shape": lambda tensors, header: tensors.update({"model.plain": tensors["model.plain"][None]}),
    "a type": lambda tensors, header: tensors.update({"model.plain": tensors["model.plain"].view(torch.int16)}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_whose_file_was_written_again_is_whole_only_if_it_says_the_same(change, tmp_path):
    """Its digest covers the header and the names, shapes, dtypes and numbers of all tensors."""
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
    """Its content is forced there before the rename, the new name after it. A failure leaves the old file."""
    path, forced, opened = tmp_path / "a.bin", [], len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "fsync", lambda file: forced.append((os.fstat(file).st_ino, path.exists())))
    write_atomically(path, lambda temporary: temporary.write_bytes(b"whole"))
    assert forced == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]
    assert len(os.listdir("/proc/self/fd")) == opened

    def half(temporary):
        assert temporary == tmp_path / "a.bin.tmp"  # So a file that a power cut leaves is known by its name.
        temporary.write_bytes(b"ha")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, half)
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    assert path.read_bytes() == b"whole"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit on file sizes")
def test_a_full_disk(small):
    """No file may grow beyond 200 kB, so a checkpoint cannot be written. One line says so, and nothing is lost."""
    folder = train(small(max_steps=6, save_steps=1), callbacks=stop_at(2))
    before = {p: p.read_bytes() for p in (folder / "checkpoints").iterdir()}
    assert len(before) == 2
    code, _, err = resume(folder, largest_file=200_000)
    assert code == 2
    assert err.count("\n") == 1
    assert "cannot be written" in err
    assert f"minicpgd train --resume {folder}" in err
    assert {p: p.read_bytes() for p in (folder / "checkpoints").iterdir()} == before
    assert resume(folder)[0] == 0
    whole = train(small("whole", max_steps=6, save_steps=1))
    torch.testing.assert_close(load_run(folder).metrics, load_run(whole).metrics, equal_nan=True, rtol=0, atol=0)
    assert Path(folder, "model").is_dir()
