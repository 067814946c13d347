r"""Token log-probabilities: how likely were the sampled tokens under a policy?

For each token $y_t$ of a completion, this file computes $\log \pi(y_t \mid x, y_{<t})$ and the entropy of the whole
next-token distribution, at the temperature that the tokens were sampled with.

The logits would be the largest tensor of training: B x T x V numbers, of which one per token is needed. So they are
computed for `chunk_size` tokens at a time, reduced to two numbers each, dropped, and computed again in the backward
pass. (B, T, V) never exists.

In: a model, token ids and a mask, (B, P + T). Out: log-probabilities and entropies, (B, T) each, in nats.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

LOGITS_AT_ONCE = 2**24  # These numbers take 64 MiB in float32, and a few times as much in the computation.


def token_logprobs(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_length: int,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Score the last T = `completion_length` tokens of each row.

    Args:
        input_ids: (B, P + T), left-padded prompts followed by right-padded completions.
        attention_mask: (B, P + T), 1 for real tokens.
        temperature: the one that the tokens were sampled with; the logits are divided by it.
        chunk_size: tokens whose logits exist at once; None for as many as make 64 MiB.

    Returns:
        (logp, entropy), each (B, T) in nats. Both are float32: in bfloat16 the on-policy ratio would differ from 1. The
        entropy carries no gradient. Values at padding are finite and mean nothing.
    """
    _, decoder = split_network(model)
    output = decoder(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids(attention_mask), use_cache=False
    )
    hidden, targets = output.last_hidden_state[:, -completion_length - 1 : -1], input_ids[:, -completion_length:]
    head = partial(_score, model, temperature, type(output))
    chunk_size = chunk_size or max(1, LOGITS_AT_ONCE // model.get_output_embeddings().weight.shape[0])
    if targets.numel() <= chunk_size:
        return head(hidden, targets)
    chunks = zip(hidden.flatten(0, 1).split(chunk_size), targets.flatten().split(chunk_size), strict=True)
    pieces = [checkpoint(head, h[None], y[None], use_reentrant=False) for h, y in chunks]
    logp, entropy = (torch.cat(column, dim=1).view_as(targets) for column in zip(*pieces, strict=True))
    return logp, entropy


def position_ids(attention_mask: Tensor) -> Tensor:
    """(B, L) mask to (B, L) positions that count real tokens only, so that left padding changes nothing."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def without_padding(ids: Tensor, lengths: Tensor) -> list[list[int]]:
    """(B, T) right-padded ids and (B,) lengths to B lists of ids."""
    return [row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)]


def num_positions(model: PreTrainedModel) -> float:
    """How many tokens a model was made for; infinite if it has no such limit."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    extended = (rope.get("factor") or 1) * (rope.get("original_max_position_embeddings") or 0)
    return max(positions, extended)


def logp_and_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(..., V) logits and (...) token ids to log-probabilities and entropies, (...) each, in nats, float32."""
    log_p = logits.float().log_softmax(-1)
    logp = log_p.gather(-1, targets[..., None]).squeeze(-1)
    with torch.no_grad():
        # An action of probability 0 adds 0, not 0 * -inf.
        entropy = -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)
    return logp, entropy


def _score(
    model: PreTrainedModel, temperature: float, kind: type[ModelOutput], hidden: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """(b, t, D) hidden states and (b, t) token ids to log-probabilities and entropies, through the model's own head.

    Some models scale or cap their logits (Granite, Cohere, Gemma). So this calls the model's whole forward pass, in
    which the decoder returns `hidden` at once. `kind` is the type of the decoder's output.
    """
    network, decoder = split_network(model)
    own = vars(decoder).get("forward")  # accelerate replaces a module's forward.
    vars(decoder)["forward"] = lambda *_, **__: kind(last_hidden_state=hidden)
    try:
        logits = network(input_ids=targets).logits
    finally:
        del vars(decoder)["forward"]
        if own is not None:
            vars(decoder)["forward"] = own
    return logp_and_entropy(logits.float() / temperature, targets)


def split_network(model: PreTrainedModel) -> tuple[Any, Any]:
    """A causal language model without PEFT's wrapper, and its decoder: the part that ends before the output layer."""
    network: Any = getattr(model, "get_base_model", lambda: model)()
    # Some models have another word for it: then get_decoder is the output layer (ModernBERT), or the model (Llama 4).
    others = (network, network.get_output_embeddings())
    candidates = (network.get_decoder(), network.base_model, getattr(network, "model", None))
    return network, next(candidate for candidate in candidates if not any(candidate is other for other in others))
