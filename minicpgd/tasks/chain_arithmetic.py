"""Chain arithmetic: think step by step, or guess.

Left-to-right arithmetic modulo 10, with 4 to 8 operands and `+ - *`:

    prompt      7+5*3=
    worked      7+5=2,2*3=6#6       each step spelled out, then the answer
    guess       #6                  the answer at once

Both are right if the digit after the one `#` is. A tiny model can do each step, but not the whole chain in its head;
so a policy that discovers, from a 0/1 reward alone, that writing more is worth it goes from a third of the problems
right to nearly all of them.
"""

import operator
import random
import zlib

from minicpgd.errors import ConfigError
from minicpgd.tasks.rewards import exact_answer, final_answer

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
    """A row: `prompt`, its `answer`, and `worked`, the response that spells out each step."""
    digits, operations = make_chain(rng)
    steps, value = work(digits, operations)
    prompt = str(digits[0]) + "".join(o + str(d) for o, d in zip(operations, digits[1:], strict=True)) + "="
    return {"prompt": prompt, "answer": str(value), "worked": f"{steps}#{value}"}


def is_held_out(prompt: str) -> bool:
    """One prompt in 16 is never trained on; its own letters decide which, so no list has to be kept."""
    return zlib.crc32(prompt.encode()) % 16 == 0


class ChainArithmetic:
    """The task of this module; see `minicpgd.tasks.Task` for what each member promises."""

    reward = staticmethod(exact_answer)

    def __init__(self, data: str | None = None, instruction: str | None = None):
        for name, value in (("data", data), ("instruction", instruction)):
            if value is not None:
                raise ConfigError(f"{name} = {value!r}: chain_arithmetic makes its own problems; leave it out")

    @staticmethod
    def source(data: str | None) -> str:
        """None are needed."""
        return "made on the spot"

    def sample(self, num_problems: int, rng: random.Random) -> list[dict[str, str]]:
        """Training problems: never one that is held out."""
        return self._draw(num_problems, rng, held_out=False)

    def held_out(self, num_problems: int, seed: int = 0) -> list[dict[str, str]]:
        """Evaluation problems: the same ones for the same seed, none of which training can meet."""
        return self._draw(num_problems, random.Random(f"held out {seed}"), held_out=True)

    def is_correct(self, problem: dict[str, str], completion: str) -> bool:
        """The digit after the one `#` is the answer."""
        return final_answer(completion) == problem["answer"]

    def _draw(self, num_problems: int, rng: random.Random, *, held_out: bool) -> list[dict[str, str]]:
        problems: list[dict[str, str]] = []
        while len(problems) < num_problems:
            problem = make_problem(rng)
            if is_held_out(problem["prompt"]) is held_out:
                problems.append(problem)
        return problems
