"""How much time and memory does our training step need, compared with TRL's?

    python benchmarks/vs_trl.py                          # embedded and 30m; writes benchmarks/results/vs_trl.csv
    python benchmarks/vs_trl.py --sizes 30m --rounds 1

`embedded` is the model of this package on its own task, as `minicpgd train` trains it: 16 prompts x 16 responses of at
most 64 tokens, 4 updates on each rollout, one thread. `30m` is a Llama with 31 million random weights: 8 prompts of 32
tokens x 8 responses, 4 updates, all cores. A random model rarely ends a response early, so both loops process 64 tokens
of each response. Both loops train all weights in full precision with AdamW and GRPO's loss, write a log line per
rollout, and save no checkpoints. They use a GPU if there is one.

Each run is a process of its own. The two loops take turns, `rounds` times. The numbers are medians over the steps of a
process, without its first two:

- `seconds`: the whole step, which is a rollout and its updates.
- `scoring`: TRL computes the log-probabilities of the sampled tokens again. Our loop keeps them from sampling.
- `rollout`: the time until each response has an advantage, without `scoring`.
- `update`: the rest of the step.

`peak_mib` is the peak memory of the process, and `grown_mib` is its growth since training began. Both processes import
TRL before they train.
"""

import contextlib
import gc
import itertools
import multiprocessing
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import tyro
from qlora import odd_length, save_random
from transformers import AutoTokenizer, LlamaConfig

from minicpgd import TrainConfig
from minicpgd.cli.progress import Bars
from minicpgd.models.policy import quiet
from minicpgd.models.source import EMBEDDED
from minicpgd.tasks.task import load_task
from minicpgd.training.loop import Callbacks, train

RESULTS = Path(__file__).parent / "results" / "vs_trl.csv"
WARM_UP = 2
STEPS = {"embedded": 22, "30m": 6}


def make_config(size: str, folder: Path) -> TrainConfig:
    """Return the settings of both loops. For `30m`, save the model and its problems to the folder."""
    settings = {"num_minibatches": 4, "max_steps": STEPS[size], "max_completion_length": 64}
    config = TrainConfig(algorithm="grpo", target_kl=None, **settings)  # A stop would leave updates out.
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
        reward="qlora:odd_length",
        num_prompts=8,
        num_generations=8,
    )


def train_ours(config: TrainConfig, send: Callable[[dict], None]) -> None:
    """Train with our loop, and send the measurements of each step."""
    config = replace(config, eval_steps=config.max_steps + 1, save_steps=config.max_steps + 1, eval_problems=1)
    ends: list[float] = []

    def on_step(step: int, metrics: dict[str, float], timings: dict[str, float]) -> None:
        ends.append(time.perf_counter())
        if step:
            send(
                {
                    "seconds": ends[-1] - ends[-2],
                    "rollout": timings["rollout_seconds"],
                    "scoring": 0.0,
                    "tokens": metrics["completion_length"] * config.num_responses,
                    "reward": metrics["reward"],
                }
            )

    with tempfile.TemporaryDirectory() as folder:
        train(replace(config, output_dir=str(Path(folder) / "run")), callbacks=Callbacks(on_step=on_step))


