"""Rule-based rewards: a completion goes in, a number comes out, no model judges.

A reward function has the shape of TRL's: `f(prompts, completions, **columns) -> list[float]`, one number per
completion, where the columns are those of the dataset beside `prompt`. One written for TRL's GRPOTrainer runs here
unchanged, and the other way round.
"""

import importlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from minicpgd.errors import ConfigError, UserError

RewardFunction = Callable[..., list[float]]

_FINAL_ANSWER = re.compile(r"[^#]*#([^#]*)")


def final_answer(completion: str) -> str | None:
    """What stands after the one `#` of a completion, stripped; None where there is no `#`, or more than one."""
    match = _FINAL_ANSWER.fullmatch(completion.strip())
    return match[1].strip() if match else None


def exact_answer(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1.0 where `final_answer` is the answer, to the letter; else 0.0."""
    return [float(final_answer(c) == a) for c, a in zip(completions, answer, strict=True)]


def load_reward(name: str) -> RewardFunction:
    """`module:function` to the function.

    Raises:
        ConfigError: the name has another form, the module cannot be imported, or holds no such function.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon:
        raise ConfigError(f"reward = {name!r}: write it as module:function, e.g. my_rewards:short_and_right")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"reward = {name!r}: {error}; is the module's folder on PYTHONPATH?") from error
    if not callable(function):
        raise ConfigError(f"reward = {name!r}: {function_name} is not a function")
    return function


def call_reward(function: RewardFunction, rows: Sequence[dict], completions: Sequence[str]) -> list[float]:
    """Call a reward function on B completions of B dataset rows, and check what it returns.

    Returns:
        B finite floats.

    Raises:
        UserError: the function raised, or returned another number of rewards, or one that is not a finite number.
    """
    name = f"{getattr(function, '__module__', '?')}:{getattr(function, '__name__', type(function).__name__)}"
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    try:
        rewards = list(function(columns.pop("prompt"), list(completions), **columns))
    except Exception as error:
        raise UserError(f"reward function {name} raised {type(error).__name__}: {error}") from error
    if len(rewards) != len(completions):
        raise UserError(
            f"reward function {name} returned {len(rewards)} rewards for {len(completions)} completions; "
            "it has to return one each"
        )
    for completion, reward in zip(completions, rewards, strict=True):
        if not isinstance(reward, (int, float)) or not math.isfinite(reward):
            raise UserError(f"reward function {name} returned {reward!r} for {completion!r}; a finite number is needed")
    return [float(reward) for reward in rewards]
