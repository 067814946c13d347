"""Advantages are tested by hand and by brute force."""

import math
import statistics

import pytest
import torch

from minicpgd import ALGORITHMS, TrainConfig
from minicpgd.algorithms.advantages import WEIGHTS
from minicpgd.algorithms.loss import max_advantage_coef
from minicpgd.algorithms.table import display_name
from minicpgd.errors import ConfigError

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
LENGTHS = torch.tensor([[3, 5, 2, 7], [1, 4, 9, 2], [6, 6, 1, 3]])


def test_group_normalised():
    """grpo, cpgd, their parts and their relatives compute (R - mean) / (std + 1e-4), with ddof 1."""
    expected = []
    for group in REWARDS.tolist():
        mean, deviation = statistics.mean(group), statistics.stdev(group)
        expected.append([(r - mean) / (deviation + 1e-4) for r in group])
    others = {"rloo", "rloo_drift", "reinforce_pp", "reinforce_pp_drift", "reinforce_pp_baseline", "dr_grpo"}
    for name in ALGORITHMS.keys() - others:
        assert ALGORITHMS[name].advantages(REWARDS, LENGTHS).tolist() == [pytest.approx(row) for row in expected]


def test_group_centred():
    """dr_grpo, and cpgd with equal weights, compute R - mean."""
    expected = [[r - statistics.mean(group) for r in group] for group in REWARDS.tolist()]
    assert ALGORITHMS["dr_grpo"].advantages(REWARDS, LENGTHS).tolist() == [pytest.approx(row) for row in expected]
    ours = ALGORITHMS["cpgd"].advantages(REWARDS, LENGTHS, advantage_weight="equal")
    assert ours.tolist() == [pytest.approx(row) for row in expected]


def test_leave_one_out():
    expected = [[r - statistics.mean(g[:i] + g[i + 1 :]) for i, r in enumerate(g)] for g in REWARDS.tolist()]
    assert ALGORITHMS["rloo"].advantages(REWARDS, LENGTHS).tolist() == [pytest.approx(row) for row in expected]


def whitened(rewards):
    """Whiten by brute force: write out every token with the reward of its response."""
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
    assert ours.tolist() == [pytest.approx(row, rel=1e-12) for row in whitened(REWARDS.tolist())]


def test_whitening_adds_1e_8_to_the_variance():
    """Here the variance is about as large as the 1e-8 that is added to it."""
    nearly_equal = REWARDS * 1e-4
    ours = ALGORITHMS["reinforce_pp"].advantages(nearly_equal, LENGTHS)
    assert ours.tolist() == [pytest.approx(row, rel=1e-9) for row in whitened(nearly_equal.tolist())]


@pytest.mark.parametrize("shape", [(1, 4), (4, 1)])
def test_reinforce_pp_needs_neither_several_prompts_nor_groups(shape):
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(shape)
    advantages = ALGORITHMS["reinforce_pp"].advantages(rewards, torch.ones(shape)).flatten()
    assert advantages.tolist() == pytest.approx([3**0.5, *[-(3**-0.5)] * 3])


def test_group_centred_then_whitened():
    centred = [[r - statistics.mean(group) for r in group] for group in REWARDS.tolist()]
    ours = ALGORITHMS["reinforce_pp_baseline"].advantages(REWARDS, LENGTHS)
    assert ours.tolist() == [pytest.approx(row) for row in whitened(centred)]


@pytest.mark.parametrize(("informative", "weight"), [(0, 0.0), (1, 3.0), (2, 3.0), (3, 8 / 3), (4, 2.0), (8, 1.0)])
def test_clip_filter_counts_prompts(informative, weight):
    """The weight is min(3, N / informative prompts) with N = 8. It counts prompts, not responses."""
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
def test_a_constant_added_to_all_rewards_changes_no_bit(name, weight):
    """From 2**23 on float32 counts in ones, so these sums are still exact."""
    rewards = torch.tensor([[1.0, 0.0, 3.0], [2.0, 2.0, 2.0], [0.0, 5.0, 1.0]])
    plain, shifted = (
        ALGORITHMS[name].advantages(r, LENGTHS[:, :3], advantage_weight=weight) for r in (rewards, rewards + 2**23)
    )
    assert torch.equal(plain, shifted)


def test_advantages_keep_the_shape_and_dtype_of_the_rewards():
    for row in ALGORITHMS.values():
        advantages = row.advantages(REWARDS.float(), LENGTHS)
        assert advantages.shape == REWARDS.shape
        assert advantages.dtype == torch.float32


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_an_overridden_weight_is_the_weight_given_to_advantages(name, weight):
    row = ALGORITHMS[name]
    overridden = row.override(advantage_weight=weight)
    assert overridden.weight is WEIGHTS[weight]
    expected = row.advantages(REWARDS, LENGTHS, advantage_weight=weight)
    assert torch.equal(overridden.advantages(REWARDS, LENGTHS), expected)


def alone_in_their_groups(row):
    """Return the advantages of four different rewards, each of which is a group."""
    return row.advantages(torch.tensor([[0.0], [1.0], [3.0], [4.0]]), torch.ones(4, 1)).flatten()


@pytest.mark.filterwarnings("ignore:std")  # The deviation of one number is 0 / 0, and torch warns.
@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("weight", [None, *WEIGHTS])
def test_a_row_needs_groups_where_a_group_of_one_has_no_advantage(name, weight):
    """In every row that needs groups, the only response to a prompt has the advantage 0, or 0 / 0."""
    row = ALGORITHMS[name].override(advantage_weight=weight)
    advantages = alone_in_their_groups(row)
    assert row.needs_groups == (not (advantages.isfinite() & (advantages != 0)).all())


