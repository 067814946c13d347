"""Is the memory a step needs what `minicpgd/memory.py` predicts? Random models, real rollouts, real updates.

    python benchmarks/memory.py        # a few minutes, 4 GB; prints a table, writes benchmarks/results/memory.csv

Each row is a model of some architecture and size, with the settings that make another component the largest. Measured
is what the allocator hands out: on a CPU as the profiler reports it, on a GPU as torch.cuda.max_memory_allocated. The
first update makes the optimizer's moments; the second is measured. A GPU's measurement does not see the moments of
the paged optimizer, which lie in memory that CUDA moves to and fro; the prediction has them.
"""

import csv
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler tells of each start and stop

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from minicpgd.config import TrainConfig
from minicpgd.learner import Learner
from minicpgd.memory import ROLLOUT, UPDATE, Memory, predict
from minicpgd.policy import Policy, load_policy, quiet
from minicpgd.rollout import Rollout, generate

RESULTS = Path(__file__).parent / "results" / "memory.csv"
SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "vocab_size": 32_000, "intermediate_size": 1024, "num_hidden_layers": 6},
    "llama-flat": {"model_type": "llama", "vocab_size": 1_000, "intermediate_size": 1024, "num_hidden_layers": 12},
    "qwen2": {"model_type": "qwen2", "vocab_size": 50_000, "intermediate_size": 1536, "num_hidden_layers": 8,
              "tie_word_embeddings": True, "hidden_size": 512},
    "qwen3": {"model_type": "qwen3", "vocab_size": 150_000, "intermediate_size": 768, "num_hidden_layers": 4,
              "head_dim": 64, "tie_word_embeddings": True},
    "gemma3": {"model_type": "gemma3_text", "vocab_size": 64_000, "intermediate_size": 1024, "num_hidden_layers": 7,
               "head_dim": 128, "num_key_value_heads": 1, "sliding_window": 64},
}  # fmt: skip
SETTINGS = TrainConfig(num_prompts=2, num_generations=4, num_minibatches=2, max_completion_length=64, eval_problems=1)
QLORA = {"load_in_4bit": True, "lora_r": 16}
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "all weights, one pass": ("llama", 30, {}),
    "all weights, micro-batches": ("llama", 30, {"micro_batch_size": 2, "chunk_size": 100}),
    "tied output layer": ("qwen2", 30, {"micro_batch_size": 1}),
    "large vocabulary, chunks": ("qwen3", 20, {"chunk_size": 32}),
    "activations": ("llama-flat", 200, {"max_completion_length": 128}),
    "activations, recomputed": ("llama-flat", 200, {"max_completion_length": 128, "gradient_checkpointing": True}),
    "reference copy": ("qwen2", 30, {"beta": 0.1, "micro_batch_size": 1}),
    "adapter": ("qwen2", 60, {"lora_r": 16}),
    "adapter, recomputed": ("qwen2", 60, {"lora_r": 16, "gradient_checkpointing": True}),
    "many prompts": ("llama-flat", 200, {"lora_r": 8, "num_prompts": 8, "num_generations": 2,
                                         "max_completion_length": 12, "micro_batch_size": 2}),
    "adapter, thin and deep": ("llama-flat", 200, {"lora_r": 1, "gradient_checkpointing": True}),
    "adapter in bfloat16": ("qwen2", 60, {"lora_r": 16, "dtype": "bfloat16"}),
    "4-bit": ("qwen2", 60, QLORA),
    "4-bit, recomputed": ("qwen2", 60, QLORA | {"gradient_checkpointing": True}),
    "4-bit, one row at a time": ("qwen2", 60, QLORA | {"gradient_checkpointing": True, "micro_batch_tokens": 130}),
    "4-bit in bfloat16": ("llama-flat", 100, QLORA | {"gradient_checkpointing": True, "dtype": "bfloat16"}),
    "4-bit, many rows": ("llama-flat", 16, QLORA | {"num_prompts": 16, "num_generations": 16, "num_minibatches": 32,
                                                    "max_completion_length": 96}),
    "sliding windows": ("gemma3", 100, {"lora_r": 8, "num_prompts": 8}),
    "8-bit moments": ("qwen3", 20, {"chunk_size": 32, "optim": "paged_adamw_8bit"}),
}  # fmt: skip
MIB = 2**20
SCRATCH = {
    ("adapter in bfloat16", "rollout"): "a CPU's kernels take scratch memory of their own, which no prediction has",
    ("8-bit moments", "update"): "a CPU's kernels take scratch memory of their own, which no prediction has",
}


