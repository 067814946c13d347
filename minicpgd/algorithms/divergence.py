r"""Divergences: how far one policy has moved from another.

For samples $y \sim p$ and the log-ratio $e = \log q(y) - \log p(y)$ three estimators share one target,

$$ \mathrm{KL}(p \,\|\, q) = \mathbb{E}_{y \sim p}[-e]. $$

| estimator | formula | biased? | can it be negative? |
|---|---|---|---|
| `k1` | $-e$ | no | yes |
| `k2` | $e^2 / 2$ | a little | no |
| `k3` | $\exp(e) - 1 - e$ | no | no |

A good estimator of a KL can have a wrong gradient. Let $p = \pi_\theta$, and let q be fixed. Then the gradient of `k1`
is $\nabla \log \pi_\theta(y)$, whose mean is zero, so `k1` is useless as a loss.

CPGD penalises the *policy drift* $\mathrm{KL}(\pi_{old} \,\|\, \pi_\theta)$. Its samples come from $\pi_{old}$, so
$e = \log \pi_\theta - \log \pi_{old}$. For these samples `k3` is an unbiased estimate of the drift. Its gradient
$(r - 1) \nabla \log \pi_\theta$ is an unbiased estimate of the drift's gradient, but it grows without bound with the
ratio $r = \exp(e)$. The loss therefore uses `bounded_drift`, which continues as a straight line once its slope has
reached a bound.

In: log-ratios of any shape, in nats. Out: the same shape and unit.
"""

import math

import torch
from torch import Tensor


def k1(log_ratio: Tensor) -> Tensor:
    r"""$-e$: unbiased, but a sample can be negative (Schulman, *Approximating KL divergence*, 2020)."""
    return -log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    r"""$e^2/2$: never negative; its bias has only terms of third and higher order (Schulman 2020)."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    r"""$\exp(e) - 1 - e$: unbiased and never negative (Schulman 2020); every run reports its mean as `kl_old`."""
    return torch.expm1(log_ratio) - log_ratio


def bounded_drift(log_ratio: Tensor, bound: float = 2.0) -> Tensor:
    r"""The drift term of the loss: `k3` until its slope reaches `bound`, then a straight line of that slope.

    $$ \frac{\partial}{\partial d}\,\mathrm{drift}(d) = \min(\exp(d) - 1,\; c) $$

    CPGD (arXiv 2505.12504, section 3) bounds the gradient of a token with a very large ratio. The derivative of
    this function is that bounded gradient, so finite differences of the function can check it.

    Args:
        log_ratio: $d = \log \pi_\theta - \log \pi_{old}$, any shape, nats.
        bound: $c > 0$, the largest slope (`drift_clip`), reached at the ratio $1 + c$.

    Returns:
        The same shape, nats; equal to `k3(d)` wherever $\exp(d) \le 1 + c$.
    """
    knee = math.log1p(bound)
    # At the knee torch gives clamp the slope 1 and relu the slope 0, so exactly one of the terms has a gradient.
    return k3(log_ratio.clamp(max=knee)) + bound * torch.relu(log_ratio - knee)


def exact_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    r"""$\mathrm{KL}(p \,\|\, q) = \sum_a p(a)\,(\log p(a) - \log q(a))$, for distributions that are known in full
    (Kullback and Leibler 1951, equation 2.4).

    The logits have the shape (..., V), and the result (...), in nats. An action that p never takes adds nothing.
    """
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
