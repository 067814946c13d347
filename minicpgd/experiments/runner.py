r"""Many runs: one question, a grid of settings, several seeds, and a table of outcomes.

In: a `Study` (`catalogue.py` has them). Out: its folder, with

    study.csv       a row per run: its settings, whether it collapsed, accuracy before, best and after
    steps.csv.gz    the metrics of every step of every run; of one with over 100 steps, of every `log_every` steps
    passes.csv.gz   ratios, KL and clipped shares of every pass over some rollouts
    seconds.csv     the seconds of each run in rollouts and in updates; they depend on the machine
    made.json       the command, the versions, and the core-minutes

Runs lie in a pool, under names made from their settings. Two studies with the same settings share a run. You may kill a
study at any time; the same command continues it.
"""

import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from minicpgd.config import TrainConfig
from minicpgd.errors import NonFiniteError, UserError
from minicpgd.experiments.outcome import DIVERGED, outcome
from minicpgd.files import versions, write_atomically
from minicpgd.models.policy import quiet
from minicpgd.recipes import load_config
from minicpgd.training.loop import train
from minicpgd.training.run_folder import is_finished, read_lines, resolved, run_seconds

Settings = dict[str, Any]
# A run of a map: 20 rollouts of 8 problems x 8 responses.
BASE: Settings = {"max_steps": 20, "num_prompts": 8, "num_generations": 8, "eval_steps": 2, "logging_steps": 5}


class Part(NamedTuple):
    """Some settings, each at every seed. `settings` gets the table of the parts before, to choose from it."""

    name: str
    seeds: Sequence[int]
    settings: Callable[[pd.DataFrame], Sequence[Settings]]


@dataclass(frozen=True)
class Study:
    """A question and the runs that answer it; `settings` are fields of `TrainConfig`, on top of `base`."""

    name: str
    asks: str
    base: Settings
    parts: Sequence[Part]
    quick: bool = False
    log_every: int = 1  # steps.csv.gz has every so many steps of a run with over 100 steps

    @property
    def command(self) -> str:
        """The command that makes this study."""
        return f"minicpgd study {self.name}{' --quick' if self.quick else ''}"

    def runs(self, part: Part, so_far: pd.DataFrame, pool: Path) -> pd.DataFrame:
        """The runs of one part, a row each: part, settings, K, and the `config`, with its folder in the pool."""
        arms = part.settings(so_far)
        fields = dict.fromkeys(["algorithm", "seed", *(name for arm in arms for name in arm)])
        fields.pop("num_iterations", None)
        rows = []
        for seed, arm in product(part.seeds, arms):  # A study that was stopped early is complete for fewer seeds.
            config = _in_pool(TrainConfig(**{**self.base, **arm, "seed": seed}), pool)
            row = {"part": part.name} | {name: getattr(config, name) for name in fields}
            rows.append(row | {"updates_per_rollout": config.updates_per_rollout, "config": config})
        return pd.DataFrame(rows)


