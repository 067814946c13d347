r"""Divergences: how far one policy has moved from another.

For samples $y \sim p$ and the log-ratio $e = \log q(y) - \log p(y)$ three estimators share one target,

$$ \mathrm{KL}(p \,\|\, q) = \mathbb{E}_{y \sim p}[-e]. $$

| estimator | formula | biased? | can it be negative? |
|---|---|---|---|
| `k1` | $-e$ | no | yes |
| `k2` | $e^2 / 2$ | a little | no |
| `k3` | $\exp(e) - 1 - e$ | no | no |

Estimating a KL is not differentiating it. If `k1` of samples from $\pi_\theta$ itself stands in a loss, its gradient
has mean zero. CPGD penalises something else, the *policy drift* $\mathrm{KL}(\pi_{old} \,\|\, \pi_\theta)$. Its samples
come from $\pi_{old}$, so $e = \log \pi_\theta - \log \pi_{old}$. There `k3` is an unbiased value and its derivative
$r - 1$ an unbiased gradient, but this gradient explodes with the ratio $r = \exp(e)$. `bounded_drift`, the term that is
trained, therefore continues as a straight line once its slope has reached a bound.

In: log-ratios of any shape, in nats. Out: the same shape and unit.
"""

import math

import torch
from torch import Tensor


def k1(log_ratio: Tensor) -> Tensor:
    r"""$-e$: unbiased, but a sample can be negative (Schulman, *Approximating KL divergence*, 2020)."""
    return -log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    r"""$e^2/2$: never negative, biased at second order (Schulman 2020)."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    r"""$\exp(e) - 1 - e$: unbiased and never negative (Schulman 2020); every run reports this as its drift."""
    return torch.expm1(log_ratio) - log_ratio


def bounded_drift(log_ratio: Tensor, bound: float = 2.0) -> Tensor:
    r"""The drift term that is trained: `k3` until its slope reaches `bound`, a straight line of that slope after.

    $$ \frac{\partial}{\partial d}\,\mathrm{drift}(d) = \min(\exp(d) - 1,\; c) $$

    CPGD (arXiv 2505.12504, section 3) bounds the gradient of the drift of a token with a very large ratio. This
    function, like Huber's loss, has exactly that gradient, so finite differences can check it.

    Args:
        log_ratio: $d = \log \pi_\theta - \log \pi_{old}$, any shape, nats.
        bound: $c > 0$, the largest slope (`drift_clip`); 2 is reached at a ratio of 3.

    Returns:
        The same shape, nats; equal to `k3(d)` wherever $\exp(d) \le 1 + c$.
    """
    knee = math.log1p(bound)
    # clamp prevents an overflow of exp. relu has slope 0 at the knee, clamp has not, so no slope counts twice there.
    return k3(log_ratio.clamp(max=knee)) + bound * torch.relu(log_ratio - knee)


def exact_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    r"""$\mathrm{KL}(p \,\|\, q) = \sum_a p(a)\,(\log p(a) - \log q(a))$, for distributions that are known in full
    (Kullback and Leibler 1951, equation 2.4).

    Unnormalised log-probabilities, (..., V), become (...), in nats. An action that p never takes adds nothing.
    """
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
