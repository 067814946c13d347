"""Sampling three ways: our loop, `generate` of transformers with a dynamic cache, and with a static one.

    python benchmarks/generation.py                    # the embedded model, and a Llama of 30 M random parameters
    python benchmarks/generation.py --repeats 9

Responses' tokens per second, the median of several turns, each way in turn; on a CPU they also go to
benchmarks/results/generation.csv. `generate` is asked for the logits,
too: without them there is no log-probability of what was drawn, and sampling would not be known to be on-policy. They
are B x T x V numbers, which ours never holds.
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

from minicpgd.policy import Policy, load_policy, quiet
from minicpgd.rollout import generate
from minicpgd.tasks import get_task

PROMPTS, GROUP, LENGTH = 8, 8, 64


def larger(policy: Policy) -> Policy:
    """30 M parameters, random, with the embedded model's tokenizer; it hardly ever ends a response."""
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8}
    config = LlamaConfig(**shape, vocab_size=8192, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    return Policy(LlamaForCausalLM(config).to(policy.device).eval(), policy.tokenizer)


def ours(policy: Policy, prompts: list[str], seed: int) -> int:
    """Tokens in all responses."""
    draws = torch.Generator(policy.device).manual_seed(seed)
    return int(generate(policy, prompts, GROUP, max_completion_length=LENGTH, generator=draws).lengths.sum())


def theirs(policy: Policy, prompts: list[str], seed: int, cache: str) -> int:
    """Tokens in all responses, up to their end; `generate` computes the padding after it as well."""
    torch.manual_seed(seed)
    ids, mask = (t.repeat_interleave(GROUP, dim=0) for t in policy.encode(prompts))
    made = policy.model.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=LENGTH,
        cache_implementation=cache, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    logits, new = torch.stack(made.logits, dim=1).float(), made.sequences[:, ids.shape[1] :]
    logits.log_softmax(-1).gather(-1, new[..., None])
    ended = (new == policy.eos_ids[0]).cumsum(dim=1)
    return int(((ended - (new == policy.eos_ids[0]).long()) == 0).sum())


def main(repeats: int = 5) -> None:
    """Take turns, and print the medians."""
    quiet()
    torch.set_num_threads(1)  # two, on a machine with other work, wait for each other at every small matrix
    rows: list[dict[str, Any]] = []
    prompts = [p["prompt"] for p in get_task("chain_arithmetic").sample(PROMPTS, random.Random(0))]
    embedded = load_policy("embedded")
    ways = {
        "ours": ours,
        "generate, dynamic cache": lambda *a: theirs(*a, "dynamic"),
        "generate, static cache": lambda *a: theirs(*a, "static"),
    }
    print(f"{PROMPTS} x {GROUP} responses of at most {LENGTH} tokens, {embedded.device}")
    for name, policy in {"embedded, 0.1 M": embedded, "random, 30 M": larger(embedded)}.items():
        speeds: dict[str, list[float]] = {way: [] for way in ways}
        for seed in range(repeats + 1):
            for way, sample in ways.items():
                started = time.perf_counter()
                tokens = sample(policy, prompts, seed)
                if seed:  # the first turn warms up
                    speeds[way].append(tokens / (time.perf_counter() - started))
        first = statistics.median(speeds["ours"])
        for way, values in speeds.items():
            speed = statistics.median(values)
            rows.append({"model": name, "by": way, "tokens/s": round(speed), "of ours": f"{speed / first:.2f}"})
    table = pd.DataFrame(rows)
    if not torch.cuda.is_available():
        table.to_csv(Path(__file__).parent / "results" / "generation.csv", index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
