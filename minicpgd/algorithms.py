r"""The table: every algorithm is one row.

An algorithm answers four questions, and the table at the end of this file has columns for each:

1. *advantage* and *weight*: how good was a response? (`advantages.py`)
2. *surrogate*: what is climbed, and where does a token stop counting? (`surrogates.py`)
3. *aggregation*: how do tokens and responses of different lengths share one mean? (here)
4. *drift*: is moving away from $\pi_{old}$ penalised? (`divergence.py`)

$$ \mathrm{loss} = \sum_t w_t \left( -\mathrm{surrogate}_t + \alpha\, \mathrm{drift}_t
   + \beta\, \mathrm{KL}_{ref,t} \right) $$

The weights $w_t$ are the aggregation's. A few rows set more: the `level` at which a ratio is taken (token or response),
an upper clip bound of their own (`epsilon_high`), and whether the KL to a reference policy is paid in the loss or in the
reward (`reference_kl`).

To try an idea of your own: write its function beside the others and add a row.

In: rewards (N, G), G responses to each of N prompts; then log-probabilities (B, T) in nats, B = N * G responses of T
tokens at most. Out: advantages (N, G), then a scalar loss and its metrics. Needs torch only.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from minicpgd.advantages import (
    WEIGHTS,
    Centre,
    batch_whitened,
    group_centred,
    group_centred_whitened,
    leave_one_out,
)
from minicpgd.divergence import bounded_drift, k3
from minicpgd.surrogates import (
    LEVELS,
    Surrogate,
    capped_weight,
    log_ratio_clip,
    log_ratio_free,
    ratio_clip,
    ratio_dual_clip,
    ratio_free,
)

Aggregation = Callable[[Tensor, int | None], Tensor]


# Aggregation: from a mask (B, T) to the weight of each token in the loss, (B, T). Since the loss is a sum over tokens
# once these are known, an optimizer step may be cut into micro-batches anywhere: each takes its rows of the weights.


def sequence_mean(mask: Tensor, max_completion_length: int | None = None) -> Tensor:
    """Mean over each response's tokens, then over responses: a token of a long response weighs less."""
    return mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / len(mask)


def token_mean(mask: Tensor, max_completion_length: int | None = None) -> Tensor:
    """Mean over all tokens of the optimizer step: each token weighs the same."""
    return mask / mask.sum().clamp(min=1)


def constant(mask: Tensor, max_completion_length: int | None = None) -> Tensor:
    """Sum over tokens / (B * max_completion_length): no length enters (Dr. GRPO, arXiv 2503.20783).

    Raises:
        ValueError: there is no `max_completion_length` to divide by.
    """
    if max_completion_length is None:
        raise ValueError("aggregation 'constant' divides by max_completion_length: give it")
    return mask / (len(mask) * max_completion_length)


AGGREGATIONS: dict[str, Aggregation] = {
    "sequence_mean": sequence_mean,
    "token_mean": token_mean,
    "constant": constant,
}


