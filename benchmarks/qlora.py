"""Memory and speed of QLoRA training on one GPU, at the true size of Qwen2.5, with random weights.

    python benchmarks/qlora.py                         # 0.5b, 1.5b, 3b, 7b in turn; writes benchmarks/results/qlora.csv
    python benchmarks/qlora.py --sizes 0.5b --trl      # TRL's GRPOTrainer beside it (the extra trl)
    python benchmarks/qlora.py --sizes tiny --length 16    # a dry run, on a CPU: says nothing about a card

4-bit, LoRA of rank 16 on all linear layers, gradient checkpointing, 8 prompts of 150 tokens x 8 responses x 512 new
tokens, 2 updates on each rollout. Random weights end no response early: every one is as long as it may be, which is the
worst case. What memory and speed depend on is the shape of a model, not its values; nothing here says how it learns.

Each size runs in a process of its own. Reported: peak memory of the GPU's tensors, and beside it what `minicpgd memory`
predicts; generated tokens per second; seconds of one update. The first step warms up, the median of the others counts.
"""

import gc
import json
import multiprocessing
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from minicpgd import TrainConfig
from minicpgd.architectures import model_config
from minicpgd.learner import Learner
from minicpgd.memory import predict
from minicpgd.policy import Policy, quiet
from minicpgd.progress import Bars
from minicpgd.recipes import load_recipe

RECIPES = {"0.5b": "qwen2.5-0.5b-8gb", "1.5b": "qwen2.5-1.5b-12gb", "3b": "qwen2.5-3b-16gb", "7b": "qwen2.5-7b-24gb"}
PROMPT, STEPS = 150, 3
RESULTS = Path(__file__).parent / "results" / "qlora.csv"
TINY = {
    "model_type": "qwen3", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def varied(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A reward that random text gets now and then."""
    return [float(len(completion) % 2) for completion in completions]


def save_random(architecture: PretrainedConfig, folder: Path, dtype: torch.dtype, prompt: int) -> None:
    """A model of random weights, a tokenizer with a word for each of its ids, and problems of `prompt` tokens."""
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


def make(size: str, folder: Path) -> TrainConfig:
    """Random weights of a model's true shape in a folder, with problems; the settings of its recipe."""
    config = load_recipe(RECIPES.get(size, RECIPES["0.5b"])).config
    if size == "tiny":
        shape = dict(TINY)
        architecture = AutoConfig.for_model(shape.pop("model_type"), **shape)
    else:
        architecture = model_config(config.model)
    save_random(architecture, folder, torch.bfloat16, PROMPT)
    return replace(config, model=str(folder / "model"), task="jsonl", data=str(folder / "problems.jsonl"), reward=None)


def measure(config: TrainConfig, send: Any) -> None:
    """Some steps of ours."""
    quiet()
    learner = Learner.from_config(config)
    learner = replace(learner, reward=varied)
    timings = []
    for step in range(1, STEPS + 1):
        made = learner.step(step)
        timings.append(made.timings | {"tokens": made.metrics["completion_length"] * config.num_responses})
        send.send(step)
    rest = timings[1:]
    send.send(
        {
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan"),
            "tokens_per_second": statistics.median(t["tokens"] / t["rollout_seconds"] for t in rest),
            "seconds_per_update": statistics.median(t["update_seconds"] for t in rest) / config.updates_per_rollout,
        }
    )


def measure_trl(config: TrainConfig, send: Any) -> None:
    """As many steps of TRL's GRPOTrainer with the same model, prompts, lengths and updates per rollout."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from minicpgd.qlora import nf4

    quiet()
    on_card = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_card else torch.float32
    rows = config.num_responses // config.num_minibatches
    ends, spent = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())
            send.send(len(ends) // config.num_minibatches)

    class Timed(GRPOTrainer):
        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            made = super()._generate(*args, **kwargs)
            spent.append(time.perf_counter() - started)
            return made

    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            model=config.model,
            reward_funcs=varied,
            train_dataset=Dataset.from_json(config.data),
            peft_config=LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules="all-linear"),
            callbacks=[Clock()],
            args=GRPOConfig(
                output_dir=folder,
                model_init_kwargs={"quantization_config": nf4(dtype), "dtype": dtype},
                per_device_train_batch_size=rows,
                steps_per_generation=config.num_minibatches,
                num_generations=config.num_generations,
                max_completion_length=config.max_completion_length,
                gradient_checkpointing=config.gradient_checkpointing,
                max_steps=STEPS * config.num_minibatches,
                optim="paged_adamw_8bit" if on_card else "adamw_torch",
                bf16=on_card,
                use_cpu=not on_card,
                beta=0.0,
                report_to=[],
                disable_tqdm=True,
            ),
        )
        started = time.perf_counter()
        trainer.train()
    steps = [b - a for a, b in zip([started, *ends], ends, strict=False)]
    rollouts = [sum(steps[i : i + config.num_minibatches]) for i in range(0, len(steps), config.num_minibatches)]
    tokens = config.num_responses * config.max_completion_length
    updates = [whole - s for whole, s in zip(rollouts, spent, strict=True)][1:]
    send.send(
        {
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_card else float("nan"),
            "tokens_per_second": tokens / statistics.median(spent[1:]),
            "seconds_per_update": statistics.median(updates) / config.num_minibatches,
        }
    )


def main(sizes: tuple[str, ...] = ("0.5b", "1.5b", "3b", "7b"), length: int = 512, trl: bool = False) -> None:
    """Measure each size, and write the table.

    Args:
        sizes: of 0.5b, 1.5b, 3b, 7b and tiny.
        length: new tokens of each response.
        trl: TRL's GRPOTrainer, too.
    """
    quiet()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    context, rows = multiprocessing.get_context("spawn"), []
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            config = replace(make(size, Path(name)), max_completion_length=length)
            gc.collect()
            torch.cuda.empty_cache()
            memory = predict(
                config, model_config(config.model), prompt_length=PROMPT, device=device if device == "cpu" else "cuda"
            )
            for who, work in ({"minicpgd": measure} | ({"trl": measure_trl} if trl else {})).items():
                listen, send = context.Pipe(duplex=False)
                process = context.Process(target=work, args=(config, send))
                with Bars([f"{size} {who}"], STEPS) as bars:
                    process.start()
                    send.close()
                    while isinstance(result := listen.recv(), int):
                        bars.update(0, result, "")
                process.join()
                predicted = max(memory.rollout, memory.update) / 2**30 if who == "minicpgd" else float("nan")
                rows.append({"size": size, "by": who, **result, "predicted_gib": predicted, "device": device})
    table = pd.DataFrame(rows)
    if "tiny" not in sizes:
        table.to_csv(RESULTS, index=False, float_format="%.4g")
    print(table.to_string(index=False, float_format="%.3g"))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
