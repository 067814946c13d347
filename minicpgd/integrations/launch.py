"""Our tasks on TRL's engine, from the command line: one process, eight GPUs, or a cluster of them.

    torchrun --nproc_per_node 2 -m minicpgd.integrations.launch --model_name_or_path embedded
    accelerate launch --config_file fsdp.yaml -m minicpgd.integrations.launch --config run.yaml

Flags are TRL's (`CPGDConfig`; `ModelConfig`, for 4 bit and adapters) and those of `Problems`; `--config` reads them
from a YAML file. In: problems and a reward by their names in this package. Out: `--output_dir`, with TRL's log,
checkpoints, and the trained model, which `minicpgd evaluate` takes. Errors are one line and exit code 2.

For your own dataset and reward function you need none of this: `CPGDTrainer` takes them as TRL's GRPOTrainer does.
"""

import functools
import importlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minicpgd.errors import UserError
from minicpgd.policy import EMBEDDED, quiet
from minicpgd.rewards import RewardFunction, load_reward
from minicpgd.tasks import Task, get_task

if TYPE_CHECKING:
    from trl import ModelConfig

    from minicpgd.integrations.trl import CPGDConfig, CPGDTrainer


@dataclass
class Problems:
    """What to train on, by names of this package."""

    task: str = field(default="chain_arithmetic", metadata={"help": "chain_arithmetic, gsm8k or jsonl."})
    data: str | None = field(default=None, metadata={"help": "A file or folder with problems, for gsm8k and jsonl."})
    reward: str | None = field(default=None, metadata={"help": "As in `minicpgd train`; None: the task's own."})
    instruction: str | None = field(default=None, metadata={"help": "Below each problem, in place of the task's."})
    num_problems: int = field(default=4096, metadata={"help": "Problems drawn from the task, to be gone over in turn."})


def rows_of(task: Task, num_problems: int, seed: int, *, chat: bool) -> list[dict[str, Any]]:
    """Training problems as rows for TRL.

    Args:
        chat: give each prompt as a message, so that TRL puts it into the tokenizer's chat template.
    """
    problems: list[dict[str, Any]] = list(task.sample(num_problems, random.Random(seed)))
    if not chat:
        return problems
    return [problem | {"prompt": [{"role": "user", "content": problem["prompt"]}]} for problem in problems]


def of_text(reward: RewardFunction) -> RewardFunction:
    """The same reward function, for completions that TRL hands over as messages."""

    @functools.wraps(reward)
    def read(prompts: list, completions: list, **columns: Any) -> list[float]:
        return reward(prompts=[_text(p) for p in prompts], completions=[_text(c) for c in completions], **columns)

    return read


def main(arguments: list[str] | None = None) -> None:
    """Train as the flags say.

    Raises:
        UserError: no TRL; a flag, file, task, reward or model that is not there; batches that hold no whole groups.
    """
    trainer = _trainer(*settings(arguments))
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()


def settings(arguments: list[str] | None = None) -> tuple[Problems, "CPGDConfig", "ModelConfig"]:
    """What the flags, and the file that `--config` names, say.

    Args:
        arguments: in place of the program's own.

    Raises:
        UserError: no TRL, or a flag or value that is none.
    """
    quiet()
    ours = importlib.import_module("minicpgd.integrations.trl")  # first: it says in one line what is missing
    from trl import ModelConfig, TrlParser

    parser = TrlParser((Problems, ours.CPGDConfig, ModelConfig), usage="%(prog)s --flag value ... (--help lists all)")
    with _in_one_line():
        return parser.parse_args_and_config(args=arguments)


def _trainer(problems: Problems, args: "CPGDConfig", model: "ModelConfig") -> "CPGDTrainer":
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import get_peft_config, get_quantization_config

    from minicpgd.integrations.trl import CPGDTrainer

    name = str(EMBEDDED) if model.model_name_or_path in (None, "embedded") else model.model_name_or_path
    task = get_task(problems.task, data=problems.data, instruction=problems.instruction)
    reward = load_reward(problems.reward) if problems.reward else task.reward
    args.model_init_kwargs = {"dtype": model.dtype, "attn_implementation": model.attn_implementation}
    with _in_one_line(f"model_name_or_path = {name!r}: "):
        tokenizer = AutoTokenizer.from_pretrained(name)
    rows = rows_of(task, problems.num_problems, args.seed, chat=bool(tokenizer.chat_template))
    with _in_one_line():
        return CPGDTrainer(
            model=name,
            reward_funcs=of_text(reward),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=get_peft_config(model),
            quantization_config=get_quantization_config(model),
        )


@contextmanager
def _in_one_line(where: str = "") -> Iterator[None]:
    """What TRL and transformers refuse, in the first line of their words."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(where + str(error).strip().splitlines()[0]) from error


def _text(message: Any) -> str:
    return message if isinstance(message, str) else message[-1]["content"]


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"minicpgd: {error}", file=sys.stderr)
        sys.exit(2)
