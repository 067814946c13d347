r"""Answers that are no formulas: words, dates, times, ratios, numbers, quantities and lists of them.

In: a stated answer and a reference, after the rules of `answers.py`. Out: whether they are equal, or the formulas that
remain for math-verify. It would multiply letters as symbols, so `cat` would equal `tac`, and 6 am would equal 6 pm.
You may add a judge to KINDS, and a unit to UNITS.
"""

import re
from fractions import Fraction
from itertools import pairwise

_NUMBER = r"\d+(?:\.\d+)?"
Pair = tuple[str, str]
Verdict = bool | list[Pair] | None
"""True or False; the pairs (stated, reference) that math-verify has to find equal; or None, if a judge cannot tell."""

FUNCTIONS = set("sin cos tan cot sec csc log ln lg exp sqrt pi infty infinity inf min max gcd lcm det dim mod".split())
"""Names of mathematics that have several letters. Other runs of letters may be words."""
NOT_UNITS = FUNCTIONS | set("or and plus minus times over choose factorial squared cubed dozen to not is".split())
UNITS = {
    spelling: line.split()[0]
    for line in r"""
        dollar $ \$ USD | euro € EUR | pound £ GBP lb lbs | yen ¥ JPY | rupee ₹ INR Rs | cent ¢
        degree deg | celsius C | fahrenheit F | kelvin K | ordinal st nd rd th
        meter metre m | kilometer kilometre km | centimeter centimetre cm | millimeter millimetre mm
        inch inche in | foot feet ft | yard yd | mile mi | liter litre l L | milliliter millilitre ml mL
        gram g | kilogram kg kilo | milligram mg | megagram Mg | ton tonne | ounce oz | mole mol
        second s sec | minute min | hour h hr | day | week | month | year yr | mile/hour mph | kilometer/hour kmh kph
        newton N | joule J | kilojoule kJ | watt W | kilowatt kW | milliwatt mW | megawatt MW
        volt V | ampere A amp | hertz Hz | pascal Pa | kilopascal kPa | ohm Ω
    """.replace("\n", "|").split("|")
    for spelling in line.split()
}
"""The first name of a unit, by each of its spellings without a plural s. A unit that is not here is its own name."""
_WORD = r"[^\W\d_]+\.?(?:\^\{-?\d\})?"
_UNIT = re.compile(rf"(?<=[\w)}}\]!.%]) ?(US\$|\\?[$€£¥₹¢%]|(?:(?<![^\W\d_])|(?<= )){_WORD}(?:[ /-]{_WORD}){{0,5}})$")
_NO_VALUE = re.compile(r"[=<>]|\\(?!pi)[a-zA-Z]+ ?$")
_BASE = re.compile(r"(\w+)_\{?(\d+)\}?")
_TIME = re.compile(r"(\d{1,2})(?::([0-5]\d))?(?::([0-5]\d))? ?(?:([ap])\.? ?m)?", re.IGNORECASE)
_DATE = re.compile(r"(\d{4})([-/.])\d{1,2}\2\d{1,2}|\d{1,2}([-/.])\d{1,2}\3\d{4}")
_RATIO = re.compile(rf"{_NUMBER}(?: ?: ?{_NUMBER})+")
_PLAIN = re.compile(r"([-+]?(?:\d+(?:\.\d*)?|\.\d+))(?: ?\\times 10\^\{(-?\d{1,3})\})? ?(\\%)?")
_TEXT = re.compile(r"[^\W\d_]+(?:[ '’.,&!?;-]+[^\W\d_]+)*[.!?]*")
_FIGURE = re.compile(r"(?:[△∠]|\\(?:angle|triangle|overline|vec|widehat)) ?\{? ?[A-Z]{2,} ?\}?|[A-Z](?:-[A-Z]){2,}")
_CODE = re.compile(r"(?=\d*[A-Za-z]+\d)[A-Za-z0-9]+")
_LABELLED = re.compile(r"([^\W\d_]+) (?:[^\W\d_]|\d| )+")  # as Room 12


def _dates(stated: str, reference: str) -> Verdict:
    """A date is no difference of numbers. Zeros before a number do not change it, as in 2024-1-2."""
    is_date = [bool(_DATE.fullmatch(text)) for text in (stated, reference)]
    if not any(is_date):
        return None
    parts = [[int(part) for part in re.split(r"[-/.]", text)] for text in (stated, reference) if all(is_date)]
    return all(is_date) and parts[0] == parts[1]


