"""The same objectives in TRL: `CPGDTrainer` is TRL's GRPOTrainer with our advantages and our loss.

TRL does everything else: several GPUs (accelerate, FSDP, DeepSpeed), vLLM, adapters, 4 bit, chat templates, tools,
logging, checkpoints. docs/scale.md has an example and translates our names into TRL's. `launch.py` trains on our tasks.

In: a reward function and a dataset, as for GRPOTrainer. Out: what GRPOTrainer writes; its log also has `kl_old`,
`ratio_min`, `ratio_max`, `clip_frac_pos`, `clip_frac_neg`, `drift_coef` and `skipped_updates`. You may change every
field of `CPGDConfig` except those in `NOT_OURS`, which only TRL's own losses read. This file needs the extra `trl`.
"""

import contextlib
import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from minicpgd.algorithms import LossOutput, auto_drift_coef, token_metrics
from minicpgd.algorithms.aggregation import token_mean
from minicpgd.config import ObjectiveSettings
from minicpgd.errors import ConfigError, UserError
from minicpgd.tasks.reward_call import LARGEST, refusal

try:
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    needs = "minicpgd.integrations.trl needs TRL 1.16 or newer: pip install 'minicpgd[trl]'"
    raise UserError(f"{needs} ({error})") from error

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
DRIFT_COEF = (
    "drift_coef.json"  # A checkpoint has it, because "auto" keeps the last value if a rollout has no advantage.
)


@dataclass
class CPGDConfig(GRPOConfig):
    """TRL's GRPOConfig with six fields of ours, which mean the same as in `minicpgd.TrainConfig`.

    Raises:
        ConfigError: a field of ours is wrong, or one of TRL's is set that our losses would not read.
    """

    algorithm: str = field(default="cpgd", metadata={"help": "A row of minicpgd's table."})
    drift_coef: str = field(default="auto", metadata={"help": "Alpha: a number, or auto for max |A| of each rollout."})
    drift_clip: float = field(default=2.0, metadata={"help": "The largest slope of the drift, c."})
    advantage_weight: str | None = field(default=None, metadata={"help": "equal, std or clip_filter; None: the row's."})
    aggregation: str | None = field(default=None, metadata={"help": "How tokens share one mean; None: the row's."})
    importance_level: str | None = field(default=None, metadata={"help": "Where the ratio is taken; None: the row's."})
    use_bias_correction_kl: bool = field(default=False, metadata={"help": "Not read: beta weighs k3 as it is."})

    def __post_init__(self) -> None:
        with contextlib.suppress(ValueError, TypeError):  # It may be "auto"; `objective` refuses other words.
            self.drift_coef = float(self.drift_coef)  # type: ignore[assignment]  # A command line has only strings.
        self.objective()
        super().__post_init__()
        for theirs in fields(self):
            if theirs.name in NOT_OURS and getattr(self, theirs.name) != theirs.default:
                raise ConfigError(f"{theirs.name}: only TRL's own losses read it; here it is {NOT_OURS[theirs.name]}")

    def objective(self) -> ObjectiveSettings:
        """The fields that our losses read, checked. Some have TRL's names."""
        return ObjectiveSettings(**{field.name: getattr(self, field.name) for field in fields(ObjectiveSettings)})


