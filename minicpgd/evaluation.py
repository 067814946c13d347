r"""Evaluation: how good is a policy on problems it never trained on?

Greedy accuracy takes the likeliest token each time: one number, no luck in it. Sampled responses say what training
sees, and `pass@k`: how likely one of k tries is right, by the unbiased estimator (Chen et al., arXiv 2107.03374,
equation 1):

$$ \mathrm{pass@}k = 1 - \binom{n-c}{k} \Big/ \binom{n}{k} $$

for n samples of which c are right.
"""

from math import comb
from pathlib import Path

import torch

from minicpgd.config import MOST_TOKENS, TEMPERATURES, TrainConfig, check_range, load_config
from minicpgd.errors import UserError
from minicpgd.policy import Policy, load_policy, policy_of
from minicpgd.rollout import Rollout, generate
from minicpgd.tasks import Task, get_task, task_of


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The unbiased estimate that one of k tries is right, from c right ones in n samples; k <= n."""
    return 1 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def evaluate(
    run_or_model: str | Path | Policy,
    *,
    task: str | None = None,
    num_problems: int = 256,
    num_samples: int = 8,
    max_completion_length: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[str, float]:
    """Measure a policy on the first `num_problems` held-out problems.

    Args:
        run_or_model: a finished run's folder, "embedded", a model folder, a hub name, or a `Policy`.
        task: name of a task; by default the run's, else chain_arithmetic.
        num_samples: sampled responses per problem.
        max_completion_length: tokens; by default the run's, else 64.
        seed: chooses the problems and the samples.

    Returns:
        `accuracy` (greedy), `sampled_accuracy`, `pass@k` for k = 1, 2, 4, ... up to `num_samples`, and
        `completion_length` (greedy, tokens). Accuracies are shares of 1.

    Raises:
        UserError: no such model, a run that has not finished, or a number that makes no sense.
    """
    check_range("num_samples", num_samples, 1, MOST_TOKENS)
    config = TrainConfig()
    if isinstance(run_or_model, Policy):
        policy = run_or_model
    else:
        policy, config = open_policy(run_or_model)
    chosen = task_of(config) if task in (None, config.task) else get_task(task)
    batch_size = config.rollout_batch_size
    length = max_completion_length or config.max_completion_length
    greedy = respond(policy, chosen, num_problems, max_completion_length=length, seed=seed, batch_size=batch_size)
    sampled = respond(
        policy,
        chosen,
        num_problems,
        num_samples,
        max_completion_length=length,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
    )
    correct = sampled[1].sum(dim=1).tolist()
    result = {"accuracy": greedy[1].double().mean().item(), "sampled_accuracy": sampled[1].double().mean().item()}
    for k in [2**i for i in range(num_samples.bit_length())]:
        result[f"pass@{k}"] = sum(pass_at_k(num_samples, c, k) for c in correct) / len(correct)
    return result | {"completion_length": greedy[0].lengths.double().mean().item()}


def open_policy(run_or_model: str | Path) -> tuple[Policy, TrainConfig]:
    """The policy of a finished run, with the run's config; or a model, with the default one.

    Raises:
        UserError: no such model, or a run that has not finished.
    """
    folder = Path(run_or_model)
    if not ((folder / "config.json").is_file() and (folder / "metrics.jsonl").is_file()):
        several = None if str(run_or_model) == "embedded" else 64  # a real model's keys and values need room
        return load_policy(str(run_or_model)), TrainConfig(rollout_batch_size=several)
    config = load_config(folder / "config.json")
    if not (folder / config.trained_as).is_dir():
        raise UserError(f"{folder}: has not finished; if it is not running, `minicpgd train --resume {folder}`")
    if config.lora_r:
        return policy_of(config, adapter=folder / config.trained_as), config
    return load_policy(str(folder / config.trained_as), chat_template=config.chat_template), config


def respond(
    policy: Policy,
    task: Task,
    num_problems: int,
    num_samples: int = 0,
    *,
    max_completion_length: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
) -> tuple[Rollout, torch.Tensor]:
    """Answer held-out problems: greedily, or with `num_samples` samples each; in `max_completion_length` tokens.

    Returns:
        The rollout, and a bool tensor (problems, max(1, num_samples)): which responses are right. There are fewer
        problems than asked for where the task has no more.

    Raises:
        ConfigError: a number that makes no sense, or more tokens than can be held.
    """
    group = max(1, num_samples)
    check_range("max_completion_length", max_completion_length, 1, MOST_TOKENS)
    check_range("num_problems", num_problems, 1, MOST_TOKENS / max_completion_length / group)
    check_range("temperature", temperature, *TEMPERATURES)
    check_range("seed", seed, 0, 2**63 - 1)
    problems = task.held_out(num_problems, seed)
    rollout = generate(
        policy,
        [p["prompt"] for p in problems],
        group,
        max_completion_length=max_completion_length,
        temperature=temperature,
        generator=torch.Generator(policy.device).manual_seed(seed) if num_samples else None,
        batch_size=batch_size,
    )
    right = [task.is_correct(problems[i // group], text) for i, text in enumerate(rollout.completions)]
    return rollout, torch.tensor(right).view(-1, group)
