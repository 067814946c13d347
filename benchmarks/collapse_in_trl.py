"""Is the collapse a fault of our loop? The same runs in TRL's: its own GRPOTrainer, and CPGD in it.

    python benchmarks/collapse_in_trl.py                  # 24 runs; about 15 minutes on two cores
    python benchmarks/collapse_in_trl.py --seeds 0 1 2 3  # one more seed; the runs that are there are kept

The embedded model and its task, 16 rollouts of 8 prompts x 16 responses, 64 updates on each (4 minibatches, 16 passes),
at two learning rates, held constant. All else is at its default or alike: Adam without decay, gradients clipped at norm
1, ratios clipped to 1 +- 0.2, tokens averaged per response. One thing is not: we draw new minibatches for each pass,
TRL keeps those of the first. Each run draws its own problems and responses: what is compared is what becomes of the
runs.

Writes benchmarks/results/collapse_in_trl.csv, a line per rollout, the last of each run with the greedy accuracy on 256
held-out problems, and docs/figures/peers/collapse_in_trl.png.
"""

import contextlib
import multiprocessing
import os
import random
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import pandas as pd
import torch
import tyro
from matplotlib.figure import Figure
from transformers import AutoTokenizer

from minicpgd import TrainConfig, evaluate, load_run, train
from minicpgd.plots.style import COLOURS, DASHES, styled
from minicpgd.policy import EMBEDDED, Policy, quiet
from minicpgd.progress import Bars
from minicpgd.tasks import get_task

RESULTS = Path(__file__).parent / "results" / "collapse_in_trl.csv"
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "peers" / "collapse_in_trl.png"
PROMPTS, RESPONSES, ROLLOUTS, PASSES, MINIBATCHES, LONGEST = 8, 16, 16, 16, 4, 64
KEYS = ["learning_rate", "algorithm", "loop", "seed"]
RUNS = {
    ("grpo", "minicpgd"): "GRPO, our loop",
    ("grpo", "trl"): "GRPO, TRL's own GRPOTrainer",
    ("cpgd", "minicpgd"): "CPGD, our loop",
    ("cpgd", "trl"): "CPGD, in TRL (CPGDTrainer)",
}


def in_our_loop(rate: float, algorithm: str, seed: int, folder: str) -> tuple[list[float], float]:
    """Reward of each rollout, and the greedy accuracy at the end."""
    config = TrainConfig(
        algorithm=algorithm,
        seed=seed,
        num_prompts=PROMPTS,
        num_generations=RESPONSES,
        num_minibatches=MINIBATCHES,
        num_iterations=PASSES,
        max_steps=ROLLOUTS,
        learning_rate=rate,
        max_completion_length=LONGEST,
        output_dir=folder,
    )
    run = load_run(train(config))
    return run.metrics["reward"][1:].tolist(), float(run.metrics["eval_accuracy"][-1])


