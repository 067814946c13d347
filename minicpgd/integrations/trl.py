"""The same objectives in TRL: `CPGDTrainer` is TRL's GRPOTrainer with our advantages and our loss.

TRL does everything else: several GPUs (accelerate, FSDP, DeepSpeed), vLLM, adapters, 4 bit, chat templates, tools,
logging, checkpoints. docs/scale.md has an example and translates our names into TRL's. `launch.py` trains on our tasks.

In: a reward function, a dataset, and a `CPGDConfig` (trl_config.py). Out: what GRPOTrainer writes; its log also has our
metrics from `kl_old` to `skipped_updates`. This file needs the extra `trl`.
"""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from minicpgd.algorithms import (
    LossOutput,
    adaptive_drift_coef,
    drift_warning,
    kept_groups,
    max_advantage_coef,
    token_metrics,
)
from minicpgd.algorithms.aggregation import token_mean
from minicpgd.errors import ConfigError
from minicpgd.integrations.trl_config import CPGDConfig, GRPOTrainer
from minicpgd.tasks.reward_call import LARGEST, refusal

DRIFT_COEF = "drift_coef.json"  # A checkpoint has it, because the rules for drift_coef start from the last value.


class CPGDTrainer(GRPOTrainer):
    """TRL's GRPOTrainer, with the advantages and the loss of a row of `minicpgd.ALGORITHMS`.

    It takes the arguments of GRPOTrainer, with a `CPGDConfig`. The number of processes and of micro-batches does not
    change the gradient, except for rounding, and except for a mean over tokens whose optimizer step needs a part of the
    next rollout. TRL's `clip_ratio/*` count tokens beyond the bounds, also for a row that does not clip.

    A response for which every reward function returned None has the advantage 0. If no response of an optimizer step
    has an advantage, the step is skipped: weights and moments keep their values. It is made all the same if `beta` acts
    in the loss, or if experts are balanced. Once the KL of a step exceeds `target_kl`, it and the rest of the rollout's
    steps are skipped. With DeepSpeed and in float16 no step is skipped, because the optimizer needs its gradients.

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
        updates = self.args.num_iterations * self.args.steps_per_generation // self.args.gradient_accumulation_steps
        if self.algorithm.drift and (line := drift_warning(self.args.drift_coef, updates)):
            warnings.warn(line, stacklevel=2)
        self.drift_coef = 1.0 if isinstance(self.args.drift_coef, str) else self.args.drift_coef
        _, upper = self.algorithm.clip_bounds(self.args.epsilon, self.args.epsilon_high)
        self.epsilon_high = upper - 1  # TRL's metrics read it. A row may have its own.
        self._rewards: Tensor  # (B of all processes, reward functions), from TRL's last rollout
        self._lengths: Tensor  # (B of this process,) tokens, from TRL's last rollout
        self._scored: tuple[Tensor, Tensor, Tensor | None]  # a micro-batch's logp and entropy (B, T); the experts' loss
        self._counted: tuple[list, Tensor] = ([], torch.empty(0))  # a rollout's micro-batches, and the tokens in each
        self._learns: Tensor | bool = False  # whether a response of this optimizer step has an advantage
        self._made, self._skipped = 0, 0  # optimizer steps since the last log
        self._kl = torch.zeros(2, dtype=torch.float64)  # of this optimizer step: sum of k3 and tokens, of all processes
        self._kls: list[Tensor] = []  # the same, for each optimizer step on this rollout
        self._learned, self._stopped = False, False  # whether one of them was made; whether one exceeded target_kl
        self.add_callback(_BeforeOptimizerStep(self))

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
        least, most = self.args.group_reward_min, self.args.group_reward_max
        kept = kept_groups(rewards.view(-1, group), least, most).repeat_interleave(group)
        local = len(rollout["advantages"])
        first = self.accelerator.process_index * local
        rollout["completion_mask"] = rollout["completion_mask"] * kept[first : first + local, None]
        mask = _mask(rollout)
        if self.beta and self.algorithm.reference_kl == "reward":
            if "old_per_token_logps" not in rollout:
                reason = "TRL keeps the log-probabilities that this needs only if num_iterations * steps_per_generation"
                name = f"beta = {self.beta}: {self.algorithm.name}"
                raise ConfigError(f"{name} has it in the reward, and {reason} > gradient_accumulation_steps")
            penalty = ((rollout["old_per_token_logps"] - rollout["ref_per_token_logps"]) * mask).sum(dim=1)
            rewards = rewards - self.beta * self.accelerator.gather(penalty)
        lengths = mask.sum(dim=1)  # 0 for responses dropped by mask_truncated_completions
        lengths = self.accelerator.gather(torch.where(lengths > 0, lengths, self._lengths))
        advantages = self.algorithm.advantages(rewards.view(-1, group), lengths.view(-1, group)).flatten()
        if self.model.training:
            self._begin_rollout(advantages)
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), len(advantages))):
            logged.pop()
        logged.extend(advantages.tolist())
        return rollout | {"advantages": advantages[first : first + local]}

    def _begin_rollout(self, advantages: Tensor) -> None:
        """Set the drift's coefficient, from the advantages or from the KL of the last pass over the rollout before."""
        if self.args.drift_coef == "max_advantage":
            self.drift_coef = max_advantage_coef(advantages, previous=self.drift_coef)
        elif self.args.drift_coef == "adaptive" and self._learned and self.args.target_kl:
            per_pass = max(1, self.args.steps_per_generation // self.args.gradient_accumulation_steps)
            total, tokens = torch.stack(self._kls[-per_pass:]).sum(dim=0).tolist()
            self.drift_coef = adaptive_drift_coef(self.drift_coef, total / max(tokens, 1), self.args.target_kl)
        self._kls, self._learned, self._stopped = [], False, False

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

    def before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop all gradients where no step is to be made, so that the optimizer changes nothing."""
        learns = self.accelerator.reduce(torch.as_tensor(self._learns, device=self.accelerator.device).float())
        kl, tokens = self._kl.tolist()
        if self.args.reset_optimizer and not self._kls:
            optimizer.state.clear()
        self._stopped |= kl > self.objective.largest_kl * tokens
        self._kls.append(self._kl)
        self._learns, self._kl = False, torch.zeros_like(self._kl)
        kl_in_loss = self.beta != 0 and self.algorithm.reference_kl == "loss"
        is_idle = not (learns or kl_in_loss or self.aux_loss_enabled)
        needs_gradients = self.is_deepspeed_enabled or self.accelerator.scaler is not None
        if needs_gradients or not (is_idle or self._stopped):
            self._made, self._learned = self._made + 1, True
            return
        self._skipped += 0 if self._stopped else 1
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, with the numbers of steps that were made and skipped since the last one."""
        if "loss" in logs:
            logs = logs | {"updates": self._made, "skipped_updates": self._skipped}
            self._made, self._skipped = 0, 0
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
        sums = self.accelerator.reduce(tokens * tokens.new_tensor([1.0, *(local[name] for name in means)]))
        if self.model.training:
            self._kl += sums[[1, 0]].cpu()
        ends = self.accelerator.gather(tokens.new_tensor([[-local["ratio_min"], local["ratio_max"]]])).amax(dim=0)
        metrics = dict(zip(means, (sums[1:] / sums[0].clamp(min=1)).tolist(), strict=True))
        metrics |= {"ratio_min": -ends[0].item(), "ratio_max": ends[1].item()}
        if self.algorithm.drift:
            metrics["drift_coef"] = self.drift_coef
        for name, value in metrics.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)


class _BeforeOptimizerStep(TrainerCallback):
    """Tells the trainer when gradients are complete. It is called after they are clipped."""

    def __init__(self, trainer: CPGDTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.trainer.before_optimizer_step(optimizer)


def _mask(inputs: dict[str, Any]) -> Tensor:
    """(B, T), 1 for each token that the policy wrote, and 0 for padding and for a tool's answer."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
