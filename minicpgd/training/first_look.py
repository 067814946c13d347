"""The first look: what a model answers before training, so that a run without a signal is seen in its first minute.

In: the answers of step 0. Out: a `FirstLook`, which the command `train` prints, with a warning where nothing can be
learned from such rewards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

FEW = 30  # A share of fewer problems is uncertain by 0.18 and more.


class Answer(NamedTuple):
    """A response and its reward."""

    text: str
    reward: float


@dataclass(frozen=True)
class FirstLook:
    """One problem with three answers, and shares over all sampled answers to the held-out problems."""

    prompt: str  # as the model sees it: with its chat template
    greedy: Answer
    samples: Sequence[Answer]
    best_greedy: float  # the largest reward of a greedy answer
    rewards: Sequence[float]  # of one sampled answer to each held-out problem; NaN where no reward was given
    truncated: float  # the share of these answers that were cut off at the limit
    max_completion_length: int

    @property
    def rewarded(self) -> float:
        """The share of the answers with a reward above 0."""
        return sum(reward > 0 for reward in self.rewards) / len(self.rewards)

    @property
    def summary(self) -> str:
        """The shares in one line."""
        cut = f"{self.truncated:.0%} were cut off at {self.max_completion_length} tokens"
        line = f"of {len(self.rewards)} sampled answers {self.rewarded:.0%} had a reward above 0, and {cut}"
        return line + "; a share of so few says little" * (len(self.rewards) < FEW)

    @property
    def warnings(self) -> list[str]:
        """What stands in the way of learning, each with what to try; empty if nothing does."""
        lines = []
        if self.rewarded == 0 and not self.best_greedy > 0:
            remedy = "try easier problems, a --reward that gives partial credit, or an --instruction with an example"
            if self.truncated >= 0.5:
                remedy = f"most were cut off: try a longer --max-completion-length than {self.max_completion_length}"
            lines.append(f"none of these answers had a reward; while none has, nothing is learned; {remedy}")
        elif self.rewarded == len(set(self.rewards)) == 1:
            lines.append(f"every sampled answer had the reward {self.rewards[0]:g}; try harder problems")
        elif self.truncated >= 0.5:
            lines.append("half of the answers or more were cut off; try a longer --max-completion-length")
        return lines
