"""Do two final answers, such as 1/2 and 0.5, have the same value? math-verify compares them, in a second process.

A response is untrusted text. `9^{9^9}` keeps sympy busy for hours, and deep nesting overflows the stack. math-verify's
own timeouts are alarm signals, which only the main thread can set. So a second process compares, and the kernel limits
its processor time and memory. A comparison that ends this process counts as "not equal". The limit is not wall time,
so a busy machine gives the same rewards as an idle one. The second process runs this file as a program. The file
imports nothing of minicpgd, so the process starts fast. math-verify takes a difference below 1e-15 for zero, so 1/2^98
would equal 1/2^99. `_strict_numbers` prevents that.

In: two final answers as text. Out: whether they are equal. You may change the limits.
"""

import contextlib
import functools
import json
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

SECONDS = 2.0  # processor time of one comparison, which usually takes 5 ms
GIBIBYTES = 2  # address space of the process
LONGEST = 200  # characters of an answer
TOLERANCE = 5e-6  # relative difference of a decimal from a value that is no decimal, as 0.333333 from 1/3


class UnavailableError(Exception):
    """math-verify is not installed, or cannot be imported."""


@functools.lru_cache(maxsize=8192)  # Responses to one prompt often agree. The accuracy repeats the reward's questions.
def same_value(reference: str, answer: str) -> bool:
    """Whether math-verify finds that two final answers, in LaTeX or plain text, have the same value.

    The order matters: `x = 3` matches the reference `3`, but `3` may not match a reference that is an equation. An
    answer is not equal if it cannot be parsed, has more than LONGEST characters, or exceeds SECONDS or GIBIBYTES.

    Raises:
        UnavailableError: math-verify is not there.
    """
    return max(len(reference), len(answer)) <= LONGEST and _judge.ask(reference, answer)


class _Judge:
    """The second process. It starts at the first question, and again after a question that ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: Popen[str] | None = None

    def ask(self, reference: str, answer: str) -> bool:
        with self._lock:
            # After a fork, poll() returns 0 in the child. So the child starts a process of its own.
            if self._process is None or self._process.poll() is not None:
                self._process = _start()
            reply = _exchange(self._process, json.dumps([reference, answer]))
            if not reply:
                self._process.wait()
            return reply == "yes"


_judge = _Judge()


def _start() -> "Popen[str]":
    command = [sys.executable, "-P", __file__]  # -P: no file beside this one can hide a library.
    env = os.environ | {"PYTHONHASHSEED": "0"}  # sympy iterates over sets.
    # In its own session the process does not get Ctrl-C. The run gets it, and finishes its step.
    process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True, env=env, start_new_session=True)
    reply = _exchange(process, str(SECONDS))
    if reply != "ready":
        process.kill()
        process.wait()
        raise UnavailableError(reply or "it cannot be started")
    return process


def _exchange(process: "Popen[str]", line: str) -> str:
    """Write a line and read the reply. A process that has ended replies ""."""
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        print(line, file=process.stdin, flush=True)
    return process.stdout.readline().rstrip("\n")


def _strict_numbers(equal: Callable[..., bool]) -> Callable[..., bool]:
    """The function of math-verify that compares two numbers, with a relative tolerance instead of an absolute one."""
    from sympy import Float, MatrixBase, MatrixExpr, Rational, simplify

    def strictly_equal(a: Any, b: Any, *rounding: int) -> bool:
        if isinstance(a, MatrixBase | MatrixExpr) or isinstance(b, MatrixBase | MatrixExpr):
            return equal(a, b, *rounding)  # It calls this function for the elements.
        with contextlib.suppress(Exception):  # After False, math-verify compares symbolically, which is exact.
            is_rounded = bool(a.atoms(Float)) != bool(b.atoms(Float))
            exact, other = (v.xreplace({n: Rational(str(n)) for n in v.atoms(Float)}).doit() for v in (a, b))
            difference = exact - other
            if difference.free_symbols:
                return bool(a.atoms(Float) | b.atoms(Float)) and simplify(difference) == 0
            if difference == 0 or difference.is_infinite or (difference.is_Rational and not is_rounded):
                return difference == 0
            limit = abs(exact).evalf(50) * (TOLERANCE if is_rounded else 1e-30)
            return bool(abs(difference).evalf(50) <= limit) and (not is_rounded or equal(a, b, *rounding))
        return False

    return strictly_equal


def _serve() -> None:
    """Reply "yes" or "no" to each line [reference, answer] from standard input, until it ends."""
    replies, sys.stdout = sys.stdout, sys.stderr  # A library may print.
    seconds = float(sys.stdin.readline())
    try:
        from latex2sympy2_extended.math_normalization import NormalizationConfig
        from math_verify import LatexExtractionConfig, grader, parse, verify
        from sympy.core.random import seed

        grader.sympy_numeric_eq = _strict_numbers(grader.sympy_numeric_eq)
    except Exception as error:
        print(" ".join(str(error).split()), file=replies, flush=True)
        return
    logging.disable()
    for limit, value in ((resource.RLIMIT_AS, GIBIBYTES << 30), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # macOS cannot limit the address space.
            resource.setrlimit(limit, (value, value))

    # math-verify would remove units. Its list has the letters c, d, g, h, l, m, o, s and t, so 2t would equal 2.
    rules = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    boxed = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=rules)]

    def verdict(*answers: str) -> str:
        seed(0)  # sympy compares some expressions at random numbers.
        reference, answer = (parse(rf"\boxed{{{answer}}}", boxed, parsing_timeout=None) for answer in answers)
        # With allow_set_relation_comp, `x < 3` answers `(-\infty, 3)`.
        return "yes" if verify(reference, answer, timeout_seconds=None, allow_set_relation_comp=True) else "no"

    verdict("1/2", r"\frac{1}{2}")  # The first comparison loads modules, which takes time.
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # Nothing handles its signal, so it ends the process.
        print(verdict(*json.loads(line)), file=replies, flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    _serve()
