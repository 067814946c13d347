"""Does a training step need as much memory as `minicpgd/memory/predict.py` predicts?

    python benchmarks/memory.py              # a few minutes, 4 GB; writes benchmarks/results/memory.csv
    python benchmarks/memory.py adapter      # one case; writes nothing

Each case runs a rollout and two updates of a random model. The cases differ in architecture, size and settings, so that
each makes another component the largest. The script measures what the allocator hands out: on a CPU as the profiler
reports it, on a GPU as torch.cuda.max_memory_allocated. The first update creates the optimizer's moments; the script
measures the second update.

On a GPU, the measurement omits the moments of the paged optimizer, because CUDA keeps them in memory that it moves
between the GPU and the CPU. The prediction includes them.
"""

import csv
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["KINETO_LOG_LEVEL"] = "99"  # Otherwise the profiler reports each start and stop.

import torch
import tyro
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from minicpgd.config import TrainConfig
from minicpgd.memory.predict import ROLLOUT, UPDATE, Memory, predict
from minicpgd.models.policy import Policy, load_policy, quiet
from minicpgd.models.sampling import Rollout, generate
from minicpgd.training.metrics import Experience
from minicpgd.training.step import Learner

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
NOTE = "the kernels of a CPU need scratch memory, which the prediction omits"
NOTES = {("adapter in bfloat16", "rollout"): NOTE, ("8-bit moments", "update"): NOTE}


def save_random_model(name: str, folder: Path) -> None:
    """Save a model of random weights with the embedded model's tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(SHAPE | MODELS[name])))
    Policy(model, load_policy("embedded").tokenizer).save(folder / name)


def measure(config: TrainConfig, prompt_length: int) -> tuple[dict[str, int], int, int]:
    """Return the bytes of each permanent component, and the peaks of a rollout and of an update."""
    learner = Learner.from_config(config)
    rollouts: list[Rollout] = []
    rollout_peak = peak(lambda: rollouts.append(sample(learner, prompt_length)))
    rollout, shape = rollouts[0], (config.num_prompts, config.num_generations)
    advantages = torch.linspace(-1, 1, config.num_responses, device=learner.policy.device).view(shape)
    experience = Experience(
        problems=[],
        rollout=rollout,
        rewards=advantages,
        advantages=advantages,
        drift_coef=learner.drift_coef,
        ref_logp=rollout.logp if config.beta else None,
        used=torch.ones_like(rollout.truncated),
    )
    rows = torch.arange(config.num_responses, device=learner.policy.device)
    rows = rows[:: config.num_minibatches]  # The rows come from all prompts, so that some rows have padding.
    learner.update(experience, rows)
    components = permanent_bytes(learner)
    update_peak = peak(lambda: learner.update(experience, rows))
    total = sum(components.values())
    return components, total + rollout_peak, total + update_peak


def sample(learner: Learner, prompt_length: int) -> Rollout:
    """Sample responses to prompts of this length. A random model rarely ends a response early."""
    config, policy = learner.config, learner.policy
    generator = torch.Generator(policy.device).manual_seed(0)
    prompts = ["1" * prompt_length] * (config.num_prompts - 1) + ["1" * (prompt_length - 1)]  # The last has padding.
    return generate(policy, prompts, config.num_generations, config, generator=generator)


def permanent_bytes(learner: Learner) -> dict[str, int]:
    """Return the bytes of weights, reference, adapter and moments, and count each storage once."""
    model, adapter = learner.policy.model, learner.policy.peft is not None
    frozen = [p for p in model.parameters() if not (adapter and p.requires_grad)]
    scales = [t for p in frozen if hasattr(p, "quant_state") for t in tensors_of(p.quant_state)]
    copy = learner.policy.frozen_copy
    return {
        "weights": distinct(frozen + scales),
        "reference": distinct(list(copy.parameters()) if copy else []),
        "adapter": distinct([p for p in model.parameters() if adapter and p.requires_grad]),
        "optimizer": distinct([t for s in learner.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]),
    }


def tensors_of(state: Any) -> list[torch.Tensor]:
    """Return the tensors of a QuantState of bitsandbytes, and those of the state of its scales."""
    own = [value for value in vars(state).values() if torch.is_tensor(value)]
    return own + (tensors_of(state.state2) if state.state2 is not None else [])


def distinct(tensors: list[torch.Tensor]) -> int:
    """Return the bytes of all storages, and count each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def peak(work: Callable[[], Any]) -> int:
    """Return the largest number of bytes allocated during the work, minus those at its start."""
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
    """Return the prediction, and for each part the predicted and the measured bytes."""
    model, prompt_length, settings = CASES[name]
    if not (folder / model).exists():
        save_random_model(model, folder)
    config = replace(SETTINGS, model=str(folder / model), **(settings | changes))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prediction = predict(config, AutoConfig.from_pretrained(config.model), prompt_length=prompt_length, device=device)
    components, rollout, update = measure(config, prompt_length)
    pairs = {part: (prediction.moments["draw"][part], size) for part, size in components.items()}
    return prediction, pairs | {"rollout": (prediction.rollout, rollout), "update": (prediction.update, update)}


def main(cases: tyro.conf.Positional[tuple[str, ...]] = ()) -> None:
    """Compare predictions with measurements.

    Args:
        cases: names of cases, as in the table; without them the script runs all cases and writes the table.
    """
    quiet()
    rows: list[tuple] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in cases or CASES:
            prediction, pairs = compare(name, Path(folder))
            line = f"{name:<28}"
            for part, (predicted, measured) in pairs.items():
                if predicted or measured:
                    moments = {"rollout": ROLLOUT, "update": UPDATE}.get(part)
                    worst = max(moments, key=prediction.total) if moments else ""
                    note = NOTES.get((name, part), "") if not torch.cuda.is_available() else ""
                    error = predicted / measured - 1
                    rows.append((name, part, worst, predicted, measured, f"{error:.4f}", note))
                    line += f" {part} {predicted / MIB:.1f} {measured / MIB:.1f} {error:+.1%}{note and '*'} {worst} "
            print(line, flush=True)
    for note in {row[-1] for row in rows if row[-1]}:
        print("*", note)
    if not cases:
        header = ("case", "part", "worst_moment", "predicted_bytes", "measured_bytes", "error", "note")
        with RESULTS.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
