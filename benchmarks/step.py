"""Which parts of a training step take how much time?

    python benchmarks/step.py                         # the embedded model, 16 prompts x 16 responses, 4 updates
    python benchmarks/step.py --algorithm grpo --num-prompts 8

The script measures generation, scoring, loss, backward pass and optimizer. It prints the median milliseconds of each
part over the steps, and its share of a step. It accepts the flags of `minicpgd train`.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import tyro

from minicpgd import TrainConfig
from minicpgd.algorithms import Algorithm
from minicpgd.models.policy import quiet
from minicpgd.training import step as step_module

WARM_UP, STEPS = 2, 10


def timed(seconds: dict[str, float], name: str, function: Callable) -> Callable:
    """Wrap a function so that the time of each call is added to `seconds[name]`."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        started = now()
        result = function(*args, **kwargs)
        seconds[name] += now() - started
        return result

    return wrapped


def now() -> float:
    """Wait until the device has finished, and return the time in seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main(config: TrainConfig) -> None:
    """Run a few steps, and print the times of their parts."""
    quiet()
    seconds: dict[str, float] = defaultdict(float)
    learner = step_module.Learner.from_config(config)
    step_module.generate = timed(seconds, "generation", step_module.generate)
    step_module.token_logprobs = timed(seconds, "scoring (forward)", step_module.token_logprobs)
    Algorithm.loss = timed(seconds, "loss", Algorithm.loss)  # type: ignore[method-assign]
    torch.Tensor.backward = timed(seconds, "backward", torch.Tensor.backward)  # type: ignore[method-assign]
    learner.optimizer.step = timed(seconds, "optimizer", learner.optimizer.step)  # type: ignore[method-assign]

    steps: list[float] = []
    parts: dict[str, list[float]] = defaultdict(list)
    for step in range(1, WARM_UP + STEPS + 1):
        seconds.clear()
        started = now()
        timings = learner.step(step).timings
        step_seconds = now() - started
        seconds["everything else"] = step_seconds - sum(seconds.values())
        if step > WARM_UP:
            steps.append(step_seconds)
            for name, value in seconds.items():
                parts[name].append(value)
    total = statistics.median(steps)
    print(
        f"{config.num_prompts} x {config.num_generations} responses, {config.updates_per_rollout} updates, "
        f"{torch.get_num_threads()} threads, {learner.policy.device}: median of {STEPS} steps"
    )
    for name, values in parts.items():
        median = statistics.median(values)
        print(f"{name:<20} {1000 * median:8.1f} ms  {median / total:6.1%}")
    print(f"{'a whole step':<20} {1000 * total:8.1f} ms   (peak memory {timings['peak_memory_bytes'] / 2**20:.0f} MiB)")


if __name__ == "__main__":
    main(tyro.cli(TrainConfig, description=__doc__))
