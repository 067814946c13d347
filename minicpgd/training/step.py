r"""One training step: problems, rollout, rewards, advantages, K updates, log.

An algorithm is a row of `algorithms/table.py`; nearly everything here is the same for all rows. In: a config. Out: each
call of `step` makes up to K updates of the policy, and returns metrics, timings and, at some steps, samples. `collect`
and `step` read like pseudocode. To change what a step does, begin there.

K = `num_iterations` * `num_minibatches` updates are made on one rollout. At the first of them, with the default
settings, $\pi_\theta = \pi_{old}$: every ratio is 1, no clip acts, the drift has neither value nor gradient, and all
surrogates have the same gradient. Algorithms differ in how large K and the learning rate can be before they collapse.
"""

import math
import random
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from minicpgd.algorithms.advantages import kept_groups
from minicpgd.algorithms.loss import Algorithm, adaptive_drift_coef, max_advantage_coef, mean_kl
from minicpgd.config import TrainConfig
from minicpgd.errors import NonFiniteError
from minicpgd.models.logprobs import token_logprobs
from minicpgd.models.policy import Policy, load_policy
from minicpgd.models.precision import LOSS_SCALE, make_optimizer, one_thread_if_small, start_rollout
from minicpgd.models.sampling import Rollout, generate
from minicpgd.tasks.rewards import RewardContext, RewardFunction, TrainerState, call_reward, load_reward
from minicpgd.tasks.task import Task, load_task
from minicpgd.training import metrics
from minicpgd.training.evaluation import respond
from minicpgd.training.first_look import Answer, FirstLook
from minicpgd.training.metrics import Experience, Pass, StepLog, Update


class Generators(NamedTuple):
    """The sources of a step's randomness: which problems, which tokens, in which order."""

    problems: random.Random
    tokens: torch.Generator
    order: torch.Generator
    step: int = 0  # The number of the step, which reward functions may read.


def seed_step(seed: int, step: int, device: torch.device | str = "cpu") -> Generators:
    """Seed every generator of a step with (seed, step), also torch's global one. Tokens are drawn on `device`."""
    words = [int(word) for word in np.random.SeedSequence([seed, step]).generate_state(4)]
    torch.manual_seed(words[3])  # Dropout (disable_dropout=False) draws from the global generator.
    tokens = torch.Generator(device).manual_seed(words[1])
    return Generators(random.Random(words[0]), tokens, torch.Generator().manual_seed(words[2]), step)


