r"""Every row of the table in verl 0.9.1, for models and clusters that are too large for this package.

With `pip install 'minicpgd[verl]'` the driver and every worker of verl find this file through the entry-point group
`verl.plugins`. It registers each row as a policy loss and as an advantage estimator, both called `minicpgd_<row>`: verl
has a "grpo", a "gspo", a "cispo" and an "rloo" of its own. docs/scale.md has a whole command.

| `minicpgd.TrainConfig` | in verl (`actor` is `actor_rollout_ref.actor`) |
|---|---|
| `num_generations` | `actor_rollout_ref.rollout.n` |
| `epsilon`, `epsilon_high` | `actor.clip_ratio_low`, `actor.clip_ratio_high`; `actor.clip_ratio` where these are null |
| `aggregation` | `actor.loss_agg_mode` |
| `advantage_weight` | `+algorithm.advantage_weight` |
| `drift_coef`, `drift_clip`, `importance_level` | `+actor.policy_loss.drift_coef` and so on: see `CPGDLossConfig` |
| `beta` | `actor.use_kl_loss`, `actor.kl_loss_coef`; for REINFORCE++ `algorithm.use_kl_in_reward` and `kl_ctrl` |

If verl's configuration and a row disagree, verl's value is used, so that its log is true, and one line warns. So
`minicpgd_dapo` needs `actor.clip_ratio_high=0.28`, and `minicpgd_cpgd`, which averages over each response first, needs
`actor.loss_agg_mode=seq-mean-token-mean`, because verl's default is `token-mean`.

In: log-probabilities (B, T) in nats, masks and token-level rewards, as verl has them. Out: a scalar loss and metrics,
or advantages (B, T). `Algorithm.loss` and `Algorithm.advantages` compute them.
"""

import functools
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minicpgd.algorithms import ALGORITHMS, LEVELS, WEIGHTS, Algorithm, LossOutput, LossSettings, k1, token_metrics
from minicpgd.algorithms.aggregation import Aggregation, constant, sequence_mean, token_mean
from minicpgd.errors import ConfigError, UserError, did_you_mean

try:
    from verl.trainer.ppo.core_algos import agg_loss, register_adv_est, register_policy_loss
    from verl.workers.config import PolicyLossConfig
except ImportError as error:
    raise UserError(f"minicpgd.integrations.verl needs verl 0.9.1: pip install 'minicpgd[verl]' ({error})") from error

PREFIX = "minicpgd_"
ACTOR = "actor_rollout_ref.actor"
AGG_MODES: dict[Aggregation, str] = {
    sequence_mean: "seq-mean-token-mean",
    token_mean: "token-mean",
    constant: "seq-mean-token-sum-norm",
}
_warn_once = functools.cache(warnings.warn)  # Python's "once" starts again after each warnings.catch_warnings.
METRICS = ("kl_old", "ratio_p01", "ratio_p99", "clip_frac_pos", "clip_frac_neg")


@dataclass
class CPGDLossConfig(PolicyLossConfig):
    """verl's `policy_loss` with three fields of ours, which mean the same as in `minicpgd.TrainConfig`.

    hydra makes it if `actor_rollout_ref.actor.policy_loss._target_` is `minicpgd.integrations.verl.CPGDLossConfig`.
    Otherwise rows with drift use the defaults here. `drift_coef` is a number, because a loss in verl sees one
    micro-batch and not the whole rollout.

    Raises:
        ConfigError: a field is wrong, or set where nothing reads it.
    """

    loss_mode: str = "minicpgd_cpgd"
    drift_coef: float = 0.01
    drift_clip: float = 2.0
    importance_level: str | None = None

    def __post_init__(self) -> None:
        modes = [PREFIX + name for name in ALGORITHMS]
        with_drift = [PREFIX + name for name, row in ALGORITHMS.items() if row.drift]
        coef, clip, level = self.drift_coef, self.drift_clip, self.importance_level
        rule = "verl's losses see micro-batches, not the advantages of a rollout; set the largest |A|, which for 0/1 "
        rule += "rewards and std weights is (G-1)/sqrt(G): 2.475 for rollout.n=8, 3.75 for 16"
        only = f"only these have a drift: {', '.join(with_drift)}"
        for name, right, wanted in (
            ("loss_mode", self.loss_mode in modes, f"only our losses read it; {_choice(self.loss_mode, modes)}"),
            ("drift_coef", coef != "max_advantage", rule),
            ("drift_coef", _is_number(coef) and coef >= 0, "it has to be a number that is at least 0"),
            ("drift_clip", _is_number(clip) and clip > 0, "it has to be a number above 0"),
            ("importance_level", level is None or level in LEVELS, _choice(level, LEVELS)),
            ("drift_coef", coef == CPGDLossConfig.drift_coef or self.loss_mode in with_drift, only),
        ):
            if not right:
                raise ConfigError(f"policy_loss.{name} = {getattr(self, name)!r}: {wanted}")


