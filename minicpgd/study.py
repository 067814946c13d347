"""Many runs: the same thing asked of several algorithms, and what came of it.

A run has *collapsed* if the mean reward of its last 10 steps is below half of its best mean over any 10 consecutive
steps, or below that of the model it started from. The rule was written down before any run was looked at.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike

from minicpgd.config import TrainConfig
from minicpgd.policy import quiet
from minicpgd.trainer import train

WINDOW = 10


def collapsed(reward: ArrayLike, start: float) -> bool:
    """Whether a run fell apart.

    Args:
        reward: mean reward of each step, in order.
        start: mean reward of the model that training started from.

    Raises:
        ValueError: fewer than 10 steps; no judgement is possible.
    """
    rewards = np.asarray(reward, dtype=float)
    if len(rewards) < WINDOW:
        raise ValueError(f"{len(rewards)} steps: collapse is defined over windows of {WINDOW}")
    means = np.convolve(rewards, np.full(WINDOW, 1 / WINDOW), mode="valid")
    return bool(means[-1] < 0.5 * means.max() or means[-1] < start)


def run_all(configs: Iterable[TrainConfig], on_wait: Callable[[], None], jobs: int | None = None) -> list[Path]:
    """Train each config in a process of its own, one per core at a time, each on one thread.

    Args:
        on_wait: called a few times a second; to see how far the runs are, read their folders.
        jobs: processes at a time; by default one per core.

    Returns:
        The runs' folders, in order.

    Raises:
        UserError: that of the first run that failed; the others are not started.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=context, initializer=_prepare_worker) as pool:
        futures = [pool.submit(train, config) for config in configs]
        pending = set(futures)
        try:
            while pending:
                done, pending = wait(pending, timeout=0.3)
                on_wait()
                for future in done:
                    future.result()  # raises what the run raised
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _prepare_worker() -> None:
    quiet()
    torch.set_num_threads(1)  # as many processes as cores: more threads would only wait for each other
