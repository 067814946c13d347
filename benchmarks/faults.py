"""Faults: what does a run make of what computers do to it?

    python benchmarks/faults.py                        # 40 faults, minutes; nothing is written
    python benchmarks/faults.py --count 200 --write    # writes benchmarks/results/faults.csv

A run is started in a process of its own, and at a random moment a fault strikes it. What it leaves is compared with a
run that was left in peace; it is resumed, struck again, resumed, and so to its end, where every file has to be the
same, byte for byte. Of all faults, one in four strikes in the first six seconds of a process: while it imports torch,
makes the run's folder, or reads its checkpoint.

A fault counts as survived if the process ended by itself in time; said so in one line, without a traceback; left logs
that begin like the undisturbed run's, and a newest intact checkpoint that is the undisturbed run's of that step; lost
no step that had been saved; and went on from that very checkpoint. Exit code 1 if one did not.

Runs live in a small tmpfs, so that the disk can be full in earnest. Where none may be mounted, a limit on the size of
files stands in, and a line says so. Needs Linux.
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
from matplotlib.figure import Figure
from rich.table import Table
from striking import (
    CODES,
    FAULTS,
    LOGS,
    OVERSIZED,
    SMALL,
    Child,
    Peace,
    Undo,
    heed_permissions,
    intact,
    into_a_namespace,
    newest_first,
    room_of,
    start,
    steps_logged,
)

from minicpgd.checkpoint import Checkpoint, load_checkpoint
from minicpgd.plots.style import COLOURS, styled
from minicpgd.policy import quiet
from minicpgd.progress import Bars, console

RESULTS = Path(__file__).parent / "results" / "faults.csv"
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "reliability" / "faults.png"
TIME_LIMIT = 120  # seconds that a struck process has to end in


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


def wait_for_the_moment(child: Child, fault: str) -> None:
    """A random one: of its start, or within one of its next eight steps."""
    if fault != "memory exhausted" and child.rng.random() < 0.25:
        deadline = time.monotonic() + child.rng.uniform(0, 6)
        while time.monotonic() < deadline and child.process.poll() is None:
            time.sleep(0.01)
        return
    before, wanted = steps_logged(child.folder), child.rng.randint(1, 3 if fault == "memory exhausted" else 8)
    seen = before
    while seen < before + wanted and child.process.poll() is None:
        time.sleep(0.01)
        now = steps_logged(child.folder)
        before, seen = min(before, now), now  # a resume drops what was not saved
    time.sleep(child.rng.uniform(0, 0.3))


def strike(fault: str, child: Child, peace: Peace) -> tuple[Case, str]:
    """One fault, from the moment it strikes to the end of the process: what came of it, and what was on stdout."""
    saved = intact(child.folder, peace)
    if fault.startswith("checkpoint") and saved and newest_first(child.folder)[0].stem.endswith(f"{saved[0]:06d}"):
        del saved[0]
    case, struck = Case(fault, steps_logged(child.folder), saved[0] if saved else -1), time.monotonic()
    undo: Undo = lambda: None  # noqa: E731
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it has ended just now
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
    if "stopped and saved" in out and case.resumed != steps_logged(child.folder):
        case.wrong += f" step {steps_logged(child.folder)} was not saved"
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
        """Of the run at hand."""
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
        draw(pd.read_csv(RESULTS)).savefig(FIGURE)
        console.print(f"table   {RESULTS}\nfigure  {FIGURE}")
    sys.exit(1 if any(map(failed, cases)) else 0)


def failed(case: Case) -> bool:
    """Whether something was lost, wrong, or shown that should not have been."""
    return bool(case.lost or case.wrong or case.shown)


def report(table: pd.DataFrame, seed: int) -> None:
    """A line per kind of fault, then one for each case that was not survived."""
    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("fault", "times", "lost steps", "wrong", "told badly", "median s", "longest"):
        shown.add_column(name, justify="left" if name == "fault" else "right", no_wrap=True)
    for fault, rows in table.groupby("fault"):
        counts = (len(rows), (rows.lost > 0).sum(), (rows.wrong != "").sum(), (rows.shown != "").sum())
        seconds = (f"{rows.seconds.median():.1f}", f"{rows.seconds.max():.1f}")
        shown.add_row(str(fault), *map(str, counts), *seconds)
    console.print(shown)
    for row in table.itertuples():
        if row.lost or row.wrong or row.shown:
            console.print(f"NOT SURVIVED (seed {seed}): {row}", markup=False)


@styled
def draw(table: pd.DataFrame) -> Figure:
    """Where each fault struck, and how far back the run had to go."""
    survived = (table.lost == 0) & table.wrong.isna() & table.shown.isna()
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    axes = figure.subplots()
    kinds = [kind for kind in FAULTS if kind in set(table.fault)][::-1]
    for place, kind in enumerate(kinds):
        rows = table[table.fault == kind].sort_values("struck")
        heights = place + np.linspace(-0.33, 0.33, len(rows))
        back = rows.resumed.clip(lower=0, upper=rows.struck.clip(lower=0))  # after a signal it is a step ahead
        axes.hlines(heights, back, rows.struck.clip(lower=0), color=COLOURS[4], linewidth=1.6)
        for fine, marker, colour in ((True, "o", COLOURS[0]), (False, "X", COLOURS[1])):
            these = (survived[rows.index] == fine).to_numpy()
            axes.plot(rows.struck.clip(lower=0)[these], heights[these], marker, color=colour, markersize=3.5)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("step of the run (the line: steps that were not saved yet, and were made again)")
    axes.set_title(f"{len(table)} faults, {int(survived.sum())} survived")
    return figure


if __name__ == "__main__":
    into_a_namespace()
    heed_permissions()
    tyro.cli(main)
