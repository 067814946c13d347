# %% [markdown]
# # 0. CPGD on one page
#
# CPGD (Clipped Policy Gradient Optimization with Policy Drift, [arXiv 2505.12504](https://arxiv.org/abs/2505.12504))
# trains a language model on rewards that a rule computes. The model samples several responses to each prompt, and an
# update raises the log-probability of the responses whose reward exceeds the mean of their group. It lowers that of the
# responses below the mean. A clip takes away a token's own gradient once it has moved far enough, and a drift penalty
# pulls it back towards the policy that sampled.
#
# This page implements all of it in plain PyTorch and transformers. It trains a tiny model on one CPU core in less than
# a minute. It imports two things from minicpgd: the task, and the path of the model.
# [A test](../tests/test_one_page.py) compares the page with the package: the sampled tokens are identical, and the
# losses agree to $10^{-6}$.

# %%
import math
import random
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Generator, Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from minicpgd.models import EMBEDDED
from minicpgd.tasks import get_task

SEED = 0
N, G = 16, 8  # prompts per rollout, responses per prompt
MAX_TOKENS = 64  # per response
PASSES, MINIBATCHES = 2, 4  # a rollout serves PASSES * MINIBATCHES = 8 updates
LEARNING_RATE, MAX_GRAD_NORM = 1e-4, 1.0
EPSILON, ALPHA, DRIFT_CLIP = 0.2, 0.01, 2.0  # ε, α and c of section 4

# %% [markdown]
# ## 1. A model and a task
#
# The model is a Llama with 108 thousand parameters, and its tokens are single characters. A problem is a chain of
# sums, differences and products modulo 10, from left to right: in `7+5*3=`, 7 + 5 gives 2, and 2 · 3 gives 6. The model
# can guess: `#6`. It can also write each step before the answer: `7+5=2,2*3=6#6`. The rule reads only what follows the
# `#`.

# %%
disable_progress_bar()
tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
PAD, EOS = tokenizer.pad_token_id, tokenizer.eos_token_id
model = AutoModelForCausalLM.from_pretrained(EMBEDDED)
optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
task = get_task("chain_arithmetic")


def next_token_logits(ids: Tensor, attention: Tensor) -> Tensor:
    """Compute the logits (B, L, V) of the next token at each position of ids (B, L)."""
    positions = (attention.cumsum(dim=1) - 1).clamp(min=0)  # padding on the left takes no position
    return model(input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False).logits


# %% [markdown]
# ## 2. Sample responses
#
# A rollout holds G responses to each of N prompts, B = N · G responses in all. The prompts have padding on the left, so
# all responses begin in the same column. The loop draws one token per row and stores the token's log-probability.
# The policy that samples is called *old*, so the stored value is $\ln \pi_{\mathrm{old}}$. Updates do not change it.
#
# A response ends with its first `<eos>`, and the mask excludes everything after it. When half of the rows have ended,
# the loop continues without them.


# %%
class Rollout(NamedTuple):
    """B responses and their prompts. P and T are the lengths of the longest prompt and the longest response."""

    ids: Tensor  # (B, P + T): padding, prompt, response, padding
    attention: Tensor  # (B, P + T): 0 at padding, 1 elsewhere
    mask: Tensor  # (B, T): True at the tokens of the response
    old_logp: Tensor  # (B, T): the log-probability of each token under the policy that sampled


@torch.no_grad()
def sample_rollout(prompts: list[str], generator: Generator) -> Rollout:
    """Sample one response to each of B prompts."""
    encoded = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    B, P = encoded["input_ids"].shape
    ids = torch.nn.functional.pad(encoded["input_ids"], (0, MAX_TOKENS), value=PAD)
    attention = torch.nn.functional.pad(encoded["attention_mask"], (0, MAX_TOKENS), value=1)
    old_logp = torch.zeros(B, MAX_TOKENS)

    rows = torch.arange(B)  # the rows that the loop continues
    for t in range(MAX_TOKENS):
        logits = next_token_logits(ids[rows, : P + t], attention[rows, : P + t])[:, -1]
        token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids[rows, P + t] = token[:, 0]
        old_logp[rows, t] = logits.log_softmax(-1).gather(1, token)[:, 0]
        running = (ids[rows, P:] != EOS).all(dim=1)
        if running.sum() <= len(rows) / 2:
            rows = rows[running]
        if len(rows) == 0:
            break

    is_end = ids[:, P:] == EOS
    mask = is_end.cumsum(dim=1) - is_end.int() == 0  # True up to and including the first <eos>
    attention[:, P:] = mask
    ids[attention == 0] = PAD
    old_logp[~mask] = 0.0
    T = mask.sum(dim=1).max()
    return Rollout(ids[:, : P + T], attention[:, : P + T], mask[:, :T], old_logp[:, :T])


