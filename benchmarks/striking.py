"""What `faults.py` strikes, and with what: a run left in peace, training processes, and the faults.

A fault is a function: it takes a `Child`, strikes it, and returns what undoes the harm once the process has ended. To
add one, write it and put it into `FAULTS`.
"""

import contextlib
import ctypes
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from minicpgd import TrainConfig
from minicpgd.trainer import Listener, train

LOGS = ("metrics.jsonl", "samples.jsonl", "passes.jsonl")
SMALL = TrainConfig(
    num_prompts=2, num_generations=4, num_minibatches=2, num_iterations=2, max_steps=24,
    eval_problems=8, eval_steps=5, save_steps=3, logging_steps=2,
)  # fmt: skip
OVERSIZED = replace(SMALL, num_prompts=64, num_generations=16, num_iterations=1, max_steps=6, save_steps=1)
"""Needs 700 MB more than it has when it starts."""
ROOM_MIB = 64


@dataclass(frozen=True)
class Peace:
    """What the undisturbed run left: its files, and each checkpoint that it ever wrote."""

    config: TrainConfig
    files: dict[str, bytes]
    checkpoints: dict[int, bytes]

    @classmethod
    def of(cls, config: TrainConfig, folder: Path) -> "Peace":
        """Make it."""
        checkpoints: dict[int, bytes] = {}

        def keep(step: int, *_: object) -> None:
            path = folder / "checkpoints" / f"step-{step:06d}.safetensors"
            checkpoints.update({step: path.read_bytes()} if path.exists() else {})

        # saved at every step: a signal saves where no checkpoint was due
        config = replace(config, output_dir=str(folder))
        train(replace(config, save_steps=1), listener=Listener(step=keep))
        return cls(
            config, {name: (folder / name).read_bytes() for name in (*LOGS, "model/model.safetensors")}, checkpoints
        )


@dataclass
class Child:
    """A training process, and what a fault has to know of it."""

    process: subprocess.Popen[str]
    folder: Path
    rng: random.Random


Undo = Callable[[], None]
Fault = Callable[[Child], Undo]


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a run."""
    return sorted((folder / "checkpoints").glob("step-*.safetensors"), reverse=True)


def steps_logged(folder: Path) -> int:
    """The last step in the log; -1 where there is none."""
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") - 1 if path.exists() else -1


def start(folder: Path, config: TrainConfig) -> subprocess.Popen[str]:
    """Begin the run, or go on with it."""
    if (folder / "config.json").exists():
        flags = ["--resume", str(folder)]
    else:
        changed = [f.name for f in fields(config) if getattr(config, f.name) != getattr(TrainConfig(), f.name)]
        asked = {name: str(getattr(config, name)) for name in changed} | {"output_dir": str(folder)}
        flags = [word for name, value in asked.items() for word in ("--" + name.replace("_", "-"), value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "500"}
    return subprocess.Popen(
        [sys.executable, "-m", "minicpgd", "train", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def intact(folder: Path, peace: Peace) -> list[int]:
    """The steps of the checkpoints that are the undisturbed run's, byte for byte, newest first."""
    found = []
    for path in newest_first(folder):
        step = int(path.stem.partition("-")[2])
        with contextlib.suppress(FileNotFoundError):  # replaced by a newer one just now
            found += [step] if path.read_bytes() == peace.checkpoints[step] else []
    return found


def kill(child: Child) -> Undo:
    """As a system does that needs the memory."""
    child.process.kill()
    return lambda: None


def send(*numbers: signal.Signals) -> Fault:
    """Signals, with up to a third of a second between them."""

    def strike(child: Child) -> Undo:
        for i, number in enumerate(numbers):
            time.sleep(child.rng.uniform(0, 0.3) if i else 0)
            child.process.send_signal(number)
        return lambda: None

    return strike


def fill_disk(child: Child) -> Undo:
    """All but the last few kilobytes, or nearly the size of a checkpoint."""
    room, left = child.folder.parent, child.rng.choice([0, 10_000, child.rng.randrange(2_000_000)])
    if not os.path.ismount(room):
        resource.prlimit(child.process.pid, resource.RLIMIT_FSIZE, (left, left))
        return lambda: None
    ballast = room / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(65536))
    os.truncate(ballast, max(0, ballast.stat().st_size - left))
    return ballast.unlink


def forbid(child: Child) -> Undo:
    """Nothing may be written any more, in the run's folder or beside it."""

    def allow(folders: int, files: int) -> None:
        for path in (child.folder.parent, *child.folder.parent.rglob("*")):
            with contextlib.suppress(FileNotFoundError):  # one of the child's temporary files
                path.chmod(folders if path.is_dir() else files)

    allow(0o555, 0o444)
    return lambda: allow(0o755, 0o644)


def damage(how: Callable[[bytearray, random.Random], bytes]) -> Fault:
    """Kill it, and do this to the newest checkpoint."""

    def strike(child: Child) -> Undo:
        kill(child)
        child.process.wait()
        for newest in newest_first(child.folder)[:1]:
            newest.write_bytes(how(bytearray(newest.read_bytes()), child.rng))
        return lambda: None

    return strike


def truncated(content: bytearray, rng: random.Random) -> bytes:
    """Its beginning."""
    return bytes(content[: rng.randrange(len(content))])


def flipped(content: bytearray, rng: random.Random) -> bytes:
    """With a bit turned over, or a hundred."""
    for _ in range(rng.choice([1, 1, 100])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def starve(child: Child) -> Undo:
    """Memory for a part of the batch, and no more."""
    pages = int(Path(f"/proc/{child.process.pid}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + child.rng.randrange(100_000_000)
    resource.prlimit(child.process.pid, resource.RLIMIT_AS, (limit, limit))
    return lambda: None


FAULTS: dict[str, Fault] = {
    "kill -9": kill,
    "SIGINT": send(signal.SIGINT),
    "SIGINT twice": send(signal.SIGINT, signal.SIGINT),
    "SIGTERM": send(signal.SIGTERM),
    "disk full": fill_disk,
    "folder read-only": forbid,
    "checkpoint truncated": damage(truncated),
    "checkpoint bits flipped": damage(flipped),
    "memory exhausted": starve,
}
CODES = {  # with which a process may end, beside 0; elsewhere 2. Negative: before minicpgd began, or after it had ended
    "kill -9": {-9},
    "checkpoint truncated": {-9},
    "checkpoint bits flipped": {-9},
    "SIGINT": {130, -2},
    "SIGINT twice": {130, -2},
    "SIGTERM": {143, -15},
}


def room_of(base: Path, name: str) -> Path:
    """A folder with little room on its disk."""
    (room := base / name).mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM_MIB}m", "tmpfs", room], check=False, capture_output=True)
    return room


def into_a_namespace() -> None:
    """Start again where a tmpfs may be mounted, and unseen by others, if this machine lets us."""
    if "MINICPGD_FAULTS" in os.environ:
        return
    os.environ["MINICPGD_FAULTS"] = "inside"
    unshare = ["unshare", "--map-root-user", "--mount"]
    try:
        mounts = subprocess.run([*unshare, "mount", "-t", "tmpfs", "tmpfs", tempfile.gettempdir()], capture_output=True)
        if mounts.returncode == 0:
            os.execvp("unshare", [*unshare, sys.executable, *sys.argv])
    except FileNotFoundError:
        pass
    print("no tmpfs may be mounted here: a limit on the size of files stands in for a full disk")


def heed_permissions() -> None:
    """Children are kept out of what is read-only, even where they are root."""
    ctypes.CDLL(None).prctl(24, 1)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
