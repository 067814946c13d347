"""Makes the embedded model: a tiny Llama that can work a problem out, and rarely does.

It is taught by imitation, in two phases. The first phase has worked answers only (`7+5=2,2*3=6#6`), until the model can
compute them. In the second, short phase five answers in six are guesses (`#6`). The result guesses five times in six,
usually wrongly: a policy that has something to discover.

In: a seed. Out: a folder with weights and tokenizer, as in `minicpgd/models/embedded/`.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minicpgd.models.policy import Policy
from minicpgd.models.sampling import generate
from minicpgd.models.source import EMBEDDED
from minicpgd.tasks.task import get_task

CHARACTERS = "0123456789+-*=,#"
STEPS, BATCH, LEARNING_RATE = 750, 256, 2e-3
SECOND_PHASE, WORKED_SHARE = 0.67, 0.17  # These are its start, and the share of worked answers in it.


@dataclass(frozen=True)
class Measured:
    """How a model answers held-out problems, with one sampled response each. Shares of 1."""

    accuracy: float
    worked_share: float
    worked_accuracy: float
    guess_accuracy: float


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, two special ones; 18 ids in all."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()  # Otherwise decoding puts spaces between the characters.
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def make_model(seed: int) -> LlamaForCausalLM:
    """A Llama with two layers of width 64 and 107,968 parameters, drawn from the seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=True,
        vocab_size=len(CHARACTERS) + 2, pad_token_id=0, eos_token_id=1, bos_token_id=None, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def pretrain(
    folder: Path, *, seed: int = 0, steps: int = STEPS, on_step: Callable[[int, float], None] = lambda step, loss: None
) -> Policy:
    """Teach a fresh model, and save it with its tokenizer.

    The `seed` decides the initial weights and every example. Each of the `steps` has 256 examples. `on_step` is called
    with the number of the step and its loss, in nats per token.
    """
    policy, rng = Policy(make_model(seed), make_tokenizer()), random.Random(seed)
    optimizer = torch.optim.AdamW(policy.model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    second_phase = min(round(SECOND_PHASE * steps), steps - 1)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50, (steps - step) / (steps - second_phase)))
    for step in range(1, steps + 1):
        ids, labels = _examples(policy, rng, 1.0 if step <= second_phase else WORKED_SHARE)
        logits = policy.model(input_ids=ids).logits  # The model is causal, so no real token sees the padding.
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step(step, loss.item())
    policy.save(folder)
    return policy


def _examples(policy: Policy, rng: random.Random, worked_share: float) -> tuple[Tensor, Tensor]:
    """(BATCH, L) right-padded ids and labels; the labels of prompts and padding are -100, which the loss ignores."""
    problems = get_task("chain_arithmetic").sample(BATCH, rng)
    responses = [p["worked"] if rng.random() < worked_share else "#" + p["answer"] for p in problems]
    prompts = policy.tokenizer([p["prompt"] for p in problems])["input_ids"]
    answers = [[*row, policy.tokenizer.eos_token_id] for row in policy.tokenizer(responses)["input_ids"]]
    ids = [torch.tensor(p + a) for p, a in zip(prompts, answers, strict=True)]
    labels = [torch.tensor([-100] * len(p) + a) for p, a in zip(prompts, answers, strict=True)]
    return pad_sequence(ids, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=-100)


def measure(policy: Policy, num_problems: int = 1024, seed: int = 0) -> Measured:
    """Sample one response to each held-out problem and sort them into guesses (`#6`) and worked answers."""
    task = get_task("chain_arithmetic")
    problems = task.held_out(num_problems, seed)
    prompts = [problem["prompt"] for problem in problems]
    rollout = generate(policy, prompts, 1, generator=torch.Generator(policy.device).manual_seed(seed))
    right = [task.is_correct(p, c) for p, c in zip(problems, rollout.completions, strict=True)]
    worked = ["=" in c for c in rollout.completions]

    def accuracy(which: bool) -> float:
        return sum(r for r, w in zip(right, worked, strict=True) if w is which) / max(1, worked.count(which))

    return Measured(sum(right) / num_problems, sum(worked) / num_problems, accuracy(True), accuracy(False))


def largest_difference(folder: Path, other: Path = EMBEDDED) -> float:
    """Largest absolute difference between two models' weights; 0.0 means the same to the last bit."""
    a, b = (load_file(path / "model.safetensors") for path in (folder, other))
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)
