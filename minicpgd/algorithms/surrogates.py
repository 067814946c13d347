r"""Surrogates: the quantity that training maximises. It is estimated on samples of an older policy.

With $d = \log \pi_\theta - \log \pi_{old}$, $r = \exp(d)$ and the advantage $A$, each surrogate is a number per token
to be *maximised*. At $r = 1$ all of them have the same gradient, $A$. They differ where r is far from 1:

| surrogate | gradient in $\log \pi_\theta$ of an unclipped token | where A > 0, r large | where A < 0, r large |
|---|---|---|---|
| `log_ratio_free` | $A$ | $A$ | $A$ |
| `log_ratio_clip` | $A$ | 0 | $A$ |
| `ratio_free` | $r A$ | explodes | explodes |
| `ratio_clip` | $r A$ | 0 | **explodes** |
| `ratio_dual_clip` | $r A$ | 0 | 0 beyond r = 3 |
| `capped_weight` | $r A$ | $(1 + \varepsilon_{high}) A$ | $(1 + \varepsilon_{high}) A$ |

For small r the rows with $r A$ have a vanishing gradient. The others keep $A$ until the token is clipped.

The fourth row is PPO's, and so GRPO's, RLOO's and REINFORCE++'s. If the ratio of a bad token has risen, its gradient
grows with the ratio, without bound. The second row is CPGD's: no ratio multiplies the advantage. With the drift,
its gradient is $A - \alpha \min(r - 1, c)$. Its size can also grow with r, up to r = 1 + c. (c is `drift_clip`, by
default 2.) Take A < 0 and $\alpha = -A$: the gradient is $r A$, as in GRPO, for r from $1 - \varepsilon$ to 1 + c.

In: `log_ratio` (d, nats), `logp` (nats) and `advantage` (A), each broadcastable to (B, T); the clip bounds `low` < 0 <
`high`. These are log-ratios, each a scalar or of the shape (B, T). Out: the objective, and the objective without its
bound. A token counts as clipped where these two values differ. All surrogates have one signature. The functions of
`LEVELS`, at the end of this file, decide whether each token has its own ratio or all tokens of a response share one:
log-ratios (B, T) go in, and (B, T) or (B, 1) come out.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
Surrogate = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Pair]
Level = Callable[[Tensor, Tensor], Tensor]

DUAL_CLIP = 3.0


def ratio(log_ratio: Tensor) -> Tensor:
    r"""$r = \exp(d)$ (PPO, arXiv 1707.06347), limited to $e^{80}$.

    Beyond $e^{88}$ a float32 is infinite, and the gradient of a clipped token would be NaN.
    """
    return log_ratio.clamp(max=80).exp()


def log_ratio_free(log_ratio: Tensor, advantage: Tensor, logp: Tensor, low: Tensor, high: Tensor) -> Pair:
    r"""$d A$: its gradient is the policy gradient, on samples of another policy (CPGD, arXiv 2505.12504)."""
    free = log_ratio * advantage
    return free, free


def log_ratio_clip(log_ratio: Tensor, advantage: Tensor, logp: Tensor, low: Tensor, high: Tensor) -> Pair:
    r"""$\min(d A,\ \mathrm{clip}(d, \ln(1-\varepsilon), \ln(1+\varepsilon_{high}))\, A)$: CPGD (arXiv 2505.12504)."""
    free = log_ratio * advantage
    return torch.minimum(free, log_ratio.clamp(low, high) * advantage), free


def ratio_free(log_ratio: Tensor, advantage: Tensor, logp: Tensor, low: Tensor, high: Tensor) -> Pair:
    r"""$r A$: importance sampling, unbounded (PPO, arXiv 1707.06347, equation 6)."""
    free = ratio(log_ratio) * advantage
    return free, free


def ratio_clip(log_ratio: Tensor, advantage: Tensor, logp: Tensor, low: Tensor, high: Tensor) -> Pair:
    r"""$\min(r A,\ \mathrm{clip}(r, 1-\varepsilon, 1+\varepsilon_{high})\, A)$: PPO (arXiv 1707.06347, equation 7)."""
    free = ratio(log_ratio) * advantage
    return torch.minimum(free, ratio(log_ratio.clamp(low, high)) * advantage), free


def ratio_dual_clip(log_ratio: Tensor, advantage: Tensor, logp: Tensor, low: Tensor, high: Tensor) -> Pair:
    r"""`ratio_clip`, and for $A < 0$ never below $3 A$ (dual clip, arXiv 1912.09729, equation 5)."""
    clipped, free = ratio_clip(log_ratio, advantage, logp, low, high)
    return torch.where(advantage < 0, torch.maximum(clipped, DUAL_CLIP * advantage), clipped), free


def capped_weight(log_ratio: Tensor, advantage: Tensor, logp: Tensor, low: Tensor, high: Tensor) -> Pair:
    r"""$\mathrm{sg}[\min(r, 1+\varepsilon_{high})]\, A \log \pi_\theta$; sg stops the gradient (CISPO, 2506.13585)."""
    weight = ratio(log_ratio.detach())
    return weight.clamp(max=high.exp()) * advantage * logp, weight * advantage * logp


def per_token(log_ratio: Tensor, mask: Tensor) -> Tensor:
    r"""$r_t$: every token has its own ratio (GRPO, arXiv 2402.03300)."""
    return log_ratio


def per_sequence(log_ratio: Tensor, mask: Tensor) -> Tensor:
    r"""$\prod_t r_t$: the ratio of whole responses, as TRL's RLOOTrainer has it (RLOO, arXiv 2402.14740)."""
    return (log_ratio * mask).sum(dim=1, keepdim=True)


def per_sequence_mean(log_ratio: Tensor, mask: Tensor) -> Tensor:
    r"""$(\prod_t r_t)^{1/T}$: the geometric mean of the response's ratios (GSPO, arXiv 2507.18071)."""
    return per_sequence(log_ratio, mask) / mask.sum(dim=1, keepdim=True).clamp(min=1)


LEVELS: dict[str, Level] = {"token": per_token, "sequence": per_sequence, "sequence_mean": per_sequence_mean}
