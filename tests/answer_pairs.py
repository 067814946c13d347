r"""Pairs of answers that we judged by hand: data for tests/test_answers.py and for the page docs/rewards.md.

A pair has an answer that a response states, and a reference. `equal` are pairs that a reader accepts, `different` are
pairs that a reader refuses. RESPONSES are whole responses, with what the reader takes as their answer.
"""

from typing import Any, NamedTuple

Pair = tuple[str, Any]


class Kind(NamedTuple):
    """Pairs of one kind, and the rule that decides them, as a sentence for users."""

    name: str
    rule: str
    equal: list[Pair]
    different: list[Pair]


KINDS = [
    Kind(
        "Numbers",
        "Two decimals or whole numbers are equal if their values are, to the last digit. Nothing is rounded.",
        [("72", "72.0"), ("+72", "72"), (".5", "0.5"), ("0.50", "0.5"), ("5.", "5"), ("-0", "0"), ("72", 72),
         ("0.5", 0.5), ("0.0000001", 1e-7), ("1e3", "1000"), ("1E+3", "1000"), ("2.5e-3", "0.0025"),
         (r"2.5 \times 10^{-3}", "0.0025"), ("2.5×10^-3", "0.0025"), ("3·10^8", "300000000"), ("2 million", "2000000")],
        [("72", "-72"), ("72", "72.5"), ("0.33", "0.333"), ("0.1234561", "0.1234562"), ("0.0000001", "0.0000002"),
         ("72.0000001", "72"), ("123456789012345678", "123456789012345679"), ("1e-7", "1e-8"), ("1e3", "1e4"),
         ("7 2", "72"), ("5 7", "5"), ("2 million", "2"), ("2 thousand", "2 million"), ("1", 0.1), ("five", "5")],
    ),
    Kind(
        "Values",
        "math-verify compares formulas by value. Fractions and formulas with variables have to be equal exactly, "
        "and roots and the like in 30 digits. A decimal may stand for another value, as 0.333333 for 1/3, if both "
        "agree after 6 decimals, and differ by 5e-6 of the value at most.",
        [(r"\frac{1}{2}", "0.5"), ("1/2", "0.5"), (r"\dfrac{2}{4}", "0.5"), (r"\tfrac12", "1/2"), ("2^3", "8"),
         ("2**3", "8"), (r"2\sqrt{2}", r"\sqrt{8}"), ("2√5", r"2\sqrt{5}"), ("√(20)", r"2\sqrt5"),
         ("sqrt(5)", r"\sqrt{5}"),
         ("2π", r"\pi + \pi"), ("2pi", r"2\pi"), ("∞", r"\infty"), ("5!", "120"), ("0.333333", "1/3"),
         ("0.166667", r"\frac{1}{6}"), (r"0.\overline{3}", r"\frac{1}{3}"), (r"\log_2 8", "3"), ("6×7", "42"),
         ("84÷2", "42"),
         ("sin x", r"\sin x"), ("∛8", "2"), ("1.414214", r"\sqrt{2}"),
         (r"\frac{1}{2005! \cdot 2006}", r"\frac{1}{2006!}"), (r"\left(\frac{1}{2}\right)", "0.5")],
        [("0.33", "1/3"), ("1/2", "2"), ("0.51", "1/2"), ("3.14", r"\pi"), ("1.5", r"\sqrt{2}"),
         (r"-\infty", r"\infty"),
         (r"\frac{1}{2006!}", r"\frac{1}{2004!}"), (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}"), ("2^{-70}", "2^{-71}"),
         ("e^{-100}", "e^{-101}"), ("0.0012", r"\frac{1}{833}"), (r"3 \cdot 10^{-9}", r"4 \cdot 10^{-9}"),
         ("x = 0.1234561", "x = 0.1234562"), ("(0.0000001, 1)", "(0.0000002, 1)"), (r"\{10^{-20}\}", r"\{10^{-21}\}"),
         (r"\frac{1}{", "12"), ("3^2", "8"), ("1 - 10^{-40}", "1"), ("2√5", r"2\sqrt{6}")],
    ),
    Kind(
        "Mixed numbers",
        "A whole number before a fraction is added to it.",
        [("1 3/4", "1.75"), (r"1\frac34", "7/4"), (r"1 \frac{3}{4}", "1.75"), ("-1 3/4", "-1.75"), ("1½", "1.5"),
         ("½", "0.5"), ("¾", r"\frac{3}{4}"), (r"2\dfrac{1}{2}", "5/2")],
        [("1 3/4", "1"), ("1 3/4", "3/4"), ("1½", "½"), ("11/4", "1 1/4")],
    ),
    Kind(
        "Thousands",
        "Commas, spaces and LaTeX spaces may separate groups of three digits. A period does so only where it occurs "
        "twice. No comma is a decimal comma.",
        [("1,000", "1000"), (r"1\,000", "1000"), (r"1\!000", "1000"), (r"1,\!000", "1000"), (r"1\ 000", "1000"),
         ("1~000", "1000"), ("1\u2009000", "1000"), ("1\u202f000", "1000"), ("1\u00a0000\u00a0000", "1000000"),
         ("1{,}000", "1000"), ("1 000 000", "1,000,000"), ("1,234,567.5", "1234567.5"), ("1.000.000", "1000000"),
         ("-1,000", "-1000"), ("x = 1,000", "1000")],
        [("1,23", "1.23"), ("1,23", "123"), ("1.000", "1000"), ("1,000", "1"), ("10,00", "1000"), ("1,0000", "10000"),
         (r"1\,000", "100")],
    ),
    Kind(
        "Characters",
        "Characters of other keyboards mean what they show: full-width digits, minus signs, raised digits.",
        [("–5", "-5"), ("−5", "-5"), ("７２", "72"), ("－７２", "-72"), ("x²", "x^2"), ("10⁻³", "0.001"), ("٧٢", "72"),
         ("x ≤ 3", r"x \le 3"), ("±5", r"\pm 5"), ("２/３", "2/3")],
        [("–5", "5"), ("x²", "2x"), ("x³", "x^2"), ("７２", "27"), ("x ≤ 3", "x < 3")],
    ),
    Kind(
        "Marks around an answer",
        "Dollars, brackets of LaTeX, fonts, Markdown, quotation marks and a final period do not change an answer.",
        [("**73**", "73"), ("*73*", "73"), ("__73__", "73"), ("`73`", "73"), ("$73$", "73"), ("$$73$$", "73"),
         (r"\(73\)", "73"),
         (r"\[73\]", "73"), ("**$73$**", "73"), ("73.", "73"), (r"\text{73}", "73"), (r"\mathrm{73}", "73"),
         (r"\mathbf{73}", "73"),
         ("**Paris**", "Paris"), ("“Paris”", "Paris"), ("Paris.", "Paris"), (r"\text{Paris}", "Paris"),
         (r"\displaystyle 73", "73"),
         (r"\boxed{73}", "73"), (r"\approx 42", "42"), ("4 (four)", "4"), ("≈ 42", "42"), ("about 42", "42"),
         ("The answer is 42.", "42")],
        [("**73**", "37"), (r"\text{73}", "37"), (r"\approx 42", "24"), ("3*", "9"), ("The answer is 42.", "43")],
    ),
    Kind(
        "Words",
        "Words are equal if they have the same letters in the same order. Capitals do not matter. Letters alone are a "
        "word, so `xy` is not `yx`.",
        [("Paris", "paris"), ("True", "true"), ("true", True), (r"\text{True}", "true"), ("FALSE", False),
         ("yes", "Yes"),
         ("New York", "new york"), ("IV", "IV"), ("north-west", "North-West"), ("cat and dog", "dog and cat"),
         ("red, blue", "blue, red"), ("T T H", "TTH"), ("H2O", "H2O"), (r"\angle ABC", r"\angle{ABC}")],
        [("cat", "tac"), ("silent", "listen"), ("Paris", "pairs"), ("please", "esaelp"), ("IV", "VI"),
         ("XIV", "XVI"), ("AB", "BA"),
         ("RLUDD", "DDURL"), ("TTH", "HTT"), ("T T H", "H T T"), ("xy", "yx"), ("Ronald", "Arnold"),
         ("New York", "York New"),
         ("Mary", "Army"), ("true", "false"), ("yes", "no"), ("H2O", "HO2"), ("1A2B", "2A1B"), ("Room 12", "Moor 12"),
         (r"\text{cat}", r"\text{act}"), ("(cat, dog)", "(tac, dog)"), (r"\{cat, dog\}", r"\{act, god\}"),
         ("north-west", "west-north"),
         ("Москва", "Смоква"), (r"\angle ABC", r"\angle BAC"), ("A-B-C", "A-C-B"), ("not enough", "enough not"),
         ("true", 1),
         ("dog", "god")],
    ),
    Kind(
        "Letters of a choice",
        "One letter is equal to itself, with brackets or without.",
        [("A", "A"), ("(A)", "A"), ("A.", "A"), (r"\text{(C)}", "C"), ("**B**", "B"), ("B)", "B"), ("Option A", "A"),
         ("A, C", "C, A")],
        [("A", "B"), ("(A)", "(B)"), ("A, B", "A, C"), ("AB", "A"), ("A, B", "A")],
    ),
    Kind(
        "Formulas with variables",
        "A formula with digits or operators is mathematics, so the order of factors and of terms does not matter.",
        [("y+x", "x+y"), ("2ba", "2ab"), ("yx^2", "x^2y"), ("(x-1)(x+1)", "x^2-1"), ("x · y + 1", "1 + yx"),
         ("3 x", "3x"),
         ("3+4i", "4i+3"), ("x = 5", "5"), ("5", "x = 5"), ("area = 12", "12"), ("y = 2x+1", "2x+1"),
         ("x = y + 1 = 3", "3"),
         ("x < 3", "3 > x"), ("a_1", "a_{1}"), ("x ≈ 3", "3"), ("x=1, y=2", "y=2, x=1")],
        [("x-1", "x+1"), ("2ab", "2a"), ("2t", "2"), ("3c", "3d"), ("5", "2x + z = 5"), ("x = 3", "x = 4"),
         ("x = 3", "y = 3"),
         ("x > 3", "x < 3"), ("y/x", "x/y"), ("3+4i", "4+3i"), ("a_1", "a_2"), ("x=1, y=2", "x=2, y=1")],
    ),
    Kind(
        "Units",
        "A number with a unit is equal to the number alone. Two units have to be the same. Nothing is converted. The "
        "letter of a reference such as 5m may be a variable, so the answer has to have it.",
        [("5 kg", "5"), ("5", "5 kg"), ("5kg", "5 kg"), ("5 kilograms", "5 kg"), ("5 oranges", "5"),
         ("1 orange", "1 oranges"),
         (r"5\text{ cm}", "5"), (r"5 \mathrm{cm}", "5 cm"), ("8 hours", "8 hr"), ("5 m²", r"5\text{ m}^2"),
         ("5 square meters", "5 m^2"),
         ("60 km/h", "60 kilometers per hour"), (r"\frac{1}{2} cup", "0.5"), (r"25\pi\text{ cm}^2", r"25\pi"),
         ("1,000 m", "1000 m"),
         (r"2\sqrt{3}\text{ cm}", r"\sqrt{12}"), ("5 kg of sugar", "5 kg"), ("3rd", "3"), ("x = 5 kg", "5 kg"),
         ("12 students", 12)],
        [("5 kg", "5 g"), ("8 hours", "8 minutes"), ("5 m", "5 km"), (r"5\text{ kg}", r"5\text{ g}"),
         ("5 apples", "5 oranges"),
         ("5 kg", "6 kg"), ("5 kg", "6"), ("1 km", "1000 m"), ("5 m", "5 m^2"), ("5 cm^2", "5 cm^3"),
         ("60 km/h", "60 m/s"),
         ("5 MW", "5 mW"), ("x = 5 kg", "x = 5 g"), ("(5 kg, 3)", "(5 g, 3)"), ("5 or 6", "5"), ("5 dozen", "5"),
         ("5", "5m"),
         ("3 cats", "3 acts"), ("5 min", "5 s"), ("5 s", "5 m"), ("2ab", "2")],
    ),
    Kind(
        "Money",
        "The sign or the name of a currency is a unit.",
        [("72 dollars", "72"), ("$72", "72"), (r"\$72", "72"), ("€72", "72"), ("72€", "72"), ("£5", "5"),
         ("¥100", "100"), ("72 USD", "$72"),
         ("USD 72", "72"), ("$72", "72 dollars"), ("€1,000", "1000"), ("-$5", "-5"), (r"\$1,000.50", "1000.5"),
         ("72 euros", "€72"),
         ("$2 million", "2000000")],
        [("€72", "$72"), ("72 cents", "72 dollars"), ("£5", "€5"), ("$72", "27"), ("$5", "-5"), ("72 USD", "72 EUR")],
    ),
    Kind(
        "Degrees and percent",
        "A degree is a unit. A percent sign may be left out, or stand for a division by 100: datasets have both.",
        [("90°", "90"), (r"90^\circ", "90"), (r"90^{\circ}", "90°"), ("90 degrees", "90"), ("20°C", "20"),
         ("20 degrees Celsius", "20°C"),
         ("50%", r"50\%"), ("50%", "50"), ("50%", "0.5"), ("0.5", "50%"), ("50%", r"\frac{1}{2}"), ("12.5%", "12.5"),
         ("50 percent", "50%"), ("50", "50%")],
        [("20°C", "20°F"), ("90°", "60°"), ("50%", "5"), ("50%", "0.05"), ("50%", "60%"), ("50%", "50 kg"),
         ("5%", "500")],
    ),
    Kind(
        "Times",
        "A time is equal to itself. A reference without am or pm accepts both.",
        [("3:30 pm", "3:30 PM"), ("3:30 p.m.", "3:30 pm"), ("15:30", "3:30 pm"), ("6 am", "6 a.m."), ("6pm", "6 pm"),
         ("3:30 pm", "3:30"),
         ("12 pm", "12:00 pm"), ("6 pm", "6"), (r"3:30\text{ pm}", "3:30 pm")],
        [("3:30 am", "3:30 pm"), ("6 am", "6 pm"), ("10 a.m.", "10 p.m."), ("6", "6 pm"), ("3:30", "3:30 pm"),
         ("15:30", "3:30 am"),
         ("3:30", "4:40"), ("12 am", "12 pm"), ("3:30 pm", "3:31 pm"), (r"6\text{ am}", r"6\text{ pm}")],
    ),
    Kind(
        "Dates",
        "A date has the same numbers in the same order. It is no subtraction and no division.",
        [("2024-01-02", "2024-01-02"), ("2024-1-2", "2024-01-02"), ("2024/01/02", "2024-01-02"),
         ("January 2, 2024", "January 2, 2024")],
        [("2024-01-02", "2024-02-01"), ("4/2/2024", "2/1/2024"), ("2024-01-02", "2021"), ("2021", "2024-01-02"),
         ("01-02-2024", "02-01-2024"),
         ("2024-01-02", "2023-01-01"), ("January 2, 2024", "February 1, 2024"), ("5 May", "5 March")],
    ),
    Kind(
        "Codes",
        "A whole number with a zero before it is a code or a string of digits, and equal to nothing else. A number "
        "in another base is equal to its digits.",
        [("0110", "0110"), ("007", "007"), ("1010_2", "1010"), ("1010_{2}", "1010_2")],
        [("0110", "110"), ("110", "0110"), ("007", "7"), ("00", "0"), ("0110", 110), ("007", "0007"),
         ("110_2", "110_3"), ("110_2", "6")],
    ),
    Kind(
        "Ratios",
        "A ratio of two numbers is equal to their fraction. Ratios are equal if they are in proportion. Two times, as "
        "3:30 and 4:40, are no ratios.",
        [("1:2", "1/2"), ("1/2", "1:2"), ("1 : 2", "1:2"), ("2:4", "1:2"), ("1:2:3", "2:4:6"), ("3:2", r"\frac{3}{2}")],
        [("1:2", "2:1"), ("1:2:3", "1:2:4"), ("1:2:3", "1:6"), ("1:2:3", "1/6"), ("1:2", "2"), ("1:3", "1/4")],
    ),
    Kind(
        "Sets, tuples and intervals",
        "Order matters in tuples, points and intervals. It does not in sets and in lists without brackets.",
        [(r"\{2, 1\}", r"\{1, 2\}"), ("2, 1", "1, 2"), ("1, 2", r"\{2, 1\}"), (r"\left(1, 2\right)", "(1,2)"),
         ("1, 2", "(1,2)"),
         ("1 and 2", "1, 2"), ("(0.5, 2)", r"(\frac{1}{2}, 2)"), ("[1, 2)", "[1,2)"), (r"(-\infty, 3]", "(-∞, 3]"),
         ("±5", "5, -5"),
         ("x = 5 or x = -5", "5, -5"), (r"(3,4)\cup(1,2)", r"(1,2)\cup(3,4)"), (r"\{1, 1, 2\}", r"\{1, 2\}"),
         ("∅", r"\emptyset"),
         (r"\sqrt{4}, 1", "1, 2"), ("x < 3", r"(-\infty, 3)"), (r"\lbrace 1; 2\rbrace", r"\{1, 2\}"),
         ("(1,2),(3,4)", "(3,4),(1,2)")],
        [("(2, 1)", "(1, 2)"), ("2, 1", "(1, 2)"), ("[1, 2)", "(1, 2]"), ("[1, 2]", "(1, 2)"),
         ("(1, 2)", r"\{1, 2\}"), ("1, 1, 2", "1, 2, 2"),
         ("1, 2, 3", "1, 2"), ("72, 73", "72"), ("72 or 73", "72"), ("72", "72, 73"), ("1, 2, 72", "72"),
         (r"\{1, 2\}", r"\{1, 3\}"),
         ("(1, 2, 3)", "(1, 2)"), ("(1,2),(3,4)", "(1,2),(4,3)"), (r"(\sqrt{5}, 1)", r"(\sqrt{7}, 1)")],
    ),
    Kind(
        "Matrices",
        "Each element has to be equal. The shape of the brackets does not matter.",
        [(r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
         (r"\begin{pmatrix}0.5\\1\end{pmatrix}", r"\begin{pmatrix}\frac{1}{2}\\1\end{pmatrix}")],
        [(r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
         (r"\begin{pmatrix}0.0000001\\1\end{pmatrix}", r"\begin{pmatrix}0.0000002\\1\end{pmatrix}")],
    ),
]  # fmt: skip

RESPONSES = [  # a response, and the answer that it states; None if it states none
    (r"So it is \boxed{72}.", "72"),
    (r"First \boxed{1}, then \boxed{72}.", "72"),
    (r"\boxed{\boxed{72}}", "72"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    ("It is 6 * 12.\n#### 72\nI hope this helps.", "72"),
    (r"\boxed{72} #### 73", "72"),
    ("7+5=12#12", "12"),
    ("72", None),
    ("1#2#3", None),
    (r"\boxed{72", None),
    (r"\boxed{72} or \boxed{7", None),
    (r"\boxed{72}. Wait, no: \boxed{", None),
    (r"\boxed{72}. Wait, no: \boxed", None),
    (r"\boxed{72} or \boxed{\frac{1}{2}", None),
    ("#### 72\nIn LaTeX: " + r"\boxed{7", None),
    (r"#72 or \boxed{7", None),
    (r"\boxed{72} or \boxed{}", None),
]