# %% [markdown]
# ## 3. Rewards and advantages
#
# The reward R of a response is 1 if its answer is correct, and 0 otherwise. The G responses to one prompt form a group.
# The advantage $A = (R - \mathrm{mean}(R)) / (\mathrm{std}(R) + 10^{-4})$ compares each reward with its group. If all
# rewards of a group are equal, its advantages are 0.


# %%
def rule_rewards(problems: list[dict[str, str]], rollout: Rollout) -> Tensor:
    """Judge B responses and return their rewards (N, G)."""
    T = rollout.mask.shape[1]
    responses = tokenizer.batch_decode(rollout.ids[:, -T:], skip_special_tokens=True)
    correct = [task.is_correct(problem, text) for problem, text in zip(problems, responses, strict=True)]
    return torch.tensor(correct).float().view(N, G)


def group_advantages(rewards: Tensor) -> Tensor:
    """Compare each reward (N, G) with its group. The standard deviation has G - 1 in its denominator."""
    return (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + 1e-4)


# %% [markdown]
# ## 4. The objective
#
# CPGD maximises J. It is a mean over the b responses of a minibatch and over the tokens $y_{i,1}, \dots, y_{i,T_i}$ of
# each response. $\pi(y_{i,t})$ is the probability of a token after the prompt and all earlier tokens.
#
# $$
# \begin{align*}
# J(\theta) &= \frac{1}{b} \sum_{i=1}^{b} \frac{1}{T_i} \sum_{t=1}^{T_i} \Big[
# \min\big(d_{i,t}\, A_i,\ \mathrm{clip}(d_{i,t}, \ln(1-\varepsilon), \ln(1+\varepsilon))\, A_i\big) \\
# &\qquad\qquad\qquad\quad - \alpha\,
# \big(e^{\bar d_{i,t}} - 1 - \bar d_{i,t} + c\,(d_{i,t} - \bar d_{i,t})\big) \Big] \\
# d_{i,t} &= \ln \frac{\pi_\theta(y_{i,t})}{\pi_{\mathrm{old}}(y_{i,t})} \qquad
# \bar d_{i,t} = \min(d_{i,t}, \ln(1+c)) \qquad
# A_i = \frac{R_i - \mathrm{mean}(R)}{\mathrm{std}(R) + 10^{-4}}
# \end{align*}
# $$
#
# - **The log-ratio** d is the change of a token's log-probability since sampling. The ratio is $r = e^d$.
# - **The surrogate** is the `min`. Its gradient in d is A, or 0 for a clipped token. A token with A > 0 is clipped if
#   r > 1 + ε. A token with A < 0 is clipped if r < 1 − ε.
# - **The drift** is the bracket after α. Up to r = 1 + c it is $r - 1 - d$, and the mean of this term estimates
#   $\mathrm{KL}(\pi_{\mathrm{old}} \,\|\, \pi_\theta)$. Beyond that it goes on as a straight line in d, with the
#   slope c. So its gradient in d is $\min(r - 1, c)$ everywhere.


# %%
def cpgd_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, alpha: float = ALPHA) -> Tensor:
    """Compute -J. The advantages have the shape (b,), and the other tensors have the shape (b, T)."""
    d = logp - old_logp
    A = advantages[:, None]
    surrogate = torch.minimum(d * A, d.clamp(math.log(1 - EPSILON), math.log(1 + EPSILON)) * A)
    d_bar = d.clamp(max=math.log(1 + DRIFT_CLIP))
    drift = d_bar.expm1() - d_bar + DRIFT_CLIP * (d - d_bar)  # expm1(x) is e^x - 1
    per_response = ((surrogate - alpha * drift) * mask).sum(dim=1) / mask.sum(dim=1)
    return -per_response.mean()


# %% [markdown]
# ## 5. The updates
#
# Sampling takes time, so one rollout serves several updates. Each pass shuffles the responses and cuts them into
# minibatches. Each minibatch gives one update. At the first update every d is 0, so the clip and the drift have no
# effect. They act from the second update on.


