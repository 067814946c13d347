"""Your own problems: any file or folder of rows with `prompt` and `answer`.

    {"prompt": "What is 3/4 of 12?", "answer": "9"}

An answer is right if it is equal in value, wherever a response states it (see `minicpgd.rewards.stated_answer`).
"""

import random
from typing import Any

from minicpgd.errors import ConfigError, UserError
from minicpgd.tasks.chain_arithmetic import is_held_out
from minicpgd.tasks.data_files import find_files, read_files
from minicpgd.tasks.rewards import is_solution, mathematical, need_math_verify

Rows = list[dict[str, Any]]


class Jsonl:
    """The task of this module; see `minicpgd.tasks.Task` for what each member promises.

    Everything is read when it is made.

    Raises:
        UserError: no data, or data that cannot be used (the line names file, line and field), or no math-verify.
    """

    reward = staticmethod(mathematical)
    instruction: str | None = None

    def __init__(self, data: str | None = None, instruction: str | None = None):
        instruction = self.instruction if instruction is None else instruction
        self._train, self._held_out = self._load(data)
        need_math_verify()
        if instruction:
            for row in self._train + self._held_out:
                row["prompt"] = f"{row['prompt']}\n\n{instruction}"

    @staticmethod
    def source(data: str | None) -> str:
        """Which files."""
        files = find_files(_needed(data))
        names = {split: ", ".join(map(str, paths)) for split, paths in files.items()}
        if "all" in names:
            return f"{names['all']}, one problem in 16 held out"
        return f"{names['train']}; held out: {names['test']}"

    def sample(self, num_problems: int, rng: random.Random) -> Rows:
        """Training problems, no row twice before each has been taken once."""
        rounds, rest = divmod(num_problems, len(self._train))
        return self._train * rounds + rng.sample(self._train, rest)

    def held_out(self, num_problems: int, seed: int = 0) -> Rows:
        """Evaluation problems: the same ones for the same seed; all there are, if fewer."""
        return random.Random(f"held out {seed}").sample(self._held_out, len(self._held_out))[:num_problems]

    def is_correct(self, problem: dict[str, str], completion: str) -> bool:
        """The final answer equals the reference, to the letter or in value."""
        return is_solution(completion, problem["answer"])

    def _load(self, data: str | None) -> tuple[Rows, Rows]:
        return read_and_split(_needed(data))


def read_and_split(data: str, *, prompt: str = "prompt", answer: str = "answer") -> tuple[Rows, Rows]:
    """Training and held-out rows, which share no prompt.

    A folder says which is which. In a single file one prompt in 16 is held out; its own letters decide which, as in
    chain_arithmetic, so the same prompt twice is on one side, and a file that grows moves nothing across.

    Raises:
        UserError: what cannot be read, or leaves nothing to train on or nothing to hold out.
    """
    files = find_files(data)
    if "all" not in files:
        train, test = (read_files(files[split], prompt=prompt, answer=answer) for split in ("train", "test"))
        return without(train, test, data), test
    rows = read_files(files["all"], prompt=prompt, answer=answer)
    parts = [row for row in rows if not is_held_out(row["prompt"])], [row for row in rows if is_held_out(row["prompt"])]
    for part, lack in zip(parts, ("train on", "hold out"), strict=True):
        if not part:
            raise UserError(
                f"data = {data!r}: its {len(rows)} problems leave none to {lack}, as one prompt in 16 is held out; "
                "give more, or a folder with train.jsonl and test.jsonl"
            )
    return parts


def without(train: Rows, test: Rows, data: str) -> Rows:
    """The training rows whose prompt is not in the test rows.

    Raises:
        UserError: there is none.
    """
    tested = {row["prompt"] for row in test}
    if not (kept := [row for row in train if row["prompt"] not in tested]):
        raise UserError(f"data = {data!r}: every training problem is among the test problems, too")
    return kept


def _needed(data: str | None) -> str:
    if data is None:
        raise ConfigError("data = None: the task jsonl needs a file, as --data problems.jsonl, with prompt and answer")
    return data
