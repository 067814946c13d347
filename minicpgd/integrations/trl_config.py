"""The settings of `CPGDTrainer`: TRL's GRPOConfig with fields of ours.

In: TRL's fields and ours. Out: a checked config, or one line that names the wrong field. You may change every field
except those in `NOT_OURS`, which only TRL's own losses read.
"""

import contextlib
from dataclasses import dataclass, field, fields

from minicpgd.config import ObjectiveSettings
from minicpgd.errors import ConfigError, UserError

try:
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    needs = "minicpgd.integrations.trl needs TRL 1.16 or newer: pip install 'minicpgd[trl]'"
    raise UserError(f"{needs} ({error})") from error

__all__ = ["NOT_OURS", "CPGDConfig", "GRPOTrainer"]  # trl.py takes the trainer from here, after the check above.
NOT_OURS = {
    "loss_type": "algorithm and aggregation",
    "importance_sampling_level": "importance_level",
    "scale_rewards": "advantage_weight",
    "multi_objective_aggregation": "a sum of rewards, by reward_weights",
    "delta": "algorithm='grpo_dual_clip'",
    "top_entropy_quantile": "all tokens",
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), "algorithm"),
    **dict.fromkeys(("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), "algorithm"),
    **dict.fromkeys(("entropy_coef", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta"), "no entropy bonus"),
    **dict.fromkeys(("use_adaptive_entropy", "entropy_target"), "no entropy bonus"),
    "off_policy_mask_threshold": "the drift",
    "use_bias_correction_kl": "beta, on k3 as it is",
}  # fields of TRL's config, and what replaces each


@dataclass
class CPGDConfig(GRPOConfig):
    """TRL's GRPOConfig with eleven fields of ours, which mean the same as in `minicpgd.TrainConfig`.

    Raises:
        ConfigError: a field of ours is wrong, or one of TRL's is set that our losses would not read.
    """

    algorithm: str = field(default="cpgd", metadata={"help": "A row of minicpgd's table."})
    drift_coef: str = field(default="0.01", metadata={"help": "Alpha: a number, or max_advantage or adaptive."})
    drift_clip: float = field(default=2.0, metadata={"help": "The largest slope of the drift, c."})
    target_kl: float | None = field(default=0.003, metadata={"help": "End the updates on a rollout above this KL."})
    clip_growth: float = field(default=1.0, metadata={"help": "How far the clip bounds loosen along a response."})
    group_reward_min: float | None = field(default=None, metadata={"help": "Leave groups with less mean reward out."})
    group_reward_max: float | None = field(default=None, metadata={"help": "Leave groups with more mean reward out."})
    reset_optimizer: bool = field(default=False, metadata={"help": "Forget the moments at each rollout."})
    advantage_weight: str | None = field(default=None, metadata={"help": "equal, std or clip_filter; None: the row's."})
    aggregation: str | None = field(default=None, metadata={"help": "How tokens share one mean; None: the row's."})
    importance_level: str | None = field(default=None, metadata={"help": "Where the ratio is taken; None: the row's."})
    use_bias_correction_kl: bool = field(default=False, metadata={"help": "Not read: beta weighs k3 as it is."})

    def __post_init__(self) -> None:
        with contextlib.suppress(ValueError, TypeError):  # It may be "adaptive"; `objective` refuses other words.
            self.drift_coef = float(self.drift_coef)  # type: ignore[assignment]  # A command line has only strings.
        self.objective()
        if self.aggregation == "group_token_mean":
            raise ConfigError("aggregation = group_token_mean: TRL shuffles responses, so a micro-batch has no groups")
        super().__post_init__()
        for theirs in fields(self):
            if theirs.name in NOT_OURS and getattr(self, theirs.name) != theirs.default:
                raise ConfigError(f"{theirs.name}: only TRL's own losses read it; here it is {NOT_OURS[theirs.name]}")

    def objective(self) -> ObjectiveSettings:
        """The fields that our losses read, checked. Some have TRL's names."""
        return ObjectiveSettings(**{field.name: getattr(self, field.name) for field in fields(ObjectiveSettings)})