def policy_loss(
    algorithm: Algorithm,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Mapping[str, Any] | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    r"""A row's loss on one micro-batch, with verl's signature for policy losses.

    Args:
        algorithm: the row.
        old_log_prob, log_prob: (B, T), nats.
        advantages: (B, T), the same for all tokens of a response.
        response_mask: (B, T), true or 1 for the policy's own tokens.
        loss_agg_mode: verl's name of an aggregation; verl also computes it.
        config: verl's actor configuration, a dataclass or a mapping.
        rollout_is_weights: (B, T), corrections for a sampler that differs from $\pi_{old}$. They also weigh the drift,
            which is an expectation under $\pi_{old}$.

    Returns:
        A scalar, and the metrics of this micro-batch, which verl averages. Source: see `Algorithm.loss`.

    Raises:
        ConfigError: no `config`, a setting that cannot be run, or advantages that differ within a response.
    """
    if config is None:
        reads = "it reads the actor's clip_ratio_low and policy_loss"
        raise ConfigError(f"{PREFIX}{algorithm.name} got no config: {reads}")
    settings = _settings(algorithm, config.get("policy_loss") or {})
    epsilon, epsilon_high = _clip_ratios(algorithm, config)
    _check_aggregation(algorithm, loss_agg_mode, config)
    weights = token_weights(response_mask, loss_agg_mode, config)
    if rollout_is_weights is not None:
        weights = weights * rollout_is_weights
    output = algorithm.override(importance_level=settings.importance_level).loss(
        log_prob,
        old_log_prob,
        _one_per_response(advantages, response_mask),
        response_mask,
        LossSettings(epsilon, epsilon_high, settings.drift_coef, settings.drift_clip),
        token_weights=weights,
    )
    return output.loss, _metrics(output)


def token_weights(response_mask: Tensor, loss_agg_mode: str, config: Mapping[str, Any]) -> Tensor:
    """The weight of each token in verl's own mean over the global batch, which verl divides among ranks.

    verl's `agg_loss` is linear in the matrix that it aggregates, so its gradient has the weights, in every mode.

    Args:
        response_mask: (B, T), of one micro-batch.
        loss_agg_mode: verl's name of an aggregation.
        config: its `global_batch_info` holds the tokens and responses of the whole optimizer step, and the ranks.

    Returns:
        (B, T), 0 outside the mask.
    """
    with torch.enable_grad():  # verl may switch gradients off.
        matrix = torch.zeros_like(response_mask, dtype=torch.float32, requires_grad=True)
        total = agg_loss(matrix, response_mask, loss_agg_mode, **(config.get("global_batch_info") or {}))
    return torch.autograd.grad(total, matrix)[0]


def advantage_estimator(
    algorithm: Algorithm,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray | None = None,
    config: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """A row's advantages for a whole rollout, with verl's signature for advantage estimators.

    Args:
        algorithm: the row.
        token_level_rewards: (B, T), any unit; a response's reward is their sum.
        response_mask: (B, T), 1 for the policy's own tokens.
        index: (B,), verl's uid, which the responses to one prompt share; their order is free.
        config: verl's `algorithm` configuration; its `advantage_weight` replaces the row's own.

    Returns:
        (B, T) twice: the advantages, 0 outside the mask, and the same as "returns", which only a critic would read.

    Raises:
        ConfigError: no uids, groups of different sizes, groups of one, or an unknown `advantage_weight`.
    """
    weight = None if config is None else config.get("advantage_weight")
    if weight is not None and weight not in WEIGHTS:
        raise ConfigError(f"algorithm.advantage_weight = {weight!r}: {_choice(weight, WEIGHTS)}")
    if index is None:
        raise ConfigError(f"{PREFIX}{algorithm.name} got no uid, which says what responses answer the same prompt")
    _, group, sizes = np.unique(index, return_inverse=True, return_counts=True)
    if sizes.min() != sizes.max():
        unequal = f"groups of {sizes.min()} to {sizes.max()} responses to a prompt"
        raise ConfigError(f"{PREFIX}{algorithm.name}: {unequal}; each has to have actor_rollout_ref.rollout.n")
    row = algorithm.override(advantage_weight=weight)
    if sizes[0] == 1 and row.needs_groups:
        raise ConfigError(f"{PREFIX}{algorithm.name} compares responses: actor_rollout_ref.rollout.n has to be above 1")
    order = torch.as_tensor(np.argsort(group, kind="stable"), device=token_level_rewards.device)
    rewards, lengths = token_level_rewards.sum(dim=-1), response_mask.sum(dim=-1)
    grouped = (values[order].view(-1, sizes[0]) for values in (rewards, lengths))
    per_response = torch.empty_like(rewards)
    per_response[order] = row.advantages(*grouped).flatten()
    advantages = per_response[:, None] * response_mask
    return advantages, advantages


def _settings(algorithm: Algorithm, policy_loss: Mapping[str, Any]) -> CPGDLossConfig:
    """Our fields, checked. A mapping, or verl's own PolicyLossConfig, may lack them."""
    if isinstance(policy_loss, CPGDLossConfig):
        return policy_loss
    values = {name: policy_loss.get(name) for name in ("drift_coef", "drift_clip", "importance_level")}
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    return CPGDLossConfig(loss_mode=PREFIX + algorithm.name, **given)


def _clip_ratios(algorithm: Algorithm, config: Mapping[str, Any]) -> tuple[float, float]:
    """The bounds in verl's config. If one is null, it is `clip_ratio`, as in verl's losses."""
    names = ("clip_ratio_low", "clip_ratio_high")
    low, high = (config.get("clip_ratio" if config.get(name) is None else name) for name in names)
    if low is None or high is None or not 0 < low < 1 or not high > 0:
        wanted = "ratios are clipped to [1 - low, 1 + high], so low lies between 0 and 1, and high above 0"
        raise ConfigError(f"{ACTOR}.clip_ratio_low = {low}, clip_ratio_high = {high}: {wanted}")
    if algorithm.epsilon_high not in (None, high):
        own = f"the row's own value is {ACTOR}.clip_ratio_high={algorithm.epsilon_high}"
        _warn_once(f"{PREFIX}{algorithm.name} clips at 1 + {high}, because verl's configuration says so; {own}")
    return low, high


def _check_aggregation(algorithm: Algorithm, loss_agg_mode: str, config: Mapping[str, Any]) -> None:
    name, own = PREFIX + algorithm.name, AGG_MODES[algorithm.aggregation]
    if loss_agg_mode != own:
        row = f"the row's own mode is {ACTOR}.loss_agg_mode={own}"
        _warn_once(f"{name} aggregates by {loss_agg_mode}, because verl's configuration says so; {row}")
    elif own == AGG_MODES[constant] and config.get("loss_scale_factor") is None:
        flag = f"{ACTOR}.loss_scale_factor=<data.max_response_length>"
        _warn_once(f"{name} divides by the longest response of each micro-batch; to divide by a constant: {flag}")


def _one_per_response(advantages: Tensor, response_mask: Tensor) -> Tensor:
    """(B, T) advantages to (B,): those of each response's first token, which all its tokens have to share."""
    mask = response_mask.bool()
    own = advantages.gather(1, mask.int().argmax(dim=1, keepdim=True))
    if not torch.allclose(torch.where(mask, advantages, own), own):
        wanted = "choose an estimator that gives one, like algorithm.adv_estimator=minicpgd_cpgd"
        raise ConfigError(f"advantages differ within a response, and our losses take one for each: {wanted}")
    return own[:, 0]


def _metrics(output: LossOutput) -> dict[str, float]:
    """Two metrics with verl's names, the others with ours. Without tokens all are 0, because verl needs each name."""
    ours = dict.fromkeys(METRICS, 0.0) | token_metrics([output])
    theirs = {
        "actor/pg_clipfrac": ours["clip_frac_pos"] + ours["clip_frac_neg"],
        "actor/ppo_kl": k1(output.log_ratio).sum().item() / max(output.mask.sum().item(), 1),
    }
    return theirs | {f"actor/{name}": ours[name] for name in METRICS}


def _choice(value: Any, known: Iterable[str]) -> str:
    return f"{did_you_mean(str(value), known)}choose from {', '.join(known)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


for _name, _row in ALGORITHMS.items():
    register_policy_loss(PREFIX + _name)(functools.partial(policy_loss, _row))
    register_adv_est(PREFIX + _name)(functools.partial(advantage_estimator, _row))
