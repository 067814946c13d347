"""Does a run survive kills, signals, a full disk, damaged checkpoints and too little memory?

    python benchmarks/faults.py                        # 40 faults, some minutes; writes nothing
    python benchmarks/faults.py --count 200 --write    # writes benchmarks/results/faults.csv

The script starts a run in a process of its own and injects a fault at a random moment. It compares the files of the
run with those of an undisturbed run, resumes the run, and injects the next fault. At the end of the run, every file
must equal the undisturbed run's byte for byte. One fault in four comes in the first six seconds of a process, while the
process imports torch, makes the run's folder, or reads its checkpoint.

A run has survived a fault if all of these hold:

- The process ended by itself in time. It printed one line about the fault and no traceback.
- The logs begin like those of the undisturbed run.
- The newest intact checkpoint equals the undisturbed run's checkpoint of that step. No saved step was lost.
- The next process resumed from that checkpoint.

The exit code is 1 if a run did not survive. Each run lives in a small tmpfs, so that its disk can really become full.
If the machine allows no tmpfs, the script limits the size of files instead, and prints a line that says so. The script
needs Linux.
"""

import contextlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from fault_injection import (
    EXIT_CODES,
    FAULTS,
    LOGS,
    OVERSIZED,
    SMALL,
    Child,
    Undisturbed,
    Undo,
    enter_mount_namespace,
    intact_steps,
    last_logged_step,
    make_disk,
    newest_first,
    obey_permissions,
    start,
)
from matplotlib.figure import Figure
from rich.table import Table

from minicpgd.cli.progress import Bars, console
from minicpgd.models.policy import quiet
from minicpgd.plots.style import COLOURS, styled
from minicpgd.training.checkpoint import Checkpoint, load_checkpoint

RESULTS = Path(__file__).parent / "results" / "faults.csv"
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "reliability" / "faults.png"
RESUMED = re.compile(r"continuing after step (\d+)")  # cli/train.py prints this.
TIME_LIMIT = 120
"""A process must end within this many seconds after a fault."""


@dataclass
class Case:
    """A fault and its result; a row of the table."""

    fault: str
    struck: int  # the last logged step at the moment of the fault; -1 if there was none
    saved: int  # the step of the newest intact checkpoint, which the fault did not damage
    resumed: int = -1  # the step of the checkpoint from which the next process resumes
    code: int = 0
    seconds: float = 0.0  # from the fault to the end of the process
    lost: int = 0  # saved steps that the next process must repeat
    wrong: str = ""  # the differences from the undisturbed run
    shown: str = ""  # output that a user should not see

    @property
    def survived(self) -> bool:
        """Whether nothing was lost, nothing is wrong, and the user saw no bad output."""
        return not (self.lost or self.wrong or self.shown)


def wait_for_random_moment(child: Child, fault: str) -> None:
    """Wait up to six seconds (one time in four), or for one of the next eight steps."""
    if fault != "memory exhausted" and child.rng.random() < 0.25:
        deadline = time.monotonic() + child.rng.uniform(0, 6)
        while time.monotonic() < deadline and child.process.poll() is None:
            time.sleep(0.01)
        return
    first, steps = last_logged_step(child.folder), child.rng.randint(1, 3 if fault == "memory exhausted" else 8)
    current = first
    while current < first + steps and child.process.poll() is None:
        time.sleep(0.01)
        current = last_logged_step(child.folder)
        first = min(first, current)  # A process that resumes removes the steps that were not saved.
    time.sleep(child.rng.uniform(0, 0.3))


