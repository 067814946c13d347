"""The judge of final answers, on pairs that we judged by hand (answer_pairs.py)."""

import sys
from pathlib import Path

import pytest
from answer_pairs import KINDS, RESPONSES
from conftest import load_script

from minicpgd.tasks import answers
from minicpgd.tasks.answers import RULES, is_solution, reference_answer, stated_answer, tidy
from minicpgd.tasks.answers.kinds import NOT_UNITS, UNITS, judge
from minicpgd.tasks.answers.mathematics import LONGEST

PAIRS = [
    (kind.name, *pair, same) for kind in KINDS for same in (True, False) for pair in (kind.different, kind.equal)[same]
]
LONG = 200_000  # characters; an algorithm with quadratic time would take hours


@pytest.mark.parametrize(("kind", "stated", "reference", "same"), PAIRS)
def test_a_pair_is_judged_as_a_reader_judges_it(kind, stated, reference, same):
    assert is_solution(rf"Therefore \boxed{{{stated}}}.", reference) is same
    assert is_solution(f"Therefore\n#### {stated}\n", reference) is same


def test_there_are_enough_pairs_of_every_kind():
    assert len(PAIRS) >= 170
    assert len({(stated, repr(reference)) for _, stated, reference, _ in PAIRS}) == len(PAIRS)
    assert all(len(kind.equal) > 1 and len(kind.different) > 1 for kind in KINDS)


@pytest.mark.parametrize(("kind", "stated", "reference", "same"), PAIRS)
def test_every_answer_equals_itself(kind, stated, reference, same):
    assert is_solution(f"#### {stated}", stated)
    assert is_solution(f"#### {reference_answer(reference)}", reference)


@pytest.mark.parametrize(("response", "answer"), RESPONSES)
def test_a_response_states_its_last_answer_or_none(response, answer):
    assert stated_answer(response) == answer
    assert is_solution(response, "72") is (answer == "72")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.what)
def test_a_rule_turns_its_example_into_its_result(rule):
    assert rule.apply(rule.example) == rule.result
    assert tidy(rule.example) == tidy(rule.result)
    assert rule.result != rule.example


def test_rules_have_names_of_their_own():
    assert len({rule.what for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.what)
def test_no_rule_takes_quadratic_time(rule):
    pieces = [
        rule.example,
        rule.example + " ",
        *rule.example,
        *"1 1, 1. a $ ( { ^ * _ \\ = ~".split(" "),
        "1,000,",
        "√(",
    ]
    for piece in pieces:
        text = (piece or " ") * (LONG // max(len(piece), 1))
        assert isinstance(rule.apply(f"a{text}!"), str)


def test_long_answers_are_compared_as_text(monkeypatch):
    monkeypatch.setattr(answers, "tidy", None)
    assert is_solution(rf"\boxed{{{'7' * LONG}}}", "7" * LONG)
    assert not is_solution(rf"\boxed{{{'7' * (LONGEST + 1)}.0}}", "7" * (LONGEST + 1))
    assert not is_solution(rf"\boxed{{{'kg ' * LONG}}}", "5 kg")


def test_a_reference_may_be_a_value_of_json():
    assert [reference_answer(value) for value in (5, -5, 0.5, 1e-7, True, False)] == "5 -5 0.5 1e-07 true false".split()
    assert is_solution(r"\boxed{5}", 5)
    assert is_solution(r"\boxed{5.0}", 5)
    assert is_solution("#### 1/2", 0.5)
    assert not is_solution(r"\boxed{1}", True)


def test_math_verify_is_asked_only_about_formulas():
    assert judge("5 kg", "5 g") is False
    assert judge("(5 kg, 1)", "(5 kg, 1.0)") is True
    assert judge(r"(\sqrt{4} kg, 1)", "(2 kg, 1)") == [(r"\sqrt{4}", "2")]
    assert judge("x+y", "y+x") == [("x+y", "y+x")]


def test_a_spelling_of_a_unit_is_no_word_of_mathematics():
    assert not {spelling for spelling in UNITS if spelling in NOT_UNITS} - {"min", "sec"}
    assert {UNITS[name] for name in UNITS.values() if "/" not in name} == {n for n in UNITS.values() if "/" not in n}


def test_the_page_has_every_pair_and_is_current():
    root = Path(__file__).parent.parent
    load_script(root / "docs" / "build.py")
    page = (root / "docs" / "rewards.md").read_text()
    assert sys.modules["reference"].filled(page) == page, "run `make docs`"
    assert page.count(" = `") == sum(len(kind.equal) for kind in KINDS)
    assert page.count(" ≠ `") == sum(len(kind.different) for kind in KINDS)
