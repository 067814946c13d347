r"""The loss: what a row of the table computes.

A row answers four questions:

1. *centre* and *weight*: how good was a response? (`advantages.py`)
2. *surrogate*: what is maximised, and beyond which ratios is a token's gradient 0? (`surrogates.py`)
3. *aggregation*: how is the loss averaged over tokens and responses? (`aggregation.py`)
4. *drift*: is moving away from $\pi_{old}$ penalised? (`divergence.py`)

`Algorithm.loss` puts the answers together:

$$ \mathrm{loss} = \sum_t w_t \left( -\mathrm{surrogate}_t + \alpha\, \mathrm{drift}_t
   + \beta\, \mathrm{KL}_{ref,t} \right) $$

The weights $w_t$ come from the aggregation; $\alpha$ is `drift_coef`.

In: log-probabilities (B, T) in nats and advantages (B,), for B responses of at most T tokens. Out: a scalar loss and
its metrics. To change the formula, edit this file. To add a row, edit `table.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from minicpgd.algorithms.advantages import WEIGHTS, Centre, Weight, batch_whitened, equal, of_scored
from minicpgd.algorithms.aggregation import AGGREGATIONS, Aggregation
from minicpgd.algorithms.divergence import bounded_drift, k3
from minicpgd.algorithms.surrogates import LEVELS, Level, Surrogate, per_token


@dataclass(frozen=True)
class LossSettings:
    """The numbers in a loss."""

    epsilon: float = 0.2
    """Ratios are clipped below at 1 - epsilon."""
    epsilon_high: float | None = None
    """Ratios are clipped above at 1 + epsilon_high. None: the row's own value, else epsilon."""
    drift_coef: float | Tensor = 0.01
    """CPGD's alpha, the weight of the policy drift: a number, or a tensor (B,) with one weight per response."""
    drift_clip: float = 2.0
    """CPGD's c: the gradient of the drift never exceeds it."""
    beta: float = 0.0
    """Weight of the KL to a reference policy."""
    clip_growth: float = 1.0
    """The factor on epsilon and epsilon_high at a response's last token. It is 1 at the first, and linear between."""


