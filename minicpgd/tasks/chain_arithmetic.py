"""Chain arithmetic: the task that the embedded model has been pretrained for.

A problem is left-to-right arithmetic modulo 10, with 4 to 8 operands and `+ - *`:

    prompt      7+5*3=
    worked      7+5=2,2*3=6#6       each step, then the answer
    guess       #6                  the answer at once

A response is right if the digit after its only `#` is right. A tiny model can compute each step, but not a whole chain
at once. It first solves a third of the problems. A policy that learns from a 0/1 reward to write the steps solves
nearly all of them.

In: a random generator. Out: problems as dataset rows. You may change `OPERANDS`, and then have to pretrain again.
"""

import itertools
import operator
import random
import zlib
from functools import cache

from minicpgd.errors import ConfigError
from minicpgd.tasks.answers import final_answer
from minicpgd.tasks.rewards import exact_answer

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
OPERANDS = (4, 8)


def make_chain(rng: random.Random) -> tuple[list[int], list[str]]:
    """4 to 8 digits and the operations between them, each uniform."""
    length = rng.randint(*OPERANDS)
    return [rng.randrange(10) for _ in range(length)], [rng.choice("+-*") for _ in range(length - 1)]


def work(digits: list[int], operations: list[str]) -> tuple[str, int]:
    """The worked steps `7+5=2,2*3=6` and the final digit."""
    value, steps = digits[0], []
    for symbol, digit in zip(operations, digits[1:], strict=True):
        result = OPERATIONS[symbol](value, digit) % 10
        steps.append(f"{value}{symbol}{digit}={result}")
        value = result
    return ",".join(steps), value


def make_problem(rng: random.Random) -> dict[str, str]:
    """A row: `prompt`, its `answer`, and `worked`, the response with each step."""
    digits, operations = make_chain(rng)
    steps, value = work(digits, operations)
    prompt = str(digits[0]) + "".join(o + str(d) for o, d in zip(operations, digits[1:], strict=True)) + "="
    return {"prompt": prompt, "answer": str(value), "worked": f"{steps}#{value}"}


def is_held_out(prompt: str, one_in: int = 16) -> bool:
    """One prompt in 16 is never trained on. A checksum of the prompt decides which, so nobody has to keep a list."""
    return zlib.crc32(prompt.encode()) % one_in == 0


@cache  # Every evaluation asks for the same ones, and making 256 takes a tenth of a second.
def _held_out(num_problems: int, seed: int) -> list[dict[str, str]]:
    rng = random.Random(f"held out {seed}")
    problems = (make_problem(rng) for _ in itertools.count())
    return list(itertools.islice((p for p in problems if is_held_out(p["prompt"])), num_problems))


class ChainArithmetic:
    """The task of this module. `minicpgd.tasks.Task` describes the members."""

    reward = staticmethod(exact_answer)

    def __init__(self, data: str | None = None, instruction: str | None = None):
        for name, value in (("data", data), ("instruction", instruction)):
            if value is not None:
                raise ConfigError(
                    f"{name} = {value!r}: chain_arithmetic makes its own problems; leave it out, or add --task jsonl"
                )

    @staticmethod
    def source(data: str | None) -> str:
        """Problems are made when they are needed."""
        return "made on the spot"

    def sample(self, num_problems: int, rng: random.Random) -> list[dict[str, str]]:
        """Training problems: never one that is held out."""
        problems = (make_problem(rng) for _ in itertools.count())
        return list(itertools.islice((p for p in problems if not is_held_out(p["prompt"])), num_problems))

    def held_out(self, num_problems: int, seed: int = 0) -> list[dict[str, str]]:
        """Evaluation problems: the same ones for the same seed. Training never contains them."""
        return [dict(problem) for problem in _held_out(num_problems, seed)]

    def is_correct(self, problem: dict[str, str], completion: str) -> bool:
        """The digit after the only `#` is the answer."""
        return final_answer(completion) == problem["answer"]
