r"""Rule-based rewards: a completion goes in, a number comes out, no model judges.

A reward function has the shape of TRL's: `f(prompts, completions, **columns) -> list[float]`, one number per
completion, where the columns are those of the dataset beside `prompt`. One written for TRL's GRPOTrainer runs here
unchanged, and the other way round.

`REWARDS` are those that ship; `load_reward` reads `math`, `my_rewards:short`, and sums by weight of such.
"""

import importlib
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence, Set
from numbers import Real
from typing import Any

from minicpgd.errors import ConfigError, MissingPackageError, UserError, describe_error, did_you_mean, short_repr
from minicpgd.tasks.math_answers import UnavailableError, same_value

RewardFunction = Callable[..., list[float]]

LARGEST = 1e15  # rewards are summed and squared in float32, which ends at 3e38
_FINAL_ANSWER = re.compile(r"[^#]*#([^#]*)")
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)  # `\\.` steps over `\{` and `\}`, which are letters
_AFTER_BOX = re.compile(r"(?:[\s.,$*]|\\\]|\\\))*")  # what may close a sentence or a formula
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")


def final_answer(completion: str) -> str | None:
    """What stands after the one `#` of a completion, stripped; None where there is no `#`, or more than one."""
    match = _FINAL_ANSWER.fullmatch(completion.strip())
    return match[1].strip() if match else None


