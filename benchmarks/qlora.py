"""How much memory and time does QLoRA training of Qwen2.5 need on one GPU?

    python benchmarks/qlora.py                         # all four sizes; writes benchmarks/results/qlora.csv
    python benchmarks/qlora.py --sizes 0.5b --trl      # also measures TRL's GRPOTrainer (needs the extra trl)
    python benchmarks/qlora.py --sizes tiny --length 16    # a dry run on a CPU; its numbers mean nothing

The models have the true shapes of Qwen2.5 and random weights. Memory and speed depend on the shape of a model and not
on its values. The script cannot say how well a model learns. The settings are those of the recipes: 4-bit weights,
LoRA of rank 16 on all linear layers, gradient checkpointing, 8 prompts of 150 tokens x 8 responses of 512 tokens, and
two updates on each rollout. A random model rarely ends a response early, so most responses have the maximal length.

Each size runs in a process of its own. The script reports the peak memory of the GPU's tensors, the peak that `minicpgd
memory` predicts, the generated tokens per second, and the seconds per update. The first step warms up; the numbers are
medians over the other steps.
"""

import gc
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from minicpgd import TrainConfig
from minicpgd.cli.progress import Bars
from minicpgd.memory.architectures import model_config
from minicpgd.memory.predict import predict
from minicpgd.models.policy import Policy, quiet
from minicpgd.recipes import load_recipe
from minicpgd.training.step import Learner

RECIPES = {"0.5b": "qwen2.5-0.5b-8gb", "1.5b": "qwen2.5-1.5b-12gb", "3b": "qwen2.5-3b-16gb", "7b": "qwen2.5-7b-24gb"}
PROMPT, STEPS = 150, 3
RESULTS = Path(__file__).parent / "results" / "qlora.csv"
TINY = {
    "model_type": "qwen3", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def odd_length(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Reward the completions of odd length. About half of all random texts get this reward."""
    return [float(len(completion) % 2) for completion in completions]


def save_random(architecture: PretrainedConfig, folder: Path, dtype: torch.dtype, prompt: int) -> None:
    """Save a model of random weights, a tokenizer with a word for each id, and problems of `prompt` tokens."""
    architecture.eos_token_id, architecture.pad_token_id, architecture.bos_token_id = 1, 0, None
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(architecture, dtype=dtype)
    words = [f"w{i}" for i in range(2, architecture.vocab_size)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<eos>", *words])}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    Policy(model, fast).save(folder / "model")
    problems = [{"prompt": " ".join(words[i : i + prompt]), "answer": "1"} for i in range(200)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))


def make_config(size: str, folder: Path) -> TrainConfig:
    """Save a random model of this size and problems, and return the settings of its recipe."""
    config = load_recipe(RECIPES.get(size, RECIPES["0.5b"])).config
    if size == "tiny":
        shape = dict(TINY)
        architecture = AutoConfig.for_model(shape.pop("model_type"), **shape)
    else:
        architecture = model_config(config.model)
    save_random(architecture, folder, torch.bfloat16, PROMPT)
    data = {"task": "jsonl", "data": str(folder / "problems.jsonl"), "reward": None}
    return replace(config, model=str(folder / "model"), target_kl=None, **data)  # A stop would leave updates out.


def measure_ours(config: TrainConfig, connection: Connection) -> None:
    """Run some steps of our loop, and send the number of each step and then the measurements."""
    quiet()
    learner = replace(Learner.from_config(config), reward=odd_length)
    timings = []
    for step in range(1, STEPS + 1):
        log = learner.step(step)
        timings.append(log.timings | {"tokens": log.metrics["completion_length"] * config.num_responses})
        connection.send(step)
    timings = timings[1:]
    connection.send(
        {
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan"),
            "tokens_per_second": statistics.median(t["tokens"] / t["rollout_seconds"] for t in timings),
            "seconds_per_update": statistics.median(t["update_seconds"] for t in timings) / config.updates_per_rollout,
        }
    )


def measure_trl(config: TrainConfig, connection: Connection) -> None:
    """Do the same with TRL's GRPOTrainer, with the same model, prompts, lengths and updates per rollout."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from minicpgd.models.lora import nf4

    quiet()
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    ends, generation_seconds = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())
            connection.send(len(ends) // config.num_minibatches)

    class TimedTrainer(GRPOTrainer):
        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = super()._generate(*args, **kwargs)
            generation_seconds.append(time.perf_counter() - started)
            return result

    with tempfile.TemporaryDirectory() as folder:
        trainer = TimedTrainer(
            model=config.model,
            reward_funcs=odd_length,
            train_dataset=Dataset.from_json(config.data),
            peft_config=LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules="all-linear"),
            callbacks=[Clock()],
            args=GRPOConfig(
                output_dir=folder,
                model_init_kwargs={"quantization_config": nf4(dtype), "dtype": dtype},
                per_device_train_batch_size=config.num_responses // config.num_minibatches,
                steps_per_generation=config.num_minibatches,
                num_generations=config.num_generations,
                max_completion_length=config.max_completion_length,
                gradient_checkpointing=config.gradient_checkpointing,
                max_steps=STEPS * config.num_minibatches,
                optim="paged_adamw_8bit" if gpu else "adamw_torch",
                bf16=gpu,
                use_cpu=not gpu,
                beta=0.0,
                report_to=[],
                disable_tqdm=True,
            ),
        )
        started = time.perf_counter()
        trainer.train()
    ends = [started, *ends[config.num_minibatches - 1 :: config.num_minibatches]]
    steps = [end - start for start, end in itertools.pairwise(ends)]
    updates = [step - generation for step, generation in zip(steps, generation_seconds, strict=True)]
    tokens = config.num_responses * config.max_completion_length
    connection.send(
        {
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else float("nan"),
            "tokens_per_second": tokens / statistics.median(generation_seconds[1:]),
            "seconds_per_update": statistics.median(updates[1:]) / config.num_minibatches,
        }
    )


def main(sizes: tuple[str, ...] = ("0.5b", "1.5b", "3b", "7b"), length: int = 512, trl: bool = False) -> None:
    """Measure each size, and write the table.

    Args:
        sizes: sizes of the models: 0.5b, 1.5b, 3b, 7b or tiny.
        length: tokens of each response.
        trl: also measure TRL's GRPOTrainer.
    """
    quiet()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    context, rows = multiprocessing.get_context("spawn"), []
    loops = {"minicpgd": measure_ours} | ({"trl": measure_trl} if trl else {})
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            config = replace(make_config(size, Path(name)), max_completion_length=length)
            gc.collect()
            torch.cuda.empty_cache()
            memory = predict(
                config, model_config(config.model), prompt_length=PROMPT, device=device if device == "cpu" else "cuda"
            )
            for loop, measure in loops.items():
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=measure, args=(config, sender))
                with Bars([f"{size} {loop}"], STEPS) as bars:
                    process.start()
                    sender.close()
                    while isinstance(result := receiver.recv(), int):
                        bars.update(0, result, "")
                process.join()
                predicted = max(memory.rollout, memory.update) / 2**30 if loop == "minicpgd" else float("nan")
                rows.append({"size": size, "by": loop, **result, "predicted_gib": predicted, "device": device})
    table = pd.DataFrame(rows)
    if "tiny" not in sizes:
        table.to_csv(RESULTS, index=False, float_format="%.4g")
    print(table.to_string(index=False, float_format="%.3g"))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
