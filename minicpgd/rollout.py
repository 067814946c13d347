r"""The rollout: prompts go in, G sampled responses to each come out, with all that an update will ask about them.

Sampling is written out here because everything later depends on it being exactly $\pi_{old}$: the log-probabilities
kept for the ratio are those the tokens were drawn from, at the same temperature. (`generate` of transformers would
quietly keep the 50 likeliest tokens only.)
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper

from minicpgd.errors import NonFiniteError
from minicpgd.logprobs import logp_and_entropy, position_ids, token_logprobs
from minicpgd.policy import Policy


@dataclass(frozen=True)
class Rollout:
    """B = N * G responses; the G responses to one prompt stand together."""

    prompt_ids: Tensor  # (B, P), left-padded
    prompt_mask: Tensor  # (B, P), 1 for real tokens
    completion_ids: Tensor  # (B, T), right-padded; the end-of-sequence token belongs to the response
    mask: Tensor  # (B, T) bool, made from lengths, never by comparing ids
    lengths: Tensor  # (B,), tokens
    truncated: Tensor  # (B,) bool: ran into max_completion_length without an end
    logp: Tensor  # (B, T), log-probabilities under the policy that sampled, nats; 0 at padding
    entropy: Tensor  # (B, T), of the distribution sampled from, nats; 0 at padding
    completions: list[str]  # B texts

    def inputs(self, rows: Tensor) -> tuple[Tensor, Tensor, int]:
        """Some rows as `token_logprobs` wants them: ids and mask (b, p + t), and t, cut to the longest of these."""
        longest = int(self.lengths[rows].max())
        prompt = int(self.prompt_mask[rows].sum(dim=1).max())
        ids = torch.cat([self.prompt_ids[rows, -prompt:], self.completion_ids[rows, :longest]], dim=1)
        mask = torch.cat([self.prompt_mask[rows, -prompt:], self.mask[rows, :longest]], dim=1)
        return ids, mask, longest

    def micro_batches(self, rows: Tensor, size: int | None, tokens: int | None) -> list[Tensor]:
        """Cut a minibatch into parts that fit in memory.

        Args:
            rows: (b,) indices of responses.
            size: responses in a part, at most.
            tokens: in a part, at most, prompts and padding included; rows of like length then go together, the longest
                first. A response that is longer goes alone.

        Returns:
            Indices into `rows`; each row is in one part.
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
        """What a model thinks of these tokens: (B, T) log-probabilities in nats, 0 at padding.

        Args:
            size, tokens: see `micro_batches`.
            temperature, chunk_size: see `token_logprobs`.
        """
        scored = torch.zeros_like(self.logp)
        for part in self.micro_batches(torch.arange(len(scored), device=scored.device), size, tokens):
            ids, attention, t = self.inputs(part)
            scored[part, :t], _ = token_logprobs(model, ids, attention, t, temperature, chunk_size)
        return scored * self.mask


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[str],
    num_generations: int,
    *,
    max_completion_length: int,
    generator: torch.Generator | None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    batch_size: int | None = None,
) -> Rollout:
    r"""Sample `num_generations` responses to each prompt, or take the likeliest tokens.

    Args:
        prompts: N texts.
        num_generations: G.
        max_completion_length: T at most, tokens.
        generator: the source of all randomness, on the policy's device; None for greedy decoding.
        temperature: divides the logits, here and when the tokens are scored again.
        top_p, top_k: draw from the likeliest tokens only (1.0 and 0: from all). The log-probabilities kept are those of
            the distribution before that cut: what $\pi_\theta$ will be compared with.
        batch_size: responses generated at once; None for all.
    """
    model, was_training = policy.model, policy.model.training
    model.eval()
    prompt_ids, prompt_mask = (t.repeat_interleave(num_generations, dim=0) for t in policy.encode(prompts))
    batch, device = len(prompt_ids), policy.device
    made = Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=torch.full((batch, max_completion_length), policy.pad_id, device=device),
        mask=torch.empty(0),  # made at the end, like the texts
        lengths=torch.full((batch,), max_completion_length, device=device),
        truncated=torch.zeros(batch, dtype=torch.bool, device=device),
        logp=torch.zeros(batch, max_completion_length, device=device),
        entropy=torch.zeros(batch, max_completion_length, device=device),
        completions=[],
    )
    draw = functools.partial(_draw, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    for rows in torch.arange(batch, device=device).split(batch_size or batch):
        _fill(made, rows, rows // num_generations, model, policy.eos_ids, draw)
    model.train(was_training)

    longest = int(made.lengths.max())
    return replace(
        made,
        completion_ids=made.completion_ids[:, :longest],
        mask=torch.arange(longest, device=device) < made.lengths[:, None],
        logp=made.logp[:, :longest],
        entropy=made.entropy[:, :longest],
        completions=policy.decode(made.completion_ids, made.lengths),
    )


def _fill(
    made: Rollout,
    rows: Tensor,
    groups: Tensor,
    model: PreTrainedModel,
    eos_ids: Tensor,
    draw: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
) -> None:
    """Write some responses into a rollout, token by token.

    Args:
        rows: (b,), which; those that have ended leave it in batches.
        groups: (b,), equal where the prompt is the same. It is read once; what that leaves in the cache goes to each.
        draw: (b, V) logits to (b,) tokens, their log-probabilities, and entropies.
    """
    asked, group = torch.unique_consecutive(groups, return_inverse=True)
    first = torch.stack([rows[groups == which][0] for which in asked])
    attention, cache, new = made.prompt_mask[first], DynamicCache(config=model.config), made.prompt_ids[first]
    running = torch.ones(len(rows), dtype=torch.bool, device=rows.device)  # of the rows, those without an end yet
    for t in range(made.completion_ids.shape[1]):
        logits = model(
            input_ids=new,
            attention_mask=attention,
            position_ids=position_ids(attention)[:, -new.shape[1] :],
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
        if t == 0:
            cache.batch_select_indices(group)
            logits, attention = logits[group], attention[group]
        token, logp, entropy = draw(logits)
        alive = rows[running]
        made.completion_ids[alive, t], made.logp[alive, t] = token[running], logp[running]
        made.entropy[alive, t] = entropy[running]
        ended = running & torch.isin(token, eos_ids)
        made.lengths[rows[ended]] = t + 1
        running = running & ~ended
        if not running.any():
            break
        if 2 * int(running.sum()) <= len(rows):  # half have ended: stop paying for them
            keep = running.nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            rows, token, attention, running = rows[keep], token[keep], attention[keep], running[keep]
        attention = torch.cat([attention, attention.new_ones(len(rows), 1)], dim=1)
        new = token[:, None]
    made.truncated[rows[running]] = True


def _draw(
    logits: Tensor, *, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(b, V) logits to (b,) tokens, drawn from the likeliest or, without a generator, the likeliest; with log-probs."""
    logits = logits.float() / temperature
    if not logits.isfinite().all():
        raise NonFiniteError("the model's logits are not finite")
    if generator is None:
        token = logits.argmax(-1)
    else:
        likeliest = logits
        # the warpers' first argument, the text so far, is not looked at
        if top_k > 0:
            likeliest = TopKLogitsWarper(top_k)(None, likeliest)  # type: ignore[arg-type]
        if top_p < 1:
            likeliest = TopPLogitsWarper(top_p)(None, likeliest)  # type: ignore[arg-type]
        token = torch.multinomial(likeliest.softmax(-1), 1, generator=generator).squeeze(1)
    return token, *logp_and_entropy(logits, token)