def exact_answer(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1.0 where `final_answer` is the answer, to the letter; else 0.0. What chain_arithmetic is rewarded with."""
    return [float(final_answer(c) == a) for c, a in zip(completions, answer, strict=True)]


def boxes(text: str) -> list[tuple[int, int]]:
    r"""(start, end) of what each `\boxed{...}` holds, in the order they open; one that never closes is none."""
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
    r"""The final answer: in the last `\boxed{}`, else on the line of the last `####`, else after the one `#`."""
    return _marked(completion) or final_answer(completion) or None


def reference_answer(answer: str) -> str:
    r"""The final answer of a dataset's row, which may come with its reasoning, as `... #### 72` or `\boxed{72}`."""
    return _marked(answer) or answer


def _marked(text: str) -> str:
    if found := boxes(text):
        start, end = found[-1]
        return text[start:end].strip()
    return text.rpartition("####")[2].strip().partition("\n")[0].strip() if "####" in text else ""


def plain(answer: str) -> str:
    """An answer without what does not change it: outer spaces, a trailing period, `$`, thousands commas."""
    answer = answer.strip().removesuffix(".").removeprefix(r"\$").strip("$").strip()
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer


def is_solution(completion: str, answer: str) -> bool:
    r"""Whether a completion's final answer is the reference, to the letter or in value, as `1/2`, `0.5`, `\frac{1}{2}`.

    Raises:
        MissingPackageError: math-verify is needed, and is not installed.
    """
    stated = stated_answer(completion)
    if stated is None:
        return False
    stated, reference = plain(stated), plain(reference_answer(answer))
    try:
        return stated == reference or same_value(reference, stated)
    except UnavailableError as error:
        install = "pip install 'minicpgd[math]'"
        raise MissingPackageError(f"mathematical answers need math-verify: {install} ({error})") from error


def need_math_verify() -> None:
    """Find out now, and not after the first rollout, whether `is_solution` can work. Raises MissingPackageError."""
    is_solution("#1.0", "1")


def exact(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1.0 where the final answer is the reference, to the letter, but for what `plain` takes away; else 0.0."""
    stated = [stated_answer(completion) for completion in completions]
    references = [plain(reference_answer(a)) for a in answer]
    return [float(s is not None and plain(s) == r) for s, r in zip(stated, references, strict=True)]


def mathematical(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1.0 where the final answer has the reference's value (`is_solution`); else 0.0."""
    return [float(is_solution(c, a)) for c, a in zip(completions, answer, strict=True)]


def one_box(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    r"""1.0 where a response has one `\boxed{}`, it holds something, and ends the response; else 0.0."""

    def follows(text: str) -> bool:
        found = boxes(text)
        return (
            len(found) == text.count(r"\boxed") == 1
            and bool(text[slice(*found[0])].strip())
            and _AFTER_BOX.fullmatch(text, found[0][1] + 1) is not None
        )

    return [float(follows(completion)) for completion in completions]


REWARDS: dict[str, RewardFunction] = {"exact": exact, "math": mathematical, "format": one_box}


def load_reward(text: str) -> RewardFunction:
    """What is written as `math`, `my_rewards:short_and_right`, or `math + 0.2*format`, to a reward function.

    A sum has parts with `+` between them; a part is a name, or a number, `*` and a name.

    Raises:
        ConfigError: a weight that is no number, a name that is not known, a module that cannot be imported or holds no
            such function, or `math` without math-verify.
    """
    parts = []
    for part in text.split("+"):
        weight, star, name = (piece.strip() for piece in part.rpartition("*"))
        parts.append((_weight(weight, text) if star else 1.0, name, _find(name, text)))
    if len(parts) == 1 and parts[0][0] == 1.0:
        return parts[0][2]

    def weighted_sum(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        rows = [
            dict(zip(("prompt", *columns), row, strict=True)) for row in zip(prompts, *columns.values(), strict=True)
        ]
        totals = [0.0] * len(completions)
        for weight, name, function in parts:
            rewards = call_reward(function, rows, completions, name)
            totals = [total + weight * reward for total, reward in zip(totals, rewards, strict=True)]
        return totals

    weighted_sum.__name__ = text  # TRL logs a reward under this
    return weighted_sum


def _weight(weight: str, text: str) -> float:
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(
            f"reward = {text!r}: {weight!r} is not a weight; write a number, * and a name, with + between the parts "
            "even before a negative number, as 'math + 0.2*format'"
        )
    return value


def _find(name: str, text: str) -> RewardFunction:
    if name in REWARDS:
        if name == "math":
            need_math_verify()
        return REWARDS[name]
    module_name, colon, function_name = name.partition(":")
    if not colon:
        raise ConfigError(
            f"reward = {text!r}: there is no reward {name!r}; {did_you_mean(name, REWARDS)}"
            f"choose from {', '.join(REWARDS)}, or write your own as module:function, e.g. my_rewards:short_and_right"
        )
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, ValueError) as error:  # ValueError: no module name at all
        raise ConfigError(f"reward = {text!r}: {error}; is the module's folder on PYTHONPATH?") from error
    except AttributeError as error:
        raise ConfigError(f"reward = {text!r}: {error}") from error
    except (Exception, SystemExit) as error:  # the module's own, a syntax error say
        raise ConfigError(f"reward = {text!r}: {describe_error(error)}") from error
    if not callable(function):
        raise ConfigError(f"reward = {text!r}: {function_name} is not a function")
    return function


def call_reward(
    function: RewardFunction, rows: Sequence[dict], completions: Sequence[str], name: str | None = None
) -> list[float]:
    """Call a reward function on B completions of B dataset rows, and check what it returns.

    Args:
        name: the function's name in messages; by default `module:function`.

    Returns:
        B finite floats.

    Raises:
        UserError: the function raised, or returned another number of rewards, or one that is not a finite number. For
            a sum, the line names the part.
    """
    name = name or f"{getattr(function, '__module__', '?')}:{getattr(function, '__name__', type(function).__name__)}"
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    try:
        returned = function(prompts=columns.pop("prompt"), completions=list(completions), **columns)
        if isinstance(returned, str | bytes | Mapping | Set):
            raise TypeError(f"{type(returned).__name__!r} returned, not a list of numbers")
        rewards = list(itertools.islice(returned, len(completions) + 1))  # A generator may never end.
        numbers = [_number(reward) for reward in rewards]
    except UserError:  # A part of a sum has already been reported under its own name.
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"reward function {name} raised {describe_error(error)}") from error
    if len(rewards) != len(completions):
        count = len(rewards) if len(rewards) < len(completions) else "more"
        raise UserError(
            f"reward function {name} returned {count} rewards for {len(completions)} completions; it has to return one "
            "each"
        )
    for completion, reward, number in zip(completions, rewards, numbers, strict=True):
        if not abs(number) <= LARGEST:
            raise UserError(
                f"reward function {name} returned {short_repr(reward)} for {short_repr(completion)}; "
                f"a finite number is needed, of {LARGEST:g} at most"
            )
    return numbers


def _number(reward: Any) -> float:
    """A reward as a float, or NaN. As in TRL, it may be a tensor or an element of an array."""
    if getattr(reward, "numel", lambda: 0)() == 1:  # a tensor
        reward = reward.item()
    try:
        return float(reward) if isinstance(reward, Real) else math.nan
    except Exception:  # 10**400 raises, and so may a class of the user's.
        return math.nan