class CPGDTrainer(GRPOTrainer):
    """TRL's GRPOTrainer, with the advantages and the loss of a row of `minicpgd.ALGORITHMS`.

    It takes the arguments of GRPOTrainer, with a `CPGDConfig`. The number of processes and of micro-batches does not
    change the gradient, except for rounding, and except for a mean over tokens whose optimizer step needs a part of the
    next rollout. TRL's `clip_ratio/*` count tokens beyond the bounds, also for a row that does not clip.

    A response for which every reward function returned None has the advantage 0. If no response of an optimizer step
    has an advantage, there is nothing to learn, and the step is skipped: weights and the optimizer's moments keep their
    values. It is made all the same if `beta` acts in the loss, if experts are balanced, with DeepSpeed, and in float16,
    where the optimizer does not wait for the trainer or counts on having gradients.

    Raises:
        ConfigError: `args` is no CPGDConfig; or `beta` is a penalty in the reward, with one update per rollout, for
            which TRL does not keep the log-probabilities that the penalty needs.
        UserError: a reward is infinite, or larger than rewards may be.
    """

    args: CPGDConfig
    _tag_names = ["trl", "minicpgd"]
    _name = "minicpgd (CPGD and its relatives)"
    _paper = {"title": "CPGD: Toward Stable Rule-based Reinforcement Learning for Language Models", "id": "2505.12504"}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, CPGDConfig):
            raise ConfigError(f"args is a {type(self.args).__name__}: CPGDTrainer takes a CPGDConfig")
        self.objective = self.args.objective()
        self.algorithm = self.objective.row
        self.drift_coef = 1.0 if self.args.drift_coef == "auto" else float(self.args.drift_coef)
        _, upper = self.algorithm.clip_bounds(self.args.epsilon, self.args.epsilon_high)
        self.epsilon_high = upper - 1  # TRL's metrics read it. A row may have its own.
        self._rewards: Tensor  # (B of all processes, reward functions), from TRL's last rollout
        self._lengths: Tensor  # (B of this process,) tokens, from TRL's last rollout
        self._scored: tuple[Tensor, Tensor, Tensor | None]  # a micro-batch's logp and entropy (B, T); the experts' loss
        self._counted: tuple[list, Tensor] = ([], torch.empty(0))  # a rollout's micro-batches, and the tokens in each
        self._learns: Tensor | bool = False  # whether a response of this optimizer step has an advantage
        self._skipped = 0  # optimizer steps since the last log
        self.add_callback(_SkipIdleSteps(self))

    def _calculate_rewards(self, inputs: list, prompts: list, completions: list, completion_ids: list) -> Tensor:
        self._rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        refused = (self._rewards.abs() > LARGEST).nonzero().tolist()
        if refused:  # All processes have all rewards, so all raise the error.
            row, column = refused[0]
            reward = self._rewards[row, column].item()
            raise refusal(self.reward_func_names[column], reward, gather_object(completions)[row])
        self._lengths = torch.tensor([len(ids) for ids in completion_ids], device=self._rewards.device)
        return self._rewards

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        self._scored = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return self._scored

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollout with our advantages. Each process computes them from the rewards of all processes."""
        rollout = super()._generate_and_score_completions(inputs)
        group = self.num_generations if self.model.training else self.num_generations_eval
        if group == 1 and not self.model.training:
            return rollout  # An evaluation with one response per prompt has TRL's advantages, which are 0.
        rewards = (self._rewards * self.reward_weights.to(self._rewards)).nansum(dim=1)
        rewards[self._rewards.isnan().all(dim=1)] = torch.nan  # TRL turns None into NaN.
        mask = _mask(rollout)
        if self.beta and self.algorithm.reference_kl == "reward":
            if "old_per_token_logps" not in rollout:
                kept = "TRL keeps the log-probabilities that this needs only if num_iterations * steps_per_generation"
                name = f"beta = {self.beta}: {self.algorithm.name}"
                raise ConfigError(f"{name} has it in the reward, and {kept} > gradient_accumulation_steps")
            penalty = ((rollout["old_per_token_logps"] - rollout["ref_per_token_logps"]) * mask).sum(dim=1)
            rewards = rewards - self.beta * self.accelerator.gather(penalty)
        lengths = mask.sum(dim=1)  # 0 for responses dropped by mask_truncated_completions
        lengths = self.accelerator.gather(torch.where(lengths > 0, lengths, self._lengths))
        advantages = self.algorithm.advantages(rewards.view(-1, group), lengths.view(-1, group)).flatten()
        if self.args.drift_coef == "auto" and self.model.training:
            self.drift_coef = auto_drift_coef(advantages, previous=self.drift_coef)
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), len(advantages))):
            logged.pop()
        logged.extend(advantages.tolist())
        local = len(rollout["advantages"])
        return rollout | {"advantages": advantages[self.accelerator.process_index * local :][:local]}

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """TRL's next micro-batch, with its `share` of the optimizer step.

        For a mean over responses the share is 1 / micro-batches. For a mean over tokens it is the tokens of the
        micro-batch / those of the step, times the number of processes, because gradients are averaged over processes.
        """
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training:
            return inputs | {"share": 1.0}
        together = self.current_gradient_accumulation_steps
        if self.algorithm.aggregation is not token_mean:
            return inputs | {"share": 1 / together}
        if self._counted[0] is not self._buffered_inputs:
            counts = torch.stack([_mask(batch).sum() for batch in self._buffered_inputs]).float()
            self._counted = self._buffered_inputs, self.accelerator.reduce(counts, reduction="sum")
        _, counts = self._counted
        if len(counts) % together == 0:
            first = self._step % len(counts) // together * together
            tokens = counts[first : first + together].sum()
        else:  # The step needs a part of the next rollout, whose length is assumed to be this one's.
            tokens = counts.mean() * together
        return inputs | {"share": _mask(inputs).sum() * self.accelerator.num_processes / tokens.clamp(min=1)}

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Our loss, from the log-probabilities that TRL has computed for its own.

        TRL computes its loss, too, because its metrics need it. So this file copies none of TRL's code.
        """
        super()._compute_loss(model, inputs)
        logp, entropy, aux_loss = self._scored
        # Detach what stays, so that the graph is freed.
        self._scored = logp.detach(), entropy.detach(), None if aux_loss is None else aux_loss.detach()
        mask, old_logp = _mask(inputs), inputs.get("old_per_token_logps")
        if self.model.training:
            self._learns = (inputs["advantages"] * mask.any(dim=1)).any() | self._learns
        weights = self.algorithm.token_weights(mask, self.max_completion_length)
        if "importance_sampling_ratio" in inputs:  # vLLM's probabilities differ from those of the trained model.
            weights = weights * inputs["importance_sampling_ratio"]
        output = self.algorithm.loss(
            logp,
            logp.detach() if old_logp is None else old_logp,  # With one update per rollout, this policy has sampled.
            inputs["advantages"],
            mask,
            replace(self.objective.loss_settings(self.drift_coef), beta=self.beta),
            ref_logp=inputs.get("ref_per_token_logps"),
            token_weights=weights * inputs["share"],
        )
        self._log_ours(output)
        if not self.aux_loss_enabled:
            return output.loss
        share = 1 / self.current_gradient_accumulation_steps if self.model.training else 1.0
        return output.loss + share * self.router_aux_loss_coef * aux_loss

    def skip_if_idle(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop all gradients before an optimizer step without any advantage, so that the optimizer changes nothing."""
        learns = self.accelerator.reduce(torch.as_tensor(self._learns, device=self.accelerator.device).float())
        self._learns = False
        kl_in_loss = self.beta != 0 and self.algorithm.reference_kl == "loss"
        needs_gradients = self.is_deepspeed_enabled or self.accelerator.scaler is not None
        if learns or kl_in_loss or self.aux_loss_enabled or needs_gradients:
            return
        self._skipped += 1
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, with the number of skipped steps since the last one."""
        if "loss" in logs:
            logs, self._skipped = logs | {"skipped_updates": self._skipped}, 0
        super().log(logs, start_time)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            (folder / DRIFT_COEF).write_text(json.dumps(self.drift_coef))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (path := Path(checkpoint) / DRIFT_COEF).is_file():
            self.drift_coef = json.loads(path.read_text())

    def _log_ours(self, output: LossOutput) -> None:
        """Log our metrics over all processes: means over tokens, and the extremes of the ratio."""
        means = ("kl_old", "clip_frac_pos", "clip_frac_neg")
        local = dict.fromkeys(means, 0.0) | {"ratio_min": 1.0, "ratio_max": 1.0} | token_metrics([output])
        tokens = output.mask.sum().double()
        sums = tokens * tokens.new_tensor([1.0, *(local[name] for name in means)])
        sums = self.accelerator.reduce(sums, reduction="sum")
        ends = self.accelerator.gather(tokens.new_tensor([[-local["ratio_min"], local["ratio_max"]]])).amax(dim=0)
        metrics = dict(zip(means, (sums[1:] / sums[0].clamp(min=1)).tolist(), strict=True))
        metrics |= {"ratio_min": -ends[0].item(), "ratio_max": ends[1].item()}
        if self.algorithm.drift:
            metrics["drift_coef"] = self.drift_coef
        for name, value in metrics.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)


class _SkipIdleSteps(TrainerCallback):
    """Tells the trainer when gradients are complete. It is called after they are clipped."""

    def __init__(self, trainer: CPGDTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.trainer.skip_if_idle(optimizer)


def _mask(inputs: dict[str, Any]) -> Tensor:
    """(B, T), 1 for each token that the policy wrote, and 0 for padding and for a tool's answer."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
