"""Does a long run need more and more memory, or more and more time per step?

    python benchmarks/long_run.py              # 2,000 steps, half an hour; writes benchmarks/results/long_run.csv
    python benchmarks/long_run.py --steps 50   # a trial; writes nothing

The script trains the embedded model with the settings of `minicpgd train`: 256 responses and 4 updates a step, with
evaluations and checkpoints. After every step it records the resident memory of the process and the CPU seconds of the
step. CPU seconds depend less on other processes than the clock's seconds do. A slope is that of a straight line through
all steps after the first tenth, because caches fill during the first tenth.
"""

import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from matplotlib.figure import Figure

from minicpgd import TrainConfig
from minicpgd.cli.progress import Bars, console
from minicpgd.experiments.endurance import REMEDIES
from minicpgd.models.policy import quiet
from minicpgd.plots.style import COLOURS, styled
from minicpgd.training.loop import Callbacks, train

RESULTS = Path(__file__).parent / "results" / "long_run.csv"
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "reliability" / "long_run.png"
STEPS = 2000


def main(steps: int = STEPS) -> None:
    """Train, and measure the process after every step.

    Args:
        steps: number of steps; the script writes the table only for the default number.
    """
    quiet()
    torch.set_num_threads(1)
    rows, started = [], time.process_time()
    with tempfile.TemporaryDirectory() as folder, Bars(["long run"], steps) as bars:

        def measure(step: int, metrics: dict[str, float], _: object) -> None:
            nonlocal started
            seconds = time.process_time() - started
            rows.append((step, resident_mib(), seconds, metrics["completion_length"], metrics["reward"]))
            bars.update(0, step, f"{rows[-1][1]:.1f} MiB")
            started = time.process_time()

        # The published run has the first default of the package: a large drift, and no stop.
        config = TrainConfig(**REMEDIES["CPGD, α = max A"], max_steps=steps, output_dir=str(Path(folder) / "run"))
        train(config, callbacks=Callbacks(on_step=measure))
    table = pd.DataFrame(rows, columns=["step", "held_mib", "cpu_seconds", "tokens_per_response", "reward"])
    console.print(summary(table).to_string(index=False))
    if steps == STEPS:
        table.round(4).to_csv(RESULTS, index=False)
        draw(pd.read_csv(RESULTS)).savefig(FIGURE)
        console.print(f"table   {RESULTS}\nfigure  {FIGURE}")


def resident_mib() -> float:
    """Return the resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def slope(table: pd.DataFrame, column: str) -> float:
    """Return a column's change per 1,000 steps, without the first tenth and without the steps that evaluate."""
    kept = table[(table.step > len(table) / 10) & (table.step % TrainConfig().eval_steps != 0)]
    return 1000 * float(np.polyfit(kept.step, kept[column], 1)[0])


@styled
def draw(table: pd.DataFrame) -> Figure:
    """Draw memory, time and reward of every step, with a straight line through memory and through time."""
    figure = Figure(figsize=(8.4, 6.0), layout="constrained")
    panels = figure.subplots(3, sharex=True)
    plain = table[table.step % TrainConfig().eval_steps != 0]
    kept = plain[plain.step > len(table) / 10]
    columns = (("held_mib", "memory", "MiB"), ("cpu_seconds", "one step", "CPU s"), ("reward", "mean reward", ""))
    for axes, colour, (column, name, unit) in zip(panels, COLOURS, columns, strict=False):
        axes.plot(plain.step, plain[column], ".", color=colour, markersize=2.5, alpha=0.5)
        if unit:
            line = np.polyval(np.polyfit(kept.step, kept[column], 1), kept.step)
            axes.plot(kept.step, line, color="black", linewidth=1.6)
        axes.set(ylabel=unit, ylim=(0, 1.15 * plain[column].max()))
        axes.set_title(f"{name}: {slope(table, column):+.2g} {unit} per 1,000 steps" if unit else name)
    panels[-1].set_xlabel("step")
    return figure


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Compare the first and the last hundred steps after the first tenth, and give the slopes."""
    kept = table[table.step > len(table) / 10]
    units = {"held_mib": "memory, MiB", "cpu_seconds": "a step, s", "tokens_per_response": "response, tokens"}
    rows = [
        {
            "": name,
            "first 100 steps": f"{kept[column].iloc[:100].mean():.3g}",
            "last 100": f"{kept[column].iloc[-100:].mean():.3g}",
            "per 1,000 steps": f"{slope(table, column):+.2g}",
        }
        for column, name in (units | {"reward": "reward"}).items()
    ]
    return pd.DataFrame(rows)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
