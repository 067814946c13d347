"""Divergences are compared with sums over all actions and with finite differences."""

import math

import pytest
import torch

from minicpgd.algorithms.divergence import bounded_drift, exact_kl, k1, k2, k3

P_LOGITS = torch.tensor([0.3, -1.0, 0.7, 0.0, -0.4], dtype=torch.float64)
Q_LOGITS = torch.tensor([0.1, -0.6, 0.9, -0.3, -0.2], dtype=torch.float64)


def kl_by_hand(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p.tolist(), q.tolist(), strict=True))


def test_exact_kl_is_the_sum_over_actions():
    p, q = P_LOGITS.softmax(-1), Q_LOGITS.softmax(-1)
    assert exact_kl(P_LOGITS, Q_LOGITS).item() == pytest.approx(kl_by_hand(p, q), abs=1e-12)
    assert exact_kl(P_LOGITS, Q_LOGITS).item() != pytest.approx(kl_by_hand(q, p), rel=1e-2)


def test_exact_kl_is_computed_for_each_row():
    both, swapped = torch.stack([P_LOGITS, Q_LOGITS]), torch.stack([Q_LOGITS, P_LOGITS])
    p, q = P_LOGITS.softmax(-1), Q_LOGITS.softmax(-1)
    assert exact_kl(both, swapped).tolist() == pytest.approx([kl_by_hand(p, q), kl_by_hand(q, p)], abs=1e-12)


def test_exact_kl_ignores_actions_of_probability_zero():
    p = torch.tensor([0.0, 0.0, -math.inf])
    q = torch.tensor([0.0, 0.0, 0.0])
    assert exact_kl(p, q).item() == pytest.approx(math.log(3 / 2))
    assert exact_kl(torch.stack([p, q]), torch.stack([q, q])).shape == (2,)


def test_the_mean_of_the_estimators():
    """The mean of k1 and of k3 is the KL, and that of k2 is near it. Three values are computed by hand."""
    p = P_LOGITS.softmax(-1)
    e = Q_LOGITS.log_softmax(-1) - P_LOGITS.log_softmax(-1)
    kl = kl_by_hand(p, Q_LOGITS.softmax(-1))
    assert (p * k1(e)).sum().item() == pytest.approx(kl, abs=1e-12)
    assert (p * k3(e)).sum().item() == pytest.approx(kl, abs=1e-12)
    assert 1e-5 < abs((p * k2(e)).sum().item() - kl) < 0.1 * kl
    d = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    assert k1(d).tolist() == [1.0, 0.0, -2.0]
    assert k2(d).tolist() == [0.5, 0.0, 2.0]
    assert k3(d).tolist() == pytest.approx([math.exp(-1), 0.0, math.exp(2) - 3])


def test_k3_is_never_negative_in_float32():
    d = torch.cat([torch.linspace(-20, 20, 4001), torch.logspace(-8, 0, 400), -torch.logspace(-8, 0, 400)])
    assert (k3(d) >= 0).all()


def test_the_gradients_of_the_estimators_on_policy():
    """On samples of pi_theta itself k1 has the gradient 0, k2 that of KL(pi || ref), and k3 that of KL(ref || pi)."""
    theta = P_LOGITS.clone().requires_grad_()
    ref = Q_LOGITS.log_softmax(-1)
    weights = theta.softmax(-1).detach()  # The samples are not differentiated.

    def gradient(value):
        return torch.autograd.grad(value, theta, retain_graph=True)[0]

    e = ref - theta.log_softmax(-1)
    assert gradient((weights * k1(e)).sum()).abs().max() < 1e-12
    torch.testing.assert_close(gradient((weights * k2(e)).sum()), gradient(exact_kl(theta, ref)))
    torch.testing.assert_close(gradient((weights * k3(e)).sum()), gradient(exact_kl(ref, theta)))


def test_the_gradients_of_the_estimators_off_policy():
    """On samples of pi_old, the derivatives of k1 and k3 are the gradient of KL(pi_old || pi_theta)."""
    theta = Q_LOGITS.clone().requires_grad_()
    old = P_LOGITS.log_softmax(-1)
    exact = torch.autograd.grad(exact_kl(P_LOGITS, theta), theta)[0]
    for estimator in (k1, k3):
        mean = (old.exp() * estimator(theta.log_softmax(-1) - old)).sum()
        torch.testing.assert_close(torch.autograd.grad(mean, theta)[0], exact)


@pytest.mark.parametrize("bound", [0.5, 2.0, 5.0])
def test_bounded_drift(bound):
    """Its value is k3 up to the knee, and its slope min(r - 1, c) everywhere, by hand and by finite differences."""
    ratios = torch.tensor([1e-6, 0.1, 0.9, 1.0, 1.1, 1.4, 2.9, 3.1, 5.9, 6.1, 1e4], dtype=torch.float64)
    d = ratios.log().requires_grad_()
    slope = torch.autograd.grad(bounded_drift(d, bound).sum(), d)[0]
    torch.testing.assert_close(slope, (ratios - 1).clamp(max=bound))
    h = 1e-6
    by_difference = (bounded_drift(d + h, bound) - bounded_drift(d - h, bound)) / (2 * h)
    torch.testing.assert_close(by_difference, slope, atol=1e-8, rtol=1e-6)
    below = ratios <= 1 + bound
    torch.testing.assert_close(bounded_drift(d, bound)[below], (ratios - 1 - d)[below])
    at_the_knee = torch.tensor(math.log1p(bound), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(bounded_drift(at_the_knee, bound), at_the_knee)[0].item() == pytest.approx(bound)


def test_bounded_drift_is_finite_at_any_ratio():
    d = torch.tensor([-1000.0, -100.0, 100.0, 1000.0], requires_grad=True)
    value = bounded_drift(d, 2.0)
    assert value.isfinite().all()
    assert torch.autograd.grad(value.sum(), d)[0].tolist() == [-1.0, -1.0, 2.0, 2.0]
    assert bounded_drift(torch.tensor(5.0)) == bounded_drift(torch.tensor(5.0), 2.0)
