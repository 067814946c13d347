# %% [markdown]
# # 7. Theory you can check
#
# For a policy with few possible answers an expectation is a sum, and numbers can check a theorem. This notebook does so
# with the package's own losses. At the end it applies CPGD outside language, to a bandit and a small maze.
#
# **After this notebook you can**
#
# - show that the first gradient of CPGD is the policy gradient, and say under which averaging it is not;
# - derive how large the drift coefficient α must be, and read the bound off a rollout;
# - explain why a clip bounds the objective, but not the ratio;
# - say what about CPGD is proved here, what is only checked, and what is only claimed.
#
# The notebook takes about 25 seconds on a laptop's CPU.

# %%
from itertools import product

import matplotlib.pyplot as plt
import torch

from minicpgd import ALGORITHMS, TrainConfig
from minicpgd.algorithms import LossSettings, bounded_drift, exact_kl, k3, max_advantage_coef
from minicpgd.experiments.statistics import bootstrap_mean
from minicpgd.models import quiet
from minicpgd.plots.style import STYLE, line_style
from minicpgd.training import Learner, seed_step

quiet()
plt.rcParams.update(STYLE)

# %% [markdown]
# ## 1. All fifteen answers of a policy
#
# Our policy writes `a`, `b` or the end `.`, at most three tokens. That makes 15 answers. In each of 7 situations
# (nothing yet, `a`, `b`, `aa`, ...) it has its own three logits, so θ is a table of 7 by 3. Each answer gets some
# reward.

# %%
prefixes = ["", "a", "b", "aa", "ab", "ba", "bb"]
answers = [
    "".join(y) for n in (1, 2, 3) for y in product("ab.", repeat=n) if "." not in y[:-1] and (n == 3 or y[-1] == ".")
]
states = torch.tensor([[prefixes.index(y[:t]) if t < len(y) else 0 for t in range(3)] for y in answers])
tokens = torch.tensor([["ab.".index(y[t]) if t < len(y) else 0 for t in range(3)] for y in answers])
lengths = torch.tensor([len(y) for y in answers])
mask = (torch.arange(3) < lengths[:, None]).double()
generator = torch.Generator().manual_seed(0)
theta = torch.randn(7, 3, generator=generator, dtype=torch.float64).requires_grad_()
rewards = torch.rand(15, generator=generator, dtype=torch.float64)


def logps(theta):
    """(15, 3) log-probabilities of the tokens, 0 where an answer has ended."""
    return theta.log_softmax(-1)[states, tokens] * mask


old = logps(theta).detach()
p_old = old.sum(1).exp()
print(*answers)
print(f"probabilities sum to {p_old.sum():.12f}, expected reward {(p_old * rewards).sum():.4f}")
assert len(answers) == 15 and abs(p_old.sum() - 1) < 1e-12

# %% [markdown]
# We want to maximise the expected reward $J(\theta) = \sum_y \pi_\theta(y) R(y)$. Its gradient at $\pi_\theta =
# \pi_{\mathrm{old}}$ takes two lines. The first uses $\nabla \pi = \pi \nabla \ln \pi$, the second that probabilities
# always sum to 1:
#
# $$ \nabla J = \sum_y \pi_{\mathrm{old}}(y) R(y) \nabla \ln \pi_\theta(y), \qquad
#    0 = \sum_y \pi_{\mathrm{old}}(y)\, \mu\, \nabla \ln \pi_\theta(y). $$
#
# Their difference has $A = R - \mu$ in place of $R$. And $\ln \pi_\theta(y)$ is the sum of its tokens' $\ell_t$, whose
# gradient is that of $d_t = \ell_t - \ell_{\mathrm{old},t}$. So $\nabla J = \nabla \sum_y \pi_{\mathrm{old}}(y) \sum_t
# d_t A$. That is the gradient of CPGD's surrogate, since at $d = 0$ no clip acts.
#
# With $\pi_{\mathrm{old}}(y)$ as `token_weights` the package's loss is an exact expectation.
#
# **Predict.** Most rows of the table divide a response's tokens by its length (`sequence_mean`). Does the gradient
# still have the direction of $\nabla J$? Could any of the 17 rows have another gradient here than `cpg`?

# %%
A = rewards - (p_old * rewards).sum()
(exact,) = torch.autograd.grad((logps(theta).sum(1).exp() * rewards).sum(), theta)


def first_gradient(name, weights):
    loss = ALGORITHMS[name].loss(logps(theta), old, A, mask, token_weights=weights).loss
    return -torch.autograd.grad(loss, theta)[0]


summed = p_old[:, None] * mask
for label, weights in (("sum over tokens", summed), ("mean over tokens", summed / lengths[:, None])):
    g = first_gradient("cpg", weights)
    cosine = torch.cosine_similarity(g.flatten(), exact.flatten(), dim=0)
    print(f"{label:<17} largest difference from the exact gradient {(g - exact).abs().max():.4f}, cosine {cosine:.3f}")
    assert max((first_gradient(name, weights) - g).abs().max() for name in ALGORITHMS) < 1e-14
