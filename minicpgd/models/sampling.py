r"""Sampling: prompts go in, G responses to each come out, with the log-probabilities that an update needs.

Sampling is written out here because the ratio depends on it being exactly $\pi_{old}$. The log-probabilities kept are
those of the policy's whole distribution, at the temperature that the tokens were drawn with. (`generate` of
transformers keeps only the 50 likeliest tokens, unless it is told otherwise.)

In: a policy, prompts, `SamplingSettings`. Out: a `Rollout` of B = N * G responses.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import DynamicCache, PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper

from minicpgd.config import SamplingSettings
from minicpgd.errors import NonFiniteError, UserError, describe_error, is_out_of_memory
from minicpgd.models.logprobs import logp_and_entropy, position_ids, token_logprobs, without_padding
from minicpgd.models.policy import Policy
from minicpgd.models.precision import one_thread_if_small
from minicpgd.tasks.data_files import Prompt


@dataclass(frozen=True)
class Rollout:
    """B = N * G responses; the G responses to one prompt stand together."""

    prompt_ids: Tensor  # (B, P), left-padded
    prompt_mask: Tensor  # (B, P), 1 for real tokens
    completion_ids: Tensor  # (B, T), right-padded; the end-of-sequence token belongs to the response
    mask: Tensor  # (B, T) bool, made from lengths, never by comparing ids
    lengths: Tensor  # (B,), tokens
    truncated: Tensor  # (B,) bool: reached max_completion_length without an end
    logp: Tensor  # (B, T), log-probabilities under the policy that sampled, nats; 0 at padding
    entropy: Tensor  # (B, T), of the distribution sampled from, nats; 0 at padding
    completions: list[str]  # B texts

    def token_ids(self) -> list[list[int]]:
        """The ids of each response, without padding."""
        return without_padding(self.completion_ids, self.lengths)

    def inputs(self, rows: Tensor) -> tuple[Tensor, Tensor, int]:
        """Some rows as `token_logprobs` takes them: ids and mask (b, p + t), and t, cut to the longest of these."""
        longest = int(self.lengths[rows].max())
        prompt = int(self.prompt_mask[rows].sum(dim=1).max())
        ids = torch.cat([self.prompt_ids[rows, -prompt:], self.completion_ids[rows, :longest]], dim=1)
        mask = torch.cat([self.prompt_mask[rows, -prompt:], self.mask[rows, :longest]], dim=1)
        return ids, mask, longest

    def micro_batches(self, rows: Tensor, size: int | None, tokens: int | None) -> list[Tensor]:
        """Split a minibatch into parts that fit in memory: indices into `rows`, each of them once.

        Args:
            rows: (b,) indices of responses.
            size: the largest number of responses in a part.
            tokens: the largest number of tokens in a part, with prompts and padding. Rows of similar length then go
                together, the longest first. A response that is longer goes alone.
        """
        if tokens is None:
            return list(torch.arange(len(rows), device=rows.device).split(size or len(rows)))
        prompts, completions = self.prompt_mask[rows].sum(dim=1).tolist(), self.lengths[rows].tolist()
        parts: list[list[int]] = []
        for i in sorted(range(len(rows)), key=lambda i: prompts[i] + completions[i], reverse=True):
            grown = [*parts[-1], i] if parts else [i]
            width = max(prompts[j] for j in grown) + max(completions[j] for j in grown)
            fits = len(grown) * width <= tokens and len(grown) <= (size or len(rows))
            parts = [*parts[:-1], grown] if parts and fits else [*parts, [i]]
        return [torch.tensor(part, device=rows.device) for part in parts]

    @torch.no_grad()
    def score(
        self,
        model: PreTrainedModel,
        *,
        size: int | None = None,
        tokens: int | None = None,
        temperature: float = 1.0,
        chunk_size: int | None = None,
    ) -> Tensor:
        """The log-probabilities of these tokens under a model: (B, T) in nats, 0 at padding.

        `micro_batches` explains `size` and `tokens`, and `token_logprobs` the other arguments.
        """
        scored = torch.zeros_like(self.logp)
        with one_thread_if_small(model):
            for part in self.micro_batches(torch.arange(len(scored), device=scored.device), size, tokens):
                ids, attention, t = self.inputs(part)
                scored[part, :t], _ = token_logprobs(model, ids, attention, t, temperature, chunk_size)
        return scored * self.mask


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[Prompt],
    num_generations: int,
    settings: SamplingSettings = SamplingSettings(),  # noqa: B008 (frozen)
    *,
    generator: Generator | None = None,
    greedy: bool = False,
    **changes: Any,
) -> Rollout:
    r"""Sample G = `num_generations` responses to each of N prompts.

    Args:
        prompts: texts, or conversations as lists of messages.
        settings: at most T = `max_completion_length` tokens. With `top_p` and `top_k` the log-probabilities kept are
            still those of the whole distribution, since $\pi_\theta$ is compared with that.
        generator: the source of all randomness, on the policy's device.
        greedy: take the likeliest token each time; this needs no generator.
        changes: fields of the settings, by name, as `max_completion_length=16`.

    Raises:
        UserError: a prompt cannot be encoded, or leaves no room for a response among the model's positions.
        NonFiniteError: the model's logits are not finite.
        ValueError: neither a generator nor `greedy`.
    """
    if generator is None and not greedy:
        raise ValueError("sampling needs a generator; greedy=True needs none")
    settings = replace(settings, **changes)
    prompt_ids, prompt_mask = policy.encode(prompts, settings.max_completion_length)  # (N, P), left-padded
    model, was_training = policy.model, policy.model.training
    model.eval()
    answers = torch.arange(len(prompts), device=policy.device).repeat_interleave(num_generations)  # (B,)
    parts = answers.split(settings.rollout_batch_size or len(answers))
    if greedy:
        generator = None
    try:
        with one_thread_if_small(model):
            batches = [_sample_batch(policy, prompt_ids, prompt_mask, part, settings, generator) for part in parts]
    finally:
        model.train(was_training)
    completion_ids, logp, entropy, lengths, ended = (torch.cat(column) for column in zip(*batches, strict=True))

    longest = int(lengths.max())
    ids, logp, entropy = (values[:, :longest] for values in (completion_ids, logp, entropy))
    mask = torch.arange(longest, device=policy.device) < lengths[:, None]
    completions = policy.tokenizer.batch_decode(without_padding(ids, lengths), skip_special_tokens=True)
    return Rollout(
        prompt_ids=prompt_ids[answers], prompt_mask=prompt_mask[answers], completion_ids=ids, mask=mask,
        lengths=lengths, truncated=~ended, logp=logp, entropy=entropy, completions=completions,
    )  # fmt: skip


def check_sampler(policy: Policy, prompts: Sequence[Prompt], settings: SamplingSettings) -> None:
    """Sample a few short responses, score them, and compare the log-probabilities (`largest_gap`).

    Both have to be those of one distribution, or the ratio means nothing.

    Raises:
        UserError: the model cannot be sampled from or scored, or the log-probabilities differ.
    """
    model, length = policy.model, min(16, settings.max_completion_length)
    was_training, short = model.training, SamplingSettings(length, settings.temperature)
    try:
        rollout = generate(policy, prompts, 4, short, generator=Generator(policy.device).manual_seed(0))
        scored = rollout.score(model.eval(), temperature=settings.temperature)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Architectures fail in many ways.
        if is_out_of_memory(error):
            raise
        raise UserError(f"{policy.name}: cannot be sampled from token by token: {describe_error(error)}") from error
    finally:
        model.train(was_training)
    gap, most = largest_gap((scored - rollout.logp)[rollout.mask], model.dtype)
    if not gap <= most:
        what = "the log-probability of a token when it is sampled and when it is scored"
        raise UserError(f"{policy.name}: {what} differ by {gap:.2g} nats; at most {most:.2g} is right")


def largest_gap(differences: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """How far log-probabilities of the same tokens differ, and how far they may, in nats; `differences` has any shape.

    In float32 each may differ by 0.01. In half precision, caches and batches round differently, so the mean difference
    counts. It may be 25 times the dtype's resolution.
    """
    gaps = differences.abs()
    if dtype == torch.float32:
        return gaps.max().item(), 0.01
    return gaps.mean().item(), 25 * torch.finfo(dtype).eps


def _sample_batch(
    policy: Policy, ids: Tensor, mask: Tensor, answers: Tensor, settings: SamplingSettings, generator: Generator | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sample b responses, token by token; greedily without a generator.

    `ids` and `mask` are the prompts, (N, P). Response i answers the prompt `answers[i]`; equal ones stand together. The
    result is token ids, log-probabilities and entropies, (b, T) each, then lengths and whether each ended, (b,) each.
    """
    model, eos_ids, limit = policy.model, policy.eos_ids, settings.max_completion_length
    completion_ids = answers.new_full((len(answers), limit), policy.pad_id)
    logp, entropy = torch.zeros(2, len(answers), limit, device=answers.device)
    lengths, ended = torch.full_like(answers, limit), torch.zeros_like(answers, dtype=torch.bool)
    distinct, group = torch.unique_consecutive(answers, return_inverse=True)
    cache = DynamicCache(config=model.config)
    inputs, attention = ids[distinct], mask[distinct]
    options = {cache_argument(model): cache, "logits_to_keep": 1}  # Versions of transformers differ in the name.
    active = torch.arange(len(answers), device=answers.device)  # These are still computed.
    for t in range(limit):
        positions = position_ids(attention)[:, -inputs.shape[1] :]
        output = model(input_ids=inputs, attention_mask=attention, position_ids=positions, **options)
        logits = output.logits[:, -1].float() / settings.temperature
        if t == 0:  # Each prompt is encoded once. Its cache is copied to its responses.
            cache.reorder_cache(group)  # type: ignore[arg-type]
            logits, attention = logits[group], attention[group]
        if not logits.isfinite().all():
            raise NonFiniteError("the model's logits are not finite")
        if generator is None:
            token = logits.argmax(-1)
        else:
            likely = _apply_top_k_top_p(logits, settings)
            token = torch.multinomial(likely.softmax(-1), 1, generator=generator).squeeze(1)
        token_logp, token_entropy = logp_and_entropy(logits, token)

        running = ~ended[active]
        rows = active[running]
        completion_ids[rows, t], logp[rows, t] = token[running], token_logp[running]
        entropy[rows, t] = token_entropy[running]
        ended[rows] = torch.isin(token[running], eos_ids)
        lengths[rows[ended[rows]]] = t + 1
        if ended.all():
            break
        unfinished = (~ended[active]).nonzero().squeeze(1)
        if 2 * len(unfinished) <= len(active):  # Half have ended. Drop them, to save their computation.
            cache.reorder_cache(unfinished)  # type: ignore[arg-type]
            active, token, attention = active[unfinished], token[unfinished], attention[unfinished]
        attention = torch.cat([attention, attention.new_ones(len(active), 1)], dim=1)
        inputs = token[:, None]
    return completion_ids, logp, entropy, lengths, ended


def _apply_top_k_top_p(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """(b, V) logits, with -inf outside `top_k` and `top_p`. The first argument of the warpers is never read."""
    if settings.top_k > 0:
        logits = TopKLogitsWarper(settings.top_k)(None, logits)  # type: ignore[arg-type]
    if settings.top_p < 1:
        logits = TopPLogitsWarper(settings.top_p)(None, logits)  # type: ignore[arg-type]
    return logits


def cache_argument(model: PreTrainedModel) -> str:
    """The model's name for the argument with its keys and values: transformers 5.24 renamed it."""
    network = getattr(model, "get_base_model", lambda: model)()  # PEFT's wrapper takes any argument.
    parameters = inspect.signature(type(network).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"
