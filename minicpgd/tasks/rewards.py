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

from minicpgd.errors import ConfigError, MissingPackageError, UserError, describe_error, did_you_mean, short_repr
from minicpgd.tasks.math_answers import UnavailableError, same_value

RewardFunction = Callable[..., list[float]]

LARGEST = 1e15  # Rewards are summed and squared in float32, whose largest number is 3e38.
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)  # `\\.` skips `\{` and `\}`, which are characters in LaTeX.
_AFTER_BOX = re.compile(r"(?:[\s.,$*]|\\\]|\\\))*")  # the end of a sentence or of a formula
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")


def final_answer(completion: str) -> str | None:
    """The text after the only `#` of a completion, stripped; None if there is no `#`, or more than one."""
    parts = completion.split("#")
    return parts[1].strip() if len(parts) == 2 else None


def exact_answer(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """The reward of chain_arithmetic: 1.0 where `final_answer` is exactly the answer; else 0.0."""
    return [float(final_answer(c) == a) for c, a in zip(completions, answer, strict=True)]


def boxes(text: str) -> list[tuple[int, int]]:
    r"""(start, end) of the content of each closed `\boxed{...}`, in the order of the starts."""
    found, opened = [], []
    for match in _BRACES.finditer(text):
        if match[0].endswith("{") and match[0] != r"\{":
            opened.append((match.end(), len(match[0]) > 1))
        elif match[0] == "}" and opened:
            start, is_box = opened.pop()
            if is_box:
                found.append((start, match.start()))
    return sorted(found)


def stated_answer(completion: str) -> str | None:
    r"""The final answer: in the last `\boxed{}`, else on the line of the last `####`, else after the only `#`."""
    return _marked(completion) or final_answer(completion) or None


def reference_answer(answer: str) -> str:
    r"""The final answer in a dataset's column, which may contain the reasoning, as `... #### 72` or `\boxed{72}`."""
    return _marked(answer) or answer


def _marked(text: str) -> str:
    if found := boxes(text):
        start, end = found[-1]
        return text[start:end].strip()
    return text.rpartition("####")[2].strip().partition("\n")[0].strip() if "####" in text else ""


def plain(answer: str) -> str:
    """An answer without outer spaces, a final period, `$` and thousands commas. They do not change it."""
    answer = answer.strip().removesuffix(".").removeprefix(r"\$").strip("$").strip()
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer


def is_solution(completion: str, answer: str) -> bool:
    r"""Whether a completion's final answer equals the reference, exactly or in value, as `1/2`, `0.5`, `\frac{1}{2}`.

    Raises:
        MissingPackageError: math-verify is needed, and is not installed.
    """
    if (stated := stated_answer(completion)) is None:
        return False
    stated, reference = plain(stated), plain(reference_answer(answer))
    try:
        return stated == reference or same_value(reference, stated)
    except UnavailableError as error:
        install = "pip install 'minicpgd[math]'"
        raise MissingPackageError(f"mathematical answers need math-verify: {install} ({error})") from error


def need_math_verify() -> None:
    """Raise MissingPackageError before the first rollout, if `is_solution` would raise it later."""
    is_solution("#1.0", "1")


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
