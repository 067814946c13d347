r"""Answers: which one a response states, and whether it equals the reference.

In: a response and a reference. Out: the stated answer, and a verdict. The page docs/rewards.md has examples. RULES
turn the spellings of an answer into one. `kinds.py` then judges what is no formula, as words, units and dates.
Formulas remain, and `mathematics.py` compares their values.
"""

import math
import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from numbers import Real
from typing import Any, NamedTuple

from minicpgd.errors import MissingPackageError, short_repr
from minicpgd.tasks.answers.kinds import judge
from minicpgd.tasks.answers.mathematics import LONGEST, UnavailableError, same_value

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)  # `\\.` skips `\{` and `\}`, which are characters in LaTeX.
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")


def final_answer(completion: str) -> str | None:
    """The text after the only `#` of a completion, stripped; None if there is no `#`, or more than one."""
    parts = completion.split("#")
    return parts[1].strip() if len(parts) == 2 else None


def _scan(text: str) -> tuple[list[tuple[int, int]], int]:
    r"""The content of each closed `\boxed{...}`, and the start of the last box without an end, or -1."""
    closed: list[tuple[int, int]] = []
    opened: list[tuple[int, bool]] = []
    for match in _BRACES.finditer(text):
        if match[0].endswith("{") and match[0] != r"\{":
            opened.append((match.end(), len(match[0]) > 1))
        elif match[0] == "}" and opened:
            start, is_box = opened.pop()
            if is_box:
                closed.append((start, match.start()))
    unclosed = len(text) if text.rstrip().endswith(r"\boxed") else -1
    return sorted(closed), max([unclosed, *(start for start, is_box in opened if is_box)])


def boxes(text: str) -> list[tuple[int, int]]:
    r"""(start, end) of the content of each closed `\boxed{...}`, in the order of the starts."""
    return _scan(text)[0]


def stated_answer(completion: str) -> str | None:
    r"""The final answer: in the last `\boxed{}`, else on the line of the last `####`, else after the only `#`.

    A response whose last box has no end was truncated there. It states no answer.
    """
    marked = _marked(completion)
    return None if marked is None else marked or final_answer(completion) or None


def reference_answer(answer: Any) -> str:
    r"""The final answer in a dataset's column, which may contain the reasoning, as `... #### 72` or `\boxed{72}`.

    A column of a JSON file may also have numbers, true and false.
    """
    text = answer if isinstance(answer, str) else str(answer).lower() if isinstance(answer, bool) else str(answer)
    return _marked(text) or text


def answer_text(answer: Any) -> str:
    """A dataset's answer as text, where 3.0 is "3" and True is "true".

    Raises:
        TypeError: the answer is neither text nor a finite number.
    """
    if isinstance(answer, str):
        return answer
    if isinstance(answer, bool):
        return str(answer).lower()
    if not (isinstance(answer, Real | Decimal) and math.isfinite(answer)):
        raise TypeError(f"the answer {short_repr(answer)} is neither text nor a finite number")
    if isinstance(answer, Fraction):
        return str(answer)
    whole = math.floor(answer)
    return str(whole) if whole == answer else f"{Decimal(str(answer)):f}"  # math-verify reads no exponents.


def _marked(text: str) -> str | None:
    """The answer after a mark, "" if there is none, and None if the last box has no end."""
    closed, unclosed = _scan(text)
    if unclosed >= 0 and (not closed or unclosed > closed[-1][0]):
        return None
    if closed:
        start, end = closed[-1]
        return text[start:end].strip()
    return text.rpartition("####")[2].strip().partition("\n")[0].strip() if "####" in text else ""


def plain(answer: str) -> str:
    """An answer without outer spaces, a final period, `$` and thousands commas. They do not change it."""
    answer = answer.strip().removesuffix(".").removeprefix(r"\$").strip("$").strip()
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer


# One spelling --------------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """A row of RULES: every match of `pattern` is replaced, so `example` becomes `result`."""

    what: str
    pattern: str
    replacement: str | Callable[[re.Match[str]], str]
    example: str
    result: str

    def apply(self, text: str) -> str:
        """The text with its matches replaced."""
        return re.sub(self.pattern, self.replacement, text)


def _normal(match: re.Match[str]) -> str:
    return unicodedata.normalize("NFKC", match[0])