def _times(stated: str, reference: str) -> Verdict:
    """3:30 pm is 15:30. An answer may say am or pm where the reference does not."""
    times = [match for text in (stated, reference) if (match := _TIME.fullmatch(text)) and int(match[1]) <= 24]
    halves = [match[4] for match in times]
    if len(times) < 2 or not (any(halves) or all(match[2] for match in times)):
        return None
    clocks = []
    for hour, minute, second, half in (match.groups("0") for match in times):
        is_pm = half in "pP" or int(hour) > 12
        clocks.append((int(hour) % 12, int(minute), int(second), "p" if is_pm else half.lower()))
    return clocks[0][:3] == clocks[1][:3] and clocks[1][3] in ("0", clocks[0][3])


def _ratios(stated: str, reference: str) -> Verdict:
    """The ratio 2:4 equals 1:2, and 1/2. Longer ratios equal no number."""
    first, second = ([Fraction(n) for n in re.split(" ?: ?", text)] if _RATIO.fullmatch(text) else []
                     for text in (stated, reference))  # fmt: skip
    if not first and not second:
        return None
    if first and second:
        products = [(a * d, c * b) for (a, b), (c, d) in zip(pairwise(first), pairwise(second), strict=False)]
        return len(first) == len(second) and all(a == b for a, b in products) and 0 not in first + second
    fraction = [text.replace(":", "/") for text in (stated, reference)]
    return [(fraction[0], fraction[1])] if len(first or second) == 2 else False


def _is_text(answer: str) -> bool:
    r"""Whether letters are words or codes, as `cat`, `IV`, `New York`, `H2O`, `Room 12`; `x + y` and `2ab` are not."""
    words = [word for word in re.findall(r"[^\W\d_]+", answer) if word.lower() not in FUNCTIONS]
    longest = max(map(len, words), default=0)
    if _FIGURE.fullmatch(answer):
        return True
    if _TEXT.fullmatch(answer):
        return longest > (3 if "-" in answer else 1) or (" " in answer and len(words) > 1 and longest == 1)
    if _CODE.fullmatch(answer):
        return bool(words) and words[0] == re.findall(r"[^\W\d_]+", answer)[0]
    match = _LABELLED.fullmatch(answer)
    return bool(match) and len(match[1]) > 2 and match[1].lower() not in FUNCTIONS  # type: ignore[index]


def _texts(stated: str, reference: str) -> Verdict:
    """Words are equal if their letters are, in the same order. math-verify would multiply the letters."""
    if not (_is_text(stated) and _is_text(reference)):
        return None
    first, second = (re.sub(r"[\W_]+", "", text).casefold() for text in (stated, reference))
    return first == second


def _numbers(stated: str, reference: str) -> Verdict:
    """Two decimals are equal if their digits are. 50% is 50 or 0.5. A number with a zero before it is a code."""
    numbers = [match for text in (stated, reference) if (match := _PLAIN.fullmatch(text))]
    if len(numbers) < 2:
        return None
    if any(re.match(r"[-+]?0\d", match[1]) for match in numbers):
        return False
    a, b = (Fraction(f"{match[1]}e{match[2] or 0}") for match in numbers)
    in_percent, other = (a, b) if numbers[0][3] else (b, a)
    return a == b or (numbers[0][3] != numbers[1][3] and in_percent == other * 100)


def _unit_name(unit: str) -> str:
    """One name for the spellings of a unit: `kilometers per hour` and `km/h` are both kilometer/hour."""
    name, power = "", ""
    for word in re.findall(r"/|\^\{-?\d\}|\\?[^\W\d_]+|\\?[$€£¥₹¢%]", re.sub(r"US\$", "$", unit.partition(" of ")[0])):
        singular = word.removesuffix("s") if len(word) > 2 else word
        if word in ("square", "sq", "cubic", "cu"):
            power = "^{2}" if word[0] == "s" else "^{3}"
        elif word in ("/", "per"):
            name += "/"
        elif word[0] == "^":
            name += word
        else:
            spellings = (word, singular, word.lower(), singular.lower())
            known = next((UNITS[spelling] for spelling in spellings if spelling in UNITS), None)
            name += f" {known or singular.lower().removesuffix('e')}{power}"
            power = ""
    return re.sub("degree (?=celsius|fahrenheit)", "", name.replace("/ ", "/").strip())


def _split_unit(answer: str, is_reference: bool) -> Pair:
    """The value and the name of the unit of an answer, as ("5", "kilogram"); the name is "" without a unit.

    A word after a space is a unit, and so is a name of UNITS. The letter of a reference such as 5m may be a variable.
    """
    if match := _BASE.fullmatch(answer):
        return match[1], f"base {match[2]}"
    for match in _UNIT.finditer(answer):
        value, spaced = answer[: match.start()], match[0][0] == " "
        word = re.split(r"[ /^.-]", match[1].replace("US$", "$"))[0]
        is_known = _unit_name(word) in (*UNITS.values(), "\\%", "")  # The name of `square` alone is "".
        is_word = spaced and len(word) > 2 and word.lower() not in NOT_UNITS
        is_variable = len(word) == 1 and word.isalpha() and not spaced and (is_reference or word.isupper())
        if (is_word or is_known and not is_variable) and re.search(r"\d|\\pi", value) and not _NO_VALUE.search(value):
            return value.strip(), _unit_name(match[1])
    return answer, ""


