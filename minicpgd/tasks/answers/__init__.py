"""Answers: what a response states, and whether it is right.

In: a response and a reference. Out: the stated answer, or a verdict. `stated.py` finds the answer and turns its
spellings into one, `kinds.py` judges words, units and lists, and `mathematics.py` compares formulas by value.
"""

from minicpgd.tasks.answers.stated import (
    RULES,
    answer_text,
    boxes,
    final_answer,
    is_solution,
    need_math_verify,
    plain,
    reference_answer,
    stated_answer,
    tidy,
)

__all__ = [
    "RULES", "answer_text", "boxes", "final_answer", "is_solution", "need_math_verify", "plain", "reference_answer",
    "stated_answer", "tidy",
]  # fmt: skip