def _fraction(match: re.Match[str]) -> str:
    top, _, bottom = _normal(match).partition("⁄")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _repeating(match: re.Match[str]) -> str:
    whole, once, again = match.groups()
    top = int(whole + once + again) - int(whole + once)
    return rf"\frac{{{top}}}{{{'9' * len(again)}{'0' * len(once)}}}"


SIGNS = {
    "×": r"\times ", "÷": "/", "∕": "/", "⁄": "/", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "π": r"\pi ",
    "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ",
    "∅": r"\emptyset ", "∈": r"\in ", "ℝ": r"\mathbb{R}", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
}  # fmt: skip
POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
CURRENCY = r"(?:\\\$|US\$|[$€£¥₹]|(?:USD|EUR|GBP|JPY|INR|Rs\.?)(?= ?\d))"

RULES = (
    Rule("full-width characters", "[\uff01-\uff5e\uffe5\u3000]", _normal, "７２", "72"),
    Rule("digits of other scripts", r"(?![0-9])\d", lambda m: str(int(m[0])), "٧٢", "72"),
    Rule("dashes", "[−–—‐‑‒﹣]", "-", "−5", "-5"),
    Rule("characters without width", "[\u200b\u2060\ufeff]|" + r"(?<!\\)\\!", "", r"1\!000", "1000"),
    Rule("spaces", r"(?:(?<!\\)\\[,;:> ]|~|(?<!\\)\\q?quad(?![a-zA-Z])|\s)+", " ", r"1\,000", "1 000"),
    Rule("raised characters", "[⁰¹²³⁴-⁹⁺⁻ⁿ]+", lambda m: f"^{{{_normal(m)}}}".replace("−", "-"), "x²", "x^{2}"),
    Rule("lowered characters", "[₀-₉]+", lambda m: f"_{{{_normal(m)}}}", "x₁", "x_{1}"),
    Rule("fractions as a character", "[¼½¾⅐-⅞]", _fraction, "½", r"\frac{1}{2}"),
    Rule("signs as a character", f"[{''.join(SIGNS)}]", lambda m: SIGNS[m[0]], "3×4", r"3\times 4"),
    Rule("the word pi", r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi ", "2pi", r"2\pi "),
    Rule("roots of brackets", r"(?:√|(?<![\\a-zA-Z])sqrt) ?\(([^()]*)\)", r"\\sqrt{\1}", "√(5)", r"\sqrt{5}"),
    Rule("cube roots", r"∛ ?(\d+|[a-zA-Z])", r"\\sqrt[3]{\1}", "∛8", r"\sqrt[3]{8}"),
    Rule("functions", r"(?<![\\a-zA-Z])(sin|cos|tan|cot|ln|log|exp)(?![a-zA-Z])", r"\\\1", "sin x", r"\sin x"),
    Rule("names of braces", r"\\([lr])brace(?![a-zA-Z])", lambda m: r"\{" if m[1] == "l" else r"\}", r"\lbrace", r"\{"),
    Rule("names of colons", r"\\colon(?![a-zA-Z])", ":", r"3\colon4", "3:4"),
    Rule("roots", r"√ ?(\d+|[a-zA-Z])", r"\\sqrt{\1}", "2√5", r"2\sqrt{5}"),
    Rule("sizes of brackets", r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.? ?", "", r"\left(1\right)", "(1)"),
    Rule("styles", r"\\(?:displaystyle|limits)(?![a-zA-Z])", "", r"\displaystyle 5", " 5"),
    Rule("sizes of fractions", r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", r"\dfrac12", r"\frac12"),
    Rule("fonts", r"\\(?:text|math|mbox)(?:bf|it|rm|sf|tt|normal)?\*? ?\{([^{}]*)\}", r" \1 ", r"\text{cm}", " cm "),
    Rule("dollars around a formula", r"(?<!\\)\$\$?([^$]*)(?<!\\)\$\$?", r"\1", "$5$", "5"),
    Rule("brackets around a formula", r"(?<!\\)\\[][()]", "", r"\(5\)", "5"),
    Rule("Markdown and spaces", r"^[*_` ]+|(?<![*_` ])[*_` ]+$", "", "**73**", "73"),
    Rule("quotation marks", "^[\"'“‘](.*)[\"'”’]$", r"\1", "“yes”", "yes"),
    Rule("a final mark", r"[.,;:。]$", "", "72.", "72"),
    Rule("an introduction", r"^(?i:(?:the )?(?:final )?answer(?: is|:)|about|approximately|roughly) ", "",
         "about 42", "42"),
    Rule("the word option", r"^(?i:option|choice) (?=\(?[A-Z]\)?$)", "", "Option A", "A"),
    Rule("a remark", r"(?<=[\w}]) \([A-Za-z][a-z ]{2,}\)$", "", "4 (four)", "4"),
    Rule("a sign before all", r"^(?:\\approx(?![a-z])|≈|\\sim(?![a-z])|=)", "", r"\approx 42", " 42"),
    Rule("about equal", r"\\approx(?![a-z])|≈", "=", "x ≈ 3", "x = 3"),
    Rule("commas in braces", r"\{,\}", ",", "1{,}000", "1,000"),
    Rule("thousands", r"(?<![\d.,(\[{])(?<![\d(\[{] )\d{1,3}([ ,])\d{3}(?:\1\d{3})*(?![\d/]|[ ,]\d)",
         lambda m: re.sub("[ ,]", "", m[0]), "1,000 m", "1000 m"),
    Rule("thousands with periods", r"^\d{1,3}(?:\.\d{3}){2,}$", lambda m: m[0].replace(".", ""),
         "1.000.000", "1000000"),
    Rule("repeating decimals", r"(?<!\d)(\d{1,9})\.(\d{0,9})\\overline ?\{(\d{1,9})\}", _repeating,
         r"0.\overline{3}", r"\frac{3}{9}"),
    Rule("mixed numbers", r"(?<![\d.}] )(?<![\d.^_/])(\d+) (\d+)/(\d+)(?![\d./])", r"\1\\frac{\2}{\3}",
         "1 3/4", r"1\frac{3}{4}"),
    Rule("scientific notation", r"(?<![\w.])(\d+(?:\.\d+)?)[eE]\+?(-?\d+)(?![\w.])", r"\1\\times 10^{\2}",
         "1e3", r"1\times 10^{3}"),
    Rule("large numbers as words", rf"(?<=\d) ?({'|'.join(POWERS)})(?![a-z])",
         lambda m: rf"\times 10^{{{POWERS[m[1]]}}}", "2 million", r"2\times 10^{6}"),
    Rule("powers", r"(?<=[\w)}])\*\*(?=[\w(-])", "^", "2**3", "2^3"),
    Rule("spaces before exponents", r" \^", "^", "cm ^2", "cm^2"),
    Rule("exponents", r"\^ ?(-?\d+)", r"^{\1}", "10^-3", "10^{-3}"),
    Rule("degrees", r"\^ ?(?:\{ ?\\circ ?\}|\\circ(?![a-z]))|\\degree(?![a-z])|[°º]", " degrees ",
         "90°", "90 degrees "),
    Rule("percent", r"(?<!\\)%| ?(?<![a-z])percent(?![a-z])", r"\%", "50 percent", r"50\%"),
    Rule("currencies before a number", rf"^(-?) ?({CURRENCY}) ?(?=[-\d.\\])(.*)$", r"\1\3 \2", "€72", "72 €"),
    Rule("letters of a choice", r"^\(?([A-Za-z])\)$", r"\1", "(A)", "A"),
)  # fmt: skip


def tidy(answer: str) -> str:
    """An answer in one spelling: RULES are applied until they change nothing, three times at most."""
    for _ in range(3):
        before = answer
        for rule in RULES:
            answer = rule.apply(answer)
        if answer == before:
            break
    return answer


def is_solution(completion: str, answer: Any) -> bool:
    r"""Whether a completion's final answer equals the reference, exactly or in value, as `1/2`, `0.5`, `\frac{1}{2}`.

    The reference is a text, or a number, True or False from a JSON file. Answers of more than LONGEST characters are
    compared as text.

    Raises:
        MissingPackageError: math-verify is needed, and is not installed.
    """
    if (stated := stated_answer(completion)) is None:
        return False
    reference = reference_answer(answer)
    if plain(stated) == plain(reference):
        return True
    if max(len(plain(stated)), len(plain(reference))) > LONGEST:
        return False
    verdict = judge(tidy(stated), tidy(reference))
    return verdict if isinstance(verdict, bool) else all(_same_value(*pair) for pair in verdict)


def _same_value(stated: str, reference: str) -> bool:
    try:
        return same_value(reference, stated)
    except UnavailableError as error:
        install = "pip install 'minicpgd[math]'"
        raise MissingPackageError(f"mathematical answers need math-verify: {install} ({error})") from error


def need_math_verify() -> None:
    """Raise MissingPackageError before the first rollout, if `is_solution` would raise it later."""
    _same_value("1/2", "0.5")
