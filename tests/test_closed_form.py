"""How large must the drift be? SPEC's closed form on a policy small enough to enumerate.

With exact expectations, no clip and an advantage of mean 0, the maximum is pi_old * (1 + A / alpha) where
alpha > -min A, and the objective runs away where alpha is smaller. This is our derivation, not the paper's.
"""

import pytest
import torch

from minicpgd import ALGORITHMS
from minicpgd.algorithms import auto_drift_coef

COUNTS = torch.tensor([4, 3, 2, 1])
OLD = (COUNTS / COUNTS.sum()).double()
RAW = torch.tensor([0.9, -0.8, 0.3, -1.0], dtype=torch.float64)
A = RAW - (OLD * RAW).sum()
ACTIONS = torch.repeat_interleave(torch.arange(4), COUNTS)


def ascend(alpha, steps, name="pgd", learning_rate=1.0):
    """Gradient ascent on the logits through the table's own loss, over all samples in their exact proportions."""
    theta = OLD.log().requires_grad_()
    for _ in range(steps):
        logp = theta.log_softmax(-1)[ACTIONS][:, None]
        loss = (
            ALGORITHMS[name]
            .loss(logp, OLD.log()[ACTIONS][:, None], A[ACTIONS], torch.ones(10, 1), drift_coef=alpha, drift_clip=1e9)
            .loss
        )
        (g,) = torch.autograd.grad(loss, theta)
        theta = (theta - learning_rate * g).detach().requires_grad_()
    return theta.detach().softmax(-1)


@pytest.mark.parametrize("factor", [1.05, 1.5, 4.0])
def test_above_the_bound_ascent_ends_at_the_closed_form(factor):
    alpha = -factor * A.min().item()
    policy = ascend(alpha, steps=4000)
    torch.testing.assert_close(policy, OLD * (1 + A / alpha), atol=1e-6, rtol=1e-5)
    improvement = (policy * A).sum() - (OLD * A).sum()
    variance = (OLD * A.square()).sum()
    assert improvement.item() == pytest.approx((variance / alpha).item(), rel=1e-4)


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.9])
def test_below_the_bound_the_worst_action_dies(factor):
    alpha = -factor * A.min().item()
    probabilities = [ascend(alpha, steps)[A.argmin()].item() for steps in (100, 1000, 10_000)]
    assert probabilities[0] > probabilities[1] > probabilities[2]
    assert probabilities[2] < 2e-3 * OLD[A.argmin()]


def test_auto_is_never_below_the_bound():
    """Ratios end at 1 + A / alpha, all in [0, 2]; that of the worst action at 0, which ascent nears as 1 / steps."""
    alpha = auto_drift_coef(A)
    assert alpha >= -A.min()
    closed_form = 1 + A / alpha
    torch.testing.assert_close(ascend(alpha, steps=4000) / OLD, closed_form, atol=0.02, rtol=0)
    assert closed_form.min() >= 0
    assert closed_form.max() <= 2
    assert alpha == pytest.approx(A.abs().max().item())


def test_the_drift_is_idle_at_the_old_policy():
    logp = OLD.log()[ACTIONS][:, None].requires_grad_()
    losses = [
        ALGORITHMS["cpgd"].loss(logp, logp.detach(), A[ACTIONS], torch.ones(10, 1), drift_coef=alpha).loss
        for alpha in (0.0, 30.0)
    ]
    assert losses[0].item() == losses[1].item()
    with_drift, without = (torch.autograd.grad(loss, logp, retain_graph=True)[0] for loss in losses[::-1])
    assert torch.equal(with_drift, without)
