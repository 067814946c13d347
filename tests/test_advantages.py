"""Advantages, by hand and by brute force."""

import statistics

import pytest
import torch

from minicpgd import ALGORITHMS
from minicpgd.advantages import WEIGHTS
from minicpgd.algorithms import auto_drift_coef

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
LENGTHS = torch.tensor([[3, 5, 2, 7], [1, 4, 9, 2], [6, 6, 1, 3]])


def rows_of(tensor):
    return tensor.tolist()


def test_group_normalised():
    """grpo, cpgd, their parts and relatives: (R - mean) / (std + 1e-4), ddof 1."""
    expected = []
    for group in rows_of(REWARDS):
        mean, deviation = statistics.mean(group), statistics.stdev(group)
        expected.append([(r - mean) / (deviation + 1e-4) for r in group])
    others = {"rloo", "rloo_drift", "reinforce_pp", "reinforce_pp_drift", "reinforce_pp_baseline", "dr_grpo"}
    for name in ALGORITHMS.keys() - others:
        assert ALGORITHMS[name].advantages(REWARDS, LENGTHS).tolist() == [pytest.approx(row) for row in expected]


def test_group_centred():
    """dr_grpo, and cpgd with equal weights: R - mean."""
    expected = [[r - statistics.mean(group) for r in group] for group in rows_of(REWARDS)]
    assert ALGORITHMS["dr_grpo"].advantages(REWARDS, LENGTHS).tolist() == [pytest.approx(row) for row in expected]
    ours = ALGORITHMS["cpgd"].advantages(REWARDS, LENGTHS, advantage_weight="equal")
    assert ours.tolist() == [pytest.approx(row) for row in expected]


def test_leave_one_out():
    expected = [[r - statistics.mean(g[:i] + g[i + 1 :]) for i, r in enumerate(g)] for g in rows_of(REWARDS)]
    assert ALGORITHMS["rloo"].advantages(REWARDS, LENGTHS).tolist() == [pytest.approx(row) for row in expected]


def whitened(rewards):
    """By brute force: every token is written out with its response's reward."""
    tokens = [
        r
        for group, lengths in zip(rewards, LENGTHS.tolist(), strict=True)
        for r, n in zip(group, lengths, strict=True)
        for _ in range(n)
    ]
    mean, variance = statistics.mean(tokens), statistics.pvariance(tokens)
    return [[(r - mean) / (variance + 1e-8) ** 0.5 for r in group] for group in rewards]


def test_batch_whitened():
    ours = ALGORITHMS["reinforce_pp"].advantages(REWARDS, LENGTHS)
    assert ours.tolist() == [pytest.approx(row, rel=1e-12) for row in whitened(rows_of(REWARDS))]


def test_whitening_holds_back_where_rewards_hardly_differ():
    """A variance of the size of the 1e-8 that is added to it."""
    nearly_equal = REWARDS * 1e-4
    ours = ALGORITHMS["reinforce_pp"].advantages(nearly_equal, LENGTHS)
    assert ours.tolist() == [pytest.approx(row, rel=1e-9) for row in whitened(rows_of(nearly_equal))]


@pytest.mark.parametrize("shape", [(1, 4), (4, 1)])
def test_reinforce_pp_needs_neither_several_prompts_nor_groups(shape):
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(shape)
    advantages = ALGORITHMS["reinforce_pp"].advantages(rewards, torch.ones(shape)).flatten()
    assert advantages.tolist() == pytest.approx([3**0.5, *[-(3**-0.5)] * 3])


def test_group_centred_then_whitened():
    centred = [[r - statistics.mean(group) for r in group] for group in rows_of(REWARDS)]
    ours = ALGORITHMS["reinforce_pp_baseline"].advantages(REWARDS, LENGTHS)
    assert ours.tolist() == [pytest.approx(row) for row in whitened(centred)]


@pytest.mark.parametrize(("informative", "weight"), [(0, 0.0), (1, 3.0), (2, 3.0), (3, 8 / 3), (4, 2.0), (8, 1.0)])
def test_clip_filter_counts_prompts(informative, weight):
    """min(3, N / informative prompts), N = 8; it counts prompts, not responses."""
    rewards = torch.full((8, 4), 0.3)
    rewards[:informative, 0] = 1.0
    assert WEIGHTS["clip_filter"](rewards).flatten().tolist() == pytest.approx([weight] * 8)
    advantages = ALGORITHMS["cpgd"].advantages(rewards, torch.ones(8, 4), advantage_weight="clip_filter")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    torch.testing.assert_close(advantages, weight * centred, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -3.3e7, 1 / 3])
@pytest.mark.parametrize("weight", [None, *WEIGHTS])
def test_equal_rewards_give_exactly_zero(name, reward, weight):
    rewards = torch.full((3, 7), reward)
    lengths = torch.arange(1, 22).view(3, 7)
    advantages = ALGORITHMS[name].advantages(rewards, lengths, advantage_weight=weight)
    assert advantages.tolist() == [[0.0] * 7] * 3


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("weight", [None, *WEIGHTS])
def test_what_all_rewards_have_in_common_changes_nothing(name, weight):
    """To the last bit, up to where float32 ends to count in ones."""
    rewards = torch.tensor([[1.0, 0.0, 3.0], [2.0, 2.0, 2.0], [0.0, 5.0, 1.0]])
    plain, shifted = (
        ALGORITHMS[name].advantages(r, LENGTHS[:, :3], advantage_weight=weight) for r in (rewards, rewards + 2**23)
    )
    assert torch.equal(plain, shifted)


def test_shape_and_dtype_are_kept():
    for row in ALGORITHMS.values():
        advantages = row.advantages(REWARDS.float(), LENGTHS)
        assert advantages.shape == REWARDS.shape
        assert advantages.dtype == torch.float32


def test_auto_drift_coef():
    """One failure among G - 1 successes under std weights is -(G - 1) / sqrt(G), SPEC's worst case."""
    for group in (4, 16):
        rewards = torch.ones(1, group, dtype=torch.float64)
        rewards[0, 2] = 0.0
        advantages = ALGORITHMS["cpgd"].advantages(rewards, torch.ones(1, group))
        assert auto_drift_coef(advantages) == pytest.approx((group - 1) / group**0.5, rel=1e-3)
        assert auto_drift_coef(-advantages) == pytest.approx((group - 1) / group**0.5, rel=1e-3)
    assert auto_drift_coef(torch.tensor([0.25, -0.5])) == 0.5
    assert isinstance(auto_drift_coef(torch.ones(4)), float)
    assert auto_drift_coef(torch.zeros(4), previous=0.7) == 0.7
    assert auto_drift_coef(torch.zeros(4)) == 1.0
