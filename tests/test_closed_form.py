"""How large must the drift be? The closed form is tested on a policy whose actions can be enumerated.

Expectations are exact, nothing is clipped, and the mean advantage is 0. With alpha > -min A the maximum is at
pi_old * (1 + A / alpha). With a smaller alpha the objective has no maximum. The derivation is ours, not the paper's.
"""

import pytest
import torch

from minicpgd import ALGORITHMS, LossSettings
from minicpgd.algorithms.loss import max_advantage_coef

COUNTS = torch.tensor([4, 3, 2, 1])
OLD = (COUNTS / COUNTS.sum()).double()
RAW = torch.tensor([0.9, -0.8, 0.3, -1.0], dtype=torch.float64)
A = RAW - (OLD * RAW).sum()
ACTIONS = torch.repeat_interleave(torch.arange(4), COUNTS)


def ascend(alpha, steps, name="pgd", learning_rate=1.0):
    """Maximise the table's own objective over the logits, on all actions in their exact proportions."""
    theta = OLD.log().requires_grad_()
    old_logp, mask = OLD.log()[ACTIONS][:, None], torch.ones(10, 1)
    settings = LossSettings(drift_coef=alpha, drift_clip=1e9)
    for _ in range(steps):
        logp = theta.log_softmax(-1)[ACTIONS][:, None]
        (g,) = torch.autograd.grad(ALGORITHMS[name].loss(logp, old_logp, A[ACTIONS], mask, settings).loss, theta)
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
def test_below_the_bound_the_objective_has_no_maximum(factor):
    """The probability of the worst action becomes smaller without end."""
    alpha = -factor * A.min().item()
    probabilities = [ascend(alpha, steps)[A.argmin()].item() for steps in (100, 1000, 10_000)]
    assert probabilities[0] > probabilities[1] > probabilities[2]
    assert probabilities[2] < 2e-3 * OLD[A.argmin()]


def test_max_advantage_is_never_below_the_bound():
    """Ratios end at 1 + A / alpha, in [0, 2]. That of the worst action ends at 0, and approaches it as 1 / steps."""
    alpha = max_advantage_coef(A)
    assert alpha >= -A.min()
    closed_form = 1 + A / alpha
    torch.testing.assert_close(ascend(alpha, steps=4000) / OLD, closed_form, atol=0.02, rtol=0)
    assert closed_form.min() >= 0
    assert closed_form.max() <= 2
    assert alpha == pytest.approx(A.abs().max().item())


def test_the_drift_has_neither_value_nor_gradient_at_the_old_policy():
    logp = OLD.log()[ACTIONS][:, None].requires_grad_()
    settings = [LossSettings(drift_coef=alpha) for alpha in (0.0, 30.0)]
    losses = [ALGORITHMS["cpgd"].loss(logp, logp.detach(), A[ACTIONS], torch.ones(10, 1), s).loss for s in settings]
    assert losses[0].item() == losses[1].item()
    with_drift, without = (torch.autograd.grad(loss, logp, retain_graph=True)[0] for loss in losses[::-1])
    assert torch.equal(with_drift, without)