assert torch.allclose(first_gradient("cpg", summed), exact, atol=1e-14) and cosine < 0.999

# %% [markdown]
# With the sum it is the policy gradient: no entry differs by more than $10^{-14}$. With the mean it is not. A token of
# a short answer has a larger weight, and the direction changes a little (cosine 0.986). So with their own averaging,
# neither CPGD nor GRPO maximises exactly the expected reward once lengths differ. At the first update the 17 rows
# differ only in advantages and averaging: with the same ones, all agree.
#
# ## 2. The drift
#
# For one token, k3 $= r - 1 - d$ with $r = e^d$ is never negative, since $e^d \ge 1 + d$. Its slope $r - 1$ is 0 at
# $d = 0$. Given the tokens so far, $r - 1$ has mean 0 under $\pi_{\mathrm{old}}$. So the mean of $\sum_t$ k3 equals
# that of $-\sum_t d_t$, which is $\mathrm{KL}(\pi_{\mathrm{old}} \,\|\, \pi_\theta)$ of whole answers.
#
# **Predict.** The trained term is `bounded_drift`. Its slope is $\min(r - 1, c)$ with $c = 2$, so it is a straight line
# beyond $r = 3$. Will it be above or below the KL?

# %%
print("  move      KL   mean k3   trained   largest r")
for size in (0.0, 0.1, 0.3, 1.0, 3.0):
    moved = theta + size * torch.randn(7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    new = logps(moved)
    kl = exact_kl(old.sum(1), new.sum(1)).item()
    estimated, trained = ((p_old * (f(new - old) * mask).sum(1)).sum() for f in (k3, bounded_drift))
    (slope,) = torch.autograd.grad(trained, moved, retain_graph=True)
    print(f"{size:>6} {kl:>7.4f} {estimated:>9.4f} {trained:>9.4f} {(new - old).exp().max():>11.2f}")
    assert abs(kl - estimated) < 1e-9 and 0 <= trained <= kl + 1e-9
    assert (slope.abs().max() < 1e-12) == (size == 0)

# %% [markdown]
# At $\pi_{\mathrm{old}}$ value and gradient are 0, and elsewhere the drift is positive. The mean of k3 is exactly the
# KL. The trained term is the KL as long as every ratio is at most 3, and less beyond. There it is not a divergence.
#
# ## 3. How large must the drift be?
#
# Take one context with a few actions, exact expectations under $\pi_{\mathrm{old}}$, no clip, and an $A$ whose mean
# under $\pi_{\mathrm{old}}$ is 0. For an action, CPGD's objective is $A d - \alpha\,$k3$(d)$ with $d = \ln(\pi /
# \pi_{\mathrm{old}})$. The mean of $r - 1$ is $\sum_a (\pi - \pi_{\mathrm{old}}) = 0$. So the mean of k3 is that of
# $-d$, the KL, and the mean of the objective is one sum:
#
# $$ F(\pi) = \sum_a w_a \ln \frac{\pi(a)}{\pi_{\mathrm{old}}(a)}, \qquad
#    w_a = \pi_{\mathrm{old}}(a)\,(A(a) + \alpha), \qquad \sum_a w_a = \alpha $$
#
# All weights $w_a$ are positive if and only if $\alpha > -\min A$. This is *the bound*.
#
# *Claim 1.* Above the bound $F$ has one maximum, $\pi = \pi_{\mathrm{old}}(1 + A/\alpha)$. The ratios there are $r^* =
# 1 + A/\alpha$. Proof: a sum of logarithms with positive weights is strictly concave, so a stationary point on the
# simplex is its only maximum. With a Lagrange multiplier $\lambda$ for $\sum_a \pi(a) = 1$, a stationary point has
# $w_a = \lambda\, \pi(a)$. The sum over $a$ gives $\alpha = \lambda$. So $\pi(a) = w_a / \alpha$.
#
# *Claim 2.* This maximum improves the expected advantage by $\mathrm{Var}(A)/\alpha$. Proof: the improvement is $\sum_a
# (\pi(a) - \pi_{\mathrm{old}}(a)) A(a) = \sum_a \pi_{\mathrm{old}}(a) A(a)^2 / \alpha$.
#
# *Claim 3.* Below the bound there is no maximum. Proof: the worst action has $w_a < 0$. Let its $\pi(a)$ go to 0, and
# scale the others up. Its term $w_a \ln \pi(a)$ grows without end, and the other terms stay bounded. So the objective
# drives the probability of the worst action to 0 without end.
#
# *Claim 4.* With the bounded drift of the package, claim 1 holds if also $\alpha > \max A / c$. Proof: the slope of an
# action's $A d - \alpha\,\mathrm{drift}(d)$ is $A - \alpha \min(r - 1, c)$. It changes its sign once, at $r^*$, so
# every term has its maximum there. These ratios form a distribution, because their mean under $\pi_{\mathrm{old}}$
# is 1.
#
# *Claim 5.* `max_advantage_coef` takes α = max|A|. This α is never below the bound, since max|A| ≥ −min A, and it
# satisfies claim 4 with c = 2. Every $r^*$ is in [0, 2], since |A| ≤ α. And $r^* = 0$ requires A = −α, so it occurs
# only if α is the bound itself. Then $w_a = 0$ for the worst action, $F$ stays bounded, and the ratio approaches 0
# without reaching it.
#
# The closed form and this rule are ours, not the paper's. We check them by gradient ascent on logits, through the
# table's own loss. The row `pgd` is CPGD without the clip. The maximum of $F$ depends on $A/\alpha$ alone, so we run
# five α at once, each in its row.
#
# **Predict.** What will the worst action's ratio do at 0.5, 0.9 and 1 times the bound?

# %%
old4 = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
A4 = torch.tensor([0.9, -0.8, 0.3, -1.0], dtype=torch.float64)
A4 = A4 - (old4 * A4).sum()


def ascend(name, old, A, alpha=1.0, steps=300, learning_rate=2.0):
    """Ratios after each step, (steps, n, actions), for n rows of advantages (n, actions)."""
    logits, ratios = old.log().expand_as(A).clone().requires_grad_(), []
    sgd, weights = torch.optim.SGD([logits], lr=learning_rate), old.expand_as(A).reshape(-1, 1)
    row, settings = ALGORITHMS[name], LossSettings(drift_coef=alpha)
    for _ in range(steps):
        logp = logits.log_softmax(-1).view(-1, 1)
        sgd.zero_grad()
        tensors = logp, weights.log(), A.flatten(), torch.ones_like(logp)
        row.loss(*tensors, settings, token_weights=weights).loss.backward()
        sgd.step()
        ratios.append(logits.detach().softmax(-1) / old)
    return torch.stack(ratios)


# %%
ASCENT = 2000  # fast: 600
factors = torch.tensor([0.5, 0.9, 1.0, 1.1, 2.0], dtype=torch.float64)
alphas = -factors * A4.min()
ratios = ascend("pgd", old4, A4 / alphas[:, None], steps=ASCENT)
for factor, alpha, r in zip(factors[3:], alphas[3:], ratios[-1, 3:], strict=True):
    gain, promised = (old4 * r * A4).sum(), (old4 * A4.square()).sum() / alpha
    print(f"α = {factor} × bound: gain {gain:.5f}, Var(A)/α {promised:.5f}")
    assert torch.allclose(r, 1 + A4 / alpha, atol=1e-5) and abs(gain - promised) < 1e-5

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), constrained_layout=True)
for i, factor in enumerate(factors.tolist()):
    steps, style = torch.arange(1, ASCENT + 1), line_style(i)._asdict()
    left.loglog(steps, ratios[:, i, 3], label=f"{factor}", **style, markevery=(0.1, 0.2), ms=5)
