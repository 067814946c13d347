r"""Answers: which one a response states, and whether it equals the reference.

In: a response and a reference as text. Out: the stated answer, and a verdict. `math_answers.py` compares values.
"""

import re

from minicpgd.errors import MissingPackageError
from minicpgd.tasks.math_answers import UnavailableError, same_value

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)  # `\\.` skips `\{` and `\}`, which are characters in LaTeX.
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")


def final_answer(completion: str) -> str | None:
    """The text after the only `#` of a completion, stripped; None if there is no `#`, or more than one."""
    parts = completion.split("#")
    return parts[1].strip() if len(parts) == 2 else None


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
