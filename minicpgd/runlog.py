"""A run is a folder that explains itself.

    config.json       what was asked for
    metrics.jsonl     a line per step: what the run did; the same bytes whenever it is repeated on one machine
    timings.jsonl     a line per step: what depends on the clock and the machine
    samples.jsonl     some sampled responses, with reward and advantage
    passes.jsonl      of the same steps, a line per pass over the rollout: ratios, KL, clipped shares
    checkpoints/      the two newest (see checkpoint.py)
    model/            the trained model, once the run has ended; transformers loads it. With LoRA it is
    adapter/          instead, which PEFT loads onto the model that `config.json` names

Line 0 of the metrics is the model before training: its greedy accuracy and its mean reward on the held-out set.
"""

import functools
import json
import os
import resource
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout

from minicpgd.checkpoint import write_atomically
from minicpgd.config import TrainConfig, load_config, parse_json
from minicpgd.errors import ConfigError, UserError, shown

LOGS = ("metrics", "timings", "samples", "passes")


class Run(NamedTuple):
    """What `load_run` returns."""

    config: TrainConfig
    metrics: dict[str, np.ndarray]
    samples: list[dict[str, Any]]


def load_run(path: str | Path) -> Run:
    """Read a run's folder.

    Returns:
        (config, metrics, samples): `metrics` maps each name to a float array with one value a step, `nan` where that
        step has none; its column `step` starts at 0, the model before training.

    Raises:
        UserError: no such folder, no config in it, or a line that is none of a log; the message names file and line.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a run: there is no config.json in it")
    return Run(
        load_config(folder / "config.json"),
        _columns(folder / "metrics.jsonl"),
        read_lines(folder / "samples.jsonl"),
    )


def load_timings(path: str | Path) -> dict[str, np.ndarray]:
    """The columns of a run's timings.jsonl, as `load_run` gives those of its metrics."""
    return _columns(Path(path) / "timings.jsonl")


def run_seconds(path: str | Path) -> float:
    """Seconds that a run spent in rollouts and updates."""
    timings = load_timings(path)
    return float((timings["rollout_seconds"] + timings["update_seconds"]).sum()) if timings else 0.0


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of one of a run's logs, each with its `step`; none where the file does not exist.

    Raises:
        UserError: a line is not a JSON object with a step. A last line without its line break is a line still being
            written: it is left out.
    """
    if not path.exists():
        return []
    if not path.is_file():  # a pipe would keep us waiting
        raise UserError(f"{path}: not a file")
    rows = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            row = parse_json(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            if type(row.get("step")) is not int or row["step"] < 0:
                raise ValueError(f"step = {shown(row.get('step'))}: a step is a number, from 0 on")
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}; without that line the file can be read") from error
        rows.append(row)
    return rows


def _columns(path: Path) -> dict[str, np.ndarray]:
    rows = read_lines(path)
    for row in rows:
        for name, value in row.items():
            if type(value) is not float and not (type(value) is int and abs(value) < 2**63):
                raise UserError(f"{path}: at step {row['step']}, {name} = {shown(value)}: a number expected")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([row.get(name, np.nan) for row in rows], dtype=float) for name in names}


def refuse_existing(folder: Path) -> None:
    """To be asked before anything that takes long.

    Raises:
        ConfigError: there is a run's folder already.
    """
    if folder.exists():
        raise ConfigError(
            f"output_dir = {str(folder)!r} exists already: go on with `minicpgd train --resume {folder}`, "
            "or choose another"
        )


@dataclass(frozen=True)
class RunLog:
    """The writing side of a run's folder."""

    folder: Path
    config: TrainConfig

    @classmethod
    def create(cls, config: TrainConfig) -> "RunLog":
        """A new folder, which appears with its config.json inside or not at all.

        Raises:
            ConfigError: there is one already.
        """
        refuse_existing(config.folder)
        folder = config.folder
        making = folder.with_name(f".{folder.name}.{os.getpid()}")
        making.mkdir(parents=True)
        try:
            config.save(making / "config.json")
            making.rename(folder)
        except OSError:
            shutil.rmtree(making, ignore_errors=True)
            raise
        return cls(folder, config)

    @classmethod
    def reopen(cls, config: TrainConfig) -> "RunLog":
        """The folder of a run that is to go on; of its settings only `max_steps` may have grown.

        Raises:
            UserError: it is no run, or another setting changed; the line names the fields.
        """
        folder = config.folder
        if not (folder / "config.json").is_file():
            raise UserError(f"cannot resume {folder}: there is no config.json in it")
        stored = load_config(folder / "config.json")
        before, now = (asdict(replace(c, output_dir="", max_steps=1)) for c in (stored, config))
        changed = [f"{name} was {before[name]}, is {now[name]}" for name in before if before[name] != now[name]]
        if config.max_steps < stored.max_steps:
            changed.append(f"max_steps was {stored.max_steps}, is {config.max_steps}")
        if changed:
            raise ConfigError(
                f"cannot resume {folder} with other settings: {'; '.join(changed)} (only max_steps may grow)"
            )
        if config != stored:
            write_atomically(folder / "config.json", config.save)
        return cls(folder, config)

    @property
    def has_begun(self) -> bool:
        """Whether a step has been logged."""
        return bool(read_lines(self.folder / "metrics.jsonl"))

    @contextmanager
    def only_writer(self) -> Iterator[None]:
        """Keep every other process from writing this run; the lock goes when the process does, however it dies.

        Raises:
            UserError: another one is writing it.
        """
        lock = FileLock(self.folder / ".lock", blocking=False)
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(f"{self.folder}: another process is writing this run; wait for it, or stop it") from error
        try:
            yield
        finally:
            lock.release()

    def keep_until(self, step: int) -> list[int]:
        """Forget the lines of steps after `step`: they are about to be made again.

        Returns:
            The steps until then whose line in the metrics is gone: a disk that failed, or somebody's editor.
        """
        paths = [self.folder / f"{name}.jsonl" for name in LOGS]
        logs = [
            [row for row in read_lines(path) if row["step"] <= step] for path in paths
        ]  # all, before one is written
        for path, rows in zip(paths, logs, strict=True):
            write_atomically(path, functools.partial(_write, "".join(map(_line, rows))))
        return sorted(set(range(step + 1)) - {row["step"] for row in logs[0]})

    def append(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Add lines to one of the logs, and have them on disk before going on."""
        with (self.folder / f"{name}.jsonl").open("a") as file:
            file.write("".join(map(_line, rows)))
            file.flush()
            os.fsync(file.fileno())


def _write(text: str, path: Path) -> None:
    path.write_text(text)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
