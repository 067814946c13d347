r"""The loop: one step after the other, each logged, some saved, until the end or until somebody says stop.

What a step does stands in `learner.py`. Here a run gets its folder, goes on from a checkpoint, and is left in a state
from which it can go on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from minicpgd.checkpoint import forget_newer, load_checkpoint, restore, save_checkpoint
from minicpgd.config import TrainConfig
from minicpgd.errors import NonFiniteError, UserError, is_out_of_memory
from minicpgd.learner import Learner
from minicpgd.policy import Policy
from minicpgd.runlog import RunLog, refuse_existing


@dataclass(frozen=True)
class Listener:
    """How a caller hears of a run, and stops it.

    `loaded(policy)`, `resumed(step)`, `step(step, metrics, timings)`, `warn(line)`, `stop() -> bool`.
    """

    loaded: Callable[[Policy], None] = lambda policy: None
    resumed: Callable[[int], None] = lambda step: None
    step: Callable[[int, dict[str, float], dict[str, float]], None] = lambda step, metrics, timings: None
    warn: Callable[[str], None] = lambda line: None
    stop: Callable[[], bool] = lambda: False


def train(config: TrainConfig, *, resume: bool = False, listener: Listener = Listener()) -> Path:  # noqa: B008 (frozen)
    """Train, from the start or from the newest checkpoint of `config.folder` that is intact.

    Args:
        config: what to run. With `resume` it has to be the run's own, from its folder; only `max_steps` may be larger.
        listener: hears of every step; when its `stop()` is true, the step is finished and saved and `train` returns.

    Returns:
        The run's folder; see `runlog.py` for what is in it. The folder `model/` (`adapter/`, with LoRA) is there once
        the run has ended.

    Raises:
        UserError: what cannot be loaded, resumed or written, a reward function that fails, a run folder that exists.
        NonFiniteError: a loss or gradient stopped being a number; checkpoints hold the last state that was saved.
    """
    if not resume:
        refuse_existing(config.folder)
    learner = Learner.from_config(config)
    listener.loaded(learner.policy)
    with _writing(config.folder):
        log = RunLog.reopen(config) if resume else RunLog.create(config)
        with log.only_writer():
            return _go_on(learner, log, listener)


def _go_on(learner: Learner, log: RunLog, listener: Listener) -> Path:
    """From the newest checkpoint that is intact, if there is one, to the end.

    What was logged after that checkpoint is dropped, and those steps are made again; the same comes out of them.
    """
    config = log.config
    checkpoint = load_checkpoint(log.folder / "checkpoints", listener.warn)
    done = checkpoint.step if checkpoint else -1
    saved = checkpoint.path if checkpoint else None
    if checkpoint:
        if done > config.max_steps:
            raise UserError(f"{saved}: of a step after max_steps = {config.max_steps}; it is not of this run")
        restore(checkpoint, learner.policy.model, learner.optimizer)
        learner.drift_coef = checkpoint.extra["drift_coef"]
    elif log.has_begun:
        listener.warn(f"{log.folder / 'checkpoints'}: none that is whole; beginning again, from step 0")
    if gone := log.keep_until(done):
        listener.warn(f"{log.folder / 'metrics.jsonl'}: the line of step {gone[0]} is gone ({len(gone)} in all)")
    forget_newer(log.folder / "checkpoints", checkpoint)
    if checkpoint:
        listener.resumed(done)

    for step in range(done + 1, config.max_steps + 1):
        try:
            made = learner.step(step) if step else learner.starting_point()
        except NonFiniteError as error:
            raise NonFiniteError(
                f"step {step}: {error}; the last good checkpoint is {saved or 'none yet'}. "
                "In a new run, try a smaller learning_rate or fewer num_iterations, or algorithm=cpgd"
            ) from error
        stopping = listener.stop()
        log.append("metrics", [{"step": step, **made.metrics}])
        log.append("timings", [{"step": step, **made.timings}] if made.timings else [])
        log.append("samples", made.samples)
        log.append("passes", made.passes)
        if step % config.save_steps == 0 or step == config.max_steps or stopping:
            extra = {"drift_coef": learner.drift_coef}
            saved = save_checkpoint(log.folder / "checkpoints", step, learner.policy.model, learner.optimizer, extra)
        listener.step(step, made.metrics, made.timings)
        if stopping and step < config.max_steps:
            return log.folder
    learner.policy.save(log.folder / config.trained_as)
    return log.folder


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn a full disk, or one that may not be written to, into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        begun = f"what is there is intact. Once it can be, go on with `minicpgd train --resume {folder}`"
        hint = begun if (folder / "config.json").exists() else "choose another with --output-dir"
        raise UserError(f"{folder}: cannot be written ({error}); {hint}") from error
