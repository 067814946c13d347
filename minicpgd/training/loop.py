r"""The loop: step after step, each logged, some saved, until the end or until the caller says stop.

`step.py` says what a step does. This file makes the run's folder, or resumes from a checkpoint. It saves a checkpoint
after the last step, and also when the caller stops the run.

In: a config. Out: the run's folder, which `run_folder.py` describes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from safetensors import SafetensorError

from minicpgd.algorithms import drift_warning
from minicpgd.config import TrainConfig
from minicpgd.errors import NonFiniteError, UserError, is_out_of_memory
from minicpgd.models.policy import Policy
from minicpgd.models.sampling import check_sampler
from minicpgd.models.source import is_gguf, resolve_model
from minicpgd.training.checkpoint import load_checkpoint, remove_newer, restore, save_checkpoint
from minicpgd.training.first_look import FirstLook
from minicpgd.training.run_folder import RunFolder, refuse_existing, resolved, resume_command, stored_config
from minicpgd.training.step import Learner


@dataclass(frozen=True)
class Callbacks:
    """What a run calls. `on_step` gets the step, its metrics and its timings; `on_warning` gets one line of text.

    When `should_stop` returns true, the step is finished and saved, and `train` returns. The run can then be resumed.
    """

    on_load: Callable[[Policy], None] = lambda policy: None
    on_resume: Callable[[int], None] = lambda step: None
    on_first_look: Callable[[FirstLook], None] | None = None  # Its answers are sampled only if there is one.
    on_step: Callable[[int, dict[str, float], dict[str, float]], None] = lambda step, metrics, timings: None
    on_warning: Callable[[str], None] = lambda line: None
    should_stop: Callable[[], bool] = lambda: False


def train(config: TrainConfig, *, resume: bool = False, callbacks: Callbacks = Callbacks()) -> Path:  # noqa: B008 (frozen)
    """Train, from the start or from the newest intact checkpoint of `config.folder`, and return that folder.

    To resume, pass the config that is stored in the run's folder. Another `max_steps` prolongs the run, or ends it.

    Raises:
        UserError: something cannot be loaded, resumed or written, a reward fails, or a new run's folder exists.
        NonFiniteError: a logit, loss or gradient is not finite; the newest checkpoint is from before that.
    """
    if is_gguf(config.model):
        config = replace(config, model=resolve_model(config.model))
    config = resolved(config)
    if resume:
        config = replace(config, chat_date=config.chat_date or stored_config(config.folder).chat_date)
    else:
        refuse_existing(config.folder)
    learner = Learner.from_config(config)
    if learner.policy.prints_date and config.chat_date is None:
        config = replace(config, chat_date=date.today().isoformat())
        learner.config = learner.policy.settings = config
    check_sampler(learner.policy, [row["prompt"] for row in learner.task.held_out(4)], config)
    if learner.algorithm.drift and (line := drift_warning(config.drift_coef, config.updates_per_rollout)):
        callbacks.on_warning(line)
    callbacks.on_load(learner.policy)
    with _one_line_for_disk_errors(config.folder):
        run = RunFolder.reopen(config) if resume else RunFolder.create(config)
        with run.lock():
            first, saved = _restore_newest(learner, run, callbacks)
            looks = callbacks.on_first_look is not None
            for step in range(first, config.max_steps + 1):
                try:
                    log = learner.step(step) if step else learner.evaluate_before_training(look=looks)
                except NonFiniteError as error:
                    last = f"the last good checkpoint is {saved}" if saved else "there is no checkpoint yet"
                    raise NonFiniteError(
                        f"step {step}: {error}; {last}. "
                        "In a new run, try a smaller learning_rate, fewer num_iterations, or a target_kl"
                    ) from error
                if callbacks.on_first_look and log.look:
                    callbacks.on_first_look(log.look)
                stop = callbacks.should_stop()
                run.append_step(step, log)
                if step % config.save_steps == 0 or step == config.max_steps or stop:
                    state = {"drift_coef": learner.drift_coef}
                    saved = save_checkpoint(run.checkpoints, step, learner.policy.model, learner.optimizer, state)
                callbacks.on_step(step, log.metrics, log.timings)
                if stop and step < config.max_steps:
                    return run.folder
            learner.policy.save(run.folder / config.weights_folder)
    return run.folder


def _restore_newest(learner: Learner, run: RunFolder, callbacks: Callbacks) -> tuple[int, Path | None]:
    """Restore the newest intact checkpoint, and remove what was logged and saved after it.

    Return the next step, and the checkpoint's path, if there is one. A step that the run repeats has the same result.
    """
    checkpoint = load_checkpoint(run.checkpoints, callbacks.on_warning)
    last, path = (checkpoint.step, checkpoint.path) if checkpoint else (-1, None)
    if last > run.config.max_steps:
        raise UserError(f"{path}: it is after max_steps = {run.config.max_steps}; it belongs to another run")
    if checkpoint:
        restore(checkpoint, learner.policy.model, learner.optimizer)
        learner.drift_coef = checkpoint.extra["drift_coef"]
    elif run.has_begun:
        callbacks.on_warning(f"{run.checkpoints}: no checkpoint is intact; the run begins again, from step 0")
    if missing := run.truncate_after(last):
        lost = f"lines are missing: {len(missing)}; the first is that of step {missing[0]}"
        callbacks.on_warning(f"{run.folder / 'metrics.jsonl'}: {lost}")
    remove_newer(run.checkpoints, checkpoint)
    if checkpoint:
        callbacks.on_resume(last)
    return last + 1, path


@contextmanager
def _one_line_for_disk_errors(folder: Path) -> Iterator[None]:
    """Turn an error of the disk or of safetensors into a UserError of one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        later = f"its files are intact. Once it can be written, continue with {resume_command(folder)}"
        hint = later if (folder / "config.json").exists() else "choose another with --output-dir"
        raise UserError(f"{folder}: cannot be written ({error}); {hint}") from error
