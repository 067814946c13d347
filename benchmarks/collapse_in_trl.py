"""Do the settings that collapse in our training loop also collapse in TRL's?

    python benchmarks/collapse_in_trl.py                  # 24 runs; about 15 minutes on two cores
    python benchmarks/collapse_in_trl.py --seeds 0 1 2 3  # adds a seed; the table keeps its finished runs

The script trains with GRPO and CPGD in both loops. In TRL's loop, GRPO is TRL's own GRPOTrainer and CPGD is our
CPGDTrainer, with the defaults of this package: α = 0.01, and a stop at a KL of 0.003. GRPO has no stop, since TRL's
trainer has none. Each run trains the embedded model on its task: 16 rollouts of 8 prompts x 16 responses, and 64
updates on each rollout (4 minibatches, 16 passes), at one of two constant learning rates.

All other settings are equal in both loops: Adam without weight decay, gradients clipped at norm 1, an epsilon of 0.2
for the ratios, and tokens averaged per response. There is one difference: our loop draws new minibatches for each pass,
while TRL keeps those of the first pass. Each run draws its own problems and responses, so the script compares the
outcomes of runs and not their single numbers.

The script writes benchmarks/results/collapse_in_trl.csv with a line per rollout. The last line of each run has the
greedy accuracy on 256 held-out problems. It also draws docs/figures/peers/collapse_in_trl.png.
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
from minicpgd.cli.progress import Bars
from minicpgd.experiments.endurance import REMEDIES
from minicpgd.models.policy import Policy, quiet
from minicpgd.models.source import EMBEDDED
from minicpgd.plots.style import COLOURS, DASHES, styled
from minicpgd.tasks.task import get_task

RESULTS = Path(__file__).parent / "results" / "collapse_in_trl.csv"
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "peers" / "collapse_in_trl.png"
PROMPTS, RESPONSES, ROLLOUTS, PASSES, MINIBATCHES, MAX_LENGTH = 8, 16, 16, 16, 4, 64
SETTINGS = {"grpo": REMEDIES["GRPO"], "cpgd": REMEDIES["CPGD, default"]}  # GRPO has no stop: TRL's own has none.
TITLES = {"grpo": "GRPO, no stop", "cpgd": "CPGD, default"}
KEYS = ["learning_rate", "algorithm", "loop", "seed"]
RUNS = {
    ("grpo", "minicpgd"): "GRPO, our loop",
    ("grpo", "trl"): "GRPO, TRL's own GRPOTrainer",
    ("cpgd", "minicpgd"): "CPGD, our loop",
    ("cpgd", "trl"): "CPGD, in TRL (CPGDTrainer)",
}


def train_in_our_loop(rate: float, algorithm: str, seed: int, folder: str) -> tuple[list[float], float]:
    """Train with our loop, and return the reward of each rollout and the greedy accuracy at the end."""
    config = TrainConfig(
        seed=seed,
        num_prompts=PROMPTS,
        num_generations=RESPONSES,
        num_minibatches=MINIBATCHES,
        num_iterations=PASSES,
        max_steps=ROLLOUTS,
        learning_rate=rate,
        max_completion_length=MAX_LENGTH,
        output_dir=folder,
        **SETTINGS[algorithm],
    )
    run = load_run(train(config))
    return run.metrics["reward"][1:].tolist(), float(run.metrics["eval_accuracy"][-1])


def train_in_trl(rate: float, algorithm: str, seed: int, folder: str) -> tuple[list[float], float]:
    """Do the same with TRL's loop. `grpo` is TRL's own trainer without a change."""
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
        "max_completion_length": MAX_LENGTH,
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
    trainer_class, args = (
        (CPGDTrainer, CPGDConfig(**SETTINGS["cpgd"], **settings))
        if algorithm == "cpgd"
        else (GRPOTrainer, GRPOConfig(loss_type="grpo", **settings))
    )
    trainer = trainer_class(
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


def run_one(rate: float, algorithm: str, loop: str, seed: int) -> pd.DataFrame:
    """Train one run and return its rows of the table."""
    quiet()
    torch.set_num_threads(1)
    train_run = train_in_trl if loop == "trl" else train_in_our_loop
    with (
        tempfile.TemporaryDirectory() as folder,
        Path(os.devnull).open("w") as devnull,
        contextlib.redirect_stdout(devnull),  # TRL prints its log.
    ):
        rewards, accuracy = train_run(rate, algorithm, seed, str(Path(folder) / "run"))
    table = pd.DataFrame({"rollout": range(1, len(rewards) + 1), "reward": rewards})
    table.loc[len(rewards) - 1, "eval_accuracy"] = accuracy
    return table.assign(learning_rate=rate, algorithm=algorithm, loop=loop, seed=seed)[[*KEYS, *table.columns]]


@styled
def draw(table: pd.DataFrame) -> Figure:
    """Draw the reward of each rollout: a row per learning rate, a panel per algorithm, and a line per loop and seed."""
    rates = sorted(table["learning_rate"].unique())
    figure = Figure(figsize=(10, 3.6 * len(rates)), layout="constrained")
    axes = figure.subplots(len(rates), 2, sharex=True, sharey=True, squeeze=False)
    for row, rate in zip(axes, rates, strict=True):
        for axis, algorithm in zip(row, ("grpo", "cpgd"), strict=True):
            for style, loop in enumerate(("minicpgd", "trl")):
                chosen = (table["learning_rate"] == rate) & (table["algorithm"] == algorithm) & (table["loop"] == loop)
                for number, (_, run) in enumerate(table[chosen].groupby("seed")):
                    axis.plot(
                        run["rollout"],
                        run["reward"],
                        color=COLOURS[style],
                        linestyle=DASHES[style],
                        linewidth=1.7,
                        label=RUNS[algorithm, loop] if number == 0 else None,
                    )
            axis.set(title=f"{TITLES[algorithm]}, learning rate {rate:g}", ylim=(0, 1.02))
        row[0].set_ylabel("mean reward of a response")
    for axis, empty_corner in zip(axes[0], ("upper right", "lower right"), strict=True):
        axis.legend(loc=empty_corner, handlelength=3)
    for axis in axes[-1]:
        axis.set_xlabel("rollout (64 updates on each)")
    return figure


def main(rates: tuple[float, ...] = (1e-4, 3e-4), seeds: tuple[int, ...] = (0, 1, 2), jobs: int = 2) -> None:
    """Train the runs that are not in the table yet, and draw all runs.

    Args:
        rates: learning rates.
        seeds: seeds of the runs.
        jobs: number of runs at the same time; each uses one thread.
    """
    table = pd.read_csv(RESULTS) if RESULTS.exists() else pd.DataFrame(columns=KEYS)
    finished = set(table[KEYS].itertuples(index=False, name=None))
    missing = [(rate, *run, seed) for rate in rates for seed in seeds for run in RUNS]
    missing = [run for run in missing if run not in finished]
    if not missing:
        print(f"{RESULTS} has all of these runs; move it away to repeat them")
    context = multiprocessing.get_context("spawn")
    with Bars(["runs"], len(missing)) as bars, ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for done, future in enumerate(as_completed([pool.submit(run_one, *run) for run in missing]), start=1):
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
