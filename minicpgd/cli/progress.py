"""Progress: on a terminal, bars with the time left; elsewhere, a plain line every ten seconds."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(highlight=False, soft_wrap=True)
PLAIN_LINE_SECONDS = 10


class Bars:
    """One bar per name, each up to `total` steps, or percent of something; a context manager."""

    def __init__(self, names: Sequence[str], total: int, unit: str = ""):
        self.progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(24),
            MofNCompleteColumn() if not unit else TextColumn("{task.completed:3.0f}" + unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.names, self.total, self.unit = list(names), total, unit
        self.last_line: dict[int, float] = {}
        self.finished_at: dict[int, float] = {}
        self.first: dict[int, tuple[float, float]] = {}  # A bar's clock starts at its first update.
        self.tasks: list[TaskID] = [self.progress.add_task(n, start=False, total=total, note="") for n in names]

    def __enter__(self) -> "Bars":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def update(self, which: int, done: float, note: str) -> None:
        """Show that `done` steps of bar number `which` are done, and a few words."""
        now = time.monotonic()
        if which not in self.first:
            self.first[which] = (done, now)
            self.progress.start_task(self.tasks[which])
        self.progress.update(self.tasks[which], completed=done, note=note)
        over = done == self.total and self.finished_at.get(which) != done
        if not console.is_terminal and (over or now - self.last_line.setdefault(which, now) > PLAIN_LINE_SECONDS):
            self.finished_at[which] = done
            self.last_line[which] = now
            first, started = self.first[which]
            left = (now - started) * (self.total - done) / (done - first) if done > first else 0
            console.print(
                f"{self.names[which]} {f'{done:.0f}{self.unit}' if self.unit else f'{done}/{self.total}'}"
                f"{f', about {left:.0f} s left' if left else ''}: {note}"
            )
