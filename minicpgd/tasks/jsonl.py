r"""Your own problems: a file or folder of rows with `prompt` and `answer`. And GSM8K, which has other columns.

    {"prompt": "What is 3/4 of 12?", "answer": "9"}

A prompt may also be a list of messages, as in TRL: [{"role": "user", "content": "What is 3/4 of 12?"}].

A response is right if the answer that it states (`minicpgd.tasks.answers.stated_answer`) has the same value.

In: the path of the data. Out: training and held-out problems as dataset rows. You may subclass `Jsonl` for a dataset
with other columns, as `Gsm8k` does.
"""

import json
import random
from typing import Any

from huggingface_hub.utils import are_progress_bars_disabled

from minicpgd.errors import UserError
from minicpgd.tasks.answers import is_solution, need_math_verify, plain, reference_answer
from minicpgd.tasks.chain_arithmetic import is_held_out
from minicpgd.tasks.data_files import Prompt, checked, find_files, read_files
from minicpgd.tasks.rewards import mathematical

HUB_NAME = "openai/gsm8k"
COMMAND = "hf download openai/gsm8k --repo-type dataset --local-dir gsm8k"
COLUMNS = {"prompt": "question", "answer": "answer"}

Rows = list[dict[str, Any]]  # row["prompt"] is a `Prompt`, row["answer"] is text.


class Jsonl:
    """The task of this module, which reads all data at once. `minicpgd.tasks.Task` describes the members.

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
            self._train, self._held_out = (
                [row | {"prompt": add_instruction(row["prompt"], instruction)} for row in rows]
                for rows in (self._train, self._held_out)
            )

    @staticmethod
    def source(data: str | None) -> str:
        """The names of the files."""
        names = {split: ", ".join(map(str, paths)) for split, paths in find_files(data).items()}
        if "all" in names:
            return f"{names['all']}, one problem in 16 held out"
        return f"{names['train']}; held out: {names['test']}"

    def sample(self, num_problems: int, rng: random.Random) -> Rows:
        """Training problems. No row comes twice before each has come once."""
        rounds, rest = divmod(num_problems, len(self._train))
        return self._train * rounds + rng.sample(self._train, rest)

    def held_out(self, num_problems: int, seed: int = 0) -> Rows:
        """Evaluation problems: the same ones for the same seed; all of them if there are fewer."""
        return random.Random(f"held out {seed}").sample(self._held_out, len(self._held_out))[:num_problems]

    def is_correct(self, problem: dict[str, Any], completion: str) -> bool:
        """The final answer equals the reference, exactly or in value."""
        return is_solution(completion, problem["answer"])

    def _load(self, data: str | None) -> tuple[Rows, Rows]:
        return read_and_split(data)


def read_and_split(data: str | None, *, prompt: str = "prompt", answer: str = "answer") -> tuple[Rows, Rows]:
    """Training and held-out rows, which share no prompt.

    A folder may have files for both. Otherwise one prompt in 16 is held out, by the checksum of `is_held_out`. So equal
    prompts are on the same side, and stay there when the file grows.

    Raises:
        UserError: the data cannot be read, or nothing is left to train on or to hold out.
    """
    files = find_files(data)
    if "all" not in files:
        train, test = (read_files(files[split], prompt=prompt, answer=answer) for split in ("train", "test"))
        return without(train, test, data), test
    rows = read_files(files["all"], prompt=prompt, answer=answer)
    train, test = ([row for row in rows if is_held_out(prompt_key(row["prompt"])) is side] for side in (False, True))
    if not (train and test):
        lack = f"its {len(rows)} problems leave none to {'hold out' if train else 'train on'}, as one prompt in 16"
        raise UserError(f"data = {data!r}: {lack} is held out; give more, or a folder with train.jsonl and test.jsonl")
    return train, test


def without(train: Rows, test: Rows, data: str | None) -> Rows:
    """The training rows whose prompt is not in the test rows.

    Raises:
        UserError: there is none.
    """
    prompts = {prompt_key(row["prompt"]) for row in test}
    if not (kept := [row for row in train if prompt_key(row["prompt"]) not in prompts]):
        raise UserError(f"data = {data!r}: every training problem is among the test problems, too")
    return kept


def prompt_key(prompt: Prompt) -> str:
    """A text that is the same for equal prompts: text itself, and messages as JSON with sorted keys."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def add_instruction(prompt: Prompt, instruction: str) -> Prompt:
    """A new prompt with the instruction below the text, or below the last message of the user."""
    if isinstance(prompt, str):
        return f"{prompt}\n\n{instruction}"
    last = max(number for number, message in enumerate(prompt) if message["role"] == "user")
    longer = prompt[last] | {"content": f"{prompt[last]['content']}\n\n{instruction}"}
    return [*prompt[:last], longer, *prompt[last + 1 :]]


class Gsm8k(Jsonl):
    r"""GSM8K: 8,792 word problems of grade school (Cobbe et al., arXiv 2110.14168), 1,319 of them held out.

    A row has a `question`, and an `answer` that ends in `#### 72`. With a local copy as `data` it needs no network.

    Raises:
        UserError: the hub does not give it, or `data` is not GSM8K.
    """

    instruction = r"Reason step by step, and put the final answer in \boxed{}."

    @staticmethod
    def source(data: str | None) -> str:
        """The names of the files, or the name on the hub."""
        return f"{HUB_NAME} from the hub, its train and test splits" if data is None else Jsonl.source(data)

    def _load(self, data: str | None) -> tuple[Rows, Rows]:
        train, test = _from_hub() if data is None else read_and_split(data, **COLUMNS)
        return _numbers_alone(train), _numbers_alone(test)


def _numbers_alone(rows: Rows) -> Rows:
    return [row | {"answer": plain(reference_answer(row["answer"]))} for row in rows]


def _from_hub() -> tuple[Rows, Rows]:
    """Download it, or take it from the cache of `datasets`."""
    elsewhere = f"where there is a network, `{COMMAND}`; then --data gsm8k"
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"gsm8k from the hub needs datasets: pip install 'minicpgd[data]'; or, {elsewhere}") from error
    if are_progress_bars_disabled():  # A program that disables them draws its own.
        datasets.disable_progress_bars()
    try:
        splits: Any = datasets.load_dataset(HUB_NAME, "main")
    except Exception as error:  # Five libraries raise their own errors for a missing network, disk or cache.
        raise UserError(f"{HUB_NAME} cannot be had from the hub ({type(error).__name__}): {elsewhere}") from error
    train, test = (
        checked(((f"{HUB_NAME}, {split} {i}", row) for i, row in enumerate(splits[split])), HUB_NAME, **COLUMNS)
        for split in ("train", "test")
    )
    return without(train, test, HUB_NAME), test