def train_trl(config: TrainConfig, send: Callable[[dict], None]) -> None:
    """Do the same with TRL's GRPOTrainer."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    task = load_task(config)
    name = str(EMBEDDED) if config.model == "embedded" else config.model
    clock: dict[str, float] = {}

    class StepSender(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            now = time.perf_counter()
            if "reward" in (logs or {}):
                send(
                    {
                        "seconds": now - clock["end"],
                        "rollout": clock["rollout"],
                        "scoring": clock["scoring"],
                        "tokens": logs["completions/mean_length"] * config.num_responses,
                        "reward": logs["reward"],
                    }
                )
                clock["end"] = now

    class TimedTrainer(GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            if not torch.is_grad_enabled():
                clock["scoring"] += time.perf_counter() - started
            return result

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            clock["scoring"], started = 0.0, time.perf_counter()
            result = super()._generate_and_score_completions(inputs)
            clock["rollout"] = time.perf_counter() - started - clock["scoring"]
            return result

    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as devnull:
        trainer = TimedTrainer(
            model=name,
            reward_funcs=odd_length if config.reward else task.reward,
            train_dataset=Dataset.from_list(task.sample(config.num_prompts * config.max_steps, random.Random(0))),
            processing_class=AutoTokenizer.from_pretrained(name),
            callbacks=[StepSender()],
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
        with contextlib.redirect_stdout(devnull):  # TRL prints its log.
            trainer.train()


def run_child(train_loop: Callable, config: TrainConfig, threads: int, connection: Connection) -> None:
    """Train with one loop in this process, and send the measurements of each step and then those of memory."""
    quiet()
    # Both processes import TRL here, so that the numbers exclude the cost of the import.
    import datasets  # noqa: F401
    import trl.trainer.grpo_trainer  # noqa: F401

    torch.set_num_threads(threads)
    gc.collect()
    before = peak_mib()
    train_loop(config, connection.send)
    connection.send({"peak_mib": peak_mib(), "grown_mib": peak_mib() - before})


def peak_mib() -> float:
    """Return the peak memory of this process so far in MiB, or that of its GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


LOOPS = {"minicpgd": train_ours, "trl": train_trl}


def compare(size: str, rounds: int) -> pd.DataFrame:
    """Let the two loops take turns, and return a row per round and loop."""
    context, rows = multiprocessing.get_context("spawn"), []
    threads = 1 if size == "embedded" else torch.get_num_threads()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, threads: {threads}"
    with tempfile.TemporaryDirectory() as name, Bars([size], 2 * rounds * STEPS[size]) as bars:
        config = make_config(size, Path(name))
        for number, (loop, train_loop) in itertools.product(range(rounds), LOOPS.items()):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=run_child, args=(train_loop, config, threads, sender))
            process.start()
            sender.close()
            steps: list[dict] = []
            while "seconds" in (message := receiver.recv()):
                steps.append(message)
                done = len(rows) * STEPS[size] + len(steps)
                bars.update(0, done, f"{loop}: {message['seconds']:.2f} s")
            process.join()
            measured = steps[WARM_UP:]
            row = {key: statistics.median(s[key] for s in measured) for key in ("seconds", "rollout", "scoring")}
            row["update"] = statistics.median(s["seconds"] - s["rollout"] - s["scoring"] for s in measured)
            row["tokens_per_second"] = statistics.median(s["tokens"] / s["seconds"] for s in measured)
            row["reward_first"], row["reward_last"] = (
                statistics.mean(s["reward"] for s in part) for part in (steps[:5], steps[-5:])
            )
            rows.append({"size": size, "by": loop, "device": device, "round": number, **row, **message})
    return pd.DataFrame(rows)


def main(sizes: tuple[Literal["embedded", "30m"], ...] = ("embedded", "30m"), rounds: int = 3) -> None:
    """Measure, write the table, and print our time and memory as shares of TRL's.

    Args:
        sizes: the models; the script writes the table only if it measures both.
        rounds: number of processes of each loop.
    """
    quiet()
    table = pd.concat([compare(size, rounds) for size in sizes])
    if set(sizes) == set(STEPS):
        table.to_csv(RESULTS, index=False, float_format="%.4g")
    medians = table.drop(columns=["round", "device"]).groupby(["size", "by"]).median()
    print(medians.to_string(float_format="%.3g"))
    for size, pair in medians.groupby("size"):
        ours, trl = pair.droplevel(0).loc["minicpgd"], pair.droplevel(0).loc["trl"]
        time_share, memory_share = (ours[name] / trl[name] for name in ("seconds", "peak_mib"))
        print(f"{size}: {time_share:.2f} of TRL's time, {memory_share:.2f} of its memory")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