def inject(fault: str, child: Child, undisturbed: Undisturbed) -> tuple[Case, str]:
    """Inject one fault, wait for the end of the process, and return the result and the process's stdout."""
    saved = intact_steps(child.folder, undisturbed)
    if fault.startswith("checkpoint") and saved and newest_first(child.folder)[0].stem.endswith(f"{saved[0]:06d}"):
        del saved[0]
    case, started = Case(fault, last_logged_step(child.folder), saved[0] if saved else -1), time.monotonic()
    undo: Undo = lambda: None  # noqa: E731
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # The process may end just before the fault.
        undo = FAULTS[fault](child)
    try:
        out, err = child.process.communicate(timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        child.process.kill()
        out, err = child.process.communicate()
        case.shown = f"did not end within {TIME_LIMIT} seconds"
    undo()
    case.code, case.seconds = child.process.returncode, round(time.monotonic() - started, 2)
    case.shown = case.shown or bad_output(case, out, err)
    checkpoint = load_checkpoint(child.folder / "checkpoints", lambda line: None)
    case.resumed = checkpoint.step if checkpoint else -1
    case.lost = max(0, case.saved - case.resumed)
    case.wrong = difference(child.folder, undisturbed, checkpoint)
    if "stopped and saved" in out and case.resumed != last_logged_step(child.folder):
        case.wrong += f" step {last_logged_step(child.folder)} was not saved"
    return case, out


def bad_output(case: Case, out: str, err: str) -> str:
    """Describe the output if it has a traceback, a wrong exit code, not one line, or no hint how to resume."""
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    expected_lines = case.code == 2 or (case.code == 130 and "stopped and saved" not in out)
    good = (
        case.code in EXIT_CODES.get(case.fault, {2}) | {0}
        and "Traceback" not in out + err
        and len(lines) == expected_lines
        and (case.code != 2 or case.struck < 0 or "--resume" in err or "kept" in err)
    )
    return "" if good else f"exit code {case.code}, stderr {err!r}"


def difference(folder: Path, undisturbed: Undisturbed, checkpoint: Checkpoint | None) -> str:
    """Name the log that begins differently from the undisturbed run's, or the checkpoint that differs."""
    for name in LOGS:
        content = (folder / name).read_bytes() if (folder / name).exists() else b""
        if not undisturbed.files[name].startswith(content[: content.rfind(b"\n") + 1]):
            return name
    if checkpoint and checkpoint.path.read_bytes() != undisturbed.checkpoints[checkpoint.step]:
        return checkpoint.path.name
    return ""


def difference_at_end(folder: Path, undisturbed: Undisturbed) -> str:
    """Name the files of a finished run that differ from the undisturbed run's, and the temporary files."""
    end = undisturbed.config.max_steps
    files = undisturbed.files | {f"checkpoints/step-{end:06d}.safetensors": undisturbed.checkpoints[end]}
    different = [name for name, content in files.items() if (folder / name).read_bytes() != content]
    return ", ".join(different + [f"{path.name} left behind" for path in folder.rglob("*.tmp")])


@dataclass
class DisturbedRun:
    """A run that gets one fault after the other. When it has finished, a new run replaces it."""

    disk: Path
    undisturbed: Undisturbed
    rng: random.Random
    last: Case | None = None  # the fault from which the next process must recover

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.disk / "run"

    def inject_next(self, fault: str) -> Case:
        """Start or resume the run, inject a fault, and compare the run with the undisturbed one."""
        while True:
            child = Child(start(self.folder, self.undisturbed.config), self.folder, self.rng)
            wait_for_random_moment(child, fault)
            if child.process.poll() is None:
                case, out = inject(fault, child, self.undisturbed)
                self._check_resumed_step(out)
                self.last = case
                return case
            self._finish(child)

    def finish(self) -> None:
        """Resume the run after its last fault and let it finish."""
        if self.last:
            self._finish(Child(start(self.folder, self.undisturbed.config), self.folder, self.rng))

    def _check_resumed_step(self, out: str) -> None:
        """Check the step from which a process resumed; a process that a fault ended early may not print it."""
        match = RESUMED.search(out)
        if self.last and match and int(match[1]) != self.last.resumed:
            self.last.wrong += f" resumed after step {match[1]}, not {self.last.resumed}"

    def _finish(self, child: Child) -> None:
        out, err = child.process.communicate(timeout=TIME_LIMIT)
        assert self.last or child.process.returncode == 0, err
        if self.last:
            self._check_resumed_step(out)
            if self.last.resumed >= 0 and not RESUMED.search(out):
                self.last.wrong += " did not print the step from which it resumed"
            finished = child.process.returncode == 0
            self.last.wrong += difference_at_end(self.folder, self.undisturbed) if finished else err
        shutil.rmtree(self.folder)
        self.last = None


def main(count: int = 40, jobs: int = 2, seed: int | None = None, write: bool = False) -> None:
    """Inject faults into runs.

    Args:
        count: number of faults; the kinds take turns.
        jobs: number of runs at the same time.
        seed: chooses the order and the moments of the faults (the clock varies them a little); random by default.
        write: write the table to benchmarks/results/ and draw the figure.
    """
    quiet()
    torch.set_num_threads(1)
    seed = random.randrange(10**6) if seed is None else seed
    queue = [fault for _ in range(count) for fault in FAULTS][:count]
    random.Random(seed).shuffle(queue)
    cases: list[Case] = []
    with tempfile.TemporaryDirectory(prefix="minicpgd-faults-") as name, Bars(["faults"], count) as bars:
        base = Path(name)
        configs = {"small": SMALL, "large": OVERSIZED}
        undisturbed = {size: Undisturbed.run(config, base / size) for size, config in configs.items()}

        def work(job: int) -> None:
            rng = random.Random(f"{seed} {job}")
            runs = {size: DisturbedRun(make_disk(base, f"{size}{job}"), undisturbed[size], rng) for size in configs}
            with contextlib.suppress(IndexError):  # The queue is empty.
                while True:
                    fault = queue.pop()
                    cases.append(runs["large" if fault == "memory exhausted" else "small"].inject_next(fault))
                    bars.update(0, len(cases), f"{sum(not case.survived for case in cases)} not survived")
            for run in runs.values():
                run.finish()

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(work, range(jobs)))
        for disk in base.iterdir():
            subprocess.run(["umount", disk], check=False, capture_output=True)
    table = pd.DataFrame(map(asdict, cases)).sort_values("fault")
    report(table, seed)
    if write:
        table.to_csv(RESULTS, index=False)
        draw(pd.read_csv(RESULTS)).savefig(FIGURE)
        console.print(f"table   {RESULTS}\nfigure  {FIGURE}")
    sys.exit(0 if all(case.survived for case in cases) else 1)


