"""Is 1/2 the same as 0.5? In: two final answers as text. Out: whether math-verify finds them equal.

A response is text that nobody has checked, and computer algebra takes what it is given: `9^{9^9}` keeps sympy busy for
hours, and deep nesting overflows the stack. math-verify's own timeouts are alarm signals, which no thread but the main
one may set. So the comparing is done by another process, with a limit of processor time and one of memory that the
kernel keeps; a question it dies of is answered "not equal". The limit is processor time, not time on the clock, so
that a busy machine rewards like an idle one.

This file is that other process, too, where it is run as a program. So it imports nothing of minicpgd, which would load
torch there.
"""

import contextlib
import functools
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading

SECONDS = 2.0  # of processor time for one comparison; a usual one takes 5 ms
GIBIBYTES = 2  # of address space
LONGEST = 200  # characters of an answer


class UnavailableError(Exception):
    """math-verify is not installed, or cannot be imported."""


@functools.lru_cache(maxsize=8192)  # a group's responses often agree, and accuracy asks what the reward has asked
def same_value(reference: str, answer: str) -> bool:
    """Whether two final answers, in LaTeX or plain, have the same value, as math-verify sees it.

    Not symmetric: where the reference is `3`, `x = 3` will do; where it is an equation, `3` may not. What cannot be
    parsed, has more than LONGEST characters, or exceeds SECONDS or GIBIBYTES, is not equal.

    Raises:
        UnavailableError: the library is not there.
    """
    if max(len(reference), len(answer)) > LONGEST:
        return False
    return _judge.ask(reference, answer)


class _Judge:
    """The other process: started at the first question, and again after one that it did not survive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, reference: str, answer: str) -> bool:
        """Raises UnavailableError."""
        with self._lock:
            # After a fork, poll() says 0 to the child, which so starts its own: it would read its parent's replies.
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            reply = _say(self._process, json.dumps([reference, answer]))
            if not reply:
                self._process.wait()
            return reply == "yes"

    @staticmethod
    def _start() -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-P", __file__],  # -P: minicpgd/ holds files that are called like libraries
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": "0"},  # sympy goes through sets
            start_new_session=True,  # Ctrl-C is for the run, which then finishes its step
        )
        trouble = _say(process, str(SECONDS))
        if trouble != "ready":
            process.kill()
            process.wait()
            raise UnavailableError(trouble or "it cannot be started")
        return process


def _say(process: "subprocess.Popen[str]", line: str) -> str:
    """Write a line, read one; "" from a process that is dead."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(line + "\n")
        process.stdin.flush()
    return process.stdout.readline().rstrip("\n")


_judge = _Judge()


def _serve() -> None:
    """Answer "yes" or "no" to each line [reference, answer] from standard input, until it ends."""
    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no reply
    seconds = float(sys.stdin.readline())
    try:
        from math_verify import LatexExtractionConfig, parse, verify
        from sympy.core.random import seed
    except Exception as error:
        print(" ".join(str(error).split()), file=replies, flush=True)
        return
    logging.disable()
    for limit, value in ((resource.RLIMIT_AS, GIBIBYTES << 30), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit of address space
            resource.setrlimit(limit, (value, value))

    def value_of(text: str) -> list:
        boxed = LatexExtractionConfig(boxed_match_priority=0)
        return parse(rf"\boxed{{{text}}}", [boxed], parsing_timeout=None)

    def verdict(reference: str, answer: str) -> str:
        seed(0)  # sympy tries out some numbers
        return "yes" if verify(value_of(reference), value_of(answer), timeout_seconds=None) else "no"

    verdict("1/2", r"\frac{1}{2}")  # what the first question loads is not taken off its time
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # nobody handles its signal: it ends the process
        print(verdict(*json.loads(line)), file=replies, flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    _serve()