@dataclass
class Learner:
    """What a run carries from step to step.

    `drift_coef` is the coefficient of the next rollout. With "max_advantage" it is used only if all advantages are 0.
    """

    config: TrainConfig
    algorithm: Algorithm  # the row of algorithms/table.py that the config names, with the config's changes
    task: Task
    reward: RewardFunction  # the config's, else the task's: exact_answer in tasks/rewards.py for chain_arithmetic
    policy: Policy
    optimizer: torch.optim.Optimizer
    drift_coef: float

    @classmethod
    def from_config(cls, config: TrainConfig) -> "Learner":
        """Load everything that the config names."""
        task = load_task(config)
        reward = load_reward(config.reward) if config.reward is not None else task.reward
        policy = load_policy(config, with_reference=config.beta > 0)
        policy.model.train()
        optimizer = make_optimizer(config, policy.model)
        drift_coef = 1.0 if isinstance(config.drift_coef, str) else config.drift_coef
        return cls(config, config.row, task, reward, policy, optimizer, drift_coef)

    def collect(self, generators: Generators) -> Experience:
        """Sample a rollout, reward it, and compute its advantages. The learner does not change."""
        config, shape = self.config, (self.config.num_prompts, self.config.num_generations)

        # Sample G responses to each of N problems. Below, the list has each problem G times: once for each response.
        problems = self.task.sample(config.num_prompts, generators.problems)
        prompts = [problem["prompt"] for problem in problems]
        problems = [problem for problem in problems for _ in range(config.num_generations)]
        rollout = generate(self.policy, prompts, config.num_generations, config, generator=generators.tokens)
        # In half precision, sampling token by token rounds differently from the forward pass of an update. So compute
        # the old log-probabilities again, in such a forward pass.
        if self.policy.model.dtype != torch.float32:
            rollout = replace(rollout, logp=self.score(rollout))

        # Reward each response. Some rows penalise the KL to the reference in the reward.
        context = RewardContext(rollout.token_ids(), TrainerState(generators.step, config.max_steps))
        values = call_reward(self.reward, problems, rollout.completions, context=context)
        rewards = torch.tensor(values, device=self.policy.device).view(shape)
        penalty, ref_logp = torch.zeros_like(rewards), None
        if config.beta > 0:
            with self.policy.reference() as reference:
                ref_logp = self.score(rollout, reference)
            if self.algorithm.reference_kl == "reward":
                penalty = config.beta * (rollout.logp - ref_logp).sum(dim=1).view(shape)  # k1, summed

        # Compare the rewards: within each group, or over the batch.
        advantages = self.algorithm.advantages(rewards - penalty, rollout.lengths.view(shape))
        drift_coef = self.drift_coef
        if config.drift_coef == "max_advantage":
            drift_coef = max_advantage_coef(advantages, previous=drift_coef)
        kept = kept_groups(rewards, config.group_reward_min, config.group_reward_max)
        used = kept.repeat_interleave(config.num_generations)
        if config.mask_truncated_completions:
            used &= ~rollout.truncated
        return Experience(problems, rollout, rewards, advantages, drift_coef, ref_logp, used, context=context)

    def step(self, step: int) -> StepLog:
        """Collect one rollout, make K updates on it, and log what happened."""
        config, started = self.config, time.perf_counter()
        generators = seed_step(config.seed, step, self.policy.device)
        rate = start_rollout(self.optimizer, config, step)
        experience = self.collect(generators)
        sampled = time.perf_counter()

        passes: list[Pass] = []
        while len(passes) < config.num_iterations and not (passes and passes[-1].was_ended):
            if config.weigh_passes and passes:
                experience = replace(experience, pass_weights=self.weights_of_pass(experience.rollout))
            passes.append(self.train_pass(experience, generators.order))
        trained = time.perf_counter()

        values = metrics.step_metrics(experience, passes, self.task, config) | {"learning_rate": rate}
        self.drift_coef = experience.drift_coef
        if config.drift_coef == "adaptive" and config.target_kl and values["updates"]:
            self.drift_coef = adaptive_drift_coef(self.drift_coef, values["kl_old"], config.target_kl)
        if step % config.eval_steps == 0 or step == config.max_steps:
            values |= self._evaluate(step)
        timings = metrics.step_timings(experience.rollout, sampled - started, trained - sampled)
        if step == 1 or step % config.logging_steps == 0:
            return StepLog(values, timings, metrics.sample_rows(step, experience), metrics.pass_rows(step, passes))
        return StepLog(values, timings)

    def train_pass(self, experience: Experience, order: torch.Generator) -> Pass:
        """Use a rollout once, with one update for each minibatch; `order` decides which responses form a minibatch.

        As soon as the KL of a minibatch exceeds `target_kl`, the pass ends, without an update on this minibatch. With
        an adaptive drift no pass ends early.
        """
        order_of_responses = torch.randperm(len(experience.problems), generator=order)
        minibatches = order_of_responses.to(self.policy.device).chunk(self.config.num_minibatches)
        updates: list[Update] = []
        for rows in minibatches:
            updates.append(self.update(experience, rows))
            if updates[-1].ends_passes:
                break
        return Pass.from_updates(updates)

    def update(self, experience: Experience, rows: Tensor) -> Update:
        """Make one optimizer step, in micro-batches, on the responses with the indices `rows`, (b,).

        If all responses that count in the loss have the advantage 0, the optimizer step is skipped, and the moments do
        not change. In such a step Adam would enlarge tiny gradients of the drift. With `beta` in the loss no step is
        skipped.

        Raises:
            NonFiniteError: the loss or the gradient is not finite; this update does not change the weights.
        """
        config, model, parameters = self.config, self.policy.model, self.optimizer.param_groups[0]["params"]
        rollout, advantages = experience.rollout, experience.advantages.flatten()
        mask, pass_weights = rollout.mask & experience.used[:, None], experience.pass_weights
        groups = rows // config.num_generations
        weights = self.algorithm.token_weights(mask[rows], config.max_completion_length, groups)
        settings = config.loss_settings(experience.drift_coef)
        scale, outputs = LOSS_SCALE if model.dtype == torch.float16 else 1.0, []
        kl_in_loss = config.beta > 0 and self.algorithm.reference_kl == "loss"
        learns = kl_in_loss or bool(advantages[rows][mask[rows].any(dim=1)].any())
        with one_thread_if_small(model), torch.set_grad_enabled(learns):
            for places in rollout.micro_batches(rows, config.micro_batch_size, config.micro_batch_tokens):
                part = rows[places]  # `places` are positions in `rows`.
                ids, attention, t = rollout.inputs(part)
                logp, _ = token_logprobs(model, ids, attention, t, config.temperature, config.chunk_size)
                old_logp, ref_logp = rollout.logp[part, :t], experience.ref_logp
                A = advantages[part] if pass_weights is None else advantages[part, None] * pass_weights[part, :t]
                output = self.algorithm.loss(
                    logp, old_logp, A, mask[part, :t], settings, token_weights=weights[places, :t],
                    ref_logp=None if ref_logp is None else ref_logp[part, :t],
                )  # fmt: skip
                if learns:
                    (scale * output.loss).backward()
                # Keep no autograd graph: it would keep memory in use.
                outputs.append(replace(output, loss=output.loss.detach()))
            stops = config.largest_kl < math.inf and mean_kl(outputs) > config.largest_kl
            if stops or not learns:
                self.optimizer.zero_grad()
                return Update(outputs, grad_norm=None, ends_passes=stops)
            if scale != 1:
                for parameter in parameters:
                    parameter.grad /= scale
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
            if not np.isfinite(norm) or not all(output.loss.isfinite() for output in outputs):
                raise NonFiniteError(f"the loss is {sum(o.loss.item() for o in outputs)}, the gradient's norm {norm}")
            self.optimizer.step()
            self.optimizer.zero_grad()
        return Update(outputs, norm)

    def weights_of_pass(self, rollout: Rollout) -> Tensor:
        r"""(B, T), $\mathrm{clip}(\pi_\theta / \pi_{old}, 1-\varepsilon, 1+\varepsilon_{high})$ at the start of a pass.

        CPGD's paper multiplies the advantages by it when a rollout is used again (arXiv 2505.12504, section 6.1).
        """
        low, high = self.algorithm.clip_bounds(self.config.epsilon, self.config.epsilon_high)
        return (self.score(rollout) - rollout.logp).exp().clamp(low, high)

    def evaluate_before_training(self, *, look: bool = False) -> StepLog:
        """Step 0: the model before training, on the held-out set; with a `FirstLook` if somebody wants to `look`.

        A real model answers no more problems here than a rollout has responses, so this takes no longer than a step.
        """
        config = self.config
        few = config.eval_problems if config.model == "embedded" else min(config.eval_problems, config.num_responses)
        rollout, right, rewards = self._respond(0, few)
        greedy, greedy_right, greedy_rewards = self._respond(0, few, greedy=True)
        values = metrics.before_training(rollout, rewards, right) | _of_greedy(greedy_right, greedy_rewards)
        if not look:
            return StepLog(values)
        two, _, two_rewards = self._respond(0, 1, num_samples=2)
        prompt, mask = self.policy.encode([self.task.held_out(1)[0]["prompt"]])
        first = FirstLook(
            prompt=str(self.policy.tokenizer.decode(prompt[mask.bool()])),
            greedy=Answer(greedy.completions[0], greedy_rewards[0]),
            samples=[Answer(*pair) for pair in zip(two.completions, two_rewards, strict=True)],
            best_greedy=max(greedy_rewards),
            rewards=rewards,
            truncated=rollout.truncated.double().mean().item(),
            max_completion_length=config.max_completion_length,
        )
        return StepLog(values, look=first)

    def _evaluate(self, step: int) -> dict[str, float]:
        _, right, rewards = self._respond(step, self.config.eval_problems, greedy=True)
        return _of_greedy(right, rewards)

    def _respond(
        self, step: int, num_problems: int, *, num_samples: int = 1, greedy: bool = False
    ) -> tuple[Rollout, Tensor, list[float]]:
        """Answer held-out problems: the responses, which of them are right, and their rewards."""
        rollout, right = respond(
            self.policy, self.task, num_problems, self.config, num_samples=num_samples, greedy=greedy
        )
        problems = [row for row in self.task.held_out(num_problems) for _ in range(num_samples)]
        context = RewardContext(rollout.token_ids(), TrainerState(step, self.config.max_steps))
        return rollout, right, call_reward(self.reward, problems, rollout.completions, context=context)

    def score(self, rollout: Rollout, model: PreTrainedModel | None = None) -> Tensor:
        r"""(B, T) log-probabilities of a rollout's tokens, nats, 0 at padding: under $\pi_\theta$, or another model."""
        c, model = self.config, model or self.policy.model
        size = c.micro_batch_size or max(1, len(rollout.lengths) // c.num_minibatches)
        return rollout.score(
            model, size=size, tokens=c.micro_batch_tokens, temperature=c.temperature, chunk_size=c.chunk_size
        )


def _of_greedy(right: Tensor, rewards: list[float]) -> dict[str, float]:
    """Greedy accuracy, as the task judges it, and greedy reward, by the run's reward function."""
    return {"eval_accuracy": right.double().mean().item(), "eval_reward": metrics.mean_of_numbers(rewards)}
