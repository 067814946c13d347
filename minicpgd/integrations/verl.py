r"""Every row of the table inside verl, for models and clusters that this package is too small for. Needs verl 0.9.1.

With `pip install 'minicpgd[verl]'` verl finds this file by itself, through the entry-point group `verl.plugins`, in
the driver and in every worker. Each row is then a policy loss and an advantage estimator called `minicpgd_<row>`; the
prefix is there because verl has a "grpo", a "gspo", a "cispo" and an "rloo" of its own. What a user types after
`python -m verl.trainer.main_ppo`, beside model and data:

    algorithm.adv_estimator=minicpgd_cpgd
    actor_rollout_ref.actor.policy_loss.loss_mode=minicpgd_cpgd
    actor_rollout_ref.actor.policy_loss._target_=minicpgd.integrations.verl.CPGDLossConfig
    +actor_rollout_ref.actor.policy_loss.drift_coef=3.75
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean

verl swallows what goes wrong in a plugin. If it says `Unsupported loss mode: minicpgd_cpgd`, this shows why:

    python -c "import minicpgd.integrations.verl"

| `minicpgd.TrainConfig` | in verl (`actor` is `actor_rollout_ref.actor`) |
|---|---|
| `num_generations` | `actor_rollout_ref.rollout.n` |
| `epsilon`, `epsilon_high` | `actor.clip_ratio_low`, `actor.clip_ratio_high`; `actor.clip_ratio` where these are null |
| `aggregation` | `actor.loss_agg_mode` |
| `advantage_weight` | `+algorithm.advantage_weight` |
| `drift_coef`, `drift_clip`, `importance_level` | `+actor.policy_loss.drift_coef` and so on: see `CPGDLossConfig` |
| `beta` | `actor.use_kl_loss`, `actor.kl_loss_coef`; for REINFORCE++ `algorithm.use_kl_in_reward` and `kl_ctrl` |

Where verl's configuration and a row disagree, verl's is obeyed, and one line warns: a logged configuration that says
0.2 should not mean 0.28. So `minicpgd_dapo` needs `actor.clip_ratio_high=0.28`, and `minicpgd_cpgd`, whose mean is per
response, needs `actor.loss_agg_mode=seq-mean-token-mean`, since verl's default is `token-mean`.

In: log-probabilities (B, T) in nats, masks and token-level rewards, as verl has them. Out: a scalar loss and metrics,
or advantages (B, T). All arithmetic of the objective is `Algorithm.loss` and `Algorithm.advantages`.
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
METRICS = ("kl_old", "ratio_p01", "ratio_p99", "clip_frac_pos", "clip_frac_neg")


@dataclass
class CPGDLossConfig(PolicyLossConfig):
    r"""verl's `policy_loss`, and three fields of ours, which mean what they mean in `minicpgd.TrainConfig`.

    hydra makes one of `actor_rollout_ref.actor.policy_loss._target_=minicpgd.integrations.verl.CPGDLossConfig`; the
    fields are then `+actor_rollout_ref.actor.policy_loss.drift_coef=3.75` and so on. Without it rows with drift take
    the defaults here.

    `drift_coef` is a number, never "auto": the loss sees a micro-batch, and the advantages of a rollout are known to
    verl's driver alone. What "auto" would set can be had beforehand: with `std` weights and rewards 0 and 1 the largest
    $|A|$ is that of a single odd response among G, $(G-1)/\sqrt{G}$: 2.475 for G = 8, 3.75 for G = 16.

    Raises:
        ConfigError: a field is wrong, or set where nothing reads it.
    """

    loss_mode: str = "minicpgd_cpgd"
    drift_coef: float = 1.0
    drift_clip: float = 2.0
    importance_level: str | None = None

    def __post_init__(self) -> None:
        modes = [PREFIX + name for name in ALGORITHMS]
        with_drift = [PREFIX + name for name, row in ALGORITHMS.items() if row.drift]
        coef, bound, level = self.drift_coef, self.drift_clip, self.importance_level
        auto = "verl's losses see micro-batches, not the advantages of a rollout; set the largest |A|, which for 0/1 "
        auto += "rewards and std weights is (G-1)/sqrt(G): 2.475 for rollout.n=8, 3.75 for 16"
        for name, right, wanted in (
            ("loss_mode", self.loss_mode in modes, "read by our losses alone; " + _choice(self.loss_mode, modes)),
            ("drift_coef", coef != "auto", auto),
            ("drift_coef", _is_number(coef) and coef >= 0, "it has to be a number that is at least 0"),
            ("drift_clip", _is_number(bound) and bound > 0, "it has to be a number above 0"),
            ("importance_level", level is None or level in LEVELS, _choice(level, LEVELS)),
            (
                "drift_coef",
                coef == 1 or self.loss_mode in with_drift,
                f"only these have a drift: {', '.join(with_drift)}",
            ),
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
    r"""A row's loss under verl's signature for policy losses, on one micro-batch.

    `rollout_is_weights` correct for a sampler that is not quite $\pi_{old}$, so they weigh the drift, an expectation
    under $\pi_{old}$, like everything else.

    Args:
        algorithm: the row.
        old_log_prob, log_prob: (B, T), nats.
        advantages: (B, T), the same for all tokens of a response.
        response_mask: (B, T), true or 1 for the policy's own tokens.
        loss_agg_mode: verl's name of an aggregation; verl also computes it.
        config: verl's actor configuration, a dataclass or a mapping.
        rollout_is_weights: (B, T), or None.

    Returns:
        A scalar, and metrics of this micro-batch; verl averages them over micro-batches. Source: as `Algorithm.loss`.

    Raises:
        ConfigError: no `config`, a setting that cannot be run, or advantages that differ within a response.
    """
    if config is None:
        raise ConfigError(
            f"{PREFIX}{algorithm.name} got no config: it reads the actor's clip_ratio_low and policy_loss"
        )
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
    """What each token weighs in verl's own mean: over the global batch, divided as verl divides it among ranks.

    verl's `agg_loss` is linear in the matrix that it aggregates, so the weights are its gradient, whatever the mode.

    Args:
        response_mask: (B, T), of one micro-batch.
        loss_agg_mode: verl's name of an aggregation.
        config: its `global_batch_info` holds the tokens and responses of the whole optimizer step, and the ranks.

    Returns:
        (B, T), 0 outside the mask.
    """
    with torch.enable_grad():  # verl may ask for a loss where it wants no gradient
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
    """A row's advantages under verl's signature for advantage estimators, on a whole rollout.

    Args:
        algorithm: the row.
        token_level_rewards: (B, T), any unit; a response's reward is their sum.
        response_mask: (B, T), 1 for the policy's own tokens.
        index: (B,), what responses to one prompt share (verl's uid); they may stand anywhere in the batch.
        config: verl's `algorithm` configuration; `advantage_weight` in it replaces the row's own.

    Returns:
        (B, T) twice: the advantages, 0 outside the mask, and the same as "returns", which only a critic would read.

    Raises:
        ConfigError: no uids, groups of different sizes, groups of one, or an unknown `advantage_weight`.
    """
    asked = None if config is None else config.get("advantage_weight")
    if asked is not None and asked not in WEIGHTS:
        raise ConfigError(f"algorithm.advantage_weight = {asked!r}: {_choice(asked, WEIGHTS)}")
    if index is None:
        raise ConfigError(f"{PREFIX}{algorithm.name} got no uid, which says what responses answer the same prompt")
    _, group, sizes = np.unique(index, return_inverse=True, return_counts=True)
    if sizes.min() != sizes.max():
        unequal = f"groups of {sizes.min()} to {sizes.max()} responses to a prompt"
        raise ConfigError(f"{PREFIX}{algorithm.name}: {unequal}; each has to have actor_rollout_ref.rollout.n")
    row = algorithm.override(advantage_weight=asked)
    if sizes[0] == 1 and row.needs_groups:
        raise ConfigError(f"{PREFIX}{algorithm.name} compares responses: actor_rollout_ref.rollout.n has to be above 1")
    order = torch.as_tensor(np.argsort(group, kind="stable"), device=token_level_rewards.device)
    rewards, lengths = token_level_rewards.sum(dim=-1), response_mask.sum(dim=-1)
    grouped = (values[order].view(-1, sizes[0]) for values in (rewards, lengths))
    in_place = torch.empty_like(rewards)
    in_place[order] = row.advantages(*grouped).flatten()
    advantages = in_place[:, None] * response_mask
    return advantages, advantages


def _settings(algorithm: Algorithm, given: Mapping[str, Any]) -> CPGDLossConfig:
    """Our fields, checked; a mapping, or verl's own PolicyLossConfig, may have none of them."""
    if isinstance(given, CPGDLossConfig):
        return given
    names = [name for name in ("drift_coef", "drift_clip", "importance_level") if given.get(name) is not None]
    return CPGDLossConfig(loss_mode=PREFIX + algorithm.name, **{name: given[name] for name in names})


def _clip_ratios(algorithm: Algorithm, config: Mapping[str, Any]) -> tuple[float, float]:
    """The bounds in verl's config; `clip_ratio` stands in where one is null, as in verl's losses."""
    low, high = (
        next((e for e in (config.get(name), config.get("clip_ratio")) if e is not None), None)
        for name in ("clip_ratio_low", "clip_ratio_high")
    )
    if low is None or high is None or not 0 < low < 1 or not high > 0:
        wanted = "ratios are clipped to [1 - low, 1 + high], so low lies between 0 and 1, and high above 0"
        raise ConfigError(f"{ACTOR}.clip_ratio_low = {low}, clip_ratio_high = {high}: {wanted}")
    own = algorithm.epsilon_high
    if own is not None and high != own:
        _warn_once(f"{PREFIX}{algorithm.name} clips at 1 + {high}, as told; its own is {ACTOR}.clip_ratio_high={own}")
    return low, high


def _check_aggregation(algorithm: Algorithm, loss_agg_mode: str, config: Mapping[str, Any]) -> None:
    name, own = PREFIX + algorithm.name, AGG_MODES[algorithm.aggregation]
    if loss_agg_mode != own:
        _warn_once(f"{name} aggregates by {loss_agg_mode}, as told; its own is {ACTOR}.loss_agg_mode={own}")
    elif own == AGG_MODES[constant] and config.get("loss_scale_factor") is None:
        _warn_once(
            f"{name} divides by the longest response of each micro-batch; to divide by a constant: "
            f"{ACTOR}.loss_scale_factor=<data.max_response_length>"
        )


@functools.cache
def _warn_once(line: str) -> None:
    # Python's own "once" forgets whenever a library enters warnings.catch_warnings, and a loss is called often
    warnings.warn(line, stacklevel=2)


def _one_per_response(advantages: Tensor, response_mask: Tensor) -> Tensor:
    """(B, T) advantages to (B,): that of each response's first token, after a look at the others."""
    mask = response_mask.bool()
    own = advantages.gather(1, mask.int().argmax(dim=1, keepdim=True))
    if not torch.allclose(torch.where(mask, advantages, own), own):
        raise ConfigError(
            "advantages differ within a response, and our losses take one for each: choose an estimator that gives "
            "one, like algorithm.adv_estimator=minicpgd_cpgd"
        )
    return own[:, 0]


def _metrics(output: LossOutput) -> dict[str, float]:
    """Two under verl's names, the others under ours; 0 where a micro-batch has no token, since verl counts them."""
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