@dataclass(frozen=True)
class Algorithm:
    """One row of the table. A simple loop needs only `advantages` and `loss`; for `dr_grpo` also `token_weights`."""

    name: str
    label: str
    """The name that figures print."""
    centre: Centre
    weight: Weight
    surrogate: Surrogate
    aggregation: Aggregation
    drift: bool
    shows: str
    """What a reader learns from this row."""
    level: Level = per_token
    """Whether each token has its own ratio, or the tokens of a response share one."""
    epsilon_high: float | None = None
    """The row's own value for the upper clip bound 1 + epsilon_high, where it has one."""
    reference_kl: str = "loss"
    """Where `beta` acts: in the "loss", or as a penalty in the "reward"."""

    @property
    def needs_groups(self) -> bool:
        """Whether the row compares the responses to one prompt with each other, and so needs at least two."""
        return self.centre is not batch_whitened or self.weight is not equal

    @property
    def clips(self) -> bool:
        """Whether this row can clip a token. The property tests two ratios far beyond the bounds."""
        d, A = torch.tensor([-9.0, 9.0]), torch.tensor([-1.0, 1.0])
        objective, unclipped = self.surrogate(d, A, d, torch.tensor(-0.1), torch.tensor(0.1))
        return bool((objective != unclipped).any())

    def override(
        self, advantage_weight: str | None = None, aggregation: str | None = None, importance_level: str | None = None
    ) -> "Algorithm":
        """Return a copy of this row with another weight, aggregation or level, by name. None keeps the row's own."""
        return replace(
            self,
            weight=WEIGHTS[advantage_weight] if advantage_weight else self.weight,
            aggregation=AGGREGATIONS[aggregation] if aggregation else self.aggregation,
            level=LEVELS[importance_level] if importance_level else self.level,
        )

    def advantages(self, rewards: Tensor, lengths: Tensor, *, advantage_weight: str | None = None) -> Tensor:
        r"""Compute (N, G) advantages. If all rewards are equal, all advantages are 0.

        For CPGD they are $(R - \mu) / (\sigma + 10^{-4})$ (arXiv 2505.12504; `advantages.py` names the other sources).

        Args:
            rewards: (N, G), one per response, any unit. NaN: no reward function judges this response.
            lengths: (N, G), the lengths of the responses in tokens.
            advantage_weight: "equal", "std" or "clip_filter" in place of the row's own.
        """
        weight = WEIGHTS[advantage_weight] if advantage_weight else self.weight
        if rewards.isnan().any():
            return of_scored(self.centre, weight, rewards, lengths)
        return weight(rewards) * self.centre(rewards, lengths)

    def loss(
        self,
        logp: Tensor,
        old_logp: Tensor,
        advantages: Tensor,
        mask: Tensor,
        settings: LossSettings = LossSettings(),  # noqa: B008 (frozen)
        *,
        ref_logp: Tensor | None = None,
        token_weights: Tensor | None = None,
    ) -> "LossOutput":
        r"""The scalar to minimise, on one (micro-)batch.

        Args:
            logp: (B, T), $\log \pi_\theta$ of the sampled tokens, nats; only this carries a gradient.
            old_logp: (B, T), the same under the policy that sampled.
            advantages: (B,), one per response, or (B, T).
            mask: (B, T), true or 1 where a token belongs to the response. Log-probabilities elsewhere are never read.
            settings: the clip bounds $[1-\varepsilon, 1+\varepsilon_{high}]$, $\alpha$, $c$ and $\beta$.
            ref_logp: (B, T), log-probabilities under the reference policy, for `beta`.
            token_weights: (B, T), by default from `mask`. For a micro-batch, pass its rows of the minibatch's weights.

        Returns:
            The loss, with its metrics (CPGD: arXiv 2505.12504; each function names its paper).

        Raises:
            ValueError: `beta` in the loss without `ref_logp`, or the aggregation `constant` without `token_weights`.
        """
        inside = mask.bool()
        d = torch.where(inside, logp - old_logp, 0.0)
        A = (advantages if advantages.dim() == 2 else advantages[:, None]).to(logp.dtype)
        low, high = self.log_bounds(inside, settings, like=d)

        objective, unclipped = self.surrogate(self.level(d, inside), A, torch.where(inside, logp, 0.0), low, high)
        token_loss = -objective
        if self.drift:
            alpha = settings.drift_coef
            if isinstance(alpha, Tensor):
                alpha = alpha.to(d)[:, None]
            token_loss = token_loss + alpha * bounded_drift(d, settings.drift_clip)
        ref_kl = None
        if settings.beta and self.reference_kl == "loss":
            if ref_logp is None:
                raise ValueError("beta is the weight of the KL to a reference policy: pass ref_logp, (B, T)")
            ref_kl = k3(torch.where(inside, ref_logp - logp, 0.0))
            token_loss = token_loss + settings.beta * ref_kl
        if token_weights is None:
            token_weights = self.token_weights(inside)
        return LossOutput(
            loss=(token_weights * token_loss).sum(),
            log_ratio=d.detach(),
            clipped=(objective != unclipped).expand_as(d),
            advantages=A.detach().expand_as(d),
            mask=inside,
            ref_kl=None if ref_kl is None else ref_kl.detach(),
        )

    def clip_bounds(self, epsilon: float, epsilon_high: float | None = None) -> tuple[float, float]:
        """The clip bounds, as ratios; a row without a clip ignores them. The upper one comes from `epsilon_high`, the
        row, or `epsilon`.
        """
        above = next(e for e in (epsilon_high, self.epsilon_high, epsilon) if e is not None)
        return 1 - epsilon, 1 + above

    def log_bounds(self, mask: Tensor, settings: LossSettings, like: Tensor) -> tuple[Tensor, Tensor]:
        """The lower and the upper log-ratio at which a token is clipped: scalars, or (B, T) if `clip_growth` is not 1.

        In CPGD's paper (arXiv 2505.12504, section 4.3) bounds may widen along a response. That they do so linearly is
        our choice. A response of one token has the bounds of a first token. `mask` (B, T) says which tokens a response
        has. The result has the dtype and the device of `like`.
        """
        low, high = self.clip_bounds(settings.epsilon, settings.epsilon_high)
        if settings.clip_growth == 1:
            return like.new_full((), math.log(low)), like.new_full((), math.log(high))
        place = (mask.cumsum(dim=1) - 1).clamp(min=0) / (mask.sum(dim=1, keepdim=True) - 1).clamp(min=1)
        factor = 1 + (settings.clip_growth - 1) * place.to(like)
        return (1 - (1 - low) * factor).log(), (1 + (high - 1) * factor).log()

    def token_weights(
        self, mask: Tensor, max_completion_length: int | None = None, groups: Tensor | None = None
    ) -> Tensor:
        """Compute the weight of each token, (B, T), from a minibatch's mask (B, T) and the limit on its lengths.

        `groups` (B,) says which responses answer the same prompt; only `group_token_mean` reads it.
        """
        return self.aggregation(mask, max_completion_length, groups)


