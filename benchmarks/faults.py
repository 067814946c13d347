"""Faults: what does a run make of what computers do to it?

    python benchmarks/faults.py                        # 40 faults, minutes; nothing is written
    python benchmarks/faults.py --count 200 --write    # writes benchmarks/results/faults.csv

A run is started in a process of its own, and at a random moment a fault strikes it. What it leaves is compared with a
run that was left in peace; it is resumed, struck again, resumed, and so to its end, where every file has to be the same,
byte for byte. A quarter of all faults strike while the process is still starting or reading its checkpoint.

A fault counts as survived if the process ended by itself in time; said so in one line, without a traceback; left logs
that begin like the undisturbed run's, and a newest intact checkpoint that is the undisturbed run's of that step; lost no
step that had been saved; and went on from that very checkpoint. Exit code 1 if one did not.

Runs live in a small tmpfs, so that the disk can be full in earnest. Where none may be mounted, a limit on the size of
files stands in, and a line says so. Needs Linux.
"""

import contextlib
import ctypes
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import pandas as pd
import torch
import tyro

from minicpgd import TrainConfig
from minicpgd.checkpoint import Checkpoint, load_checkpoint
from minicpgd.policy import quiet
from minicpgd.progress import Bars, console
from minicpgd.trainer import Listener, train

RESULTS = Path(os.environ.get("FAULTS_OUT", Path(__file__).parent / "results" / "faults.csv"))
ROOM_MIB = 64
TIME_LIMIT = 120  # seconds that a struck process has to end in
LOGS = ("metrics.jsonl", "samples.jsonl", "passes.jsonl")
SMALL = TrainConfig(
    num_prompts=2, num_generations=4, num_minibatches=2, num_iterations=2, max_steps=24,
    eval_problems=8, eval_steps=5, save_steps=3, logging_steps=2,
)  # fmt: skip
OVERSIZED = replace(SMALL, num_prompts=64, num_generations=16, num_iterations=1, max_steps=6, save_steps=1)
"""Needs 700 MB more than it has when it starts."""


@dataclass(frozen=True)
class Peace:
    """What the undisturbed run left: its files, and each checkpoint that it ever wrote."""

    config: TrainConfig
    files: dict[str, bytes]
    checkpoints: dict[int, bytes]

    @classmethod
    def of(cls, config: TrainConfig, folder: Path) -> "Peace":
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
class Case:
    """A fault and what came of it; a row of the table."""

    fault: str
    struck: int  # the last step in the log when it struck; -1 while there was none
    saved: int  # the step of the newest intact checkpoint then (if the fault damaged that one: of the one before)
    resumed: int = -1  # the step of the checkpoint that the next process went on from
    code: int = 0
    seconds: float = 0.0  # from the fault to the end of the process
    lost: int = 0  # steps that had been saved, and had to be made again
    wrong: str = ""  # what differs from the undisturbed run
    shown: str = ""  # what a user should not have seen


@dataclass
class Child:
    """A training process, and what a fault has to know of it."""

    process: subprocess.Popen[str]
    folder: Path
    rng: random.Random


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a run."""
    return sorted((folder / "checkpoints").glob("step-*.safetensors"), reverse=True)


# Each fault strikes a child, and returns what undoes it.


def kill(child: Child) -> Callable[[], None]:
    child.process.kill()
    return lambda: None


def send(*numbers: signal.Signals) -> Callable[[Child], Callable[[], None]]:
    def strike(child: Child) -> Callable[[], None]:
        for i, number in enumerate(numbers):
            time.sleep(child.rng.uniform(0, 0.3) if i else 0)
            child.process.send_signal(number)
        return lambda: None

    return strike


def fill_disk(child: Child) -> Callable[[], None]:
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


def forbid(child: Child) -> Callable[[], None]:
    """Nothing may be written any more, in the run's folder or beside it."""

    def allow(folders: int, files: int) -> None:
        for path in (child.folder.parent, *child.folder.parent.rglob("*")):
            with contextlib.suppress(FileNotFoundError):  # one of the child's temporary files
                path.chmod(folders if path.is_dir() else files)

    allow(0o555, 0o444)
    return lambda: allow(0o755, 0o644)


def damage(how: Callable[[bytearray, random.Random], bytes]) -> Callable[[Child], Callable[[], None]]:
    def strike(child: Child) -> Callable[[], None]:
        kill(child)
        child.process.wait()
        for newest in newest_first(child.folder)[:1]:
            newest.write_bytes(how(bytearray(newest.read_bytes()), child.rng))
        return lambda: None

    return strike