left.set(xlabel="steps of gradient ascent", ylabel="ratio of the worst action", ylim=(1e-6, 3))
left.legend(title="α / bound", loc="lower left", fontsize=9)
grid = torch.linspace(1.0, 4, 50) * -A4.min()
for a in range(4):
    color, linestyle, marker = line_style(a)
    right.plot(grid, 1 + A4[a] / grid, color=color, linestyle=linestyle, label=f"A = {A4[a]:+.2f}")
    right.plot(alphas[3:], ratios[-1, 3:, a], marker, color=color, ms=7)
right.axvline(max_advantage_coef(A4), color="black", lw=1, ls=(0, (1, 2)))
right.set(xlabel="α  (dotted: max|A|)", ylabel="ratio at the maximum", xlim=(0.9, 3.9))
right.legend(fontsize=9, ncols=2, loc="upper right")
plt.show()
assert (ratios[-1, :3, 3] < ratios[99, :3, 3]).all()  # these are at the bound and below it

# %% [markdown]
# Above the bound the worst action settles at $r^*$ (on the right, lines are the formula and marks the ascent). At the
# bound it approaches $r^* = 0$ and never reaches it. Below the bound its ratio decreases faster, and without end.
#
# ### Rollout after rollout
#
# Let each maximum be the next $\pi_{\mathrm{old}}$, with $A = R - \mu$ and one α above the bound of every round. By
# claim 2, μ never decreases. It cannot exceed the best reward, so the gains have a finite sum, and $\mathrm{Var}(A)$
# goes to 0. The best action has $A \ge 0$, so it never loses probability. So its $A$ goes to 0 too, and μ to the best
# reward.
#
# Take rewards 0 and 1, and a share $p$ of right answers. Then $A$ is $1 - p$ or $-p$. Any α > 1 is above the bound of
# every round, and `max_advantage` means $\alpha = \max(p, 1 - p)$.
#
# **Predict.** Start at $p = 0.05$. What is $p$ after one rollout with `max_advantage`, after two? And with the clip at
# 1.2?


