"""Aggregation: how the losses of tokens are averaged when responses differ in length.

In: the mask (B, T) of a minibatch, and which prompt each response answers. Out: the weight of each token in the loss,
(B, T). The loss is a sum over tokens with these weights. So a minibatch can be split into micro-batches: each uses its
own rows of the weights.
"""

from collections.abc import Callable

from torch import Tensor

Aggregation = Callable[[Tensor, int | None, Tensor | None], Tensor]


def sequence_mean(mask: Tensor, max_completion_length: int | None = None, groups: Tensor | None = None) -> Tensor:
    """Mean over each response's tokens, then over responses: a token of a long response has a smaller weight."""
    return mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / len(mask)


def group_token_mean(mask: Tensor, max_completion_length: int | None = None, groups: Tensor | None = None) -> Tensor:
    """Mean over all tokens of a prompt's responses, then over prompts (CPGD, arXiv 2505.12504, equation 2).

    `groups` (B,) holds, for each response, the number of the prompt that it answers. None: each response has a prompt
    of its own. Only the responses and prompts of this minibatch count.
    """
    if groups is None:
        return sequence_mean(mask)
    _, group = groups.unique(return_inverse=True)
    of_responses = mask.sum(dim=1)
    tokens = of_responses.new_zeros(int(group.max()) + 1).index_add(0, group, of_responses)
    return mask / tokens.clamp(min=1)[group, None] / len(tokens)


def token_mean(mask: Tensor, max_completion_length: int | None = None, groups: Tensor | None = None) -> Tensor:
    """Mean over all tokens of the optimizer step: every token has the same weight (DAPO, arXiv 2503.14476)."""
    return mask / mask.sum().clamp(min=1)


def constant(mask: Tensor, max_completion_length: int | None = None, groups: Tensor | None = None) -> Tensor:
    """Sum over tokens / (B * max_completion_length): all tokens have the same weight (Dr. GRPO, arXiv 2503.20783).

    Raises:
        ValueError: there is no `max_completion_length`, in tokens, to divide by.
    """
    if max_completion_length is None:
        advice = "pass token_weights=algorithm.token_weights(mask, max_completion_length)"
        raise ValueError(f"aggregation 'constant' divides by max_completion_length: {advice}")
    return mask / (len(mask) * max_completion_length)


AGGREGATIONS: dict[str, Aggregation] = {
    "sequence_mean": sequence_mean, "group_token_mean": group_token_mean, "token_mean": token_mean,
    "constant": constant,
}  # fmt: skip
