r"""Advantages: was this response better than expected for its prompt?

Rewards come in as (N, G): N prompts, G sampled responses to each. Advantages go out in the same shape: one number per
response, shared by all of its tokens. An advantage is a *centred* reward times a *weight*.
The centre says what the reward is compared with. The weight $w(x)$ says how much the prompt $x$ counts:

| centre | the reward is compared with |
|---|---|
| `group_centred` | the mean of the group: $R - \mu$ |
| `leave_one_out` | the mean of the other G - 1 (RLOO, arXiv 2402.14740) |
| `batch_whitened` | the batch's mean; the difference is divided by the batch's deviation (REINFORCE++, 2501.03262) |
| `group_centred_whitened` | the mean of the group; the result is then whitened over the batch |

| weight | $w(x)$ |
|---|---|
| `equal` | 1 |
| `inverse_std` | $1 / (\sigma + 10^{-4})$, where $\sigma$ is the group's deviation (GRPO, 2402.03300; our row cpgd) |
| `clip_filter` | $\min(3, N / n)$, where n prompts have $\sigma > 0$; 0 if n = 0 (CPGD's paper, 2505.12504) |

$\sigma$ has G - 1 in its denominator. If all rewards of a group are equal, their computed mean can have a rounding
error, and the division by $\sigma$ would enlarge it. So the code first subtracts the group's first reward from all
rewards of the group. Equal rewards then become exactly 0.

A response that no reward function judges has the reward NaN. Its advantage is 0, as in TRL. The other responses have
the advantages that they would have without it (`of_scored`, ours).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Centre = Callable[[Tensor, Tensor], Tensor]
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

    Longer responses count more in m and v, in proportion to their tokens.
    """
    shifted = rewards - rewards[0, 0]
    share = lengths.to(rewards) / lengths.sum()
    centred = shifted - (share * shifted).sum()
    return centred / ((share * centred.square()).sum() + 1e-8).sqrt()


def group_centred_whitened(rewards: Tensor, lengths: Tensor) -> Tensor:
    """REINFORCE++ with a group baseline (arXiv 2501.03262): centre each group, then whiten the batch."""
    return batch_whitened(group_centred(rewards, lengths), lengths)


def equal(rewards: Tensor) -> Tensor:
    r"""$w(x) = 1$ (Dr. GRPO, arXiv 2503.20783)."""
    return torch.ones_like(rewards[:, :1])


def inverse_std(rewards: Tensor) -> Tensor:
    r"""$w(x) = 1 / (\sigma + 10^{-4})$: prompts that are nearly always or nearly never solved count more (GRPO)."""
    return 1 / ((rewards - rewards[:, :1]).std(dim=1, keepdim=True) + 1e-4)


def clip_filter(rewards: Tensor) -> Tensor:
    r"""$w(x) = \min(3, N / \#\{\sigma > 0\})$: if fewer prompts have a gradient, each counts more (CPGD)."""
    informative = (rewards != rewards[:, :1]).any(dim=1).sum()
    weight = min(3.0, len(rewards) / int(informative)) if informative else 0.0
    return torch.full_like(rewards[:, :1], weight)


WEIGHTS: dict[str, Weight] = {"equal": equal, "std": inverse_std, "clip_filter": clip_filter}


def kept_groups(rewards: Tensor, least: float | None, most: float | None) -> Tensor:
    """Which groups stay in the loss, (N,): those whose mean reward lies in [least, most]; None: no bound.

    The code of CPGD's authors can leave out groups whose responses are nearly all right or nearly all wrong. Rewards
    (N, G) have any unit, and NaN does not count. A group without any reward stays.
    """
    means = rewards.nanmean(dim=1)
    smallest, largest = -math.inf if least is None else least, math.inf if most is None else most
    return means.isnan() | ((means >= smallest) & (means <= largest))


def of_scored(centre: Centre, weight: Weight, rewards: Tensor, lengths: Tensor) -> Tensor:
    r"""The advantages of the responses that have a reward, as if there were no others. The advantage of a NaN is 0.

    Suppose that n of a group's G rewards are not NaN, and that their mean is $\mu$. `centre` is called with $\mu$ in
    place of each NaN, and with the length 0 there. So means and variances are those of the n rewards. `weight` is
    called with $\sqrt{(G-1)/(n-1)}\,(R - \mu)$, and with 0 in place of each NaN. The factor is for `inverse_std`, which
    divides a sum of squares by G - 1, where n - 1 is right. In `clip_filter`, a prompt without any reward still counts
    as one of the N prompts.
    """
    scored, others = ~rewards.isnan(), rewards.shape[1] - 1
    count = scored.sum(dim=1, keepdim=True).to(rewards)
    first = rewards.gather(1, scored.int().argmax(dim=1, keepdim=True)).nan_to_num()
    mean = first + torch.where(scored, rewards - first, 0).sum(dim=1, keepdim=True) / count.clamp(min=1)
    centred = centre(torch.where(scored, rewards, mean), torch.where(scored, lengths, 0))
    other_scored = (count - 1).clamp(min=1)
    if centre is leave_one_out:  # Its factor is n / (n - 1), and not G / (G - 1).
        centred = centred * (count / other_scored) * (others / (others + 1))
    deviations = torch.where(scored, rewards - mean, 0) * (others / other_scored).sqrt()
    return torch.where(scored, weight(deviations) * centred, 0)
