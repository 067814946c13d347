r"""GSM8K: 8,792 word problems of grade school (Cobbe et al., arXiv 2110.14168), from the hub or a local copy.

A row of theirs has a `question` and an `answer` whose reasoning ends in `#### 72`; here, `prompt` and the number alone.
Their 7,473 training problems are trained on, their 1,319 test problems held out.
"""

from typing import Any

from huggingface_hub.utils import are_progress_bars_disabled

from minicpgd.errors import UserError
from minicpgd.tasks.data_files import checked
from minicpgd.tasks.jsonl import Jsonl, Rows, read_and_split, without
from minicpgd.tasks.rewards import plain, reference_answer

HUB_NAME = "openai/gsm8k"
COMMAND = "hf download openai/gsm8k --repo-type dataset --local-dir gsm8k"
COLUMNS = {"prompt": "question", "answer": "answer"}


class Gsm8k(Jsonl):
    r"""The task of this module; with a local copy as `data`, a .jsonl or .parquet file or a folder, no network.

    Raises:
        UserError: it cannot be had from the hub, or what `data` names is not GSM8K.
    """

    instruction = r"Reason step by step, and put the final answer in \boxed{}."

    @staticmethod
    def source(data: str | None) -> str:
        """Which files, or where on the hub."""
        if data is None:
            return f"{HUB_NAME} from the hub, its train and test splits"
        return Jsonl.source(data)

    def _load(self, data: str | None) -> tuple[Rows, Rows]:
        parts = read_and_split(data, **COLUMNS) if data is not None else _from_hub()
        for row in parts[0] + parts[1]:
            row["answer"] = plain(reference_answer(row["answer"]))
        return parts


def _from_hub() -> tuple[Rows, Rows]:
    """Downloaded, or as `datasets` has it in its cache."""
    elsewhere = f"where there is a network, `{COMMAND}`; then --data gsm8k"
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"gsm8k from the hub needs datasets: pip install 'minicpgd[data]'; or, {elsewhere}") from error
    if are_progress_bars_disabled():  # then a program draws its own
        datasets.disable_progress_bars()
    try:
        splits: Any = datasets.load_dataset(HUB_NAME, "main")
    except Exception as error:  # no network, no disk, no cache: each has a class of its own, of five libraries
        raise UserError(f"{HUB_NAME} cannot be had from the hub ({type(error).__name__}): {elsewhere}") from error
    train, test = (
        checked(((f"{HUB_NAME}, {split} {i}", row) for i, row in enumerate(splits[split])), HUB_NAME, **COLUMNS)
        for split in ("train", "test")
    )
    return without(train, test, HUB_NAME), test