@dataclass(frozen=True)
class Algorithm:
    """One row of the table; `advantages` and `loss` are all that a simple training loop has to call.

    `level` is where the ratio is taken (`surrogates.LEVELS`), `epsilon_high` the row's own upper bound where it has
    one, and `reference_kl` says where `beta` acts: in the "loss", or as a penalty in the "reward".
    """

    name: str
    advantage: Centre
    weight: str
    surrogate: Surrogate
    aggregation: str
    drift: bool
    shows: str
    level: str = "token"
    epsilon_high: float | None = None
    reference_kl: str = "loss"

    def advantages(self, rewards: Tensor, lengths: Tensor, *, advantage_weight: str | None = None) -> Tensor:
        """Rewards to advantages.

        Args:
            rewards: (N, G), one per response, any unit.
            lengths: (N, G), the responses' lengths in tokens.
            advantage_weight: "equal", "std" or "clip_filter" in place of the row's own.

        Returns:
            (N, G). If nothing tells the rewards apart, within the group or the batch, exactly 0.
        """
        return WEIGHTS[advantage_weight or self.weight](rewards) * self.advantage(rewards, lengths)

    def loss(
        self,
        logp: Tensor,
        old_logp: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        epsilon: float = 0.2,
        epsilon_high: float | None = None,
        drift_coef: float = 1.0,
        drift_clip: float = 2.0,
        beta: float = 0.0,
        ref_logp: Tensor | None = None,
        max_completion_length: int | None = None,
        aggregation: str | None = None,
        importance_level: str | None = None,
        token_weights: Tensor | None = None,
    ) -> "LossOutput":
        r"""The scalar to minimise, on one (micro-)batch.

        Args:
            logp: (B, T), $\log \pi_\theta$ of the sampled tokens, nats; the gradient flows through this alone.
            old_logp: (B, T), the same under the policy that sampled.
            advantages: (B,), one per response.
            mask: (B, T), true or 1 where a token belongs to the response; what stands elsewhere is never read.
            epsilon, epsilon_high: clip to $[1-\varepsilon, 1+\varepsilon_{high}]$; `epsilon_high` defaults to the
                row's own, else to `epsilon`.
            drift_coef, drift_clip: $\alpha$ and $c$, for rows with drift.
            beta, ref_logp: weight of k3 to a reference policy, and its (B, T) log-probabilities.
            max_completion_length: tokens; for the aggregation "constant".
            aggregation, importance_level: in place of the row's own.
            token_weights: (B, T), this micro-batch's rows of `self.token_weights` of the whole optimizer step.

        Returns:
            `LossOutput`. Source: the paper named beside each function; all of CPGD: arXiv 2505.12504.

        Raises:
            ValueError: `beta` without `ref_logp`, or "constant" without `max_completion_length`.
        """
        inside = mask.bool()
        d = torch.where(inside, logp - old_logp, 0.0)
        A = advantages[:, None].to(logp.dtype)
        low, high = map(math.log, self.clip_bounds(epsilon, epsilon_high))

        level = LEVELS[importance_level or self.level]
        objective, unclipped = self.surrogate(level(d, inside), A, torch.where(inside, logp, 0.0), low, high)
        per_token = -objective
        if self.drift:
            per_token = per_token + drift_coef * bounded_drift(d, drift_clip)
        ref_kl = None
        if beta and self.reference_kl == "loss":
            if ref_logp is None:
                raise ValueError("beta weighs the KL to a reference policy: give ref_logp, (B, T)")
            ref_kl = k3(torch.where(inside, ref_logp - logp, 0.0))
            per_token = per_token + beta * ref_kl
        if token_weights is None:
            token_weights = self.token_weights(inside, max_completion_length, aggregation)
        return LossOutput(
            loss=(token_weights * per_token).sum(),
            log_ratio=d.detach(),
            clipped=(objective != unclipped).expand_as(d),
            advantages=A.detach().expand_as(d),
            mask=inside,
            ref_kl=None if ref_kl is None else ref_kl.detach(),
        )

    def clip_bounds(self, epsilon: float, epsilon_high: float | None = None) -> tuple[float, float]:
        """The ratios at which this row clips. The upper one: what is asked for here, else the row's own, else `epsilon`."""
        above = next(e for e in (epsilon_high, self.epsilon_high, epsilon) if e is not None)
        return 1 - epsilon, 1 + above

    def token_weights(
        self, mask: Tensor, max_completion_length: int | None = None, aggregation: str | None = None
    ) -> Tensor:
        """(B, T) mask of a whole optimizer step to (B, T) weights, by the row's aggregation, or another."""
        return AGGREGATIONS[aggregation or self.aggregation](mask, max_completion_length)


@dataclass(frozen=True)
class LossOutput:
    """A scalar loss and, detached, what its metrics are made of, (B, T) each; `metrics` is computed when read."""

    loss: Tensor
    log_ratio: Tensor
    clipped: Tensor
    advantages: Tensor
    mask: Tensor
    ref_kl: Tensor | None

    @cached_property
    def metrics(self) -> dict[str, float]:
        """`loss`, and those of `token_metrics`, of this batch alone."""
        return {"loss": self.loss.item(), **token_metrics([self])}


def token_metrics(outputs: Sequence[LossOutput]) -> dict[str, float]:
    r"""Metrics over all tokens of several batches, as one pass over a rollout has them.

    `kl_old`: mean k3 of $\mathrm{KL}(\pi_{old} \,\|\, \pi_\theta)$, nats per token. `ratio_min`, `ratio_p01`,
    `ratio_p99`, `ratio_max`: of the tokens' ratios. `clip_frac_pos`, `clip_frac_neg`: share of all tokens that the
    surrogate bounds, with A > 0 and with A < 0. `kl_ref`: mean k3 to the reference, where there is one. (k3: Schulman,
    *Approximating KL divergence*, 2020.)
    """
    # float64: a policy that ran away has ratios whose exp does not fit into float32
    d = torch.cat([o.log_ratio[o.mask] for o in outputs]).double()
    clipped = torch.cat([o.clipped[o.mask] for o in outputs])
    positive = torch.cat([o.advantages[o.mask] > 0 for o in outputs])
    if not len(d):
        return {}
    ordered = d.sort().values.exp()
    metrics = {
        "kl_old": k3(d).mean().item(),
        "ratio_min": ordered[0].item(),
        "ratio_p01": ordered[round(0.01 * (len(d) - 1))].item(),
        "ratio_p99": ordered[round(0.99 * (len(d) - 1))].item(),
        "ratio_max": ordered[-1].item(),
        "clip_frac_pos": (clipped & positive).double().mean().item(),
        "clip_frac_neg": (clipped & ~positive).double().mean().item(),
    }
    ref = [o.ref_kl[o.mask] for o in outputs if o.ref_kl is not None]
    return metrics | ({"kl_ref": torch.cat(ref).double().mean().item()} if ref else {})


