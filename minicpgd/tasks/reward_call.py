"""Call a reward function that somebody else wrote, as TRL's GRPOTrainer would call it, and check what it returns.

In: a function, completions and the other arguments of TRL's contract. Out: a finite number or None for each completion,
or one line that names the function. `rewards.py` explains the contract.
"""

import asyncio
import contextlib
import functools
import inspect
import itertools
import math
import os
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from decimal import Decimal
from numbers import Real
from typing import Any

from minicpgd.errors import UserError, describe_error, short_repr

RewardFunction = Callable[..., Any]

LARGEST = 1e15  # Rewards are summed and squared in float32, whose largest number is 3e38.


def checked_call(name: str, function: RewardFunction, completions: Sequence, /, **others: Any) -> list[float | None]:
    """Call a function on B completions, and check that it returns a finite number or None for each.

    Args:
        name: of the function, for errors.
        function: it may be asynchronous.
        completions: (B,), texts, or lists of messages.
        others: the arguments of TRL's contract besides `completions`.

    Raises:
        UserError: the function raised an error, or returned another number of rewards, or one that is neither a finite
            number nor None. An error of a part of a sum already names the part.
    """
    try:
        returned = _invoke(function, completions=[*completions], **others)
        return _checked(name, returned, completions)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"reward function {name} raised {describe_error(error)}") from error


def _invoke(function: RewardFunction, /, **arguments: Any) -> Any:
    """Call a function with those of the arguments that it takes. Wait for the result if it is asynchronous.

    TRL always passes all arguments. A function that would refuse some of them works here all the same.
    """
    try:
        parameters = [*inspect.signature(function, follow_wrapped=False).parameters.values()]
    except (TypeError, ValueError):  # Some functions that are written in C have no signature.
        parameters = []
    if parameters and all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
        taken = {parameter.name for parameter in parameters}
        arguments = {name: value for name, value in arguments.items() if name in taken}
    returned = function(**arguments)
    return _wait_for(returned) if inspect.isawaitable(returned) else returned


def _wait_for(awaitable: Awaitable) -> Any:
    """The result of a coroutine. The caller may be inside an event loop, as in a notebook."""

    async def result() -> Any:
        return await awaitable

    loop = _event_loop(os.getpid(), threading.get_ident())
    return asyncio.run_coroutine_threadsafe(result(), loop).result()


@functools.cache
def _event_loop(process: int, caller: int) -> asyncio.AbstractEventLoop:
    """The event loop for one calling thread of one process. It runs in a thread of its own.

    It never ends, as in TRL, so a function can keep a semaphore or a network session from one call to the next. A
    coroutine that itself calls an asynchronous reward is another caller, so it does not wait for itself.
    """
    loop = asyncio.new_event_loop()

    def run() -> None:
        asyncio.set_event_loop(loop)
        while True:
            with contextlib.suppress(BaseException):  # A SystemExit in a task also leaves `run_forever`.
                loop.run_forever()

    threading.Thread(target=run, name="minicpgd rewards", daemon=True).start()
    return loop


def name_of(function: RewardFunction) -> str:
    """`module:function`, also for a functools.partial and for an object that can be called."""
    while isinstance(function, functools.partial):
        function = function.func
    return f"{getattr(function, '__module__', '?')}:{getattr(function, '__name__', type(function).__name__)}"


def response_text(completion: Any) -> str:
    """The text of a completion: itself, or what the assistant says in a list of messages. A tool's words do not count.

    The content of a message is text, a list of parts with `text`, or None where the assistant only calls a tool.
    """
    if isinstance(completion, str):
        return completion
    contents = [message.get("content") or "" for message in completion if message.get("role") == "assistant"]
    parts = [[{"text": content}] if isinstance(content, str) else content for content in contents]
    return "".join(part.get("text") or "" for part in itertools.chain(*parts))


def refusal(name: str, reward: Any, completion: Any) -> UserError:
    """The error for a reward that cannot be trained on."""
    pair = f"{short_repr(reward)} for {short_repr(response_text(completion))}"
    return UserError(f"reward function {name} returned {pair}; a finite number is needed, of {LARGEST:g} at most")


def _checked(name: str, returned: Any, completions: Sequence) -> list[float | None]:
    if isinstance(returned, str | bytes | Mapping | Set):
        raise TypeError(f"{type(returned).__name__!r} returned, not a list of numbers")
    rewards = list(itertools.islice(returned, len(completions) + 1))  # A generator may never end.
    if len(rewards) != len(completions):
        count = len(rewards) if len(rewards) < len(completions) else "more"
        counts = f"{count} rewards for {len(completions)} completions"
        raise UserError(f"reward function {name} returned {counts}; it has to return one each")
    numbers = [None if reward is None else _number(reward) for reward in rewards]
    for completion, reward, number in zip(completions, rewards, numbers, strict=True):
        if number is not None and not abs(number) <= LARGEST:
            raise refusal(name, reward, completion)
    return numbers


def _number(reward: Any) -> float:
    """A reward as a float, or NaN. As in TRL, it may be a tensor or an element of an array."""
    try:
        if getattr(reward, "shape", None) == () or getattr(reward, "numel", lambda: 0)() == 1:
            reward = reward.item()
        return float(reward) if isinstance(reward, Real | Decimal) else math.nan
    except Exception:  # 10**400 raises, and so may a class of the user's.
        return math.nan
