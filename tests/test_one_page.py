"""Notebook 0 restates the package on one page. These tests compare the two, step by step."""

import math
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from minicpgd import TrainConfig
from minicpgd.algorithms import ALGORITHMS, LossSettings
from minicpgd.training import Learner, seed_step

SCRIPT = Path(__file__).parent.parent / "notebooks" / "00_cpgd_on_one_page.py"


@pytest.fixture
def page():
    """The cells before the training loop, as a module."""
    module = ModuleType("one_page")
    before_the_loop = SCRIPT.read_text().partition("\nSTEPS = ")[0]
    exec(compile(before_the_loop, SCRIPT, "exec"), vars(module))
    return module


def test_five_steps_are_those_of_the_package(page, monkeypatch):
    """Tokens and rewards are identical. Losses agree to 1e-6 in all 40 updates, with clip and drift at work."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # The page runs on the CPU.
    config = TrainConfig(
        algorithm="cpgd",
        seed=page.SEED,
        num_prompts=page.N,
        num_generations=page.G,
        max_completion_length=page.MAX_TOKENS,
        num_iterations=page.PASSES,
        num_minibatches=page.MINIBATCHES,
        learning_rate=page.LEARNING_RATE,
        max_grad_norm=page.MAX_GRAD_NORM,
        epsilon=page.EPSILON,
        drift_coef=page.ALPHA,
        drift_clip=page.DRIFT_CLIP,
        target_kl=None,
    )
    learner = Learner.from_config(config)
    outputs = []
    for step in range(1, 6):
        generators = seed_step(config.seed, step)
        experience = learner.collect(generators)
        passes = [learner.train_pass(experience, generators.order) for _ in range(config.num_iterations)]
        outputs += [output for seen in passes for output in seen.outputs]
        theirs = experience.rollout

        rollout, rewards, advantages, losses = page.train_step(step)
        assert torch.equal(rollout.ids, torch.cat([theirs.prompt_ids, theirs.completion_ids], dim=1))
        assert torch.equal(rollout.attention, torch.cat([theirs.prompt_mask, theirs.mask], dim=1))
        assert torch.equal(rollout.mask, theirs.mask)
        assert torch.equal(rewards, experience.rewards)
        torch.testing.assert_close(rollout.old_logp, theirs.logp, atol=1e-3, rtol=0)
        torch.testing.assert_close(advantages, experience.advantages, atol=1e-6, rtol=0)
        assert losses == pytest.approx([loss for seen in passes for loss in seen.losses], abs=1e-6, rel=0)

    clipped = torch.cat([(output.clipped & output.mask).flatten() for output in outputs])
    log_ratios = torch.cat([output.log_ratio.flatten() for output in outputs])
    assert clipped.sum() > 100
    assert log_ratios.max() > math.log(1 + config.drift_clip)  # The drift reached its straight line.


def test_the_loss_and_its_gradient_agree_far_from_the_old_policy(page):
    """Ratios from 0.05 to 20 and padding of every length."""
    generator = torch.Generator().manual_seed(0)
    B, T, alpha = 16, 12, 1.7
    old_logp = -torch.rand(B, T, generator=generator)
    advantages = torch.randn(B, generator=generator)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=generator)
    logp = old_logp + 6 * torch.rand(B, T, generator=generator) - 3

    ours, theirs = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    loss = page.cpgd_loss(ours, old_logp, advantages, mask, alpha)
    settings = LossSettings(epsilon=page.EPSILON, drift_coef=alpha, drift_clip=page.DRIFT_CLIP)
    expected = ALGORITHMS["cpgd"].loss(theirs, old_logp, advantages, mask, settings).loss
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=0)


def test_the_page_imports_a_path_and_a_task_from_the_package():
    imports = re.findall(r"^ *((?:from|import) +minicpgd.*)", SCRIPT.read_text(), flags=re.MULTILINE)
    assert imports == ["from minicpgd.models import EMBEDDED", "from minicpgd.tasks import get_task"]
