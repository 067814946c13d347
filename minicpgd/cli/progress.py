"""What commands print: progress bars with the time left, and tables.

In: names and numbers. Out: bars on a terminal; elsewhere a plain line every ten seconds.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

console = Console(highlight=False, markup=False, soft_wrap=True)  # A path may have brackets.
PLAIN_LINE_SECONDS = 10


def text_table(*columns: str, left: Sequence[str] = (), title: str | None = None) -> Table:
    """An empty table without lines, for the terminal: the first column and those in `left` are aligned left."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in (columns[0], *left) else "right")
    return table


def say_conversion(model: str) -> None:
    """Say that a model is converted now, if it is a GGUF file that has not been converted before."""
    from minicpgd.models.source import gguf_folder, is_gguf

    if is_gguf(model) and not (folder := gguf_folder(Path(model))).exists():
        console.print(f"converting {model} into {folder}/, once")


class Bars:
    """One bar per name, each up to `total` steps, or percent of something; a context manager."""

    def __init__(self, names: Sequence[str], total: int, unit: str = ""):
        done = TextColumn("{task.completed:3.0f}" + unit) if unit else MofNCompleteColumn()
        bar = (TextColumn("{task.description}"), BarColumn(10), done)
        left = (TextColumn("left"), TimeRemainingColumn())  # All of it fits into 80 columns.
        note = TextColumn("{task.fields[note]}")
        self.progress = Progress(*bar, *left, note, console=console, disable=not console.is_terminal)
        self.names, self.total, self.unit = list(names), total, unit
        self.printed: dict[int, tuple[float, float]] = {}  # Each bar's newest plain line has a time and a position.
        self.first: dict[int, tuple[float, float]] = {}  # A bar's clock starts at its first update.
        self.tasks = [self.progress.add_task(name, start=False, total=total, note="") for name in names]

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
        printed_at, printed = self.printed.setdefault(which, (now, -1))
        over = done == self.total and printed != done
        if not console.is_terminal and (over or now - printed_at > PLAIN_LINE_SECONDS):
            self.printed[which] = (now, done)
            first, started = self.first[which]
            left = (now - started) * (self.total - done) / (done - first) if done > first else 0
            reached = f"{done:.0f}{self.unit}" if self.unit else f"{done}/{self.total}"
            console.print(f"{self.names[which]} {reached}{f', about {left:.0f} s left' if left else ''}: {note}")
