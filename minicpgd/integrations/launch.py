"""Train on a task of this package with TRL, from the command line: in one process, on eight GPUs, or on a cluster.

    torchrun --nproc_per_node 2 -m minicpgd.integrations.launch --model_name_or_path embedded
    accelerate launch --config_file fsdp.yaml -m minicpgd.integrations.launch --config run.yaml

In: flags, also from the YAML file after `--config`. They are TRL's (`CPGDConfig`; `ModelConfig` for 4 bit and adapters)
and those of `Problems`. Out: in `--output_dir` the trained model, which `minicpgd evaluate` takes (or an adapter, which
PEFT adds to its model), TRL's checkpoints, and its log `trainer_state.json`; on the terminal a line per logged rollout.
A wrong flag gives one line and exit code 2. torchrun adds lines of its own, so try new flags without it first.

For your own dataset and reward function use `CPGDTrainer`, which takes them as TRL's GRPOTrainer does.
"""

import functools
import importlib
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import yaml
from transformers import AutoTokenizer, ProgressCallback
from transformers.utils import logging

from minicpgd.config import ModelSettings
from minicpgd.errors import UserError, did_you_mean
from minicpgd.models.policy import quiet
from minicpgd.models.source import check_model_folder, resolve_model
from minicpgd.tasks.reward_call import RewardFunction, checked_call, name_of, response_text
from minicpgd.tasks.rewards import load_reward
from minicpgd.tasks.task import Task, get_task

if TYPE_CHECKING:
    from trl import ModelConfig

    from minicpgd.integrations.trl import CPGDConfig, CPGDTrainer


@dataclass
class Problems:
    """The problems to train on, by names of this package."""

    task: str = field(default="chain_arithmetic", metadata={"help": "chain_arithmetic, gsm8k or jsonl."})
    data: str | None = field(default=None, metadata={"help": "A file or folder with problems, for gsm8k and jsonl."})
    reward: str | None = field(default=None, metadata={"help": "As in `minicpgd train`; None: the task's own."})
    instruction: str | None = field(default=None, metadata={"help": "Below each problem, in place of the task's."})
    num_problems: int = field(default=4096, metadata={"help": "Problems drawn from the task; epochs repeat them."})


class LinePerRollout(ProgressCallback):
    """The progress bar of transformers, with four of TRL's forty metrics."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write a line if the log is a rollout's."""
        if self.training_bar is not None and "reward" in (logs or {}):
            names = {"reward": "reward", "completions/mean_length": "length", "kl_old": "kl_old", "loss": "loss"}
            metrics = "  ".join(f"{short} {logs[name]:.3g}" for name, short in names.items() if name in logs)
            self.training_bar.write(f"update {state.global_step}: {metrics}")


def rows_of(task: Task, num_problems: int, seed: int, *, chat: bool) -> list[dict[str, Any]]:
    """Training problems as rows for TRL. With `chat` a text becomes a message, for TRL's chat templates."""
    rows: list[dict[str, Any]] = list(task.sample(num_problems, random.Random(seed)))
    if not chat or not has_texts(rows):
        return rows
    return [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]