def run_study(
    study: Study, folder: Path, pool: Path, *, on_wait: Callable[[int, float, int, int], None], jobs: int | None = None
) -> Path:
    """Make the missing runs in the `pool`, write the study's tables to `folder`, and return `folder`.

    Args:
        on_wait: called a few times a second with the number of the part, from 0, the finished share of its work, and
            the numbers of its finished runs and of all its runs.

    Raises:
        UserError: a run failed, or a run in the pool has other settings than its name says. A run whose loss is not a
            number has not failed: it diverged, which is an outcome.
    """
    table = pd.DataFrame()
    pool.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(study.parts):
        rows = study.runs(part, table, pool)
        configs = list(rows.pop("config"))
        for config in configs:
            _check_same(config)
        # A rollout takes as long as ten updates.
        work = np.array([config.max_steps * (10 + config.updates_per_rollout) for config in configs])

        def poll(configs: list[TrainConfig] = configs, work: np.ndarray = work, number: int = number) -> None:
            done = np.array([_finished(config) for config in configs])
            on_wait(number, float(work @ done / work.sum()), int(done.sum()), len(configs))

        poll()
        run_all([config for config in configs if not _finished(config)], poll, jobs, run=_finish)
        poll()
        outcomes = pd.DataFrame([asdict(outcome(config.folder)) for config in configs])
        table = pd.concat([table, rows.join(outcomes)], ignore_index=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "study.csv", table)
    for log, name in (("metrics", "steps"), ("passes", "passes")):
        logged = [
            pd.DataFrame(read_lines(pool / run / f"{log}.jsonl")).assign(run=run) for run in table["run"].unique()
        ]
        if name == "steps":
            logged = [rows[rows["step"] % study.log_every == 0] if len(rows) > 100 else rows for rows in logged]
        write_table(folder / f"{name}.csv.gz", pd.concat(logged, ignore_index=True))
    seconds = pd.DataFrame([run_seconds(pool / run) for run in table["run"].unique()], index=table["run"].unique())
    write_table(folder / "seconds.csv", seconds.rename_axis("run").reset_index())
    provenance = {
        "asks": study.asks,
        "command": study.command,
        "base": study.base,
        "runs": len(table),
        "core_minutes": round(float(seconds.to_numpy().sum()) / 60, 1),
        "versions": versions(),
        "machine": f"{platform.machine()}, one thread per run",
    }
    (folder / "made.json").write_text(json.dumps(provenance, indent=2) + "\n")
    return folder


def run_all(
    configs: Iterable[TrainConfig],
    on_wait: Callable[[], None],
    jobs: int | None = None,
    run: Callable[[TrainConfig], Path] = train,
) -> list[Path]:
    """Train each config in its own process, on one thread, and return the runs' folders, in order.

    Args:
        on_wait: called a few times a second; the runs' folders show how far they are.
        jobs: processes at a time; by default one per core.
        run: the function that a process calls with a config.

    Raises:
        UserError: a run failed; no further run is started.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=context, initializer=_prepare_worker) as pool:
        futures = [pool.submit(run, config) for config in configs]
        pending = set(futures)
        try:
            while pending:
                done, pending = wait(pending, timeout=0.3)
                on_wait()
                for future in done:
                    future.result()  # It raises what the run raised.
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                for child in multiprocessing.active_children():
                    child.terminate()  # A run may be killed at any time.
            raise
        return [future.result() for future in futures]


def _in_pool(config: TrainConfig, pool: Path) -> TrainConfig:
    """The config with a folder named after its algorithm, its seed, and a digest of all other non-default settings."""
    default = asdict(TrainConfig(output_dir=config.output_dir))
    changed = {name: value for name, value in asdict(config).items() if value != default[name]}
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:10]
    return replace(config, output_dir=str(pool / f"{config.algorithm}-seed{config.seed}-{digest}"))


def _check_same(config: TrainConfig) -> None:
    """Folder names omit default settings, so compare the stored config with the requested one."""
    path = config.folder / "config.json"
    if path.exists() and replace(load_config(path), output_dir=config.output_dir) != resolved(config):
        raise UserError(f"{path}: its defaults are not today's; choose another folder for the study")


def _finished(config: TrainConfig) -> bool:
    return is_finished(config.folder) or (config.folder / DIVERGED).exists()


def _finish(config: TrainConfig) -> Path:
    """Begin or continue a run, and remove its checkpoints at the end."""
    try:
        train(config, resume=(config.folder / "config.json").is_file())
    except NonFiniteError as error:
        (config.folder / DIVERGED).write_text(f"{error}\n")
    shutil.rmtree(config.folder / "checkpoints", ignore_errors=True)
    return config.folder


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a CSV with six digits. The same table gives the same bytes."""
    gzip: Any = {"method": "gzip", "mtime": 0} if path.suffix == ".gz" else None
    write_atomically(path, lambda part: table.to_csv(part, index=False, float_format="%.6g", compression=gzip))


def _prepare_worker() -> None:
    quiet()
    torch.set_num_threads(1)  # There are as many processes as cores.
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches workers too. They end at once, without a traceback.
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """End the worker when its study is killed, so that no process goes on writing."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
