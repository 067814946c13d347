"""Our training step beside TRL's: the same model, prompts, lengths and updates per rollout, in turn, on this machine.

    python benchmarks/vs_trl.py                          # embedded and 30m; writes benchmarks/results/vs_trl.csv
    python benchmarks/vs_trl.py --sizes 30m --rounds 1

`embedded` is the model of this package on its own task, 16 prompts x 16 responses of at most 64 tokens, 4 updates on
each rollout, on one thread, as `minicpgd train` runs it. `30m` is a Llama of 31 million random weights, 8 prompts of 32
tokens x 8 responses, 4 updates, on all cores; random weights end no response early, so both loops work on 64 tokens of
each. Both loops: full-precision training of all weights, AdamW, GRPO's loss, a log line per rollout, no checkpoints, on
a GPU where there is one.

Each run is a process of its own, ours and TRL's in turn, `rounds` times. Seconds are those of a whole step (a rollout
and its updates), their median without the first two steps of each process. `rollout` ends in responses with advantages;
of it, `scoring` is apart: TRL asks the model for the log-probabilities of what it sampled (ours keeps what it knew when
it sampled); `update` is the rest. Memory is the largest amount that the process ever held, and what of it was not there
before training; both processes have imported TRL.
"""

import contextlib
import gc
import multiprocessing
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import tyro
from qlora import save_random, varied
from transformers import AutoTokenizer, LlamaConfig

from minicpgd import TrainConfig
from minicpgd.policy import EMBEDDED, quiet
from minicpgd.progress import Bars
from minicpgd.tasks import task_of
from minicpgd.trainer import Listener, train

RESULTS = Path(__file__).parent / "results" / "vs_trl.csv"
WARM_UP = 2
STEPS = {"embedded": 22, "30m": 6}


def settings(size: str, folder: Path) -> TrainConfig:
    """What both loops are told; for `30m`, the model and its problems are put into the folder first."""
    config = TrainConfig(algorithm="grpo", num_minibatches=4, max_steps=STEPS[size], max_completion_length=64)
    if size == "embedded":
        return config
    shape = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    save_random(shape, folder, torch.float32, prompt=32)
    return replace(
        config,
        model=str(folder / "model"),
        task="jsonl",
        data=str(folder / "problems.jsonl"),
        reward="qlora:varied",
        num_prompts=8,
        num_generations=8,
    )


def ours(config: TrainConfig, tell: Callable[[dict], None]) -> None:
    """Our loop, as `minicpgd train` runs it."""
    config = replace(config, eval_steps=config.max_steps + 1, save_steps=config.max_steps + 1, eval_problems=1)
    ends: list[float] = []

    def step(number: int, metrics: dict[str, float], timings: dict[str, float]) -> None:
        ends.append(time.perf_counter())
        if number:
            tell(
                {
                    "seconds": ends[-1] - ends[-2],
                    "rollout": timings["rollout_seconds"],
                    "scoring": 0.0,
                    "tokens": metrics["completion_length"] * config.num_responses,
                    "reward": metrics["reward"],
                }
            )

    with tempfile.TemporaryDirectory() as folder:
        train(replace(config, output_dir=str(Path(folder) / "run")), listener=Listener(step=step))