def in_trl(rate: float, algorithm: str, seed: int, folder: str) -> tuple[list[float], float]:
    """The same, with TRL's trainer: for `grpo` its own, untouched."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from minicpgd.integrations.trl import CPGDConfig, CPGDTrainer

    task, tokenizer = get_task("chain_arithmetic"), AutoTokenizer.from_pretrained(EMBEDDED)
    settings = {
        "output_dir": folder,
        "seed": seed,
        "per_device_train_batch_size": PROMPTS * RESPONSES // MINIBATCHES,
        "steps_per_generation": MINIBATCHES,
        "num_generations": RESPONSES,
        "num_iterations": PASSES,
        "max_steps": ROLLOUTS * MINIBATCHES * PASSES,
        "max_completion_length": LONGEST,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "beta": 0.0,
        "logging_steps": MINIBATCHES * PASSES,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
    }
    trainer_of, args = (
        (CPGDTrainer, CPGDConfig(algorithm="cpgd", **settings))
        if algorithm == "cpgd"
        else (GRPOTrainer, GRPOConfig(loss_type="grpo", **settings))
    )
    trainer = trainer_of(
        model=str(EMBEDDED),
        reward_funcs=task.reward,
        args=args,
        train_dataset=Dataset.from_list(task.sample(PROMPTS * ROLLOUTS, random.Random(seed))),
        processing_class=tokenizer,
    )
    trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    trained = Policy(trainer.accelerator.unwrap_model(trainer.model), tokenizer)
    return rewards, evaluate(trained, num_samples=1)["accuracy"]


def one(rate: float, algorithm: str, loop: str, seed: int) -> pd.DataFrame:
    """A run, as rows of the table."""
    quiet()
    torch.set_num_threads(1)
    work = in_trl if loop == "trl" else in_our_loop
    with (
        tempfile.TemporaryDirectory() as folder,
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),  # TRL prints its log
    ):
        rewards, accuracy = work(rate, algorithm, seed, str(Path(folder) / "run"))
    table = pd.DataFrame({"rollout": range(1, len(rewards) + 1), "reward": rewards})
    table.loc[len(rewards) - 1, "eval_accuracy"] = accuracy
    return table.assign(learning_rate=rate, algorithm=algorithm, loop=loop, seed=seed)[[*KEYS, *table.columns]]


@styled
def draw(table: pd.DataFrame) -> Figure:
    """Reward over the rollouts: a row per learning rate, a panel per algorithm, a line per seed, dashes per loop."""
    rates = sorted(table["learning_rate"].unique())
    figure = Figure(figsize=(10, 3.6 * len(rates)), layout="constrained")
    axes = figure.subplots(len(rates), 2, sharex=True, sharey=True, squeeze=False)
    for line, rate in zip(axes, rates, strict=True):
        for axis, algorithm in zip(line, ("grpo", "cpgd"), strict=True):
            for which, loop in enumerate(("minicpgd", "trl")):
                chosen = (table["learning_rate"] == rate) & (table["algorithm"] == algorithm) & (table["loop"] == loop)
                for number, (_, run) in enumerate(table[chosen].groupby("seed")):
                    axis.plot(
                        run["rollout"],
                        run["reward"],
                        color=COLOURS[which],
                        linestyle=DASHES[which],
                        linewidth=1.7,
                        label=RUNS[algorithm, loop] if number == 0 else None,
                    )
            axis.set(title=f"{algorithm.upper()}, learning rate {rate:g}", ylim=(0, 1.02))
        line[0].set_ylabel("mean reward of a response")
    for axis, empty in zip(axes[0], ("upper right", "lower right"), strict=True):
        axis.legend(loc=empty, handlelength=3)
    for axis in axes[-1]:
        axis.set_xlabel("rollout (64 updates on each)")
    return figure


def main(rates: tuple[float, ...] = (1e-4, 3e-4), seeds: tuple[int, ...] = (0, 1, 2), jobs: int = 2) -> None:
    """Make the runs that are not in the table yet, and draw all of them.

    Args:
        rates: learning rates.
        seeds: which.
        jobs: runs at a time, each on one thread.
    """
    table = pd.read_csv(RESULTS) if RESULTS.exists() else pd.DataFrame(columns=KEYS)
    there = set(table[KEYS].itertuples(index=False, name=None))
    missing = [(rate, *run, seed) for rate in rates for seed in seeds for run in RUNS]
    missing = [run for run in missing if run not in there]
    if not missing:
        print(f"all of these runs are in {RESULTS}; to make them again, move it away")
    context = multiprocessing.get_context("spawn")
    with Bars(["runs"], len(missing)) as bars, ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for done, future in enumerate(as_completed([pool.submit(one, *run) for run in missing]), start=1):
            table = pd.concat([table, future.result()]) if len(table) else future.result()
            table = table.sort_values([*KEYS, "rollout"])
            table.to_csv(RESULTS, index=False, float_format="%.4g")
            last = future.result().iloc[-1]
            bars.update(0, done, f"{RUNS[last['algorithm'], last['loop']]}: {last['eval_accuracy']:.2f}")
    draw(table).savefig(FIGURE)
    ends = table.dropna(subset="eval_accuracy").pivot(index=KEYS[:-1], columns="seed", values="eval_accuracy")
    print(ends.to_string(float_format="%.2f"))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