def _quantities(stated: str, reference: str) -> Verdict:
    """A number may have a unit where the other has none. Two units have to be the same: nothing is converted."""
    (first, unit), (second, wanted) = _split_unit(stated, False), _split_unit(reference, True)
    if not unit and not wanted:
        return None
    if unit and wanted and unit != wanted:
        return False
    if "\\%" in (unit, wanted) and unit != wanted:
        return [(stated, reference)]  # math-verify divides by 100.
    return judge(first, second)


def _elements(answer: str) -> tuple[str, list[str]]:
    """The brackets and the elements of a list, as ("()", ["1", "2"]); ("", ["1", "2"]) without brackets."""
    depth, cuts, closes = 0, [], []
    for match in re.finditer(r"\\?[({\[]|\\?[)}\]]|[,;]| (?:and|or) ", answer):
        if match[0][-1] in "({[":
            depth += 1
        elif match[0][-1] in ")}]":
            depth -= 1
            if depth == 0:
                closes.append(match.end())
        else:
            cuts.append((depth, match.start(), match.end()))
    start = re.match(r"\\?[({\[]", answer)
    is_enclosed = bool(start) and closes[:1] == [len(answer)]
    inside = (len(start[0]), len(answer) - (2 if answer[-2:] == r"\}" else 1)) if is_enclosed else (0, len(answer))  # type: ignore[index]
    ends = [(begin, end) for level, begin, end in cuts if level == int(is_enclosed)]
    edges = [inside[0], *(edge for cut in ends for edge in cut), inside[1]]
    elements = [answer[a:b].strip() for a, b in zip(edges[::2], edges[1::2], strict=True)]
    brackets = (start[0][-1] + answer[-1]) if is_enclosed else ""  # type: ignore[index]
    return brackets, [element for element in elements if element]


def _all_of(verdicts: list[bool | list[Pair]]) -> Verdict:
    if False in verdicts:
        return False
    pairs = [pair for verdict in verdicts if isinstance(verdict, list) for pair in verdict]
    return pairs or True


def _lists(stated: str, reference: str) -> Verdict:
    """Order matters in tuples, points and intervals. It does not in sets, nor in lists without brackets."""
    (brackets, first), (wanted, second) = _elements(stated), _elements(reference)
    if min(len(first), len(second)) < 2 or "\\pm" in stated + reference:
        return None
    if brackets and wanted and brackets != wanted:
        return False
    if "{" in brackets + wanted and len(first) != len(second):
        return None  # math-verify drops elements that occur twice.
    if len(first) != len(second):
        return False
    if brackets + wanted not in ("", "{}", "{}{}"):
        return _all_of([judge(a, b) for a, b in zip(first, second, strict=True)])
    for element in list(first):
        if twin := next((other for other in second if judge(element, other) is True), None):
            first.remove(element)
            second.remove(twin)
    if any(all(judge(a, b) is False for b in second) for a in first):
        return False
    return [(",".join(first), ",".join(second))] if first else True


KINDS = (_lists, _dates, _times, _ratios, _numbers, _texts, _quantities)


def _without_name(stated: str, reference: str) -> Pair:
    """The last sides of equations, if the reference is no equation, or names a number, or both name the same."""
    (name, equals, value), (wanted, is_named, number) = stated.rpartition("="), reference.rpartition("=")
    if re.search(r"[,;<>!]| (?:and|or) ", stated + reference):
        return stated, reference
    if equals and (not is_named or name.strip() == wanted.strip()):
        return value.strip(), number.strip()
    return (stated, number.strip()) if not equals and re.fullmatch(r"\\?[^\W\d_]+ *", wanted) else (stated, reference)


def judge(stated: str, reference: str) -> bool | list[Pair]:
    """Whether two answers are equal, or the pairs (stated, reference) that math-verify has to find equal."""
    if re.sub(r"(?<!\d) | (?!\d)", "", stated) == re.sub(r"(?<!\d) | (?!\d)", "", reference):
        return True
    stated, reference = _without_name(stated, reference)
    for kind in KINDS:
        verdict = kind(stated, reference)
        if verdict is not None:
            return verdict
    return [(stated, reference)]
