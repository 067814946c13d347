r"""Advantages: was this response better than expected for its prompt?

Rewards come in as (N, G): N prompts, G sampled responses to each. Advantages go out in the same shape: one number per
response, shared by all of its tokens. Each is a difference to a *baseline* (better than what?) times a *weight* $w(x)$
(how much does this prompt count?):

| baseline | the reward is compared with |
|---|---|
| `group_centred` | the mean of the group: $R - \mu$ |
| `leave_one_out` | the mean of the other G - 1 (RLOO, arXiv 2402.14740) |
| `batch_whitened` | the mean token of the whole batch, in standard deviations (REINFORCE++, arXiv 2501.03262) |
| `group_centred_whitened` | the mean of the group first, then the batch |

| weight | $w(x)$ |
|---|---|
| `equal` | 1 |
| `std` | $1 / (\sigma + 10^{-4})$, $\sigma$ the group's standard deviation with ddof = 1 (GRPO, arXiv 2402.03300) |
| `clip_filter` | $\min(3, N / \text{prompts with } \sigma > 0)$, and 0 without such a prompt (CPGD, arXiv 2505.12504) |

Equal rewards give exact zeros. A plain mean would leave a rounding error near $10^{-9}$, which a division by a small
$\sigma$ would turn into a gradient. Every function therefore subtracts the first reward before anything else.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Baseline = Callable[[Tensor, Tensor], Tensor]
Weight = Callable[[Tensor], Tensor]


def group_centred(rewards: Tensor, lengths: Tensor) -> Tensor:
    r"""$R - \mu$, where $\mu$ is the mean over the group (GRPO, arXiv 2402.03300)."""
    shifted = rewards - rewards[:, :1]
    return shifted - shifted.mean(dim=1, keepdim=True)


def leave_one_out(rewards: Tensor, lengths: Tensor) -> Tensor:
    r"""$R_i - \frac{1}{G-1}\sum_{j \ne i} R_j$, which is $\frac{G}{G-1}(R_i - \mu)$."""
    group_size = rewards.shape[1]
    return group_centred(rewards, lengths) * group_size / (group_size - 1)


def batch_whitened(rewards: Tensor, lengths: Tensor) -> Tensor:
    r"""$(R - m) / \sqrt{v + 10^{-8}}$, mean $m$ and variance $v$ over all tokens (arXiv 2501.03262).

    A response has its length as its weight.
    """
    shifted = rewards - rewards[0, 0]
    share = lengths.to(rewards) / lengths.sum()
    centred = shifted - (share * shifted).sum()
    return centred / ((share * centred.square()).sum() + 1e-8).sqrt()


def group_centred_whitened(rewards: Tensor, lengths: Tensor) -> Tensor:
    """REINFORCE++ with a group baseline (arXiv 2501.03262): center within groups, then divide by the batch's scale."""
    return batch_whitened(group_centred(rewards, lengths), lengths)


def equal(rewards: Tensor) -> Tensor:
    r"""$w(x) = 1$ (Dr. GRPO, arXiv 2503.20783)."""
    return torch.ones_like(rewards[:, :1])


def std(rewards: Tensor) -> Tensor:
    r"""$w(x) = 1 / (\sigma + 10^{-4})$: prompts that are nearly solved or nearly hopeless count more (GRPO)."""
    return 1 / ((rewards - rewards[:, :1]).std(dim=1, keepdim=True) + 1e-4)


def clip_filter(rewards: Tensor) -> Tensor:
    r"""$w(x) = \min(3, N / \#\{\sigma > 0\})$: informative prompts take the place of the others (CPGD)."""
    informative = (rewards != rewards[:, :1]).any(dim=1).sum()
    weight = min(3.0, len(rewards) / int(informative)) if informative else 0.0
    return torch.full_like(rewards[:, :1], weight)


WEIGHTS: dict[str, Weight] = {"equal": equal, "std": std, "clip_filter": clip_filter}
