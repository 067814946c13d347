r"""Rule-based rewards: functions from completions to numbers, without a model that judges.

In: prompts, completions and the dataset's other columns. Out: one number per completion, or None where a function does
not judge it. The signature is TRL's, so TRL's GRPOTrainer can run these functions, and its functions run here:

    f(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns) -> list[float | None]

A function here may leave out each name that it does not need. It may be asynchronous. You may add functions to
`REWARDS`, or bring your own as `my_rewards:short`.
"""

import importlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from minicpgd.errors import ConfigError, describe_error, did_you_mean, short_repr
from minicpgd.tasks.answers import (
    answer_text,
    boxes,
    final_answer,
    is_solution,
    need_math_verify,
    plain,
    reference_answer,
    stated_answer,
)
from minicpgd.tasks.reward_call import RewardFunction, checked_call, name_of, response_text

_NUMBER = re.compile(r"(?<![\w.)])[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<=[-+−])\d+(?:\.\d+)?")
_AFTER_BOX = re.compile(r"(?:[\s.,$*]|\\\]|\\\))*")  # the end of a sentence or of a formula


def exact_answer(prompts: Sequence, completions: Sequence, answer: Sequence, **_: Any) -> list[float]:
    """The reward of chain_arithmetic: 1.0 where the text after the only `#` is exactly the answer; else 0.0."""
    stated = [final_answer(response_text(completion)) for completion in completions]
    return [float(s == answer_text(a)) for s, a in zip(stated, answer, strict=True)]


def exact(prompts: Sequence, completions: Sequence, answer: Sequence, **_: Any) -> list[float]:
    """1.0 where the final answer and the reference are the same text after `plain`; else 0.0."""
    stated = [stated_answer(response_text(completion)) for completion in completions]
    references = [plain(reference_answer(answer_text(a))) for a in answer]
    return [float(s is not None and plain(s) == r) for s, r in zip(stated, references, strict=True)]


def mathematical(prompts: Sequence, completions: Sequence, answer: Sequence, **_: Any) -> list[float]:
    """1.0 where the final answer has the reference's value (`is_solution`); else 0.0."""
    return [float(is_solution(response_text(c), answer_text(a))) for c, a in zip(completions, answer, strict=True)]


def one_box(prompts: Sequence, completions: Sequence, **_: Any) -> list[float]:
    r"""1.0 where a response has one `\boxed{}`, which is not empty and ends the response; else 0.0."""

    def ends_in_one_box(text: str) -> bool:
        if len(found := boxes(text)) != 1 or text.count(r"\boxed") != 1:
            return False
        start, end = found[0]
        return bool(text[start:end].strip() and _AFTER_BOX.fullmatch(text, end + 1))

    return [float(ends_in_one_box(response_text(completion))) for completion in completions]


def numbers(text: str) -> list[Fraction]:
    """The numbers in a text, as 1,234.5 and -3. In 5-3 the minus is an operation, so the numbers are 5 and 3."""
    return [Fraction(found.replace(",", "").replace("−", "-")) for found in _NUMBER.findall(text)]


def last_number(prompts: Sequence, completions: Sequence, answer: Sequence, **_: Any) -> list[float]:
    """1.0 where the last number in a response is the reference; else 0.0. For models that state no answer.

    Raises:
        ValueError: a reference is not one number.
    """
    return [float(found[-1:] == [reference]) for found, reference in _numbers_beside(completions, answer)]


def number_in_text(prompts: Sequence, completions: Sequence, answer: Sequence, **_: Any) -> list[float]:
    """1.0 where any number in a response is the reference; else 0.0. A policy may learn to list many numbers.

    Raises:
        ValueError: a reference is not one number.
    """
    return [float(reference in found) for found, reference in _numbers_beside(completions, answer)]


def _numbers_beside(completions: Sequence, answers: Sequence) -> Iterator[tuple[list[Fraction], Fraction]]:
    """The numbers in each response, and the one number of its reference."""
    for completion, answer in zip(completions, answers, strict=True):
        reference = reference_answer(answer_text(answer))
        if len(found := numbers(reference)) != 1:
            raise ValueError(f"answer = {short_repr(reference)}: one number is needed; math judges other answers")
        yield numbers(response_text(completion)), found[0]


REWARDS: dict[str, RewardFunction] = {
    "exact": exact, "math": mathematical, "last_number": last_number, "number_in_text": number_in_text,
    "format": one_box,
}  # fmt: skip


def load_reward(text: str) -> RewardFunction:
    """Turn a text such as `math`, `my_rewards:short_and_right` or `math + 0.2*format` into a reward function.

    A sum has parts with `+` between them. A part is a name, or a number, `*` and a name. Where a part's reward is None,
    the other parts count alone. Where all are None, the sum is None.

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

    def weighted_sum(prompts: Sequence, completions: Sequence, **others: Any) -> list[float | None]:
        totals: list[float | None] = [None] * len(completions)
        for factor, name, function in parts:
            rewards = checked_call(name, function, completions, prompts=prompts, **others)
            for i, reward in enumerate(rewards):
                if reward is not None:
                    totals[i] = (totals[i] or 0.0) + factor * reward
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


@dataclass(frozen=True)
class TrainerState:
    """How far the training is. The attributes mean the same as those of transformers' class of this name."""

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    num_train_epochs: int = 0
    log_history: list[dict[str, float]] = field(default_factory=list)
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True


@dataclass
class RewardContext:
    """What a reward function gets besides the dataset's columns, and what it logs. A context is for one call."""

    completion_ids: Sequence[list[int]] | None = None
    """The token ids of each completion, without padding. None: an empty list for each."""
    trainer_state: Any = TrainerState()
    """Our TrainerState, or that of transformers, which has more attributes."""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """Filled by log_metric: every number that was logged under a name. TRL logs their mean."""
    extra: dict[str, list] = field(default_factory=dict)
    """Filled by log_extra: one value per completion for each column, of any type."""

    def log_metric(self, name: str, value: float) -> None:
        """Log a number of this batch."""
        self.metrics.setdefault(name, []).append(float(value))

    def log_extra(self, column: str, values: Sequence) -> None:
        """Add a column, with one value per completion, to the table of samples."""
        self.extra.setdefault(column, []).extend(values)


def call_reward(
    function: RewardFunction, rows: Sequence[dict], completions: Sequence[str], *, context: RewardContext | None = None
) -> list[float]:
    """Call a reward function, as TRL calls it, on B completions of B dataset rows, and check the B rewards.

    If prompts are lists of messages, the function gets each completion as a list with the assistant's message.

    Returns:
        B numbers. NaN stands for None: no reward function judged this response, and its advantage has to be 0.

    Raises:
        UserError: the function raised an error, or returned another number of rewards, or one that is neither a finite
            number nor None. For a sum, the line names the part.
    """
    context = context or RewardContext()
    columns = {key: [row[key] for row in rows] for key in rows[0] if key not in ("completion", "completion_ids")}
    prompts = columns.pop("prompt")
    responses: list[Any] = [*completions]
    if not isinstance(prompts[0], str):
        responses = [[{"role": "assistant", "content": text}] for text in completions]
    others = columns | {
        "completion_ids": context.completion_ids or [[] for _ in completions],
        "trainer_state": context.trainer_state,
        "log_extra": context.log_extra,
        "log_metric": context.log_metric,
    }
    rewards = checked_call(name_of(function), function, responses, prompts=prompts, **others)
    return [math.nan if reward is None else reward for reward in rewards]
