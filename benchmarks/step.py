"""Where does a training step's time go? Generation, scoring, backward and optimizer, measured one by one.

    python benchmarks/step.py                         # the embedded model, 16 prompts x 16 responses, 4 updates
    python benchmarks/step.py --algorithm grpo --num-prompts 8

Prints the median over the steps, in milliseconds, and their shares. Takes the flags of `minicpgd train`.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import tyro

from minicpgd import TrainConfig, learner
from minicpgd.algorithms import Algorithm
from minicpgd.policy import quiet

WARM_UP, STEPS = 2, 10


def timed(spent: dict[str, float], name: str, function: Callable) -> Callable:
    """The same function, with the time it takes added up under a name."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        started = now()
        result = function(*args, **kwargs)
        spent[name] += now() - started
        return result

    return wrapped


def now() -> float:
    """Seconds, once the device has caught up."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main(config: TrainConfig) -> None:
    """Run a few steps, and print where their time went."""
    quiet()
    spent: dict[str, float] = defaultdict(float)
    run = learner.Learner.from_config(config)
    learner.generate = timed(spent, "generation", learner.generate)
    learner.token_logprobs = timed(spent, "scoring (forward)", learner.token_logprobs)
    Algorithm.loss = timed(spent, "loss", Algorithm.loss)  # type: ignore[method-assign]
    torch.Tensor.backward = timed(spent, "backward", torch.Tensor.backward)  # type: ignore[method-assign]
    run.optimizer.step = timed(spent, "optimizer", run.optimizer.step)  # type: ignore[method-assign]

    rows: dict[str, list[float]] = defaultdict(list)
    for step in range(1, WARM_UP + STEPS + 1):
        spent.clear()
        started = now()
        timings = run.step(step).timings
        whole = now() - started
        spent["everything else"] = whole - sum(spent.values())
        if step > WARM_UP:
            rows["everything"].append(whole)
            for name, seconds in spent.items():
                rows[name].append(seconds)
    total = statistics.median(rows.pop("everything"))
    print(
        f"{config.num_prompts} x {config.num_generations} responses, {config.updates_per_rollout} updates, "
        f"{torch.get_num_threads()} threads, {run.policy.device}: median of {STEPS} steps"
    )
    for name, seconds in rows.items():
        median = statistics.median(seconds)
        print(f"{name:<20} {1000 * median:8.1f} ms  {median / total:6.1%}")
    print(f"{'a whole step':<20} {1000 * total:8.1f} ms   (peak memory {timings['peak_memory_bytes'] / 2**20:.0f} MiB)")


if __name__ == "__main__":
    main(tyro.cli(TrainConfig, description=__doc__))
