"""Trains with CPGDTrainer in one or two processes, for test_trl.py. This is not a test itself.

    python tests/ranks.py FOLDER

Importing TRL takes seconds, so it is done once. Then two forked processes, which find the variables that torchrun sets,
sample and train. After them the first process trains on the same responses, alone.

Each job in `JOBS` writes to FOLDER the responses of each rank, its final parameters, and the log. One process replays
the responses of two, because random numbers differ by process, and losses agree to 1e-4 only on the same responses.
"""

import json
import multiprocessing
import os
import random
import socket
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from minicpgd.integrations.trl import CPGDConfig, CPGDTrainer
from minicpgd.models import EMBEDDED, quiet
from minicpgd.tasks import get_task

PROCESSES = 2
REPLAYED_STEPS = 6  # One process repeats at most so many steps of the two: each takes twice as long there.
JOBS = {
    "cpgd": {"num_iterations": 4, "max_steps": 32},
    "dapo": {"num_iterations": 2, "max_steps": 4},  # It takes a mean over tokens, and the ranks have unequally many.
}


class Recorded(CPGDTrainer):
    """Records its responses. It takes them from `replayed` if there are any, and otherwise samples."""

    replayed: list | None = None

    def _generate_single_turn(self, prompt_ids, *rest, **keywords):
        if self.replayed is None:
            completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *rest, **keywords)
        else:
            (expected, completion_ids), logprobs = self.replayed.pop(0), None
            assert prompt_ids == expected, "the prompts have another order"
        self.recorded.append((prompt_ids, completion_ids))
        return completion_ids, logprobs


def train(name: str, folder: Path, rank: int, world: int) -> None:
    """Run one job. A single process has as many micro-batches as there were processes."""
    task, job = get_task("chain_arithmetic"), dict(JOBS[name])
    if world == 1:
        job["max_steps"] = min(job["max_steps"], REPLAYED_STEPS)
    trainer = Recorded(
        model=str(EMBEDDED),
        reward_funcs=task.reward,
        args=CPGDConfig(
            algorithm=name,
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=256 // PROCESSES,
            gradient_accumulation_steps=PROCESSES // world,
            num_generations=16,
            max_completion_length=64,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            **job,
        ),
        train_dataset=Dataset.from_list(task.sample(512, random.Random(0))),
        processing_class=AutoTokenizer.from_pretrained(EMBEDDED),
    )
    trainer.recorded = []
    if world == 1:
        ranks = [json.loads((folder / f"{name}-responses-{rank}.json").read_text()) for rank in range(PROCESSES)]
        trainer.replayed = [[a + b for a, b in zip(*turn, strict=True)] for turn in zip(*ranks, strict=True)]
    trainer.train()
    if world > 1:
        (folder / f"{name}-responses-{rank}.json").write_text(json.dumps(trainer.recorded))
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    torch.save(unwrapped.state_dict(), folder / f"{name}-parameters-{rank}-of-{world}.pt")
    if rank == 0:
        (folder / f"{name}-log-{world}.json").write_text(json.dumps(trainer.state.log_history))


def train_all(folder: Path, rank: int, world: int) -> None:
    """Run all jobs."""
    for name in JOBS:
        train(name, folder, rank, world)


def train_as_rank(folder: Path, rank: int, port: int) -> None:
    """Run all jobs as one of the processes, as if torchrun had started it."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES}
    os.environ |= {name: str(number) for name, number in (numbers | {"MASTER_PORT": port}).items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    train_all(folder, rank, PROCESSES)


def main(folder: Path) -> None:
    """Train in two processes, then in this one."""
    quiet()
    torch.set_num_threads(1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=train_as_rank, args=(folder, rank, port)) for rank in range(PROCESSES)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        sys.exit("a rank has failed")
    train_all(folder, 0, 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