def has_texts(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether the prompts are texts. Otherwise they are lists of messages."""
    return all(isinstance(row["prompt"], str) for row in rows)


def accept_messages(reward: RewardFunction, *, as_texts: bool = True) -> RewardFunction:
    """A reward function for TRL that calls another one as `minicpgd train` does, with its one-line errors.

    With `as_texts` the other one gets texts, although TRL passes messages: the task's problems are texts.
    """

    def text(prompt: Any) -> str:
        return prompt if isinstance(prompt, str) else prompt[-1]["content"]

    @functools.wraps(reward)
    def wrapped(prompts: list, completions: list, **others: Any) -> list[float | None]:
        if as_texts:
            prompts, completions = [*map(text, prompts)], [*map(response_text, completions)]
        return checked_call(name_of(reward), reward, completions, prompts=prompts, **others)

    return wrapped


def main(arguments: list[str] | None = None) -> None:
    """Train as the flags say.

    Raises:
        UserError: TRL is missing; a flag, file, task, reward or model does not exist; a batch is not a number of whole
            groups; there are too few problems for a rollout; `output_dir` has a trained model.
    """
    trainer = _trainer(*settings(arguments))
    checkpoint = trainer.args.resume_from_checkpoint
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except UnpicklingError as error:  # torch loads tensors and numbers from a checkpoint, and nothing else.
        damage = "a file in it is damaged, or wants to run code"
        raise UserError(f"resume_from_checkpoint = {checkpoint!r}: {damage}") from error
    trainer.save_model()
    trainer.save_state()


def settings(arguments: list[str] | None = None) -> tuple[Problems, "CPGDConfig", "ModelConfig"]:
    """Parse these arguments, or the program's own, and the file after `--config`.

    Raises:
        UserError: TRL is missing, or a flag or a value is wrong.
    """
    quiet()
    ours = importlib.import_module("minicpgd.integrations.trl")  # Without TRL this raises a UserError.
    from trl import ModelConfig, TrlParser

    parser = TrlParser((Problems, ours.CPGDConfig, ModelConfig), usage="%(prog)s --flag value ... (--help lists all)")
    parser.error = _refuse  # type: ignore[method-assign]  # argparse's own method prints a page of usage.
    flags = [*(sys.argv[1:] if arguments is None else arguments)]
    if not torch.accelerator.is_available():
        flags.insert(0, "--use_cpu")
    logging.set_verbosity_warning()  # With less than warnings, TRL's config would switch off the progress bar.
    with _in_one_line():
        problems, args, model, unknown = parser.parse_args_and_config(
            args=flags, return_remaining_strings=True, fail_with_unknown_args=False
        )
    quiet()
    if unknown:
        near = did_you_mean(unknown[0], parser._option_string_actions)
        raise UserError(f"{unknown[0]}: there is no such flag; {near}--help lists all")
    return problems, args, model


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}; --help lists all")


def _trainer(problems: Problems, args: "CPGDConfig", model: "ModelConfig") -> "CPGDTrainer":
    from datasets import Dataset
    from trl import get_peft_config, get_quantization_config

    from minicpgd.integrations.trl import CPGDTrainer

    resumed = args.resume_from_checkpoint
    if resumed and not Path(resumed).is_dir():
        raise UserError(f"resume_from_checkpoint = {resumed!r}: there is no such folder")
    if not resumed and any(Path(args.output_dir).glob("*.safetensors")):
        raise UserError(f"output_dir = {args.output_dir!r}: a trained model is there; name another, or remove it")
    name = resolve_model(model.model_name_or_path or ModelSettings.model)
    task = get_task(problems.task, data=problems.data, instruction=problems.instruction)
    reward = load_reward(problems.reward) if problems.reward else task.reward
    loading = {"dtype": model.dtype, "attn_implementation": model.attn_implementation, "revision": model.model_revision}
    trusted = {"trust_remote_code": args.trust_remote_code}
    args.model_init_kwargs = loading | trusted | {"use_safetensors": True} | (args.model_init_kwargs or {})
    if args.model_init_kwargs["trust_remote_code"]:
        print(f"warning: --trust_remote_code: Python code that comes with {name} is run", file=sys.stderr)
    check_model_folder(name, name)
    with _in_one_line(f"model_name_or_path = {name!r}: "):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=model.model_revision, **trusted)
    rows = rows_of(task, problems.num_problems, args.seed, chat=bool(tokenizer.chat_template))
    wanted = (args.generation_batch_size or 0) // args.num_generations
    if len(rows) < wanted:
        reason = f"a rollout takes {wanted} (generation_batch_size / num_generations)"
        raise UserError(f"num_problems = {len(rows)}: {reason}")
    with _in_one_line():
        trainer = CPGDTrainer(
            model=name,
            reward_funcs=accept_messages(reward, as_texts=has_texts(rows_of(task, 1, args.seed, chat=False))),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=get_peft_config(model),
            quantization_config=get_quantization_config(model),
        )
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LinePerRollout)
    return trainer


@contextmanager
def _in_one_line(where: str = "") -> Iterator[None]:
    """Turn an error of TRL or transformers into a UserError with the first line of its message."""
    try:
        yield
    except (ValueError, OSError, ImportError, yaml.YAMLError) as error:
        raise UserError(where + str(error).strip().splitlines()[0]) from error
    except IndexError as error:  # TRL's parser raises it.
        raise UserError("config: name a YAML file after --config") from error


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"minicpgd: {error}", file=sys.stderr)
        sys.exit(2)
