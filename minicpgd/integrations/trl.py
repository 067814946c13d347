r"""The same objectives on TRL's engine: `CPGDTrainer` is TRL's GRPOTrainer with our advantages and our loss.

    trainer = CPGDTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=my_reward,
        train_dataset=my_dataset,
        args=CPGDConfig(algorithm="cpgd", drift_coef="auto", num_iterations=4),
    )
    trainer.train()

Everything else is TRL's and is told to TRL: several GPUs (accelerate, FSDP, DeepSpeed), vLLM, adapters, 4 bit, chat
templates, tools, logging, checkpoints. docs/scale.md says what TRL calls by another name, and has the commands.

In: a reward function and a dataset, as GRPOTrainer takes them. Out: what GRPOTrainer leaves, and in its log, beside its
own metrics, `kl_old`, `ratio_min`, `ratio_max`, `clip_frac_pos`, `clip_frac_neg`, and `drift_coef`. You may change
every field of `CPGDConfig` but those in `NOT_OURS`, which only TRL's own losses read. Needs the extra `trl`.

`launch.py` beside this file starts it on our tasks from the command line.
"""

import contextlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from minicpgd.algorithms import LossOutput, auto_drift_coef, token_metrics
from minicpgd.algorithms.aggregation import token_mean
from minicpgd.config import ObjectiveSettings
from minicpgd.errors import ConfigError, UserError

try:
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise UserError(
        f"minicpgd.integrations.trl needs TRL 1.16 or newer: pip install 'minicpgd[trl]' ({error})"
    ) from error

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
}  # a field of TRL's: what stands in its place
DRIFT_COEF = "drift_coef.json"  # in a checkpoint: "auto" keeps the last one over a rollout without any advantage


@dataclass
class CPGDConfig(GRPOConfig):
    """TRL's GRPOConfig and six fields of ours, which mean what they mean in `minicpgd.TrainConfig`.

    Raises:
        ConfigError: a field of ours is wrong, or one of TRL's is set that our losses would not read.
    """

    algorithm: str = field(default="cpgd", metadata={"help": "A row of minicpgd's table."})
    drift_coef: str = field(default="auto", metadata={"help": "Alpha: a number, or auto for max |A| of each rollout."})
    drift_clip: float = field(default=2.0, metadata={"help": "The largest slope of the drift, c."})
    advantage_weight: str | None = field(default=None, metadata={"help": "equal, std or clip_filter; None: the row's."})
    aggregation: str | None = field(
        default=None, metadata={"help": "sequence_mean, token_mean or constant; None: the row's."}
    )
    importance_level: str | None = field(
        default=None, metadata={"help": "token, sequence or sequence_mean: where the ratio is taken; None: the row's."}
    )
    use_bias_correction_kl: bool = field(default=False, metadata={"help": "Not read: beta weighs k3 as it is."})

    def __post_init__(self) -> None:
        with contextlib.suppress(ValueError, TypeError):  # of "auto"; and what is no number, TrainConfig refuses
            self.drift_coef = float(self.drift_coef)  # type: ignore[assignment]  # a command line has strings only
        self.objective()  # It refuses the values that our own loop refuses.
        super().__post_init__()
        for theirs in fields(self):
            if theirs.name in NOT_OURS and getattr(self, theirs.name) != theirs.default:
                raise ConfigError(f"{theirs.name}: only TRL's own losses read it; here it is {NOT_OURS[theirs.name]}")

    def objective(self) -> ObjectiveSettings:
        """The fields that our losses read. Some have TRL's names."""
        return ObjectiveSettings(**{field.name: getattr(self, field.name) for field in fields(ObjectiveSettings)})