# %%
def improve(name, rollouts, learning_rate, rule=max_advantage_coef, p=0.05):
    shares = [p]
    for _ in range(rollouts):
        old, A = torch.tensor([p, 1 - p], dtype=torch.float64), torch.tensor([[1 - p, -p]], dtype=torch.float64)
        p = (ascend(name, old, A, alpha=rule(A), learning_rate=learning_rate)[-1, 0] * old)[0].item()
        shares.append(p)
    return torch.tensor(shares)


fixed = improve("pgd", rollouts=8, learning_rate=2.0, rule=lambda A: 1.1)
free = improve("pgd", rollouts=5, learning_rate=2.0)
clipped = improve("cpgd", rollouts=6, learning_rate=0.05)  # large steps would overshoot the clip's bound
for label, shares in (("pgd, α = 1.1", fixed), ("pgd, max |A|", free), ("cpgd, max |A|", clipped)):
    print(f"{label:<12}", *(f"{p:.3f}" for p in shares))
assert (fixed.diff() > 0).all() and (fixed.diff() - fixed[:-1] * (1 - fixed[:-1]) / 1.1).abs().max() < 0.01
assert torch.allclose(free[1:5] / free[:4], torch.tensor(2.0), atol=0.01)
assert torch.allclose(clipped[1:7] / clipped[:6], torch.tensor(1.2), atol=0.02)

# %% [markdown]
# With α = 1.1 every gain is positive, and within 0.01 of $p(1-p)/1.1$ after these 300 steps. With `max_advantage` and
# $p < 1/2$, $r^* = 1 + (1-p)/(1-p) = 2$. So the share of right answers doubles, in any unit of the reward. From one
# half on, one rollout leads to 1 by the formula, and to 0.999 in 300 steps.
#
# With the clip the share grows only by factors of 1.2 at first, however many updates CPGD makes. So the clip makes it
# slow, by construction. Here that is only a cost: $A$ is exact, and the right answers deserve to double. In training,
# $A$ comes from a few samples. An answer may get a large $A$ by luck, and without the clip its probability would double
# as well. In this exact setting the clip limits it to a factor of about 1.2; in training it only takes away the
# answer's own gradient from there. Only there can it be worth its cost.
#
# ### The same bound on a real rollout
#
# The next cell samples six rollouts of the embedded model, 16 problems with 16 answers each. As `drift_coef` is
# "max_advantage", `collect` computes it.
#
# **Predict.** Which is larger, $-\min A$ or $\max A$? What is $A$ of a single failure among 16 answers?

# %%
SEEDS = 6  # fast: 2
learner = Learner.from_config(TrainConfig(algorithm="cpgd", drift_coef="max_advantage"))
print("seed   right   -min A   max A   drift_coef   1 + A/alpha from    to   15 of 16 right   1 of 16 right")
for seed in range(SEEDS):
    experience = learner.collect(seed_step(seed, step=1))
    A, alpha, right = experience.advantages, experience.drift_coef, experience.rewards.sum(dim=1)
    low, high = 1 + A.min() / alpha, 1 + A.max() / alpha
    print(f"{seed:>4} {experience.rewards.mean():>7.2f} {-A.min():>8.2f} {A.max():>7.2f} {alpha:>12.2f}", end="")
    print(f" {low:>18.2f} {high:>5.2f} {(right == 15).sum():>16} {(right == 1).sum():>15}")
    assert alpha == max_advantage_coef(A) >= -A.min() and low >= 0 and high <= 2
    assert not (right == 15).any() or abs(A.min() + 15 / 4) < 0.01  # this is -(G - 1) / sqrt(G)

# %% [markdown]
# A single failure among G has $A = -(G-1)/\sqrt{G}$, here −3.75; seeds 0 and 4 have one. Seed 3 has a single success,
# with +3.75, and its α is three times −min A. So either of the two can be larger; in seed 2 they are equal.
#
# In three of six rollouts (seeds 0, 2, 4) α *is* the bound. Claim 1 needs an α *above* the bound, so it does not
# cover them. Is `max_advantage` safe there? By claim 5 the objective stays bounded, but without a clip nothing keeps
# the worst answer's ratio away from 0. With the clip of `cpgd` something does: below $r = 0.8$ that answer's
# surrogate has no gradient, and the drift raises its probability again. This concerns one rollout and exact
# expectations. It does not make the rule safe in a long run with 4 updates per rollout: [there it harms a
# policy](../docs/default.md).
#
# ## 4. At the clip's bound
#
# Beyond its bound a token's surrogate has the gradient 0 ([notebook 2](02_ratio_clipping.ipynb)). But probabilities sum
# to 1, so a token moves when others do. Take four actions: two good ones just above 1.2, a bad one just below 0.8, and
# a slightly bad one at 1. Expectations are exact, and Adam makes steps of 0.1.
#
# **Predict.** Where is the best action after one more step? After 200? Which actions does the drift bring back?

