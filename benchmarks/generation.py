"""How fast does our sampling loop sample, compared with `generate` of transformers?

    python benchmarks/generation.py                    # the embedded model, and a Llama of 30 M random parameters
    python benchmarks/generation.py --repeats 9

The script compares three samplers: our loop, `generate` with a dynamic cache, and `generate` with a static cache. They
take turns. It prints the median number of response tokens per second of each, and on a CPU it also writes them to
benchmarks/results/generation.csv.

`generate` also returns the logits, because on-policy training needs the log-probabilities of the sampled tokens. The
logits are B x T x V numbers. Our loop never stores them.
"""

import random
import statistics
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from transformers import LlamaConfig, LlamaForCausalLM

from minicpgd.config import SamplingSettings
from minicpgd.models.policy import Policy, load_policy, quiet
from minicpgd.models.sampling import generate
from minicpgd.tasks.task import get_task

PROMPTS, GROUP, LENGTH = 8, 8, 64


def random_llama(policy: Policy) -> Policy:
    """Make a model of 30 M random parameters with the policy's tokenizer. It hardly ever ends a response."""
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8}
    config = LlamaConfig(**shape, vocab_size=8192, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    return Policy(LlamaForCausalLM(config).to(policy.device).eval(), policy.tokenizer)


def sample_with_ours(policy: Policy, prompts: list[str], seed: int) -> int:
    """Sample with our loop, and return the number of tokens in all responses."""
    generator = torch.Generator(policy.device).manual_seed(seed)
    settings = SamplingSettings(max_completion_length=LENGTH)
    return int(generate(policy, prompts, GROUP, settings, generator=generator).lengths.sum())


def sample_with_transformers(policy: Policy, prompts: list[str], seed: int, cache: str) -> int:
    """Do the same with `generate`. The count omits padding, although `generate` computes it."""
    torch.manual_seed(seed)
    ids, mask = (t.repeat_interleave(GROUP, dim=0) for t in policy.encode(prompts))
    output = policy.model.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=LENGTH,
        cache_implementation=cache, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    logits, new = torch.stack(output.logits, dim=1).float(), output.sequences[:, ids.shape[1] :]
    logits.log_softmax(-1).gather(-1, new[..., None])
    ended = (new == policy.eos_ids[0]).cumsum(dim=1)
    return int(((ended - (new == policy.eos_ids[0]).long()) == 0).sum())


def main(repeats: int = 5) -> None:
    """Let the samplers take turns, and print the medians.

    Args:
        repeats: number of measured turns of each sampler.
    """
    quiet()
    torch.set_num_threads(1)  # On a busy machine, two threads wait for each other at every small matrix.
    rows: list[dict[str, Any]] = []
    prompts = [p["prompt"] for p in get_task("chain_arithmetic").sample(PROMPTS, random.Random(0))]
    embedded = load_policy("embedded")
    samplers = {
        "ours": sample_with_ours,
        "generate, dynamic cache": lambda *a: sample_with_transformers(*a, "dynamic"),
        "generate, static cache": lambda *a: sample_with_transformers(*a, "static"),
    }
    print(f"{PROMPTS} x {GROUP} responses of at most {LENGTH} tokens, {embedded.device}")
    for name, policy in {"embedded, 0.1 M": embedded, "random, 30 M": random_llama(embedded)}.items():
        speeds: dict[str, list[float]] = {sampler: [] for sampler in samplers}
        for seed in range(repeats + 1):
            for sampler, sample in samplers.items():
                started = time.perf_counter()
                tokens = sample(policy, prompts, seed)
                if seed:  # The first turn warms up.
                    speeds[sampler].append(tokens / (time.perf_counter() - started))
        ours = statistics.median(speeds["ours"])
        for sampler, values in speeds.items():
            speed = statistics.median(values)
            rows.append({"model": name, "by": sampler, "tokens/s": round(speed), "of ours": f"{speed / ours:.2f}"})
    table = pd.DataFrame(rows)
    if not torch.cuda.is_available():
        table.to_csv(Path(__file__).parent / "results" / "generation.csv", index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