class CPGDTrainer(GRPOTrainer):
    """TRL's GRPOTrainer, with the advantages and the loss of a row of `minicpgd.ALGORITHMS`.

    Takes what GRPOTrainer takes, and a `CPGDConfig`. Any number of processes and any cut into micro-batches gives the
    gradient of one process with one batch, to rounding; but for a mean over tokens where an optimizer step reaches into
    a rollout that is not made yet. TRL's `clip_ratio/*` count tokens beyond the bounds, whether the row clips or not.

    Raises:
        ConfigError: `args` is no CPGDConfig, or has `beta` with a row that pays it in the reward, at one update per
            rollout (there TRL keeps no log-probabilities of the policy that sampled).
        UserError: a response to which no reward function gave a number.
    """

    args: CPGDConfig
    _tag_names = ["trl", "minicpgd"]
    _name = "minicpgd (CPGD and its relatives)"
    _paper = {"title": "CPGD: Toward Stable Rule-based Reinforcement Learning for Language Models", "id": "2505.12504"}

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # GRPOTrainer's own, which checks them
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, CPGDConfig):
            raise ConfigError(f"args is a {type(self.args).__name__}: CPGDTrainer takes a CPGDConfig")
        self.objective = self.args.objective()
        self.algorithm = self.objective.row
        self.drift_coef = 1.0 if self.args.drift_coef == "auto" else float(self.args.drift_coef)
        _, upper = self.algorithm.clip_bounds(self.args.epsilon, self.args.epsilon_high)
        self.epsilon_high = upper - 1  # for TRL's metrics: a row may have one of its own
        # What TRL has just made: rewards (B of all processes, functions), lengths (B of this one) in tokens;
        self._rewards: Tensor
        self._lengths: Tensor
        # of a micro-batch, log-probabilities and entropies (B, T), and the loss that balances experts;
        self._scored: tuple[Tensor, Tensor, Tensor | None]
        # of a rollout, its micro-batches, and the tokens in each.
        self._counted: tuple[list, Tensor] = ([], torch.empty(0))

    def _calculate_rewards(self, inputs: list, prompts: list, completions: list, completion_ids: list) -> Tensor:
        self._rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        self._lengths = torch.tensor([len(ids) for ids in completion_ids], device=self._rewards.device)
        return self._rewards

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        self._scored = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return self._scored

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollout, with our advantages in it: computed from all processes' rewards, the same on each."""
        made = super()._generate_and_score_completions(inputs)
        group = self.num_generations if self.model.training else self.num_generations_eval
        if group == 1 and not self.model.training:
            return made  # one response to a prompt, in an evaluation: TRL's advantages are 0
        if self._rewards.isnan().all(dim=1).any():
            raise UserError(
                "a response got no number from any reward function: advantages compare each with the others"
            )
        rewards = (self._rewards * self.reward_weights.to(self._rewards)).nansum(dim=1)
        if self.beta and self.algorithm.reference_kl == "reward":
            if "old_per_token_logps" not in made:
                raise ConfigError(
                    f"beta = {self.beta}: {self.algorithm.name} pays it in the reward, for which TRL keeps what is "
                    "needed only where num_iterations * steps_per_generation > gradient_accumulation_steps"
                )
            penalty = ((made["old_per_token_logps"] - made["ref_per_token_logps"]) * _mask(made)).sum(dim=1)
            rewards = rewards - self.beta * self.accelerator.gather(penalty)
        written = _mask(made).sum(dim=1)  # none, of a response that mask_truncated_completions leaves out of the loss
        lengths = self.accelerator.gather(torch.where(written > 0, written, self._lengths))
        advantages = self.algorithm.advantages(rewards.view(-1, group), lengths.view(-1, group)).flatten()
        if self.args.drift_coef == "auto" and self.model.training:
            self.drift_coef = auto_drift_coef(advantages, previous=self.drift_coef)
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), len(advantages))):
            logged.pop()
        logged.extend(advantages.tolist())
        local = len(made["advantages"])
        return made | {"advantages": advantages[self.accelerator.process_index * local :][:local]}

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """TRL's next micro-batch, with its share of the optimizer step that it belongs to.

        `share` is 1 / micro-batches for a mean over responses. For a mean over tokens it is the tokens here / those of
        the optimizer step, times the number of processes, over which gradients are averaged.
        """
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training:
            return inputs | {"share": 1.0}
        if self.algorithm.aggregation is not token_mean:
            return inputs | {"share": 1 / self.current_gradient_accumulation_steps}
        if self._counted[0] is not self._buffered_inputs:
            counts = torch.stack([_mask(batch).sum() for batch in self._buffered_inputs]).float()
            self._counted = self._buffered_inputs, self.accelerator.reduce(counts, reduction="sum")
        _, counts = self._counted
        together, here = self.current_gradient_accumulation_steps, self._step % len(counts)
        if len(counts) % together == 0:
            first = here // together * together
            tokens = counts[first : first + together].sum()
        else:  # the step reaches into a rollout that is not made yet: take it to be like this one
            tokens = counts.mean() * together
        return inputs | {"share": _mask(inputs).sum() * self.accelerator.num_processes / tokens.clamp(min=1)}

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Our loss, of the log-probabilities that TRL has just computed for its own.

        TRL's loss is computed, for its metrics, and dropped: no copy of its code to keep in step.
        """
        super()._compute_loss(model, inputs)
        logp, entropy, aux_loss = self._scored  # of which no graph is to outlive its step
        self._scored = logp.detach(), entropy.detach(), None if aux_loss is None else aux_loss.detach()
        mask, old_logp = _mask(inputs), inputs.get("old_per_token_logps")
        weights = self.algorithm.token_weights(mask, self.max_completion_length)
        if "importance_sampling_ratio" in inputs:  # what vLLM sampled with, against what is trained
            weights = weights * inputs["importance_sampling_ratio"]
        output = self.algorithm.loss(
            logp,
            logp.detach() if old_logp is None else old_logp,  # one update per rollout: this is the policy that sampled
            inputs["advantages"],
            mask,
            self.objective.loss_settings(self.drift_coef),
            ref_logp=inputs.get("ref_per_token_logps"),
            token_weights=weights * inputs["share"],
        )
        self._log_ours(output)
        if not self.aux_loss_enabled:
            return output.loss
        share = 1 / self.current_gradient_accumulation_steps if self.model.training else 1.0
        return output.loss + share * self.router_aux_loss_coef * aux_loss

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            (folder / DRIFT_COEF).write_text(json.dumps(self.drift_coef))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (Path(checkpoint) / DRIFT_COEF).is_file():
            self.drift_coef = json.loads((Path(checkpoint) / DRIFT_COEF).read_text())

    def _log_ours(self, output: LossOutput) -> None:
        """Our metrics over all processes: means over tokens, and the extremes."""
        means = ("kl_old", "clip_frac_pos", "clip_frac_neg")
        told = dict.fromkeys(means, 0.0) | {"ratio_min": 1.0, "ratio_max": 1.0} | token_metrics([output])
        tokens = output.mask.sum().double()
        sums = self.accelerator.reduce(
            tokens * tokens.new_tensor([1.0, *(told[name] for name in means)]), reduction="sum"
        )
        ends = self.accelerator.gather(tokens.new_tensor([[-told["ratio_min"], told["ratio_max"]]])).amax(dim=0)
        metrics = dict(zip(means, (sums[1:] / sums[0].clamp(min=1)).tolist(), strict=True))
        metrics |= {"ratio_min": -ends[0].item(), "ratio_max": ends[1].item()}
        if self.algorithm.drift:
            metrics["drift_coef"] = self.drift_coef
        for name, value in metrics.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)


def _mask(inputs: dict[str, Any]) -> Tensor:
    """(B, T), 1 where a token was written by the policy: not padding, and not a tool's answer."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
