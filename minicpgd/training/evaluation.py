r"""Evaluation: how good is a policy on problems that it never trained on?

Greedy accuracy takes the likeliest token each time, so it needs no random numbers. Sampled responses estimate `pass@k`,
the probability that at least one of k tries is right. Its unbiased estimator, for n samples of which c are right, is
(Chen et al., arXiv 2107.03374, equation 1)

$$ \mathrm{pass@}k = 1 - \binom{n-c}{k} \Big/ \binom{n}{k} $$

In: a run, a model or a `Policy`, and a task. Out: fractions between 0 and 1, lengths in tokens, and
perhaps a mean reward.
"""

from math import comb
from pathlib import Path

import torch

from minicpgd.config import MAX_TOKENS, SEEDS, ModelSettings, SamplingSettings, TaskSettings, TrainConfig
from minicpgd.errors import Range, UserError
from minicpgd.models.policy import Policy, load_policy
from minicpgd.models.sampling import Rollout, check_sampler, generate
from minicpgd.recipes import load_config
from minicpgd.tasks import Task, load_task
from minicpgd.tasks.rewards import RewardContext, call_reward, load_reward
from minicpgd.training.checkpoint import load_checkpoint, restore_weights
from minicpgd.training.metrics import mean_of_numbers
from minicpgd.training.run_folder import resume_command


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Estimate the probability that at least one of k <= num_samples tries is right (equation 1)."""
    return 1 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def evaluate(
    run_or_model: str | Path | ModelSettings | Policy,
    *,
    task: str | TaskSettings | None = None,
    num_problems: int = 256,
    num_samples: int = 8,
    max_completion_length: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[str, float]:
    """Measure a policy on `num_problems` held-out problems.

    Args:
        run_or_model: a finished run's folder, "embedded", a model folder, a hub name, `ModelSettings`, or a `Policy`.
        task: a task by name, or with its data and reward; by default the run's, else chain_arithmetic.
        max_completion_length: tokens; by default the run's, else 64.
        seed: chooses the problems and the samples.

    Returns:
        `accuracy` (greedy), `sampled_accuracy`, `pass@k` for k = 1, 2, 4, ... up to `num_samples`, and
        `completion_length` (greedy, tokens). Accuracies are fractions between 0 and 1. With a reward function the
        result also has `reward`, the mean reward of the greedy responses. If `task` is a `TaskSettings`, its field
        `reward` names the function. If the run's own task is used, the run's config names it.

    Raises:
        UserError: there is no such model, the run has no checkpoint yet, or a number is out of range.
    """
    Range(1, MAX_TOKENS).check("num_samples", num_samples)
    policy, config = (run_or_model, TrainConfig()) if isinstance(run_or_model, Policy) else open_policy(run_or_model)
    wanted = TaskSettings(task) if isinstance(task, str) and task != config.task else task
    wanted = wanted if isinstance(wanted, TaskSettings) else config
    chosen, reward = load_task(wanted), load_reward(wanted.reward) if wanted.reward is not None else None
    length = config.max_completion_length if max_completion_length is None else max_completion_length
    settings = SamplingSettings(length, temperature, rollout_batch_size=config.rollout_batch_size)
    greedy, greedy_right = respond(policy, chosen, num_problems, settings, greedy=True, seed=seed)
    _, right = respond(policy, chosen, num_problems, settings, num_samples=num_samples, seed=seed)
    correct = right.sum(dim=1).tolist()
    result = {"accuracy": greedy_right.double().mean().item(), "sampled_accuracy": right.double().mean().item()}
    if reward is not None:
        context = RewardContext(greedy.token_ids())
        rewards = call_reward(reward, chosen.held_out(num_problems, seed), greedy.completions, context=context)
        result["reward"] = mean_of_numbers(rewards)
    for k in [2**i for i in range(num_samples.bit_length())]:
        result[f"pass@{k}"] = sum(pass_at_k(num_samples, c, k) for c in correct) / len(correct)
    return result | {"completion_length": greedy.lengths.double().mean().item()}


def is_run(folder: str | Path) -> bool:
    """Whether a path is the folder of a run, finished or not."""
    return all(Path(folder, name).is_file() for name in ("config.json", "metrics.jsonl"))


def open_policy(run_or_model: str | Path | ModelSettings) -> tuple[Policy, TrainConfig]:
    """The policy of a run, with the run's config; or a model, with the default config.

    A run that has not finished has the policy of its newest checkpoint. Other models than the embedded one sample at
    most 64 responses at once.

    Raises:
        UserError: there is no such model, it cannot be sampled from, or the run has no checkpoint yet.
    """
    if isinstance(run_or_model, ModelSettings) or not is_run(run_or_model):
        model = run_or_model if isinstance(run_or_model, ModelSettings) else ModelSettings(str(run_or_model))
        batch_size = None if model.model == ModelSettings.model else 64  # Only the embedded model is known to be small.
        policy = load_policy(model)
        if batch_size:
            check_sampler(policy, ["1+1=", "What is 2 * 3?"], SamplingSettings())
        return policy, TrainConfig(rollout_batch_size=batch_size)
    folder = Path(run_or_model)
    config = load_config(folder / "config.json")
    trained = folder / config.weights_folder
    if not trained.is_dir():
        checkpoint = load_checkpoint(folder / "checkpoints", warn=lambda line: None)
        if checkpoint is None:
            raise UserError(f"{folder}: has no checkpoint yet. Wait for it, or continue it: {resume_command(folder)}")
        policy = load_policy(config, with_reference=config.beta > 0)
        restore_weights(checkpoint, policy.model)
        return policy, config
    if config.trains_adapter:
        return load_policy(config, with_reference=config.beta > 0, adapter=trained), config
    prompts = {name: getattr(config, name) for name in ("chat_template", "system_prompt", "chat_date")}
    return load_policy(ModelSettings(str(trained), **prompts)), config


def respond(
    policy: Policy,
    task: Task,
    num_problems: int,
    settings: SamplingSettings,
    *,
    num_samples: int = 1,
    greedy: bool = False,
    seed: int = 0,
) -> tuple[Rollout, torch.Tensor]:
    """Answer held-out problems, with `num_samples` samples each, or greedily; `seed` as in `evaluate`.

    The samples come from the whole distribution: `top_k` and `top_p` of the settings are not used.

    Returns:
        The rollout, and a bool tensor (problems, num_samples): which responses are right. There are fewer problems than
        asked for if the task has no more.

    Raises:
        ConfigError: a number is out of range, or there are too many tokens in all.
    """
    Range(1, MAX_TOKENS / settings.max_completion_length / num_samples).check("num_problems", num_problems)
    SEEDS.check("seed", seed)
    problems = task.held_out(num_problems, seed)
    prompts, generator = [p["prompt"] for p in problems], torch.Generator(policy.device).manual_seed(seed)
    rollout = generate(policy, prompts, num_samples, settings.without_limits(), generator=generator, greedy=greedy)
    right = [task.is_correct(problems[i // num_samples], text) for i, text in enumerate(rollout.completions)]
    return rollout, torch.tensor(right).view(-1, num_samples)
