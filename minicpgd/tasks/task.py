"""Tasks: where problems come from, and which answers are right.

A task is an object with the members of `Task`; `TASKS` names those that ship. A problem is a dataset row: a dict
with `prompt` and whatever columns the reward needs.
"""

import random
from typing import Protocol

from minicpgd.config import TaskSettings
from minicpgd.errors import ConfigError
from minicpgd.tasks.chain_arithmetic import ChainArithmetic
from minicpgd.tasks.gsm8k import Gsm8k
from minicpgd.tasks.jsonl import Jsonl
from minicpgd.tasks.rewards import RewardFunction


class Task(Protocol):
    """What the training loop asks of a task."""

    reward: RewardFunction

    def __init__(self, data: str | None, instruction: str | None) -> None:
        """Load the problems.

        Args:
            data: a local file or folder, for the tasks that take one.
            instruction: added below each problem, in place of the task's own; "" for none.
        """
        ...

    @staticmethod
    def source(data: str | None) -> str:
        """In one line, where the problems come from; nothing is loaded. Raises UserError where they are not."""
        ...

    def sample(self, num_problems: int, rng: random.Random) -> list[dict[str, str]]:
        """Fresh training problems, decided by `rng` alone."""
        ...

    def held_out(self, num_problems: int, seed: int = 0) -> list[dict[str, str]]:
        """A fixed evaluation set, disjoint from everything that `sample` can return."""
        ...

    def is_correct(self, problem: dict[str, str], completion: str) -> bool:
        """Whether a completion is right: accuracy counts this, whatever a run is rewarded for."""
        ...


TASKS: dict[str, type[Task]] = {"chain_arithmetic": ChainArithmetic, "gsm8k": Gsm8k, "jsonl": Jsonl}


def load_task(settings: TaskSettings) -> Task:
    """The task that some settings name, with its data."""
    return get_task(settings.task, data=settings.data, instruction=settings.instruction)


def describe_data(settings: TaskSettings) -> str:
    """In one line, where a run's problems will come from; nothing is loaded or downloaded.

    Raises:
        ConfigError: there is no such task.
        UserError: `settings.data` is not there.
    """
    return _task_class(settings.task).source(settings.data)


def get_task(name: str, *, data: str | None = None, instruction: str | None = None) -> Task:
    """The task of this name.

    Args:
        data: a local file or folder, for the tasks that take one.
        instruction: added below each problem, in place of the task's own.

    Raises:
        ConfigError: there is none; the line names those there are.
        UserError: its data cannot be had, or cannot be used.
    """
    return _task_class(name)(data, instruction)


def _task_class(name: str) -> type[Task]:
    if name not in TASKS:
        raise ConfigError(f"task = {name!r}: there is no such task; choose from {', '.join(TASKS)}")
    return TASKS[name]