# %%
old4, start = torch.tensor([[0.1, 0.2, 0.3, 0.4], [1.201, 1.201, 0.799, 1.0]], dtype=torch.float64)
A4 = torch.tensor([0.84, 0.44, -0.36, -0.16], dtype=torch.float64)
assert abs((old4 * A4).sum()) < 1e-12 and abs((old4 * start).sum() - 1) < 1e-12
settings = LossSettings(drift_coef=max_advantage_coef(A4))


def walk(name, rate):
    """201 steps of Adam: the four ratios, the objective and the gradient's length, (6, 201)."""
    logits, path = (old4 * start).log().requires_grad_(), []
    adam = torch.optim.Adam([logits], lr=rate)
    for _ in range(201):
        adam.zero_grad()
        tensors = logits.log_softmax(-1)[:, None], old4.log()[:, None], A4, torch.ones(4, 1)
        output = ALGORITHMS[name].loss(*tensors, settings, token_weights=old4[:, None])
        output.loss.backward()
        path.append([*output.log_ratio.exp(), -output.loss.detach(), logits.grad.norm()])
        adam.step()
    return torch.tensor(path).T


NAMES = ("cpgd", "cpg", "grpo", "pgd")
paths = {name: walk(name, rate=0.1) for name in NAMES}
print("steps of Adam       0      1      3    200   gradient at step 3")
for name, path in paths.items():
    print(f"{name:<13}", *(f"{path[0, step]:>6.3f}" for step in (0, 1, 3, 200)), f"{path[5, 3]:>20.3f}")
rest = walk("cpgd", rate=0.001)[:4, -1]
print("cpgd, steps of 0.001, after 200, all four:", *(f"{r:.3f}" for r in rest))

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), constrained_layout=True)
for i, name in enumerate(NAMES):
    for axis, line in zip(axes, paths[name][[0, 4]], strict=True):
        axis.plot(line, label=name, **line_style(i)._asdict(), markevery=(i * 5, 25), ms=5)
axes[0].axhline(1.2, color="black", lw=1, ls=(0, (4, 2)))
axes[0].set(xlabel="steps of Adam", ylabel="ratio of the best action")
axes[1].set(xlabel="steps of Adam", ylabel="its own objective  [units of A]")
axes[1].legend(ncols=2, fontsize=9)
plt.show()
for name in ("cpg", "grpo"):  # the gradient is 0, the objective stays constant, and the ratio still grows
    ratio, *_, objective, gradient = paths[name]
    assert gradient[3:].max() < 1e-12 and objective[3:].std() < 1e-6 and ratio[200] > ratio[3] + 0.5
assert paths["cpgd"][0, 1] < 1.2 and paths["cpgd"][0].max() < 1.5 and abs(paths["pgd"][0, 200] - 2) < 1e-3
assert abs(rest[0] - 1.218) < 2e-3 and abs(rest[2] - 0.8) < 2e-3

# %% [markdown]
# `cpg` and `grpo` move together: 1.295 after one step. From step 3 on everything is clipped, and the gradient is 0. The
# objective stays constant, while Adam's momentum carries the ratio to 2.5. The clip bounds the objective and not the
# ratio, and no term reduces the ratio again.
#
# In `cpgd` the drift brings the clipped actions back at once, to 1.140. Later the best action oscillates between about
# 1.2 and 1.4, because the steps are too large. With steps of 0.001 it settles at 1.218, not at the clip's bound: the
# bad action is at its bound, 0.80, and the probability that it loses must go somewhere. `pgd` overshoots, and settles
# at $1 + A/\alpha = 2$. On the right each row has its own objective, so do not compare heights.
#
# ## 5. What is proved, checked, claimed
#
# **Proved in this text**, and checked by numbers: with summed tokens, the first gradient is the policy gradient. The
# mean of k3 is the KL, and its value and gradient are 0 at $\pi_{\mathrm{old}}$. The rest is for one context, exact
# expectations, a mean A of 0 and no clip. Above the bound $r^* = 1 + A/\alpha$ (with the bounded drift too, if
# $\alpha > \max A / c$), and the gain is $\mathrm{Var}(A)/\alpha$. Below it there is no maximum. With one α above all
# bounds the reward rises to the best one.
#
# **Only checked**, on one example each: where clipped ratios go under Adam; that `cpgd` grows by factors of 1.2; that
# averaging tokens changes the direction of the gradient; `max_advantage`, whose α changes from rollout to rollout, for
# rewards of 0 and 1.
#
# **Neither**: sampled advantages, many contexts with shared weights, momentum, and answers of several tokens. With
# several tokens the mean advantage after a prefix is some $m \ne 0$, even with exact expectations and unshared weights.
# The weights then sum to $\alpha + m$, and the maximum is at $r^* = (\alpha + A)/(\alpha + m)$. The ratios $1 +
# A/\alpha$ do not even form a distribution there; the bound $\alpha > -\min A$ stays the same. [The choice of the
# default](../docs/default.md) measures how well `max_advantage` works: not well in long runs.
#
# **Claimed by the paper** (arXiv 2505.12504): that its method converges, and that it trains more stably. The package
# takes formulas from it. Its theorems are not proved here, and the proofs above are not from it.

