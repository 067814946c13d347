"""Into which weights can we merge a LoRA adapter that was trained on 4-bit weights?

    python benchmarks/merging.py        # about three minutes on two cores; writes benchmarks/results/merging.csv

The script trains with three learning rates and three seeds, and merges each adapter in three ways: into the dequantised
weights, into the full weights, and into the 4-bit weights. The last way is PEFT's own `merge_and_unload`, which rounds
the sum to NF4 again.

The script then compares the merged model with the trained one on 256 held-out problems: the share of equal greedy
answers, the accuracy, and the mean difference of the answers' log-probabilities. The difference is divided by the
change that training made. It is 1 if the merged model is as far from the trained model as the untrained one.
"""

import tempfile
import warnings
from pathlib import Path

import pandas as pd
import torch
import tyro

from minicpgd import TrainConfig
from minicpgd.experiments.endurance import REMEDIES
from minicpgd.experiments.runner import run_all
from minicpgd.models.logprobs import token_logprobs
from minicpgd.models.policy import Policy, load_policy, quiet
from minicpgd.models.sampling import Rollout
from minicpgd.tasks.task import load_task
from minicpgd.training.evaluation import open_policy, respond
from minicpgd.training.export import export

LEARNING_RATES, SEEDS, PROBLEMS = (1e-5, 1e-4, 3e-4), range(3), 256
RESULTS = Path(__file__).parent / "results" / "merging.csv"


@torch.no_grad()
def score(policy: Policy, answers: Rollout) -> torch.Tensor:
    """Return the (tokens,) log-probabilities of the answers' tokens."""
    ids, mask, length = answers.inputs(torch.arange(len(answers.lengths)))
    return token_logprobs(policy.model.eval(), ids, mask, length)[0][answers.mask]


def merge(run: Path, weights: str, folder: Path) -> Policy:
    """Merge the run's adapter into its model."""
    if weights != "4-bit":
        export(run, folder, base="full" if weights == "full" else "dequantised", num_problems=1)
        return load_policy(str(folder))
    policy, _ = open_policy(run)
    with warnings.catch_warnings(action="ignore"):  # PEFT warns that it rounds the weights.
        return Policy(policy.peft.merge_and_unload(), policy.tokenizer)


def main() -> None:
    """Train, merge, compare, and write the table."""
    quiet()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        configs = [
            TrainConfig(
                load_in_4bit=True, lora_r=16, learning_rate=rate, seed=seed, max_steps=30, eval_steps=30,
                output_dir=f"{name}/{rate:g}-{seed}", **REMEDIES["CPGD, α = max A"],  # the package's first default
            )
            for rate in LEARNING_RATES
            for seed in SEEDS
        ]  # fmt: skip
        for config, run in zip(configs, run_all(configs, on_wait=lambda: None), strict=True):
            trained, _ = open_policy(run)
            task = load_task(config)
            answers, right = respond(trained, task, PROBLEMS, config, greedy=True)
            logp = score(trained, answers)
            with trained.reference():
                change = (logp - score(trained, answers)).abs().mean().item()
            for weights in ("dequantised", "full", "4-bit"):
                policy = merge(run, weights, Path(name) / f"{run.name}-{weights}")
                merged_answers, merged_right = respond(policy, task, PROBLEMS, config, greedy=True)
                same = sum(map(str.__eq__, answers.completions, merged_answers.completions))
                rows.append(
                    {
                        "learning_rate": config.learning_rate,
                        "seed": config.seed,
                        "merged into": weights,
                        "same answers": same / PROBLEMS,
                        "accuracy trained": right.double().mean().item(),
                        "accuracy merged": merged_right.double().mean().item(),
                        "changed by training": change,
                        "off by": (score(policy, answers) - logp).abs().mean().item() / change,
                    }
                )
    table = pd.DataFrame(rows)
    table.to_csv(RESULTS, index=False, float_format="%.4g")
    print(table.drop(columns="seed").groupby(["learning_rate", "merged into"]).mean().to_string(float_format="%.3g"))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
