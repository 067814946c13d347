"""Everything that `faults.py` needs to disturb a run: the undisturbed run, the training processes and the faults.

A fault is a function. It takes a `Child`, disturbs it, and returns a function that undoes the harm after the process
has ended. To add a fault, write such a function and add it to `FAULTS`.
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
from minicpgd.training.loop import Callbacks, train

LOGS = ("metrics.jsonl", "samples.jsonl", "passes.jsonl")
SMALL = TrainConfig(
    num_prompts=2, num_generations=4, num_minibatches=2, num_iterations=2, max_steps=24,
    eval_problems=8, eval_steps=5, save_steps=3, logging_steps=2,
)  # fmt: skip
OVERSIZED = replace(SMALL, num_prompts=64, num_generations=16, num_iterations=1, max_steps=6, save_steps=1)
"""A step of this run needs 700 MB more than the process has when it starts."""
DISK_MIB = 64


@dataclass(frozen=True)
class Undisturbed:
    """The files of a run that no fault has disturbed, and the checkpoint of each of its steps."""

    config: TrainConfig
    files: dict[str, bytes]
    checkpoints: dict[int, bytes]

    @classmethod
    def run(cls, config: TrainConfig, folder: Path) -> "Undisturbed":
        """Train in this process and read the files."""
        checkpoints: dict[int, bytes] = {}

        def keep(step: int, *_: object) -> None:
            path = folder / "checkpoints" / f"step-{step:06d}.safetensors"
            checkpoints.update({step: path.read_bytes()} if path.exists() else {})

        # This run saves every step, because a signal makes a disturbed run save at any step.
        config = replace(config, output_dir=str(folder))
        train(replace(config, save_steps=1), callbacks=Callbacks(on_step=keep))
        files = {name: (folder / name).read_bytes() for name in (*LOGS, "model/model.safetensors")}
        return cls(config, files, checkpoints)


@dataclass
class Child:
    """A training process, with its run folder and the source of a fault's random choices."""

    process: subprocess.Popen[str]
    folder: Path
    rng: random.Random


Undo = Callable[[], None]
Fault = Callable[[Child], Undo]


def newest_first(folder: Path) -> list[Path]:
    """List the checkpoints of a run."""
    return sorted((folder / "checkpoints").glob("step-*.safetensors"), reverse=True)


def last_logged_step(folder: Path) -> int:
    """Return the last step in the log, or -1 if there is none."""
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") - 1 if path.exists() else -1