def auto_drift_coef(advantages: Tensor, previous: float = 1.0) -> float:
    r"""A drift coefficient that no advantage can outrun: $\alpha = \max |A|$. Ours, not the paper's.

    Take one context, exact expectations under $\pi_{old}$, no clip, and an advantage of mean 0. The mean of k3 is then the
    KL itself, that of $-\ln(\pi/\pi_{old})$, and the objective is

    $$ \sum_a \pi_{old}(a)\,(A(a) + \alpha)\,\ln\frac{\pi(a)}{\pi_{old}(a)} $$

    Where every weight $A + \alpha$ is positive, that is $\alpha > -\min A$, it has one maximum over all policies,
    $\pi = \pi_{old}(1 + A/\alpha)$: each ratio settles at $r^* = 1 + A/\alpha$, and the expected advantage rises by
    $\mathrm{Var}(A)/\alpha$. Below that bound the worst action's weight is negative: the smaller its probability, the
    larger the objective, without end. $\alpha = \max|A|$ is never below the bound. Every $r^*$ then lies in [0, 2], short
    of 3, where the slope of `bounded_drift` stops growing. $r^*$ is 0 only where $\alpha$ stands on the bound itself: for a
    response whose advantage is negative and the largest of all.

    Args:
        advantages: any shape, of one rollout.
        previous: what to keep when no response of the rollout has an advantage.
    """
    largest = advantages.abs().max().item()
    return largest if largest > 0 else previous


# fmt: off
_ROWS = (
    #          name                     advantage               weight   surrogate        aggregation      drift  what it shows
    Algorithm("cpgd",                   group_centred,          "std",   log_ratio_clip,  "sequence_mean", True,  "clip the log-ratio, and pay for drifting away"),
    # the baselines
    Algorithm("grpo",                   group_centred,          "std",   ratio_clip,      "sequence_mean", False, "PPO's clip, the group as its own baseline"),
    Algorithm("rloo",                   leave_one_out,          "equal", ratio_clip,      "sequence_mean", False, "the other responses as baseline"),
    Algorithm("reinforce_pp",           batch_whitened,         "equal", ratio_clip,      "token_mean",    False, "the batch as baseline: no groups", reference_kl="reward"),
    Algorithm("reinforce_pp_baseline",  group_centred_whitened, "equal", ratio_clip,      "token_mean",    False, "the group, then the scale of the batch"),
    # CPGD taken apart
    Algorithm("pg",                     group_centred,          "std",   log_ratio_free,  "sequence_mean", False, "neither ratio, nor clip, nor drift"),
    Algorithm("cpg",                    group_centred,          "std",   log_ratio_clip,  "sequence_mean", False, "CPGD without the drift"),
    Algorithm("pgd",                    group_centred,          "std",   log_ratio_free,  "sequence_mean", True,  "CPGD without the clip"),
    # GRPO taken apart
    Algorithm("grpo_unclipped",         group_centred,          "std",   ratio_free,      "sequence_mean", False, "what the clip was holding"),
    Algorithm("grpo_dual_clip",         group_centred,          "std",   ratio_dual_clip, "sequence_mean", False, "is the unbounded side the culprit?"),
    Algorithm("grpo_drift",             group_centred,          "std",   ratio_clip,      "sequence_mean", True,  "which half of CPGD does the work?"),
    # the others, given the drift
    Algorithm("rloo_drift",             leave_one_out,          "equal", ratio_clip,      "sequence_mean", True,  "does the drift help RLOO as much?"),
    Algorithm("reinforce_pp_drift",     batch_whitened,         "equal", ratio_clip,      "token_mean",    True,  "and REINFORCE++?", reference_kl="reward"),
    # the relatives
    Algorithm("dr_grpo",                group_centred,          "equal", ratio_clip,      "constant",      False, "no length and no deviation divides"),
    Algorithm("dapo",                   group_centred,          "std",   ratio_clip,      "token_mean",    False, "clip higher, every token alike", epsilon_high=0.28),
    Algorithm("gspo",                   group_centred,          "std",   ratio_clip,      "sequence_mean", False, "one ratio for a whole response", level="sequence_mean"),
    Algorithm("cispo",                  group_centred,          "std",   capped_weight,   "token_mean",    False, "cap the weight, silence no token"),
)
# fmt: on
ALGORITHMS: dict[str, Algorithm] = {row.name: row for row in _ROWS}