def random_model(name: str, folder: Path) -> str:
    """Save a model of random weights with the embedded model's tokenizer; its folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(SHAPE | MODELS[name])))
    Policy(model, load_policy("embedded").tokenizer).save(folder / name)
    return str(folder / name)


def measure(config: TrainConfig, prompt_length: int) -> tuple[dict[str, int], int, int]:
    """Bytes of what is always there, by component, and the peaks of a rollout and of an update."""
    learner = Learner.from_config(config)
    rollouts: list[Rollout] = []
    rolled = peak(lambda: rollouts.append(roll(learner, prompt_length)))
    rollout = rollouts[0]
    advantages = torch.linspace(-1, 1, config.num_responses, device=learner.policy.device)
    rows = torch.arange(config.num_responses, device=learner.policy.device)
    rows = rows[:: config.num_minibatches]  # of all prompts, so that some are padded
    reference = rollout.logp if config.beta else None
    learner.update(rollout, advantages, reference, rows)
    always = what_stays(learner)
    update = peak(lambda: learner.update(rollout, advantages, reference, rows))
    there = sum(always.values())
    return always, there + rolled, there + update


def roll(learner: Learner, prompt_length: int) -> Rollout:
    """As many tokens as allowed, from prompts of this length."""
    config, policy = learner.config, learner.policy
    policy.decode = lambda ids, lengths: [""] * len(ids)  # type: ignore[method-assign]  # its tokenizer knows 18 words
    generator = torch.Generator(policy.device).manual_seed(0)
    prompts = ["1" * prompt_length] * (config.num_prompts - 1) + ["1" * (prompt_length - 1)]  # so that there is padding
    return generate(policy, prompts, config.num_generations,
                    max_completion_length=config.max_completion_length, generator=generator)  # fmt: skip


def what_stays(learner: Learner) -> dict[str, int]:
    """Weights, reference, adapter and moments: bytes of the tensors, each storage once."""
    model, adapter = learner.policy.model, learner.policy.peft is not None
    frozen = [p for p in model.parameters() if not (adapter and p.requires_grad)]
    scales = [t for p in frozen if hasattr(p, "quant_state") for t in tensors_of(p.quant_state)]
    copied = list(learner.policy.copied.parameters()) if learner.policy.copied else []
    return {
        "weights": distinct(frozen + scales),
        "reference": distinct(copied),
        "adapter": distinct([p for p in model.parameters() if adapter and p.requires_grad]),
        "optimizer": distinct([t for s in learner.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]),
    }


def tensors_of(state: Any) -> list[torch.Tensor]:
    """Those of bitsandbytes' QuantState, and of the state of its own scales."""
    own = [value for value in vars(state).values() if torch.is_tensor(value)]
    return own + (tensors_of(state.state2) if state.state2 is not None else [])


def distinct(tensors: list[torch.Tensor]) -> int:
    """Bytes, each storage counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def peak(work: Callable[[], Any]) -> int:
    """Bytes that were allocated at most while it worked, beyond those at the start."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def compare(name: str, folder: Path, **changes: Any) -> tuple[Memory, dict[str, tuple[int, int]]]:
    """The prediction, and by part, bytes predicted and bytes measured."""
    model, prompt_length, settings = CASES[name]
    path = folder / model if (folder / model).exists() else random_model(model, folder)
    config = replace(SETTINGS, model=str(path), **(settings | changes))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    said = predict(config, AutoConfig.from_pretrained(path), prompt_length=prompt_length, device=device)
    always, rollout, update = measure(config, prompt_length)
    pairs = {part: (said.moments["draw"][part], size) for part, size in always.items()}
    return said, pairs | {"rollout": (said.rollout, rollout), "update": (said.update, update)}


def main() -> None:
    """The table."""
    quiet()
    rows: list[tuple] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or CASES:
            predicted, pairs = compare(name, Path(folder))
            line = f"{name:<28}"
            for part, (said, was) in pairs.items():
                if said or was:
                    note = SCRATCH.get((name, part), "") if not torch.cuda.is_available() else ""
                    worst = max(
                        {"rollout": ROLLOUT, "update": UPDATE}.get(part, ("",)), key=lambda m: m and predicted.total(m)
                    )
                    rows.append((name, part, worst, said, was, f"{said / was - 1:.4f}", note))
                    line += (
                        f" {part} {said / MIB:.1f} {was / MIB:.1f} {said / was - 1:+.1%}{'*' if note else ''} {worst} "
                    )
            print(line, flush=True)
    for note in {row[-1] for row in rows if row[-1]}:
        print("*", note)
    if not sys.argv[1:]:
        RESULTS.parent.mkdir(exist_ok=True)
        header = ("case", "part", "worst_moment", "predicted_bytes", "measured_bytes", "error", "note")
        with RESULTS.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])


if __name__ == "__main__":
    main()
