"""Tasks: where problems come from, and which responses are right.

In: the name of a task, with the data and the instruction of some settings. Out: an object with the members of `Task`. A
problem is a dataset row: a dict with `prompt` and the columns that the reward needs. The prompt is text or messages
(`minicpgd.tasks.data_files.Prompt`). You may add a class to `TASKS`.
"""

import random
from typing import Any, Protocol

from minicpgd.config import TaskSettings
from minicpgd.errors import ConfigError
from minicpgd.tasks.chain_arithmetic import ChainArithmetic
from minicpgd.tasks.jsonl import Gsm8k, Jsonl, Rows
from minicpgd.tasks.procedural import ReasoningGym
from minicpgd.tasks.rewards import RewardFunction


class Task(Protocol):
    """What the training loop needs from a task. `get_task` explains the arguments of the constructor."""

    reward: RewardFunction

    def __init__(self, data: str | None, instruction: str | None) -> None: ...

    @staticmethod
    def source(data: str | None) -> str:
        """Say in one line where the problems come from, without loading them. Raises UserError if there are none."""

    def sample(self, num_problems: int, rng: random.Random) -> Rows:
        """Fresh training problems, which depend on `rng` alone."""

    def held_out(self, num_problems: int, seed: int = 0) -> Rows:
        """A fixed evaluation set, disjoint from everything that `sample` can return."""

    def is_correct(self, problem: dict[str, Any], completion: str) -> bool:
        """Whether a response counts as right in the accuracy. The reward of a run may differ."""


TASKS: dict[str, type[Task]] = {
    "chain_arithmetic": ChainArithmetic, "gsm8k": Gsm8k, "jsonl": Jsonl, "reasoning_gym": ReasoningGym
}  # fmt: skip


def load_task(settings: TaskSettings) -> Task:
    """Load the task that these settings name; see `get_task`."""
    return get_task(settings.task, data=settings.data, instruction=settings.instruction)


def describe_data(settings: TaskSettings) -> str:
    """Say in one line where a run's problems will come from, without loading them.

    Raises:
        ConfigError: there is no such task.
        UserError: there is no such data.
    """
    return _task_class(settings.task).source(settings.data)


def get_task(name: str, *, data: str | None = None, instruction: str | None = None) -> Task:
    """Load the task of this name.

    Args:
        data: a local file or folder, for the tasks that take one.
        instruction: added below each problem, in place of the task's own; "" for none.

    Raises:
        ConfigError: there is no such task.
        UserError: its data cannot be found or used.
    """
    return _task_class(name)(data, instruction)


def _task_class(name: str) -> type[Task]:
    if name not in TASKS:
        raise ConfigError(f"task = {name!r}: there is no such task; choose from {', '.join(TASKS)}")
    return TASKS[name]
