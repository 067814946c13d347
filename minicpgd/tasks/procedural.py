"""Problems without end: any task of the library reasoning-gym, which makes a problem from a number.

    --task reasoning_gym --data chain_sum
    --task reasoning_gym --data chain_sum:max_terms=3,max_digits=1

Its own scorer is the reward, between 0 and 1. It gets the answer that a response states (`answers.stated_answer`), or
the whole response where it states none. A response is right if the scorer gives it 1.

In: the name of a task and its options. Out: problems as dataset rows. It needs the extra gym.
"""

import ast
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import islice
from typing import Any

from minicpgd.errors import ConfigError, MissingPackageError, describe_error, did_you_mean
from minicpgd.tasks.answers import answer_text, stated_answer
from minicpgd.tasks.chain_arithmetic import is_held_out
from minicpgd.tasks.jsonl import Rows, add_instruction
from minicpgd.tasks.reward_call import RewardFunction, response_text

PROBLEMS = 2**31  # A number below this one chooses a problem.
ONE_IN = 4  # One problem in so many is held out. Finding one costs as many problems as this, and some are slow to make.
TRIES = 1000  # After so many problems that bring nothing new, a task is taken to have no more.


class ReasoningGym:
    """The task of this module. `minicpgd.tasks.Task` describes the members.

    Raises:
        ConfigError: no such task or option, or values that the task refuses.
        MissingPackageError: reasoning-gym is not installed.
    """

    def __init__(self, data: str | None = None, instruction: str | None = None):
        self._made = make_dataset(data)
        self.reward: RewardFunction = self._scores
        self._instruction = instruction
        self._held_out: dict[tuple[int, int], Rows] = {}  # Every evaluation asks for the same ones.

    @staticmethod
    def source(data: str | None) -> str:
        """The name of the task whose problems are made.

        Raises:
            ConfigError: no such task or option.
            MissingPackageError: reasoning-gym is not installed.
        """
        make_dataset(data)
        return f"made by reasoning-gym: {data}, one problem in {ONE_IN} held out"

    def sample(self, num_problems: int, rng: random.Random) -> Rows:
        """Training problems: never one that is held out.

        Raises:
            ConfigError: the task has too few problems.
        """
        rows = list(islice(self._draw(rng, held_out=False), num_problems))
        if len(rows) < num_problems:
            raise ConfigError(f"data: of {TRIES} problems in a row each is held out; choose a task with more of them")
        return rows

    def held_out(self, num_problems: int, seed: int = 0) -> Rows:
        """Evaluation problems: the same ones for the same seed, no two alike; fewer if the task has no more."""
        if (num_problems, seed) not in self._held_out:
            rows: dict[str, dict[str, Any]] = {}
            for drawn, row in enumerate(self._draw(random.Random(f"held out {seed}"), held_out=True)):
                rows.setdefault(row["prompt"], row)
                if len(rows) == num_problems or drawn > TRIES + 4 * len(rows):
                    break
            self._held_out[num_problems, seed] = list(rows.values())
        return self._held_out[num_problems, seed]

    def _scores(self, prompts: Sequence, completions: Sequence, entry: Sequence, **_: Any) -> list[float]:
        return [self._score(e, response_text(c)) for e, c in zip(entry, completions, strict=True)]

    def is_correct(self, problem: dict[str, Any], completion: str) -> bool:
        """The scorer gives the full score."""
        return self._score(problem["entry"], completion) >= 1

    def _score(self, entry: dict[str, Any], completion: str) -> float:
        stated = stated_answer(completion)
        return float(self._made.score_answer(answer=completion.strip() if stated is None else stated, entry=entry))

    def _draw(self, rng: random.Random, held_out: bool) -> Iterator[dict[str, Any]]:
        """Rows without end, or until many problems in a row were on the other side."""
        missed = 0
        while missed < TRIES:
            entry = self._made[rng.randrange(PROBLEMS)]
            missed += 1
            if is_held_out(entry["question"], ONE_IN) == held_out:
                missed, prompt = 0, entry["question"]
                prompt = add_instruction(prompt, self._instruction) if self._instruction else prompt
                yield {"prompt": prompt, "answer": answer_text(entry["answer"] or ""), "entry": entry}


def make_dataset(data: str | None) -> Any:
    """The task of reasoning-gym that `name` or `name:option=value,option=value` describes.

    Raises:
        ConfigError: no such task or option, or values that the task refuses.
        MissingPackageError: reasoning-gym is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # A library of theirs has some, when it is compiled first.
            from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        install = "pip install 'minicpgd[gym]'"
        raise MissingPackageError(f"task = reasoning_gym: it needs the package reasoning-gym: {install}") from error
    if not data:
        raise ConfigError("data: task = reasoning_gym needs the name of one of its tasks, as --data chain_sum")
    name, _, text = data.partition(":")
    if name not in DATASETS:
        near = did_you_mean(name, DATASETS) or f"it has {len(DATASETS)}, as chain_sum and gsm_symbolic"
        raise ConfigError(f"data = {data!r}: reasoning-gym has no task {name!r}; {near}")
    allowed = [field.name for field in fields(DATASETS[name][1]) if field.name not in ("seed", "size")]
    options = _options(data, text)
    for unknown in options.keys() - set(allowed):
        raise ConfigError(f"data = {data!r}: {name} has no option {unknown!r}; it has {', '.join(allowed)}")
    try:
        return create_dataset(name, seed=0, size=PROBLEMS, **options)
    except Exception as error:  # Each task has its own checks.
        raise ConfigError(f"data = {data!r}: reasoning-gym refuses it: {describe_error(error)}") from error


def _options(data: str, text: str) -> dict[str, Any]:
    """`max_terms=3,operators=('+','-'),kind=easy` to a dict. A bare word is text; true and false are truth values."""
    words = {"true": True, "false": False}
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError(text)
        return {
            str(option.arg): words.get(option.value.id, option.value.id)
            if isinstance(option.value, ast.Name)
            else ast.literal_eval(option.value)
            for option in call.keywords
        }
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"data = {data!r}: options are needed as max_terms=3,max_digits=1") from error