def report(table: pd.DataFrame, seed: int) -> None:
    """Print a line for each kind of fault, and then a line for each case that was not survived."""
    printed = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("fault", "times", "lost steps", "wrong", "bad output", "median s", "longest"):
        printed.add_column(name, justify="left" if name == "fault" else "right", no_wrap=True)
    for fault, rows in table.groupby("fault"):
        counts = (len(rows), (rows.lost > 0).sum(), (rows.wrong != "").sum(), (rows.shown != "").sum())
        seconds = (f"{rows.seconds.median():.1f}", f"{rows.seconds.max():.1f}")
        printed.add_row(str(fault), *map(str, counts), *seconds)
    console.print(printed)
    for row in table.itertuples():
        if row.lost or row.wrong or row.shown:
            console.print(f"NOT SURVIVED (seed {seed}): {row}", markup=False)


@styled
def draw(table: pd.DataFrame) -> Figure:
    """Draw the step of each fault, and a line to the step from which the run resumed."""
    survived = (table.lost == 0) & table.wrong.isna() & table.shown.isna()
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    axes = figure.subplots()
    kinds = [kind for kind in FAULTS if kind in set(table.fault)][::-1]
    for place, kind in enumerate(kinds):
        rows = table[table.fault == kind].sort_values("struck")
        heights = place + np.linspace(-0.33, 0.33, len(rows))
        # A process that a signal stops saves one more step than the log had.
        resumed = rows.resumed.clip(lower=0, upper=rows.struck.clip(lower=0))
        axes.hlines(heights, resumed, rows.struck.clip(lower=0), color=COLOURS[4], linewidth=1.6)
        for value, marker, colour in ((True, "o", COLOURS[0]), (False, "X", COLOURS[1])):
            chosen = (survived[rows.index] == value).to_numpy()
            axes.plot(rows.struck.clip(lower=0)[chosen], heights[chosen], marker, color=colour, markersize=3.5)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("step of the run (the line: steps that were not saved yet, and were made again)")
    axes.set_title(f"{len(table)} faults, {int(survived.sum())} survived")
    return figure


if __name__ == "__main__":
    enter_mount_namespace()
    obey_permissions()
    tyro.cli(main, description=__doc__)
