r"""GSM8K: 8,792 word problems of grade school (Cobbe et al., arXiv 2110.14168).

In: the dataset from the hub, or a local copy; a row has a `question` and an `answer` that ends in `#### 72`. Out: 7,473
training and 1,319 held-out problems, whose `answer` is the number alone. You may change the instruction.
"""

from typing import Any

from huggingface_hub.utils import are_progress_bars_disabled

from minicpgd.errors import UserError
from minicpgd.tasks.answers import plain, reference_answer
from minicpgd.tasks.data_files import checked
from minicpgd.tasks.jsonl import Jsonl, Rows, read_and_split, without

HUB_NAME = "openai/gsm8k"
COMMAND = "hf download openai/gsm8k --repo-type dataset --local-dir gsm8k"
COLUMNS = {"prompt": "question", "answer": "answer"}


class Gsm8k(Jsonl):
    r"""The task of this module. If `data` is a local file or folder, it needs no network.

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