def trls(config: TrainConfig, tell: Callable[[dict], None]) -> None:
    """TRL's GRPOTrainer."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    task = task_of(config)
    name = str(EMBEDDED) if config.model == "embedded" else config.model
    clock: dict[str, float] = {}

    class Told(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            now = time.perf_counter()
            if "reward" in (logs or {}):
                tell(
                    {
                        "seconds": now - clock["end"],
                        "rollout": clock["rollout"],
                        "scoring": clock["scoring"],
                        "tokens": logs["completions/mean_length"] * config.num_responses,
                        "reward": logs["reward"],
                    }
                )
                clock["end"] = now

    class Timed(GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            made = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            if not torch.is_grad_enabled():
                clock["scoring"] += time.perf_counter() - started
            return made

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            clock["scoring"], started = 0.0, time.perf_counter()
            made = super()._generate_and_score_completions(inputs)
            clock["rollout"] = time.perf_counter() - started - clock["scoring"]
            return made

    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        trainer = Timed(
            model=name,
            reward_funcs=varied if config.reward else task.reward,
            train_dataset=Dataset.from_list(task.sample(config.num_prompts * config.max_steps, random.Random(0))),
            processing_class=AutoTokenizer.from_pretrained(name),
            callbacks=[Told()],
            args=GRPOConfig(
                output_dir=folder,
                loss_type="grpo",
                per_device_train_batch_size=config.num_responses // config.num_minibatches,
                steps_per_generation=config.num_minibatches,
                num_generations=config.num_generations,
                max_completion_length=config.max_completion_length,
                max_steps=config.max_steps * config.num_minibatches,
                learning_rate=config.learning_rate,
                lr_scheduler_type="constant",
                gradient_checkpointing=config.gradient_checkpointing,
                logging_steps=config.num_minibatches,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                bf16=False,
            ),
        )
        clock["end"] = time.perf_counter()
        with contextlib.redirect_stdout(nowhere):  # its log
            trainer.train()


def child(work: Callable, config: TrainConfig, threads: int, send: Any) -> None:
    """One loop in this process; tells of every step, then of memory."""
    quiet()
    import datasets  # noqa: F401  (and TRL, in both processes: what importing takes is no part of training)
    import trl.trainer.grpo_trainer  # noqa: F401

    torch.set_num_threads(threads)
    gc.collect()
    before = memory()
    work(config, send.send)
    send.send({"peak_mib": memory(), "grown_mib": memory() - before})


def memory() -> float:
    """The largest amount that this process has held so far, MiB: of a GPU's, where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compare(size: str, rounds: int) -> pd.DataFrame:
    """Ours and TRL's in turn; a row per round and loop, seconds and tokens as medians over its steps."""
    context, rows = multiprocessing.get_context("spawn"), []
    threads = 1 if size == "embedded" else torch.get_num_threads()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, threads: {threads}"
    with tempfile.TemporaryDirectory() as name, Bars([size], 2 * rounds * STEPS[size]) as bars:
        config = settings(size, Path(name))
        for number in range(rounds):
            for by, work in (("minicpgd", ours), ("trl", trls)):
                listen, send = context.Pipe(duplex=False)
                process = context.Process(target=child, args=(work, config, threads, send))
                process.start()
                send.close()
                steps: list[dict] = []
                while "seconds" in (told := listen.recv()):
                    steps.append(told)
                    bars.update(
                        0, (2 * number + (by == "trl")) * STEPS[size] + len(steps), f"{by}: {told['seconds']:.2f} s"
                    )
                process.join()
                counted = steps[WARM_UP:]
                row = {key: statistics.median(s[key] for s in counted) for key in ("seconds", "rollout", "scoring")}
                row["update"] = statistics.median(s["seconds"] - s["rollout"] - s["scoring"] for s in counted)
                row["tokens_per_second"] = statistics.median(s["tokens"] / s["seconds"] for s in counted)
                row["reward_first"], row["reward_last"] = (
                    statistics.mean(s["reward"] for s in part) for part in (steps[:5], steps[-5:])
                )
                rows.append({"size": size, "by": by, "device": device, "round": number, **row, **told})
    return pd.DataFrame(rows)


def main(sizes: tuple[Literal["embedded", "30m"], ...] = ("embedded", "30m"), rounds: int = 3) -> None:
    """Measure, write the table, and say what of TRL's time and memory ours takes.

    Args:
        sizes: of embedded and 30m.
        rounds: processes of each loop, in turn.
    """
    quiet()
    table = pd.concat([compare(size, rounds) for size in sizes])
    if set(sizes) == set(STEPS):
        table.to_csv(RESULTS, index=False, float_format="%.4g")
    medians = table.drop(columns=["round", "device"]).groupby(["size", "by"]).median()
    print(medians.to_string(float_format="%.3g"))
    for size, pair in medians.groupby("size"):
        mine, trl = pair.droplevel(0).loc["minicpgd"], pair.droplevel(0).loc["trl"]
        time_share, memory_share = (mine[name] / trl[name] for name in ("seconds", "peak_mib"))
        print(f"{size}: {time_share:.2f} of TRL's time, {memory_share:.2f} of its memory")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