# %%
A, m = A4[None] + 0.3, 0.3  # this is after a good prefix; α = 1
assert torch.allclose(ascend("pgd", old4, A)[-1], (1 + A) / (1 + m), atol=1e-4)
print(f"mean of r* {(old4 * (1 + A) / (1 + m)).sum():.2f}, of 1 + A/alpha {(old4 * (1 + A)).sum():.2f}")

# %% [markdown]
# ## 6. Outside language
#
# A loss does not depend on text. It needs log-probabilities of the actions, (B, T), a mask, and rewards in groups. Here
# a "prompt" is the state at the start, a response is a row of actions, and the policy is a table of logits.
#
# Two tables describe a world: the state to which an action leads (−1 is the end), and the probability of a reward of 1.
# A bandit has 4 contexts and 10 arms. In each context one arm pays in 90 % of cases, the others in less than half. The
# maze has 4 by 4 cells, three pits, 4 starts, and a goal, which alone gives a reward. A row has at most 12 moves.
#
# One run proves nothing, so one table holds 32 copies of each world, which train together: the same maze 32 times, but
# 32 different bandits. They share one α, the largest |A| of all 128 groups. Adam's steps do not depend on the number of
# rows in the mean. The other two seeds below change the random draws, not the worlds.

# %%
COPIES = 32  # fast: 4
ROLLOUTS = 30  # fast: 6


def bandit():
    contexts = torch.arange(4 * COPIES)
    pay = torch.rand(len(contexts), 10, generator=torch.Generator().manual_seed(0)) / 2
    pay[contexts, contexts % 10] = 0.9
    return torch.full(pay.shape, -1), pay, contexts, 1  # next states, probability of a reward, starts, longest row


def maze():
    row, column, copy = torch.arange(16) // 4, torch.arange(16) % 4, 16 * torch.arange(COPIES)[:, None, None]
    moves = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
    leads = torch.stack([r.clamp(0, 3) * 4 + c.clamp(0, 3) for r, c in moves], dim=1)
    goal, pits = leads == 15, torch.isin(leads, torch.tensor([5, 7, 8]))
    leads = torch.where(goal | pits, -1, leads + copy).flatten(0, 1)
    return leads, goal.float().repeat(COPIES, 1), (torch.tensor([0, 3, 12, 10]) + copy[..., 0]).flatten(), 12


# %%
def value(theta, world):
    """Exact expected reward of each copy, computed backwards from the last move."""
    leads, pay, starts, longest = world
    v, p = torch.zeros(len(leads)), theta.detach().softmax(-1)
    for _ in range(longest):
        v = (p * (pay + (leads >= 0) * v[leads])).sum(-1)
    return v[starts].view(COPIES, 4).mean(dim=1)


def play(theta, world, G, generator):
    """G rows of actions from each start: states, actions and mask (B, T), and rewards (B,)."""
    leads, pay, starts, longest = world
    s, p, rows = starts.repeat_interleave(G), theta.detach().softmax(-1), []
    alive, reward = torch.ones(len(s), dtype=torch.bool), torch.zeros(len(s))
    for _ in range(longest):
        a = torch.multinomial(p[s], 1, generator=generator)[:, 0]
        rows.append((s, a, alive))
        reward += alive * torch.bernoulli(pay[s, a], generator=generator)
        alive, s = alive & (leads[s, a] >= 0), leads[s, a].clamp(min=0)
    return (*(torch.stack(column, dim=1) for column in zip(*rows, strict=True)), reward)


