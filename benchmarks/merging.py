"""Where may a LoRA adapter be merged that was trained on 4-bit weights? Three ways, three learning rates, three seeds.

    python benchmarks/merging.py        # about three minutes on two cores; writes benchmarks/results/merging.csv

For each run, the exported model's answers beside those of the model as it was trained: the share of 256 held-out
problems with the same greedy answer, accuracy, and the mean difference of the answers' log-probabilities as a share of
what training had changed in them (1: as far off as if it had not been trained). `4-bit` is PEFT's own
`merge_and_unload` on the 4-bit model, which rounds the sum to NF4 again.
"""

import tempfile
import warnings
from pathlib import Path

import pandas as pd
import torch

from minicpgd import TrainConfig
from minicpgd.evaluation import open_policy, respond
from minicpgd.export import export
from minicpgd.logprobs import token_logprobs
from minicpgd.policy import Policy, load_policy, quiet
from minicpgd.rollout import Rollout
from minicpgd.study import run_all
from minicpgd.tasks import task_of

LEARNING_RATES, SEEDS, PROBLEMS = (1e-5, 1e-4, 3e-4), range(3), 256
RESULTS = Path(__file__).parent / "results"


@torch.no_grad()
def scored(policy: Policy, answers: Rollout) -> torch.Tensor:
    """(tokens,) log-probabilities of the answers' tokens."""
    ids, mask, length = answers.inputs(torch.arange(len(answers.lengths)))
    return token_logprobs(policy.model.eval(), ids, mask, length)[0][answers.mask]


def merged(run: Path, way: str, folder: Path) -> Policy:
    """The run's model with its adapter merged."""
    if way != "4-bit":
        export(run, folder, base="full" if way == "full" else "dequantised", num_problems=1)
        return load_policy(str(folder))
    policy, _ = open_policy(run)
    with warnings.catch_warnings(action="ignore"):  # PEFT warns of the rounding
        return Policy(policy.peft.merge_and_unload(), policy.tokenizer)


def main() -> None:
    """Train, merge, compare, and write the table."""
    quiet()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        configs = [
            TrainConfig(
                load_in_4bit=True, lora_r=16, learning_rate=rate, seed=seed, max_steps=30, eval_steps=30,
                output_dir=f"{name}/{rate:g}-{seed}",
            )
            for rate in LEARNING_RATES
            for seed in SEEDS
        ]  # fmt: skip
        for config, run in zip(configs, run_all(configs, on_wait=lambda: None), strict=True):
            trained, _ = open_policy(run)
            task, length = task_of(config), config.max_completion_length
            answers, right = respond(trained, task, PROBLEMS, max_completion_length=length)
            before = scored(trained, answers)
            with trained.reference():
                changed = (before - scored(trained, answers)).abs().mean().item()
            for way in ("dequantised", "full", "4-bit"):
                policy = merged(run, way, Path(name) / f"{run.name}-{way}")
                again, right_again = respond(policy, task, PROBLEMS, max_completion_length=length)
                rows.append(
                    {
                        "learning_rate": config.learning_rate,
                        "seed": config.seed,
                        "merged into": way,
                        "same answers": sum(map(str.__eq__, answers.completions, again.completions)) / PROBLEMS,
                        "accuracy trained": right.double().mean().item(),
                        "accuracy merged": right_again.double().mean().item(),
                        "changed by training": changed,
                        "off by": (scored(policy, answers) - before).abs().mean().item() / changed,
                    }
                )
    table = pd.DataFrame(rows)
    RESULTS.mkdir(exist_ok=True)
    table.to_csv(RESULTS / "merging.csv", index=False, float_format="%.4g")
    print(table.drop(columns="seed").groupby(["learning_rate", "merged into"]).mean().to_string(float_format="%.3g"))


if __name__ == "__main__":
    main()
