"""Three bugs of notebook 6 would pass every other test. Each test here fails if its bug is put into the package."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from minicpgd.models.logprobs import token_logprobs
from minicpgd.training.step import Learner, seed_step


def test_the_learner_scores_at_the_temperature_it_sampled_at(small):
    """The ratios of a rollout's first update are 1, at any temperature."""
    learner = Learner.from_config(small(temperature=0.6, num_minibatches=1))
    rollout = learner.collect(seed_step(0, 1)).rollout
    assert (learner.score(rollout) - rollout.logp).abs().max() < 1e-4
    metrics = learner.step(1).metrics
    assert metrics["ratio_min"] == pytest.approx(1, abs=1e-4)
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-4)


def test_a_group_is_the_responses_to_one_prompt(small):
    """This reward depends on the prompt alone. So all rewards of a group are equal, and all advantages are 0."""
    learner = Learner.from_config(small(num_prompts=3))
    learner.reward = lambda prompts, completions, **_: [float(sorted(set(prompts)).index(p)) for p in prompts]
    experience = learner.collect(seed_step(0, 1))
    assert len({problem["prompt"] for problem in experience.problems}) == 3
    assert experience.rewards.tolist() != [[0.0] * 4] * 3
    assert (experience.advantages == 0).all()


def test_positions_count_real_tokens_only():
    """Left padding must not shift GPT-2's learned, absolute positions. Rotary positions would not show a shift."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 18, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=1)).eval()
    ids = torch.randint(2, 18, (1, 9))
    alone, _ = token_logprobs(model, ids, torch.ones_like(ids), 4)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    with_padding, _ = token_logprobs(model, padded, (torch.arange(14) >= 5).long()[None], 4)
    torch.testing.assert_close(with_padding, alone, atol=1e-5, rtol=1e-5)