# %%
def learn(name, world, learning_rate, K, G=8, seed=0):
    """The exact values before training and after each rollout of K updates, (31, copies); α and shares, (30, 3)."""
    algorithm, generator, alpha = ALGORITHMS[name], torch.Generator().manual_seed(seed), 1.0
    theta = torch.zeros(world[0].shape, requires_grad=True)
    adam, values, seen = torch.optim.Adam([theta], lr=learning_rate), [value(theta, world)], []
    for _ in range(ROLLOUTS):
        states, actions, mask, rewards = play(theta, world, G, generator)
        old = theta.log_softmax(-1)[states, actions].detach()
        A = algorithm.advantages(rewards.view(-1, G), mask.sum(1).view(-1, G)).flatten()
        alpha = max_advantage_coef(A, previous=alpha)
        groups = (mask * (actions + 1)).view(-1, G, mask.shape[1])
        same = (groups == groups[:, :1]).all(dim=2).all(dim=1)
        seen.append([alpha, (A.view(-1, G) == 0).all(dim=1).float().mean(), same.float().mean()])
        settings = LossSettings(drift_coef=alpha)
        for _ in range(K):
            adam.zero_grad()
            algorithm.loss(theta.log_softmax(-1)[states, actions], old, A, mask, settings).loss.backward()
            adam.step()
        values.append(value(theta, world))
    return torch.stack(values), torch.tensor(seen)


# %% [markdown]
# *Gentle* training makes 4 updates per rollout at a learning rate of 0.1, *aggressive* training 16 updates at 1.0. G =
# 8 throughout. "A = 0" is the share of the last rollout's groups whose answers all got the same reward, and "same" the
# share whose answers were all the same.
#
# **Predict.** Which row learns fastest in gentle training? Which is best in aggressive training? Does any of them lose
# a high reward again?

# %%
figure, axes = plt.subplots(1, 4, figsize=(11, 3.4), sharey=True, constrained_layout=True)
panels = [(world, way) for world in (bandit, maze) for way in (("gentle", 0.1, 4), ("aggressive", 1.0, 16))]
history, rollouts = {}, {}
for axis, (world, (way, rate, K)) in zip(axes, panels, strict=True):
    title = f"{world.__name__}, {way}"
    print(f"{title:<18} after 5   after 30            below 0.6   A = 0    same   cpgd minus this")
    for i, name in enumerate(NAMES):
        values, seen = history[title, name], rollouts[title, name] = learn(name, world(), rate, K)
        at, low, high = bootstrap_mean(values[-1])
        print(f"  {name:<16} {values[5].mean():>7.2f}   {at:.2f} [{low:.2f}, {high:.2f}]", end="")
        print(f" {(values[-1] < 0.6).sum():>12} {seen[-1, 1]:>7.0%} {seen[-1, 2]:>7.0%}", end="")
        lead = bootstrap_mean(history[title, "cpgd"][-1] - values[-1])
        print("   {:+.3f} [{:+.3f}, {:+.3f}]".format(*lead) if i else "")
        axis.plot(values.mean(dim=1), label=name, **line_style(i)._asdict(), markevery=(2 * i, 9), ms=5)
    axis.set(title=title, xlabel="rollouts")
axes[0].set_ylabel("exact expected reward")
axes[3].legend(fontsize=9, loc="lower right")
plt.show()

# %%
print("aggressive, other seeds: cpgd minus ", *(f"  {name:<23}" for name in NAMES[1:-1]), " pgd")
leads = []
for world in (bandit, maze):
    for seed in (1, 2):
        first, *others = (learn(name, world(), 1.0, 16, seed=seed)[0][-1] for name in NAMES)
        leads.append([bootstrap_mean(first - other) for other in others])
        columns = ("  {:+.3f} [{:+.3f}, {:+.3f}]".format(*lead) for lead in leads[-1])
        print(f"{world.__name__:<8} seed {seed}", " " * 20, *columns)
if COPIES == 32:
    for place in ("bandit", "maze"):
        ways = ("gentle", "aggressive")
        gentle, aggressive = (torch.stack([history[f"{place}, {way}", name] for name in NAMES]) for way in ways)
        for values in (gentle, aggressive):
            assert values[0, 5].mean() < values[1:, 5].mean(dim=1).min()  # cpgd is the slowest
        assert gentle[:, -1].mean(dim=1).min() > gentle[:, -1].mean(dim=1).max() - 0.02
    leads.append([bootstrap_mean(aggressive[0, -1] - other[-1]) for other in aggressive[1:]])
    assert all(lead.low > 0.1 for row in leads[2:] for lead in row[:2])  # cpgd leads cpg and grpo in this maze
    for name in ("cpg", "grpo"):
        assert rollouts["maze, aggressive", name][-1, 1] > 0.95
        assert rollouts["bandit, aggressive", name][-1, 1] < 0.5 and rollouts["bandit, aggressive", name][-1, 2] > 0.95
    assert all((values[-1] > 0.5 * values.max(dim=0).values).all() for values in history.values())
    alphas = torch.stack([seen[:, 0] for (_, name), seen in rollouts.items() if name in ("cpgd", "pgd")])
    assert (alphas - 7 / 8**0.5).abs().max() < 1e-3