# %%
def log_probs(rollout: Rollout, rows: Tensor) -> Tensor:
    """Compute the log-probabilities (b, T) of the sampled tokens under the current policy."""
    ids, T = rollout.ids[rows], rollout.mask.shape[1]
    logits = next_token_logits(ids, rollout.attention[rows])[:, -T - 1 : -1]  # each predicts one response token
    return logits.log_softmax(-1).gather(-1, ids[:, -T:, None])[..., 0]


def update_policy(rollout: Rollout, advantages: Tensor, generator: Generator) -> list[float]:
    """Update the model on each minibatch of each pass, and return the losses."""
    losses = []
    for _ in range(PASSES):
        for rows in torch.randperm(N * G, generator=generator).chunk(MINIBATCHES):
            logp = log_probs(rollout, rows)
            loss = cpgd_loss(logp, rollout.old_logp[rows], advantages[rows], rollout.mask[rows])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


# %% [markdown]
# ## 6. One step
#
# A step is a rollout and the updates on it. Three generators draw its random numbers. The seed and the number of the
# step determine all three.
#
# The paper does not state α. The authors' code has 0.01, and so have this page and the package. By default the package
# also ends the passes over a rollout once the policy is far from the old one (`target_kl`). The paper has no such stop,
# and this page has none.


# %%
def step_generators(step: int) -> tuple[random.Random, Generator, Generator]:
    """Create the generators for the problems, for the tokens, and for the order of the responses."""
    problems, tokens, order = map(int, np.random.SeedSequence([SEED, step]).generate_state(3))
    return random.Random(problems), Generator().manual_seed(tokens), Generator().manual_seed(order)


def train_step(step: int) -> tuple[Rollout, Tensor, Tensor, list[float]]:
    """Sample, reward, compare, update. Return the rollout, the rewards, the advantages and the losses."""
    problem_generator, token_generator, order_generator = step_generators(step)
    problems = [problem for problem in task.sample(N, problem_generator) for _ in range(G)]
    rollout = sample_rollout([problem["prompt"] for problem in problems], token_generator)
    rewards = rule_rewards(problems, rollout)
    advantages = group_advantages(rewards)
    losses = update_policy(rollout, advantages.flatten(), order_generator)
    return rollout, rewards, advantages, losses


# %% [markdown]
# ## 7. Train
#
# The last column shows the first problem of each rollout and one response to it.

# %%
STEPS = 12  # fast: 2

mean_rewards, mean_lengths = [], []
for step in range(1, STEPS + 1):
    rollout, rewards, _, _ = train_step(step)
    mean_rewards.append(rewards.mean().item())
    mean_lengths.append(rollout.mask.sum(dim=1).float().mean().item())
    example = tokenizer.decode(rollout.ids[0], skip_special_tokens=True)
    print(f"step {step:>2}   reward {mean_rewards[-1]:.2f}   {mean_lengths[-1]:4.1f} tokens   {example}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), dpi=150, layout="constrained")
curves = (("Mean reward", mean_rewards, 1), ("Mean response length (tokens)", mean_lengths, None))
for axis, (title, values, top) in zip(axes, curves, strict=True):
    axis.plot(range(1, STEPS + 1), values, marker="o")
    axis.set(title=title, xlabel="step", ylim=(0, top))
    axis.grid(alpha=0.3)
plt.show()

# %% [markdown]
# The mean reward rises from 0.46 to 0.98, and the mean length rises from 8 tokens to 30. The rule never reads the
# intermediate results of a response. But a response that writes them is correct more often than a guess, so the updates
# raise its log-probability.
#
# This is one run with one seed. [The results](../docs/results.md) compare algorithms over many runs and several seeds.
#
# ## Where to go next
#
# - [The table of algorithms](../minicpgd/algorithms/table.py#ALGORITHMS) states CPGD, GRPO, RLOO, REINFORCE++ and their
#   relatives, in one row each. Sections 3 and 4 of this page are its row `cpgd`.
# - [The step of the package](../minicpgd/training/step.py#Learner.step) is section 6 of this page. It also
#   returns what is logged. For large models, it supports GPUs, adapters and micro-batches.
# - [Notebook 1](01_cpgd_step_by_step.ipynb) makes one step slowly. It prints every number and asks questions.
