"""A run's folder: settings, logs, checkpoints, weights.

    config.json       the settings
    metrics.jsonl     a line per step: what the run did; if the run is repeated on the same CPU, the same bytes
    timings.jsonl     a line per step from step 1 on: what depends on the clock and the machine
    samples.jsonl     at some steps (`logging_steps`), sampled responses with reward and advantage
    passes.jsonl      at these steps, a line per pass over the rollout: ratios, KL, shares of clipped tokens
    checkpoints/      the two newest (see checkpoint.py)
    model/            without LoRA, the trained model, once all steps are done; transformers loads it
    adapter/          with LoRA, the trained adapter; PEFT loads it onto the model that `config.json` names

The metrics of step 0 are those of the model before training, on the held-out set: `eval_accuracy` and `eval_reward`
come from greedy responses, the other metrics from sampled responses.

In: settings, and the log of each step. Out: these files, or what `load_run` reads from them.
"""

import functools
import json
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from minicpgd.config import TrainConfig
from minicpgd.errors import ConfigError, UserError, short_repr
from minicpgd.files import parse_json, write_atomically
from minicpgd.models.lora import adapter_config
from minicpgd.recipes import load_config, save_config
from minicpgd.training.metrics import StepLog

LOGS = ("metrics", "timings", "samples", "passes")


class Run(NamedTuple):
    """What `load_run` returns. Each metric is a float array with a value per step, NaN where the step has none.

    The metric `step` starts at 0, the model before training.
    """

    config: TrainConfig
    metrics: dict[str, np.ndarray]
    samples: list[dict[str, Any]]


def load_run(path: str | Path) -> Run:
    """Read a run's folder.

    Raises:
        UserError: there is no such run, or a log has a line that is not valid; the message names file and line or step.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a run: there is no config.json in it")
    config, metrics = load_config(folder / "config.json"), _columns(folder / "metrics.jsonl")
    return Run(config, metrics, read_lines(folder / "samples.jsonl"))


def load_timings(path: str | Path) -> dict[str, np.ndarray]:
    """The columns of a run's timings.jsonl, in the form of `load_run`'s metrics."""
    return _columns(Path(path) / "timings.jsonl")


def run_seconds(path: str | Path) -> dict[str, float]:
    """Seconds that a run spent in rollouts and in updates."""
    timings = load_timings(path)
    return {name: float(timings[name].sum()) if timings else 0.0 for name in ("rollout_seconds", "update_seconds")}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a log, each with its `step`; none if the file does not exist.

    A last line without its line break is still being written. It is left out.

    Raises:
        UserError: a line is not a JSON object with a step.
    """
    if not path.exists():
        return []
    if not path.is_file():  # Reading a pipe could take forever.
        raise UserError(f"{path}: not a file")
    rows = []
    # Only "\n" ends a line. A response may contain U+2028, at which splitlines() would split, too.
    *lines, _unfinished = path.read_bytes().decode(errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            if type(row.get("step")) is not int or row["step"] < 0:
                raise ValueError(f"step = {short_repr(row.get('step'))}: a step is a number, from 0 on")
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}; remove that line and try again") from error
        rows.append(row)
    return rows


def _columns(path: Path) -> dict[str, np.ndarray]:
    rows = read_lines(path)
    for row in rows:
        for name, value in row.items():
            if type(value) is not float and not (type(value) is int and abs(value) < 2**63):
                raise UserError(f"{path}: at step {row['step']}, {name} = {short_repr(value)}: a number expected")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([row.get(name, np.nan) for row in rows], dtype=float) for name in names}


def resume_command(folder: Path, flags: str = "") -> str:
    """The command that continues a run, in backticks, for a message."""
    return f"`minicpgd train --resume {shlex.quote(str(folder))}{flags}`"


