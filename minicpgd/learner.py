r"""One training step: rollout, reward, advantage, K updates.

Everything an algorithm is stands in its row of the table; everything here is the same for all of them. In: a config.
Out of each `step`: metrics, timings and some samples; the policy has changed meanwhile. To change what a step does,
begin with `Learner.step`: it is the pseudocode.

K = `num_iterations` * `num_minibatches` updates are made on one rollout. At the first of them
$\pi_\theta = \pi_{old}$: every ratio is 1, no clip acts, the drift has neither value nor gradient, and all surrogates
have the same gradient. What tells them apart is how far K and the learning rate can be turned up before the policy
falls apart.

A step's randomness is decided by (seed, step) alone, so any step can be repeated, and a run that was killed goes on bit
for bit from its newest checkpoint.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from minicpgd.algorithms import ALGORITHMS, Algorithm, LossOutput, auto_drift_coef, token_metrics
from minicpgd.config import TrainConfig
from minicpgd.divergence import k3
from minicpgd.errors import NonFiniteError
from minicpgd.evaluation import respond
from minicpgd.experience import Draws, Experience, Pass, StepLog, rollout_metrics, sample_rows
from minicpgd.logprobs import token_logprobs
from minicpgd.policy import Policy, policy_of
from minicpgd.qlora import LOSS_SCALE, make_optimizer
from minicpgd.rewards import RewardFunction, call_reward, load_reward
from minicpgd.rollout import Rollout, generate
from minicpgd.runlog import peak_memory
from minicpgd.tasks import Task, task_of


@dataclass
class Learner:
    """What a run carries from step to step. `drift_coef` is the one in force: "auto" sets it anew at each rollout."""

    config: TrainConfig
    algorithm: Algorithm
    task: Task
    reward: RewardFunction
    policy: Policy
    optimizer: torch.optim.Optimizer
    drift_coef: float

    @classmethod
    def from_config(cls, config: TrainConfig) -> "Learner":
        """Load what the config names."""
        task = task_of(config)
        reward = load_reward(config.reward) if config.reward is not None else task.reward  # before what takes long
        policy = policy_of(config)
        policy.model.train()
        trained = [p for p in policy.model.parameters() if p.requires_grad]
        optimizer = make_optimizer(
            config.optim, trained, config.learning_rate, adapter=policy.peft is not None, device=policy.device
        )
        return cls(
            config=config,
            algorithm=ALGORITHMS[config.algorithm],
            task=task,
            reward=reward,
            policy=policy,
            optimizer=optimizer,
            drift_coef=1.0 if config.drift_coef == "auto" else config.drift_coef,
        )

    def step(self, step: int) -> StepLog:
        """One rollout and the K updates made on it.

        Ratios, KL and clipped shares are those of the last pass, each minibatch seen just before its own update.
        """
        config, draws, started = self.config, Draws.at(self.config.seed, step, self.policy.device), time.perf_counter()
        made = self.experience(draws)
        sampled = time.perf_counter()
        logged = step == 1 or step % config.logging_steps == 0
        losses, norms, passes = [], [], []
        for number, last_pass in enumerate(self.passes(made, draws.order), start=1):
            losses += last_pass.losses
            norms += last_pass.norms
            if logged:
                passes.append({"step": step, "pass": number, **token_metrics(last_pass.outputs)})
        ended = time.perf_counter()

        answers = zip(made.problems, made.rollout.completions, strict=True)
        right = [self.task.is_correct(problem, text) for problem, text in answers]
        metrics = {
            **rollout_metrics(made, right),
            "advantage_min": made.advantages.min().item(),
            "advantage_max": made.advantages.max().item(),
            "drift_coef": self.drift_coef if self.algorithm.drift else 0.0,
            **token_metrics(last_pass.outputs),
            "grad_norm": float(np.mean(norms)),
            "loss": float(np.mean(losses)),
            "learning_rate": config.learning_rate,
        }
        if made.ref_logp is not None:  # where beta acts in the loss, it has been measured there
            metrics.setdefault("kl_ref", k3((made.ref_logp - made.rollout.logp)[made.rollout.mask]).mean().item())
        if step % config.eval_steps == 0 or step == config.max_steps:
            metrics["eval_accuracy"] = self._respond(sampled=False)[1].double().mean().item()
        timings = {
            "rollout_seconds": sampled - started,
            "update_seconds": ended - sampled,
            "tokens_per_second": int(made.rollout.lengths.sum()) / (ended - started),
            "peak_memory_bytes": peak_memory(),
        }
        samples = sample_rows(step, made) if logged else []
        return StepLog(metrics, timings, samples, passes)

    def experience(self, draws: Draws) -> Experience:
        """Sample, reward, and compare; sets `drift_coef`, where that is "auto"."""
        problems, rollout = self.sample(draws)
        rewards = self._grouped(call_reward(self.reward, problems, rollout.completions))
        ref_logp = self._reference_logp(rollout)
        advantages = self.advantages(rollout, rewards, ref_logp)
        if self.config.drift_coef == "auto":
            self.drift_coef = auto_drift_coef(advantages, previous=self.drift_coef)
        return Experience(problems, rollout, rewards, advantages, ref_logp)

    def passes(self, made: Experience, order: torch.Generator) -> Iterator[Pass]:
        """Go over a rollout `num_iterations` times, with `num_minibatches` updates each time; lazily, pass by pass.

        Args:
            order: the source of the order in which responses are met.
        """
        for _ in range(self.config.num_iterations):
            done = Pass([], [], [])
            for minibatch in torch.randperm(len(made.advantages), generator=order).chunk(self.config.num_minibatches):
                rows = minibatch.to(self.policy.device)
                outputs, norm = self.update(made.rollout, made.advantages, made.ref_logp, rows)
                done.outputs.extend(outputs)
                done.losses.append(sum(output.loss.item() for output in outputs))
                done.norms.append(norm)
            yield done

    def sample(self, draws: Draws) -> tuple[list[dict[str, str]], Rollout]:
        """Fresh problems, each G times, and the B responses to them."""
        config = self.config
        problems = self.task.sample(config.num_prompts, draws.problems)
        rollout = generate(
            self.policy,
            [problem["prompt"] for problem in problems],
            config.num_generations,
            max_completion_length=config.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            generator=draws.tokens,
            batch_size=config.rollout_batch_size,
        )
        if self.policy.model.dtype != torch.float32:
            # sampled token by token, scored all at once: half precision rounds the two differently, by a few per cent
            rollout = replace(rollout, logp=self.score(rollout))
        return [problem for problem in problems for _ in range(config.num_generations)], rollout

    def advantages(self, rollout: Rollout, rewards: Tensor, ref_logp: Tensor | None) -> Tensor:
        """(N, G) rewards to (B,) advantages; a row with its reference KL in the reward pays it here, as k1.

        Args:
            ref_logp: (B, T), nats, or None where there is no reference.
        """
        if ref_logp is not None and self.algorithm.reference_kl == "reward":
            rewards = rewards - self.config.beta * self._grouped(((rollout.logp - ref_logp) * rollout.mask).sum(dim=1))
        lengths = self._grouped(rollout.lengths)
        return self.algorithm.advantages(rewards, lengths, advantage_weight=self.config.advantage_weight).flatten()

    def update(
        self, rollout: Rollout, advantages: Tensor, ref_logp: Tensor | None, rows: Tensor
    ) -> tuple[list[LossOutput], float]:
        """One optimizer step on some responses, in micro-batches.

        Args:
            advantages: (B,).
            ref_logp: (B, T), nats, or None.
            rows: (b,) indices of the minibatch's responses.

        Returns:
            The loss of each micro-batch (their sum is the minibatch's), and the gradient's norm before clipping.

        Raises:
            NonFiniteError: before anything was changed.
        """
        config, model, parameters = self.config, self.policy.model, self.optimizer.param_groups[0]["params"]
        mask = rollout.mask & ~rollout.truncated[:, None] if config.mask_truncated_completions else rollout.mask
        weights = self.algorithm.token_weights(mask[rows], config.max_completion_length, config.aggregation)
        scale, outputs = LOSS_SCALE if model.dtype == torch.float16 else 1.0, []
        for places in rollout.micro_batches(rows, config.micro_batch_size, config.micro_batch_tokens):
            part, part_weights = rows[places], weights[places]
            ids, attention, t = rollout.inputs(part)
            logp, _ = token_logprobs(model, ids, attention, t, config.temperature, config.chunk_size)
            output = self.algorithm.loss(
                logp,
                rollout.logp[part, :t],
                advantages[part],
                mask[part, :t],
                epsilon=config.epsilon,
                epsilon_high=config.epsilon_high,
                drift_coef=self.drift_coef,
                drift_clip=config.drift_clip,
                beta=config.beta,
                ref_logp=None if ref_logp is None else ref_logp[part, :t],
                importance_level=config.importance_level,
                token_weights=part_weights[:, :t],
            )
            (scale * output.loss).backward()
            # without the graph: its small nodes, kept, pin freed heap: on a CPU up to a sixth of the peak
            outputs.append(replace(output, loss=output.loss.detach()))
        if scale != 1:
            for parameter in parameters:
                parameter.grad /= scale
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
        if not np.isfinite(norm) or not all(output.loss.isfinite() for output in outputs):
            raise NonFiniteError(f"the loss is {sum(o.loss.item() for o in outputs)}, the gradient's norm {norm}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return outputs, norm

    def starting_point(self) -> StepLog:
        """Line 0: what the model can do before training, on the held-out set."""
        rollout, right = self._respond(sampled=True)
        problems = self.task.held_out(self.config.eval_problems)
        metrics = {
            "reward": float(np.mean(call_reward(self.reward, problems, rollout.completions))),
            "accuracy": right.double().mean().item(),
            "completion_length": rollout.lengths.double().mean().item(),
            "eval_accuracy": self._respond(sampled=False)[1].double().mean().item(),
        }
        return StepLog(metrics, {}, [], [])

    def _respond(self, *, sampled: bool) -> tuple[Rollout, Tensor]:
        return respond(
            self.policy,
            self.task,
            self.config.eval_problems,
            int(sampled),
            max_completion_length=self.config.max_completion_length,
            temperature=self.config.temperature,
            batch_size=self.config.rollout_batch_size,
        )

    def _grouped(self, values: list[float] | Tensor) -> Tensor:
        """B values, one per response, to (N, G)."""
        return torch.as_tensor(values, device=self.policy.device).view(-1, self.config.num_generations)

    def _reference_logp(self, rollout: Rollout) -> Tensor | None:
        """(B, T): what the reference policy thinks of the sampled tokens; None where nobody asks."""
        if self.config.beta == 0:
            return None
        with self.policy.reference() as reference:
            return self.score(rollout, reference)

    def score(self, rollout: Rollout, model: PreTrainedModel | None = None) -> Tensor:
        r"""(B, T) log-probabilities of a rollout's tokens, nats, 0 at padding: under $\pi_\theta$, or another model."""
        config = self.config
        return rollout.score(
            model or self.policy.model,
            size=config.micro_batch_size or max(1, len(rollout.lengths) // config.num_minibatches),
            tokens=config.micro_batch_tokens,
            temperature=config.temperature,
            chunk_size=config.chunk_size,
        )