def test_only_reinforce_pp_with_equal_weights_needs_no_groups():
    assert {name for name, row in ALGORITHMS.items() if not row.needs_groups} == {"reinforce_pp", "reinforce_pp_drift"}
    for weight in ("std", "clip_filter"):
        assert ALGORITHMS["reinforce_pp"].override(advantage_weight=weight).needs_groups
        with pytest.raises(ConfigError, match="num_generations = 1: reinforce_pp compares the responses to one prompt"):
            TrainConfig(algorithm="reinforce_pp", num_generations=1, advantage_weight=weight)
    assert TrainConfig(algorithm="reinforce_pp", num_generations=1).num_responses == 16


def test_max_advantage_coef():
    """With std weights, one failure among G - 1 successes has the advantage -(G - 1) / sqrt(G), the largest of all."""
    for group in (4, 16):
        rewards = torch.ones(1, group, dtype=torch.float64)
        rewards[0, 2] = 0.0
        advantages = ALGORITHMS["cpgd"].advantages(rewards, torch.ones(1, group))
        assert max_advantage_coef(advantages) == pytest.approx((group - 1) / group**0.5, rel=1e-3)
        assert max_advantage_coef(-advantages) == pytest.approx((group - 1) / group**0.5, rel=1e-3)
    assert max_advantage_coef(torch.tensor([0.25, -0.5])) == 0.5
    assert isinstance(max_advantage_coef(torch.ones(4)), float)
    assert max_advantage_coef(torch.zeros(4), previous=0.7) == 0.7
    assert max_advantage_coef(torch.zeros(4)) == 1.0


def test_a_response_without_a_reward_is_not_in_the_baseline():
    rewards = torch.tensor(
        [
            [1, math.nan, 0, 0.5, math.nan],
            [math.nan] * 5,
            [math.nan, 3, math.nan, math.nan, math.nan],
            [0.1, math.nan, 0.1, 0.1, 0.1],
        ]
    )
    centred = ALGORITHMS["dr_grpo"].advantages(rewards, torch.ones(4, 5))
    assert centred.tolist() == [[0.5, 0, -0.5, 0, 0], *[[0] * 5] * 3]
    normalised = ALGORITHMS["cpgd"].advantages(rewards, torch.ones(4, 5))  # The deviation of 1, 0 and 0.5 is 0.5.
    assert normalised[0].tolist() == pytest.approx([0.5 / 0.5001, 0, -0.5 / 0.5001, 0, 0])
    without_others = ALGORITHMS["rloo"].advantages(rewards, torch.ones(4, 5))
    assert without_others[0].tolist() == pytest.approx([0.75, 0, -0.75, 0, 0])
    assert not normalised[1:].any()
    assert not without_others[1:].any()
    filtered = ALGORITHMS["cpgd"].advantages(rewards, torch.ones(4, 5), advantage_weight="clip_filter")
    assert filtered[0].tolist() == pytest.approx([1.5, 0, -1.5, 0, 0])  # One of four prompts has a gradient.


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("weight", [None, *WEIGHTS])
@pytest.mark.parametrize("kept", [[[0, 1, 3, 5], [1, 2, 3, 4], [2, 3, 4, 5]], [[0, 5], [1, 2], [3, 4]]])
def test_a_response_without_a_reward_changes_no_other_advantage(name, weight, kept):
    generator, kept = torch.Generator().manual_seed(0), torch.tensor(kept)
    rewards = 5 + torch.randn(3, 6, dtype=torch.float64, generator=generator)
    tokens = torch.randint(1, 9, (3, 6), generator=generator)
    without = torch.full_like(rewards, math.nan).scatter(1, kept, rewards.gather(1, kept))
    advantages = ALGORITHMS[name].advantages(without, tokens, advantage_weight=weight)
    alone = ALGORITHMS[name].advantages(rewards.gather(1, kept), tokens.gather(1, kept), advantage_weight=weight)
    torch.testing.assert_close(advantages.gather(1, kept), alone, rtol=1e-12, atol=0)
    assert (advantages[without.isnan()] == 0).all()
    none = ALGORITHMS[name].advantages(torch.full((2, 3), math.nan), torch.ones(2, 3), advantage_weight=weight)
    assert not none.any()
    if weight != "clip_filter":  # It counts a prompt without any reward.
        more, more_tokens = torch.cat([without, torch.full_like(without, math.nan)]), torch.cat([tokens, tokens])
        larger = ALGORITHMS[name].advantages(more, more_tokens, advantage_weight=weight)
        torch.testing.assert_close(larger[:3], advantages, rtol=1e-12, atol=0)
        assert not larger[3:].any()


def test_complete_rewards_take_the_formula_of_the_row():
    """To the bit: the way for missing rewards gives the same values, but rounds otherwise."""
    rewards, lengths = torch.rand(4, 7, generator=torch.Generator().manual_seed(0)), torch.ones(4, 7)
    rows = ALGORITHMS.values()
    assert all(
        torch.equal(a.advantages(rewards, lengths), a.weight(rewards) * a.centre(rewards, lengths)) for a in rows
    )


def test_figures_print_the_label_of_a_row_and_any_other_name_as_it_is():
    assert (display_name("grpo_dual_clip"), display_name("mine")) == ("GRPO, dual clip", "mine")
