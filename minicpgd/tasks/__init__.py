"""Tasks: where problems come from, and how a response is rewarded.

In: the name of a task, and perhaps a file of problems. Out: problems as dataset rows, and rewards as numbers. A reward
function has TRL's signature, so you may bring your own. This package needs no torch.
"""

from minicpgd.tasks.answers import is_solution
from minicpgd.tasks.rewards import REWARDS, RewardFunction, call_reward, load_reward
from minicpgd.tasks.task import TASKS, Task, describe_data, get_task, load_task

__all__ = [
    "REWARDS", "TASKS", "RewardFunction", "Task", "call_reward", "describe_data", "get_task", "is_solution",
    "load_reward", "load_task",
]  # fmt: skip
