r"""Rule-based rewards: functions from completions to numbers, without a model that judges.

In: prompts, completions and the dataset's other columns. Out: one number per completion. The signature is TRL's,
`f(prompts, completions, **columns) -> list[float]`, so TRL's GRPOTrainer can run these functions, and its functions run
here. You may add functions to `REWARDS`, or bring your own as `my_rewards:short`.
"""

import contextlib
import importlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from numbers import Real
from typing import Any

from minicpgd.errors import ConfigError, UserError, describe_error, did_you_mean, short_repr
from minicpgd.tasks.answers import (
    boxes,
    final_answer,
    is_solution,
    need_math_verify,
    plain,
    reference_answer,
    stated_answer,
)

RewardFunction = Callable[..., list[float]]

LARGEST = 1e15  # Rewards are summed and squared in float32, whose largest number is 3e38.
_AFTER_BOX = re.compile(r"(?:[\s.,$*]|\\\]|\\\))*")  # the end of a sentence or of a formula


def exact_answer(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """The reward of chain_arithmetic: 1.0 where `final_answer` is exactly the answer; else 0.0."""
    return [float(final_answer(c) == a) for c, a in zip(completions, answer, strict=True)]


def exact(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1.0 where the final answer and the reference are the same text after `plain`; else 0.0."""
    stated, references = map(stated_answer, completions), map(reference_answer, answer)
    return [float(s is not None and plain(s) == plain(r)) for s, r in zip(stated, references, strict=True)]


def mathematical(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1.0 where the final answer has the reference's value (`is_solution`); else 0.0."""
    return [float(is_solution(c, a)) for c, a in zip(completions, answer, strict=True)]


def one_box(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    r"""1.0 where a response has one `\boxed{}`, which is not empty and ends the response; else 0.0."""

    def ends_in_one_box(text: str) -> bool:
        if len(found := boxes(text)) != 1 or text.count(r"\boxed") != 1:
            return False
        start, end = found[0]
        return bool(text[start:end].strip() and _AFTER_BOX.fullmatch(text, end + 1))

    return [float(ends_in_one_box(completion)) for completion in completions]


REWARDS: dict[str, RewardFunction] = {"exact": exact, "math": mathematical, "format": one_box}


def load_reward(text: str) -> RewardFunction:
    """Turn a text such as `math`, `my_rewards:short_and_right` or `math + 0.2*format` into a reward function.

    A sum has parts with `+` between them. A part is a name, or a number, `*` and a name.

    Raises:
        ConfigError: a weight is not a number, a name is unknown, a module cannot be imported or has no such function,
            or `math` has no math-verify.
    """
    parts = []
    for part in text.split("+"):
        weight, star, name = (piece.strip() for piece in part.rpartition("*"))
        try:
            factor = float(weight) if star else 1.0
        except ValueError:
            factor = math.nan
        if not math.isfinite(factor):
            hint = "write a number, * and a name, with + between the parts even before a negative number"
            raise ConfigError(f"reward = {text!r}: {weight!r} is not a weight; {hint}, as 'math + 0.2*format'")
        parts.append((factor, name, _find(name, text)))
    if len(parts) == 1 and parts[0][0] == 1.0:
        return parts[0][2]

    def weighted_sum(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        totals = [0.0] * len(completions)
        for factor, name, function in parts:
            with _errors_of(name):
                returned = function(prompts=prompts, completions=list(completions), **columns)
                rewards = _checked_numbers(name, returned, completions)
            totals = [total + factor * reward for total, reward in zip(totals, rewards, strict=True)]
        return totals

    weighted_sum.__name__ = text  # TRL logs a reward under this name.
    return weighted_sum


def _find(name: str, text: str) -> RewardFunction:
    if name == "math":
        need_math_verify()
    if name in REWARDS:
        return REWARDS[name]
    module_name, colon, function_name = name.partition(":")
    if not colon:
        hint = f"{did_you_mean(name, REWARDS)}choose from {', '.join(REWARDS)}, or write your own as module:function"
        raise ConfigError(f"reward = {text!r}: there is no reward {name!r}; {hint}, e.g. my_rewards:short_and_right")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:  # A module runs its own code. An impossible name raises ValueError.
        hint = "; is the module's folder on PYTHONPATH?" if isinstance(error, ImportError | ValueError) else ""
        raise ConfigError(f"reward = {text!r}: {describe_error(error)}{hint}") from error
    if not callable(function):
        raise ConfigError(f"reward = {text!r}: {function_name} is not a function")
    return function


def call_reward(function: RewardFunction, rows: Sequence[dict], completions: Sequence[str]) -> list[float]:
    """Call a reward function on B completions of B dataset rows, and check that it returns B finite numbers.

    Raises:
        UserError: the function raised an error, or returned another number of rewards, or one that is not a finite
            number. For a sum, the line names the part.
    """
    name = f"{getattr(function, '__module__', '?')}:{getattr(function, '__name__', type(function).__name__)}"
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    prompts = columns.pop("prompt")
    with _errors_of(name):
        returned = function(prompts=prompts, completions=list(completions), **columns)
        return _checked_numbers(name, returned, completions)


@contextlib.contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """Turn whatever a reward function raises into one line with its name."""
    try:
        yield
    except UserError:  # It already names the function, or the part of a sum.
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"reward function {name} raised {describe_error(error)}") from error


def _checked_numbers(name: str, returned: Any, completions: Sequence[str]) -> list[float]:
    if isinstance(returned, str | bytes | Mapping | Set):
        raise TypeError(f"{type(returned).__name__!r} returned, not a list of numbers")
    rewards = list(itertools.islice(returned, len(completions) + 1))  # A generator may never end.
    if len(rewards) != len(completions):
        count = len(rewards) if len(rewards) < len(completions) else "more"
        counts = f"{count} rewards for {len(completions)} completions"
        raise UserError(f"reward function {name} returned {counts}; it has to return one each")
    numbers = [_number(reward) for reward in rewards]
    for completion, reward, number in zip(completions, rewards, numbers, strict=True):
        if not abs(number) <= LARGEST:
            pair, wanted = (
                f"{short_repr(reward)} for {short_repr(completion)}",
                f"a finite number is needed, of {LARGEST:g}",
            )
            raise UserError(f"reward function {name} returned {pair}; {wanted} at most")
    return numbers


def _number(reward: Any) -> float:
    """A reward as a float, or NaN. As in TRL, it may be a tensor or an element of an array."""
    if getattr(reward, "numel", lambda: 0)() == 1:  # A tensor has it.
        reward = reward.item()
    try:
        return float(reward) if isinstance(reward, Real) else math.nan
    except Exception:  # 10**400 raises, and so may a class of the user's.
        return math.nan