@dataclass(frozen=True)
class LossOutput:
    """A scalar loss, and detached (B, T) tensors. `metrics` is computed from them when it is first read."""

    loss: Tensor
    log_ratio: Tensor
    clipped: Tensor
    advantages: Tensor
    mask: Tensor
    ref_kl: Tensor | None

    @cached_property
    def metrics(self) -> dict[str, float]:
        """`loss`, and the `token_metrics` of this batch alone."""
        return {"loss": self.loss.item(), **token_metrics([self])}


def token_metrics(outputs: Sequence[LossOutput]) -> dict[str, float]:
    r"""Metrics over all tokens of several batches, such as one pass over a rollout.

    `kl_old`: mean k3 (Schulman 2020) of $\mathrm{KL}(\pi_{old} \,\|\, \pi_\theta)$, nats per token. `ratio_min`,
    `ratio_p01`, `ratio_p99`, `ratio_max`: quantiles of the token ratios. `clip_frac_pos`: the number of clipped tokens
    with A > 0, divided by the number of all tokens. `clip_frac_neg`: the same for A < 0. `kl_ref`: mean k3 to the
    reference, if it is in the loss.
    """
    # These are float64, because float32 cannot hold exp of a very large log-ratio.
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


def max_advantage_coef(advantages: Tensor, previous: float = 1.0) -> float:
    r"""The coefficient of a rollout with `drift_coef="max_advantage"`: $\alpha = \max |A|$. Ours, not the paper's.

    Suppose that responses have one token, that expectations are exact, and that nothing is clipped. The objective is
    largest if each token has the ratio $r^* = 1 + A/\alpha$. With this rule $r^*$ lies in [0, 2]. With
    $\alpha < -\min A$ there is no maximum: the objective grows without bound as the probability of the worst token
    falls. Notebook 7 derives this.

    The advantages are those of one rollout, in any shape. If all of them are 0, the coefficient stays at `previous`.
    """
    largest = advantages.abs().max().item()
    return largest if largest > 0 else previous


def drift_warning(drift_coef: float | str, updates_per_rollout: int) -> str | None:
    """A warning for a coefficient of 1 or more and 2 to 63 updates per rollout, else None. Runs were made at K = 4."""
    large = drift_coef == "max_advantage" or (not isinstance(drift_coef, str) and drift_coef >= 1)
    if not large or not 1 < updates_per_rollout < 64:
        return None
    found = "at K = 4 such runs decayed within 50 to 400 rollouts, and with 0.01 they did not (docs/default.md)"
    return f"drift_coef = {drift_coef} and K = {updates_per_rollout} updates per rollout: {found}"


def adaptive_drift_coef(coefficient: float, kl: float, target_kl: float) -> float:
    r"""The next coefficient that `drift_coef="adaptive"` sets: PPO's rule (arXiv 1707.06347, section 4).

    If the KL of a rollout's last pass exceeds 1.5 times the target, $\alpha$ is doubled. If it is below the target
    divided by 1.5, $\alpha$ is halved. KLs are in nats per token. $\alpha$ stays between $2^{-20}$ and $2^{20}$.
    """
    if kl > 1.5 * target_kl:
        return min(2 * coefficient, 2.0**20)
    return max(coefficient / 2, 2.0**-20) if kl < target_kl / 1.5 else coefficient


def mean_kl(outputs: Sequence[LossOutput]) -> float:
    r"""The mean k3 of all tokens, from $\pi_{old}$ to $\pi_\theta$, nats (Schulman 2020); 0 without tokens."""
    d = torch.cat([o.log_ratio[o.mask] for o in outputs]).double()
    return k3(d).mean().item() if len(d) else 0.0