# %% [markdown]
# In gentle training all four end within 0.02 of each other, and `cpgd` is the slowest. After 5 rollouts it has 0.45 in
# the bandit and 0.48 in the maze, the others 0.49 to 0.50 and 0.56 to 0.61.
#
# In aggressive training `cpg` and `grpo` have 0.67 to 0.70 after 5 rollouts, and `cpgd` 0.41 and 0.34. Then `cpg` and
# `grpo` stop improving: in the maze 13 and 12 of their 32 copies end below 0.6, of `cpgd` 2. There all eight answers to
# a start get the same reward in 99 % of the groups, so A is 0 and nothing more is learned. In the bandit A is 0 in only
# 32 % and 31 %, but in 98 % all eight answers chose the same arm. Their A is then payout luck; it sums to 0, and so
# does the first gradient.
#
# `cpgd` ends higher than both in the maze: by 0.22 to 0.28, beyond the intervals, in all three seeds. In the bandit it
# leads by 0.04 to 0.11, and its lead over `grpo` is not certain: with seed 2 the interval contains 0.
#
# `pgd`, the drift without the clip, learns faster than `cpgd` and ends as high or a little higher: by 0.03 to 0.06 in
# the aggressive bandit, and by 0.005 in the gentle maze. In the aggressive maze it is once higher by 0.04, beyond the
# interval, and twice undecided. That is evidence against CPGD's clip here. Section 3 explains it: the clip costs speed,
# and here the drift is enough. On the language model a large drift with the clip harms long runs, and a wider clip
# takes most of the harm away ([the choice of the default](../docs/default.md)); `pgd` has no published runs there.
#
# In every rollout of `cpgd` and `pgd` some group of the 128 had a single success or failure, so α was $7/\sqrt{8} =
# 2.47$, the largest possible with G = 8. So `max_advantage` does not adapt here. It is a fixed α, larger than many a
# single world would have.
#
# No copy ended below half of its best exact value. (The results page defines *collapse* differently, by means of
# training rewards over 10 steps.) The states of a table share no weights; such a policy fails by committing too early.
# Small worlds show a mechanism. They do not say how important it is elsewhere.
#
# ## Exercises
#
# 1. Use twice the α of `max_advantage` in `improve` (its `rule`). By which factor does a small $p$ grow per rollout
#    with `pgd`?
# 2. A group's mean contains the answer's own reward. For groups of G = 2 with weight `equal`, derive by what factor
#    that shrinks the mean gradient, and check it over all 225 pairs of answers.
# 3. Give GRPO the drift (`grpo_drift`) and train it aggressively in the maze. Does the drift matter there, or the
#    log-ratio?

# %% solution
# Solution 1
# r* = 1 + A / alpha = 1 + (1 - p) / (2 (1 - p)) = 1.5, for p < 1/2.
shares = improve("pgd", rollouts=4, learning_rate=2.0, rule=lambda A: 2 * max_advantage_coef(A))
assert torch.allclose(shares[1:] / shares[:-1], torch.tensor(1.5), atol=0.01)

# %% solution
# Solution 2
# A_1 = R_1 - (R_1 + R_2) / 2 = (R_1 - R_2) / 2. R_2 does not depend on y_1, so it is only a baseline, and R_1 / 2 is
# left. The factor is 1 - 1 / G = 1 / 2. It changes the size of the step and not its direction.
pairs = torch.cartesian_prod(torch.arange(15), torch.arange(15))
cpg, rows = ALGORITHMS["cpg"], pairs.flatten()
A_pairs = cpg.advantages(rewards[pairs], lengths[pairs], advantage_weight="equal").flatten()
weights = p_old[pairs].prod(dim=1).repeat_interleave(2)[:, None] / 2 * mask[rows]
loss = cpg.loss(logps(theta)[rows], old[rows], A_pairs, mask[rows], token_weights=weights).loss
(g,) = torch.autograd.grad(-loss, theta)
print(f"factor: {g.flatten() @ exact.flatten() / exact.square().sum():.6f}")
assert torch.allclose(g, exact / 2, atol=1e-14)

# %% solution
# Solution 3
history["maze, aggressive", "grpo_drift"] = learn("grpo_drift", maze(), 1.0, 16)[0]
for name in ("cpg", "grpo", "cpgd", "grpo_drift"):
    print(f"{name:<11}", "{:.2f} [{:.2f}, {:.2f}]".format(*bootstrap_mean(history["maze, aggressive", name][-1])))
# The drift matters. With it GRPO ends where CPGD does. `cpg`, with only the log-ratio, ends where GRPO does without it.
if COPIES == 32:
    with_drift, without = (bootstrap_mean(history["maze, aggressive", name][-1]) for name in ("grpo_drift", "cpg"))
    assert with_drift.low > without.high