def start(folder: Path, config: TrainConfig) -> subprocess.Popen[str]:
    """Start the run in a process of its own, or resume it if its folder exists."""
    if (folder / "config.json").exists():
        flags = ["--resume", str(folder)]
    else:
        changed = [f.name for f in fields(config) if getattr(config, f.name) != getattr(TrainConfig(), f.name)]
        values = {name: str(getattr(config, name)) for name in changed} | {"output_dir": str(folder)}
        flags = [word for name, value in values.items() for word in ("--" + name.replace("_", "-"), value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "500"}
    return subprocess.Popen(
        [sys.executable, "-m", "minicpgd", "train", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def intact_steps(folder: Path, undisturbed: Undisturbed) -> list[int]:
    """Return the steps of the checkpoints that equal the undisturbed run's byte for byte, newest first."""
    steps = []
    for path in newest_first(folder):
        step = int(path.stem.partition("-")[2])
        with contextlib.suppress(FileNotFoundError):  # The process may replace a checkpoint at this moment.
            steps += [step] if path.read_bytes() == undisturbed.checkpoints[step] else []
    return steps


def kill(child: Child) -> Undo:
    """Kill the process, as an operating system does when it needs the memory."""
    child.process.kill()
    return lambda: None


def send(*signals: signal.Signals) -> Fault:
    """Make a fault that sends these signals, at most 0.3 seconds apart."""

    def fault(child: Child) -> Undo:
        for i, number in enumerate(signals):
            time.sleep(child.rng.uniform(0, 0.3) if i else 0)
            child.process.send_signal(number)
        return lambda: None

    return fault


def fill_disk(child: Child) -> Undo:
    """Fill the disk up to a random rest: nothing, 10 kB, or any size below that of a checkpoint."""
    disk, rest = child.folder.parent, child.rng.choice([0, 10_000, child.rng.randrange(2_000_000)])
    if not os.path.ismount(disk):
        resource.prlimit(child.process.pid, resource.RLIMIT_FSIZE, (rest, rest))
        return lambda: None
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(65536))
    os.truncate(ballast, max(0, ballast.stat().st_size - rest))
    return ballast.unlink


def make_read_only(child: Child) -> Undo:
    """Remove the permission to write in the run's folder and in its parent folder."""

    def set_modes(folder_mode: int, file_mode: int) -> None:
        for path in (child.folder.parent, *child.folder.parent.rglob("*")):
            with contextlib.suppress(FileNotFoundError):  # The process may remove a temporary file at this moment.
                path.chmod(folder_mode if path.is_dir() else file_mode)

    set_modes(0o555, 0o444)
    return lambda: set_modes(0o755, 0o644)


def damage(change: Callable[[bytearray, random.Random], bytes]) -> Fault:
    """Make a fault that kills the process and changes the content of the newest checkpoint."""

    def fault(child: Child) -> Undo:
        kill(child)
        child.process.wait()
        for newest in newest_first(child.folder)[:1]:
            newest.write_bytes(change(bytearray(newest.read_bytes()), child.rng))
        return lambda: None

    return fault


def truncate(content: bytearray, rng: random.Random) -> bytes:
    """Keep a random number of bytes at the beginning."""
    return bytes(content[: rng.randrange(len(content))])


def flip_bits(content: bytearray, rng: random.Random) -> bytes:
    """Flip one bit or a hundred bits."""
    for _ in range(rng.choice([1, 1, 100])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def limit_memory(child: Child) -> Undo:
    """Allow the process at most 100 MB more memory, which is less than one batch needs."""
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
    "folder read-only": make_read_only,
    "checkpoint truncated": damage(truncate),
    "checkpoint bits flipped": damage(flip_bits),
    "memory exhausted": limit_memory,
}
EXIT_CODES = {
    "kill -9": {-9},
    "checkpoint truncated": {-9},
    "checkpoint bits flipped": {-9},
    "SIGINT": {130, -2},
    "SIGINT twice": {130, -2},
    "SIGTERM": {143, -15},
}
"""The exit codes that are correct beside 0. The other faults allow 2.

A code is negative if the signal ends the process before minicpgd has started or after it has ended.
"""


def make_disk(base: Path, name: str) -> Path:
    """Make a folder on a small disk of its own, if this machine allows a mount."""
    (disk := base / name).mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", disk], check=False, capture_output=True)
    return disk


def enter_mount_namespace() -> None:
    """Restart this script in a namespace that allows it to mount a tmpfs, if the machine has such namespaces."""
    if "MINICPGD_FAULTS" in os.environ:
        return
    os.environ["MINICPGD_FAULTS"] = "inside"
    unshare = ["unshare", "--map-root-user", "--mount"]
    try:
        mount = subprocess.run([*unshare, "mount", "-t", "tmpfs", "tmpfs", tempfile.gettempdir()], capture_output=True)
        if mount.returncode == 0:
            os.execvp("unshare", [*unshare, sys.executable, *sys.argv])
    except FileNotFoundError:
        pass
    print("This machine does not allow a tmpfs, so a limit on the size of files replaces the full disk.")


def obey_permissions() -> None:
    """Remove the capability by which a root process writes to read-only files. Child processes inherit this."""
    ctypes.CDLL(None).prctl(24, 1)  # The arguments are PR_CAPBSET_DROP and CAP_DAC_OVERRIDE.