def truncated(content: bytearray, rng: random.Random) -> bytes:
    return bytes(content[: rng.randrange(len(content))])


def flipped(content: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice([1, 1, 100])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def starve(child: Child) -> Callable[[], None]:
    """Memory for a part of the batch, and no more."""
    pages = int(Path(f"/proc/{child.process.pid}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + child.rng.randrange(300_000_000)
    resource.prlimit(child.process.pid, resource.RLIMIT_AS, (limit, limit))
    return lambda: None


FAULTS: dict[str, Callable[[Child], Callable[[], None]]] = {
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
CODES = {
    "kill -9": {-9},
    "checkpoint truncated": {-9},
    "checkpoint bits flipped": {-9},
    "SIGINT": {130, -2},  # negative: before minicpgd began, or after it had ended
    "SIGINT twice": {130, -2},
    "SIGTERM": {143, -15},
}


def steps_logged(folder: Path) -> int:
    """The last step in the log; -1 where there is none."""
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") - 1 if path.exists() else -1


def start(folder: Path, config: TrainConfig) -> subprocess.Popen[str]:
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


def wait_for_the_moment(child: Child, fault: str) -> None:
    """A random one: of its start, or within one of its next eight steps."""
    if fault != "memory exhausted" and child.rng.random() < 0.25:
        deadline = time.monotonic() + child.rng.uniform(0, 6)
        while time.monotonic() < deadline and child.process.poll() is None:
            time.sleep(0.01)
        return
    before, wanted = steps_logged(child.folder), child.rng.randint(1, 8)
    seen = before
    while seen < before + wanted and child.process.poll() is None:
        time.sleep(0.01)
        now = steps_logged(child.folder)
        before, seen = min(before, now), now  # a resume drops what was not saved
    time.sleep(child.rng.uniform(0, 0.3))


def intact(folder: Path, peace: Peace) -> list[int]:
    """The steps of the checkpoints that are the undisturbed run's, byte for byte, newest first."""
    found = []
    for path in newest_first(folder):
        step = int(path.stem.partition("-")[2])
        with contextlib.suppress(FileNotFoundError):  # replaced by a newer one just now
            found += [step] if path.read_bytes() == peace.checkpoints[step] else []
    return found


def strike(fault: str, child: Child, peace: Peace) -> tuple[Case, str]:
    """One fault, from the moment it strikes to the end of the process: what came of it, and what was said until then."""
    saved = intact(child.folder, peace)
    if fault.startswith("checkpoint") and saved and newest_first(child.folder)[0].stem.endswith(f"{saved[0]:06d}"):
        del saved[0]
    case, struck = Case(fault, steps_logged(child.folder), saved[0] if saved else -1), time.monotonic()
    undo = FAULTS[fault](child)
    try:
        out, err = child.process.communicate(timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        child.process.kill()
        out, err = child.process.communicate()
        case.shown = f"did not end within {TIME_LIMIT} seconds"
    undo()
    case.code, case.seconds = child.process.returncode, round(time.monotonic() - struck, 2)
    case.shown = case.shown or unwanted(case, out, err)
    found = load_checkpoint(child.folder / "checkpoints", lambda line: None)
    case.resumed = found.step if found else -1
    case.lost = max(0, case.saved - case.resumed)
    case.wrong = differing(child.folder, peace, found)
    return case, out


def unwanted(case: Case, out: str, err: str) -> str:
    """What a user should not have seen: a traceback, more than a line, another exit code, no word of how to go on."""
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    told = case.code == 2 or (case.code == 130 and "stopped and saved" not in out)
    fine = (
        case.code in CODES.get(case.fault, {2}) | {0}
        and "Traceback" not in out + err
        and len(lines) == told
        and (case.code != 2 or case.struck < 0 or "--resume" in err or "kept" in err)
    )
    return "" if fine else f"exit code {case.code}, stderr {err!r}"


def differing(folder: Path, peace: Peace, found: Checkpoint | None) -> str:
    """What is not the undisturbed run's: a log that begins otherwise, or the checkpoint that would be gone on from."""
    for name in LOGS:
        content = (folder / name).read_bytes() if (folder / name).exists() else b""
        if not peace.files[name].startswith(content[: content.rfind(b"\n") + 1]):
            return name
    return found.path.name if found and found.path.read_bytes() != peace.checkpoints[found.step] else ""


def differing_at_the_end(folder: Path, peace: Peace) -> str:
    """Every file that a finished run leaves, and nothing half-written beside it."""
    end = peace.config.max_steps
    files = peace.files | {f"checkpoints/step-{end:06d}.safetensors": peace.checkpoints[end]}
    wrong = [name for name, content in files.items() if (folder / name).read_bytes() != content]
    return ", ".join(wrong + [f"{path.name} left behind" for path in folder.rglob("*.tmp")])


@dataclass
class Victim:
    """A run that is struck again and again. When it has ended it is compared, and another begins in its place."""

    room: Path
    peace: Peace
    rng: random.Random
    last: Case | None = None  # the fault that the next process has to recover from

    @property
    def folder(self) -> Path:
        return self.room / "run"

    def suffer(self, fault: str) -> Case:
        """Go on, be struck, and be compared with the undisturbed run."""
        while True:
            child = Child(start(self.folder, self.peace.config), self.folder, self.rng)
            wait_for_the_moment(child, fault)
            if child.process.poll() is None:
                case, out = strike(fault, child, self.peace)
                self._resumed_well(out)
                self.last = case
                return case
            self._ended(child)

    def finish(self) -> None:
        """Go on in peace, to the end."""
        if self.last:
            self._ended(Child(start(self.folder, self.peace.config), self.folder, self.rng))

    def _resumed_well(self, out: str) -> None:
        """Of a process that was to recover from the last fault, and may have been struck before it could."""
        said = re.search(r"going on after step (\d+)", out)
        if self.last and said and int(said[1]) != self.last.resumed:
            self.last.wrong += f" went on after step {said[1]}, not {self.last.resumed}"

    def _ended(self, child: Child) -> None:
        out, err = child.process.communicate(timeout=TIME_LIMIT)
        assert self.last or child.process.returncode == 0, err
        if self.last:
            self._resumed_well(out)
            self.last.wrong += differing_at_the_end(self.folder, self.peace) if child.process.returncode == 0 else err
        shutil.rmtree(self.folder)
        self.last = None


def room_of(base: Path, name: str) -> Path:
    """A folder with little room on its disk."""
    (room := base / name).mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM_MIB}m", "tmpfs", room], check=False, capture_output=True)
    return room


def main(count: int = 40, jobs: int = 2, seed: int | None = None, write: bool = False) -> None:
    """Strike runs with faults.

    Args:
        count: faults in all, of all kinds in turn.
        jobs: runs at a time.
        seed: decides the moments, as far as a clock can be decided; by default another one each time.
        write: keep the table in benchmarks/results/.
    """
    quiet()
    torch.set_num_threads(1)
    seed = random.randrange(10**6) if seed is None else seed
    order = [kind for _ in range(count) for kind in FAULTS][:count]
    random.Random(seed).shuffle(order)
    cases: list[Case] = []
    with tempfile.TemporaryDirectory(prefix="minicpgd-faults-") as name, Bars(["faults"], count) as bars:
        base = Path(name)
        peace = {size: Peace.of(config, base / size) for size, config in (("small", SMALL), ("large", OVERSIZED))}

        def work(job: int) -> None:
            rng = random.Random(f"{seed} {job}")
            victims = {size: Victim(room_of(base, f"{size}{job}"), peace[size], rng) for size in peace}
            with contextlib.suppress(IndexError):
                while True:
                    fault = order.pop()
                    cases.append(victims["large" if fault == "memory exhausted" else "small"].suffer(fault))
                    bars.update(0, len(cases), f"{sum(map(failed, cases))} not survived")
            for victim in victims.values():
                victim.finish()

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(work, range(jobs)))
        for room in base.iterdir():
            subprocess.run(["umount", room], check=False, capture_output=True)
    table = pd.DataFrame(map(asdict, cases)).sort_values("fault")
    report(table, seed)
    if write:
        table.to_csv(RESULTS, index=False)
        console.print(f"table   {RESULTS}")
    sys.exit(1 if any(map(failed, cases)) else 0)


def failed(case: Case) -> bool:
    return bool(case.lost or case.wrong or case.shown)


def report(table: pd.DataFrame, seed: int) -> None:
    """One line per kind of fault, then one for each case that was not survived."""
    for fault, rows in table.groupby("fault"):
        console.print(
            f"{fault:24}{len(rows):4} times, {(rows.lost > 0).sum()} lost steps, {(rows.wrong != '').sum()} wrong resumes, "
            f"{(rows.shown != '').sum()} told badly; ended after {rows.seconds.median():.1f} s, at most {rows.seconds.max():.1f} s"
        )
    for row in table.itertuples():
        if row.lost or row.wrong or row.shown:
            console.print(f"NOT SURVIVED (seed {seed}): {row}", markup=False)


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


if __name__ == "__main__":
    into_a_namespace()
    ctypes.CDLL(None).prctl(24, 1)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE: even root's children heed a read-only folder
    tyro.cli(main)