def stored_config(folder: Path) -> TrainConfig:
    """The config of a run that is to be resumed.

    Raises:
        UserError: it is not a run.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"cannot resume {folder}: there is no config.json in it")
    return load_config(folder / "config.json")


def resolved(config: TrainConfig) -> TrainConfig:
    """The same config with absolute paths of model, data and adapter, and with the rank and scale of a saved adapter.

    Raises:
        UserError: the saved adapter is not a LoRA adapter.
    """
    given = {name: getattr(config, name) for name in ("model", "data", "adapter")}
    paths = {name: os.path.abspath(os.path.expanduser(path)) for name, path in given.items() if path}
    config = replace(config, **{name: path for name, path in paths.items() if os.path.exists(path)})
    if config.adapter is None:
        return config
    saved = adapter_config(config.adapter)
    try:
        return replace(config, lora_r=saved["r"], lora_alpha=saved["lora_alpha"])
    except (KeyError, ConfigError) as error:
        raise UserError(f"adapter = {config.adapter!r}: not a LoRA adapter: {error}") from error


def is_finished(folder: Path) -> bool:
    """Whether a run has left its trained weights: a model, or an adapter."""
    return (folder / "model").is_dir() or (folder / "adapter").is_dir()


def refuse_existing(folder: Path) -> None:
    """Refuse a run whose folder exists. Call this before any slow work.

    Raises:
        ConfigError: the run's folder exists already.
    """
    if folder.exists():
        prolong = f"{resume_command(folder, ' --max-steps N')}, which adds steps"
        way = prolong if is_finished(folder) else resume_command(folder)
        hint = f"continue it with {way} (in Python, resume=True)"
        raise ConfigError(f"output_dir = {str(folder)!r} exists already: choose another --output-dir, or {hint}")


@dataclass(frozen=True)
class RunFolder:
    """Writes the files of a run's folder. `load_run` reads them."""

    folder: Path
    config: TrainConfig

    @classmethod
    def create(cls, config: TrainConfig) -> "RunFolder":
        """Make a new folder, which appears with its config.json inside or not at all.

        Raises:
            ConfigError: the folder exists already.
        """
        folder = config.folder
        refuse_existing(folder)
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
        temporary.mkdir(parents=True)
        try:
            save_config(temporary / "config.json", config)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return cls(folder, config)

    @classmethod
    def reopen(cls, config: TrainConfig) -> "RunFolder":
        """Open the folder of a run that continues. Only `output_dir` and `max_steps` may differ.

        A smaller `max_steps` ends the run early. It may not be below the last step that is logged.

        Raises:
            UserError: it is not a run, or another setting changed; the message names the settings.
        """
        folder = config.folder
        stored = stored_config(folder)
        before, now = (asdict(replace(resolved(c), output_dir="", max_steps=1)) for c in (stored, config))
        changed = [f"{name} was {before[name]}, is {now[name]}" for name in before if before[name] != now[name]]
        if changed:
            changes = "; ".join(changed)
            raise ConfigError(f"cannot resume {folder} with other settings: {changes} (only max_steps may change)")
        last = max((row["step"] for row in read_lines(folder / "metrics.jsonl")), default=0)
        if config.max_steps < last:
            raise ConfigError(
                f"cannot resume {folder} with max_steps = {config.max_steps}: step {last} is made already"
            )
        if config.max_steps != stored.max_steps:
            new = replace(stored, max_steps=config.max_steps)
            write_atomically(folder / "config.json", functools.partial(save_config, config=new))
        return cls(folder, config)

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    @property
    def has_begun(self) -> bool:
        """Whether a step has been logged."""
        return bool(read_lines(self.folder / "metrics.jsonl"))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep every other process from writing this run. The system releases the lock when the process ends.

        Raises:
            UserError: another process is writing the run.
        """
        try:
            with FileLock(self.folder / ".lock", blocking=False):
                yield
        except Timeout as error:
            raise UserError(f"{self.folder}: another process is writing this run; wait for it, or stop it") from error

    def truncate_after(self, step: int) -> list[int]:
        """Remove the lines of all steps after `step`. Return the steps from 0 to `step` that metrics.jsonl lacks."""
        paths = [self.folder / f"{name}.jsonl" for name in LOGS]
        logs = [[row for row in read_lines(path) if row["step"] <= step] for path in paths]  # Read all before writing.
        for path, rows in zip(paths, logs, strict=True):
            text = "".join(map(_line, rows))
            write_atomically(path, functools.partial(Path.write_bytes, data=text.encode(errors="replace")))
        return sorted(set(range(step + 1)) - {row["step"] for row in logs[0]})

    def append_step(self, step: int, log: StepLog) -> None:
        """Add the lines of one step to all logs."""
        self.append("metrics", [{"step": step, **log.metrics}])
        self.append("timings", [{"step": step, **log.timings}] if log.timings else [])
        self.append("samples", log.samples)
        self.append("passes", log.passes)

    def append(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Add lines to a log, and force them to disk."""
        with (self.folder / f"{name}.jsonl").open("ab") as file:
            file.write("".join(map(_line, rows)).encode(errors="replace"))
            file.flush()
            os.fsync(file.fileno())


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, default=short_repr) + "\n"  # A reward function may log any value.
