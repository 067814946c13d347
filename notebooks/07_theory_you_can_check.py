# %% [markdown]
# # 7. Theory you can check
#
# Where a policy is small enough to write down every answer it could give, an expectation is a sum, and a theorem can
# be held against numbers. That is done here with the package's own losses; then CPGD leaves language for a bandit and
# a small maze.
#
# **After this notebook you can**
#
# - show that the first gradient of CPGD is the policy gradient, and say under which averaging it is not;
# - derive how large the drift coefficient α must be, and read the bound off a rollout;
# - explain why a clip bounds the objective, but not the ratio;
# - say what about CPGD is proved here, what is only checked, and what is only claimed.
#
# About 25 seconds on a laptop's CPU.

# %%
from itertools import product

import matplotlib.pyplot as plt
import torch

from minicpgd import ALGORITHMS, TrainConfig
from minicpgd.algorithms import auto_drift_coef
from minicpgd.divergence import bounded_drift, exact_kl, k3
from minicpgd.experience import Draws
from minicpgd.learner import Learner
from minicpgd.plots.style import STYLE, look
from minicpgd.policy import quiet
from minicpgd.stats import mean

quiet()
torch.set_num_threads(1)  # sums in one order
plt.rcParams.update(STYLE)

# %% [markdown]
# ## 1. All fifteen answers of a policy
#
# Our policy writes `a`, `b` or the end `.`, at most three tokens. That makes 15 answers. In each of the 7 situations
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
# What we want to raise is the expected reward $J(\theta) = \sum_y \pi_\theta(y) R(y)$. Its gradient at
# $\pi_\theta = \pi_{\mathrm{old}}$ takes two lines. Since $\nabla \pi = \pi \nabla \ln \pi$, and since the
# probabilities always sum to 1,
#
# $$ \nabla J = \sum_y \pi_{\mathrm{old}}(y) R(y) \nabla \ln \pi_\theta(y), \qquad
#    0 = \sum_y \pi_{\mathrm{old}}(y)\, \mu\, \nabla \ln \pi_\theta(y). $$
#
# Subtract: $R$ may be replaced by $A = R - \mu$. And $\ln \pi_\theta(y)$ is the sum of its tokens' $\ell_t$, with the
# gradient of $d_t = \ell_t - \ell_{\mathrm{old},t}$. So $\nabla J = \nabla \sum_y \pi_{\mathrm{old}}(y) \sum_t d_t A$:
# CPGD's surrogate, no clip acting at $d = 0$.
#
# In the package the weight of each token is `token_weights`. Give it $\pi_{\mathrm{old}}(y)$, and the loss is an exact
# expectation.
#
# **Predict.** The package's rows divide a response's tokens by its length (`sequence_mean`). Does the gradient still
# point along $\nabla J$? Could any of the 17 rows have another gradient here than `cpg`?

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
# With the sum it is the policy gradient: no entry is off by more than $10^{-14}$. With the mean it is not: a token of
# a short answer counts more, and the direction turns a little (cosine 0.986). With the averaging that is theirs in the
# table, neither CPGD nor GRPO climbs exactly the expected reward once lengths differ. Given the same advantages and
# averaging, all 17 rows agree: only these two can tell them apart at the first update.
#
# ## 2. The drift
#
# For one token, k3 $= r - 1 - d$ with $r = e^d$ is never negative, since $e^d \ge 1 + d$, and its slope $r - 1$ is 0
# at $d = 0$. And given what has been written so far, $r - 1$ has mean 0 under $\pi_{\mathrm{old}}$. So the mean of
# $\sum_t$ k3 is that of $-\sum_t d_t$, which is $\mathrm{KL}(\pi_{\mathrm{old}} \,\|\, \pi_\theta)$ of whole answers.
#
# **Predict.** What is trained is `bounded_drift`, whose slope is $\min(r - 1, c)$ with $c = 2$: a straight line beyond
# $r = 3$. Will it be above or below the KL?

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
# At $\pi_{\mathrm{old}}$ value and gradient are 0; elsewhere the drift is positive. Mean k3 is the KL exactly. The
# trained term is the KL while every ratio is at most 3, and less beyond: a bound on the force, not a divergence.
#
# ## 3. How large must the drift be?
#
# Take one context with a few actions, exact expectations, no clip, and an $A$ whose mean under $\pi_{\mathrm{old}}$ is
# 0. Then CPGD's objective is one sum:
#
# $$ F(\pi) = \sum_a w_a \ln \frac{\pi(a)}{\pi_{\mathrm{old}}(a)}, \qquad
#    w_a = \pi_{\mathrm{old}}(a)\,(A(a) + \alpha), \qquad \sum_a w_a = \alpha $$
#
# *Claim 1.* If $\alpha > -\min A$, the only maximum has the ratios $r^* = 1 + A/\alpha$. Proof: all $w_a > 0$, so $F$
# is strictly concave, and a stationary point on the simplex is its only maximum. With a Lagrange multiplier $\lambda$
# for $\sum_a \pi(a) = 1$ we need $w_a = \lambda\, \pi(a)$. Summed over $a$: $\alpha = \lambda$. So
# $\pi(a) = w_a / \alpha$.
#
# *Claim 2.* This raises the expected advantage by $\mathrm{Var}(A)/\alpha$. Proof: it is
# $\sum_a (\pi(a) - \pi_{\mathrm{old}}(a)) A(a) = \sum_a \pi_{\mathrm{old}}(a) A(a)^2 / \alpha$.
#
# *Claim 3.* If $\alpha < -\min A$, there is no maximum. Proof: the worst action has $w_a < 0$. Let its $\pi(a)$ go to
# 0 and scale the others up. Its term $w_a \ln \pi(a)$ grows without end, theirs stay bounded.
#
# *Claim 4.* With the bounded drift of the package, claim 1 holds if also $\alpha > \max A / c$. Proof: the slope of an
# action's own $A d - \alpha\,\mathrm{drift}(d)$ is $A - \alpha \min(r - 1, c)$. It changes its sign once, at $r^*$, so
# every term is largest there; and these ratios do make a distribution, as their mean under $\pi_{\mathrm{old}}$ is 1.
#
# `auto_drift_coef` takes α = max|A|. With c = 2 that is beyond the bound of claim 4. It is never below −min A, but may
# be equal to it: the edge between claims 1 and 3. The closed form and this rule are the package's, not the paper's.
#
# Now by gradient ascent on logits, through the table's own loss. The row `pgd` is CPGD without the clip. Where $F$ is
# largest depends on $A/\alpha$ alone, so five α are run at once, each in its row.
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
    settings = {"drift_coef": alpha, "token_weights": weights}
    for _ in range(steps):
        logp = logits.log_softmax(-1).view(-1, 1)
        sgd.zero_grad()
        ALGORITHMS[name].loss(logp, weights.log(), A.flatten(), torch.ones_like(logp), **settings).loss.backward()
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
    steps = torch.arange(1, ASCENT + 1)
    left.loglog(steps, ratios[:, i, 3], label=f"{factor}", **look(i)._asdict(), markevery=(0.1, 0.2), ms=5)
left.set(xlabel="steps of gradient ascent", ylabel="ratio of the worst action", ylim=(1e-6, 3))
left.legend(title="α / bound", loc="lower left", fontsize=9)
grid = torch.linspace(1.0, 4, 50) * -A4.min()
for a in range(4):
    right.plot(grid, 1 + A4[a] / grid, color=look(a).color, linestyle=look(a).linestyle, label=f"A = {A4[a]:+.2f}")
    right.plot(alphas[3:], ratios[-1, 3:, a], look(a).marker, color=look(a).color, ms=7)
right.axvline(auto_drift_coef(A4), color="black", lw=1, ls=(0, (1, 2)))
right.set(xlabel="α  (dotted: max|A|)", ylabel="ratio at the maximum", xlim=(0.9, 3.9))
right.legend(fontsize=9, ncols=2, loc="upper right")
plt.show()
assert (ratios[-1, :3, 3] < ratios[99, :3, 3]).all()  # at the bound and below it

# %% [markdown]
# Above the bound the worst action settles where the formula says (right: lines are the formula, marks the ascent). At
# the bound $r^* = 0$, neared for ever and never reached. Below it the fall is steeper and has no end.
#
# ### Rollout after rollout
#
# Let each maximum be the next $\pi_{\mathrm{old}}$, with $A = R - \mu$ and one α above the bound of every round. By
# claim 2, μ never falls. It cannot pass the best reward, so the gains have a finite sum, and $\mathrm{Var}(A)$ goes to
# 0. The best action has $A \ge 0$, so it never loses probability; its $A$ must then go to 0, too, and μ reaches the
# best reward.
#
# Take rewards 0 and 1 and a share $p$ of right answers. Then $A$ is $1 - p$ or $-p$. Any α > 1 is above the bound of
# every round, and `auto` means $\alpha = \max(p, 1 - p)$.
#
# **Predict.** Start at $p = 0.05$. What is $p$ after one rollout with `auto`, after two? And with the clip at 1.2?


# %%
def climb(name, rollouts, learning_rate, rule=auto_drift_coef, p=0.05):
    shares = [p]
    for _ in range(rollouts):
        old, A = torch.tensor([p, 1 - p], dtype=torch.float64), torch.tensor([[1 - p, -p]], dtype=torch.float64)
        p = (ascend(name, old, A, alpha=rule(A), learning_rate=learning_rate)[-1, 0] * old)[0].item()
        shares.append(p)
    return torch.tensor(shares)


fixed = climb("pgd", rollouts=8, learning_rate=2.0, rule=lambda A: 1.1)
free = climb("pgd", rollouts=5, learning_rate=2.0)
clipped = climb("cpgd", rollouts=6, learning_rate=0.05)  # small steps: the clip has an edge to jump over
for label, shares in (("pgd, α = 1.1", fixed), ("pgd, auto", free), ("cpgd, auto", clipped)):
    print(f"{label:<12}", *(f"{p:.3f}" for p in shares))
assert (fixed.diff() > 0).all() and (fixed.diff() - fixed[:-1] * (1 - fixed[:-1]) / 1.1).abs().max() < 0.01
assert torch.allclose(free[1:5] / free[:4], torch.tensor(2.0), atol=0.01)
assert torch.allclose(clipped[1:7] / clipped[:6], torch.tensor(1.2), atol=0.02)

# %% [markdown]
# With α = 1.1 every gain is positive, and $p(1-p)/1.1$ within 0.01, which is what 300 steps leave open. With `auto`
# and $p < 1/2$, $r^* = 1 + (1-p)/(1-p) = 2$: the share of right answers doubles, in whatever unit rewards are given.
# From one half on, one rollout leads to the end: to 1 by the formula, to 0.999 in these 300 steps. With the clip the
# same climb goes by factors of 1.2 at first. However many updates it makes, CPGD is slow here by construction. That is
# a price; it can only pay where a doubling is not deserved, since $A$ comes from a few samples.
#
# ### The same bound on a real rollout
#
# Six rollouts of the embedded model, 16 problems with 16 answers each. As `drift_coef` is "auto", `experience` sets it.
#
# **Predict.** Which is larger, $-\min A$ or $\max A$? What is $A$ of a single failure among 16 answers?

# %%
SEEDS = 6  # fast: 2
learner = Learner.from_config(TrainConfig(algorithm="cpgd", drift_coef="auto"))
print("seed   right   -min A   max A   drift_coef   1 + A/alpha from    to   15 of 16 right   1 of 16 right")
for seed in range(SEEDS):
    made = learner.experience(Draws.at(seed=seed, step=1))
    A, alpha, right = made.advantages, learner.drift_coef, made.rewards.sum(dim=1)
    low, high = 1 + A.min() / alpha, 1 + A.max() / alpha
    print(f"{seed:>4} {made.rewards.mean():>7.2f} {-A.min():>8.2f} {A.max():>7.2f} {alpha:>12.2f}", end="")
    print(f" {low:>18.2f} {high:>5.2f} {(right == 15).sum():>16} {(right == 1).sum():>15}")
    assert alpha == auto_drift_coef(A) >= -A.min() and low >= 0 and high <= 2
    assert not (right == 15).any() or abs(A.min() + 15 / 4) < 0.01  # -(G - 1) / sqrt(G)

# %% [markdown]
# A single failure among G has $A = -(G-1)/\sqrt{G}$, −3.75 here: seeds 0 and 4 met one. Seed 3 met a single success,
# +3.75, and its α is three times −min A. So each of the two is the larger in turn, and in seed 2 they are equal.
#
# In three of six (seeds 0, 2, 4) α is the bound itself: the worst answer's $r^*$ is 0, neared and never reached.
# `auto` is there the edge of claim 1, which needs >, not inside it.
#
# ## 4. From the clip's edge
#
# Beyond its bound a token's own force is 0 ([notebook 2](02_ratio_clipping.ipynb)). But probabilities share a sum.
# Take four actions: two good ones just beyond 1.2, a bad one just below 0.8, and a slightly bad one at 1. Exact
# expectations, Adam, 0.1 per step.
#
# **Predict.** Where is the best one after one more step? After 200? Whom does the drift bring back?

# %%
old4, start = torch.tensor([[0.1, 0.2, 0.3, 0.4], [1.201, 1.201, 0.799, 1.0]], dtype=torch.float64)
A4 = torch.tensor([0.84, 0.44, -0.36, -0.16], dtype=torch.float64)
assert abs((old4 * A4).sum()) < 1e-12 and abs((old4 * start).sum() - 1) < 1e-12
settings = {"drift_coef": auto_drift_coef(A4), "token_weights": old4[:, None]}


def walk(name, rate):
    """201 steps of Adam: the four ratios, the objective and the gradient's length, (6, 201)."""
    logits, path = (old4 * start).log().requires_grad_(), []
    adam = torch.optim.Adam([logits], lr=rate)
    for _ in range(201):
        adam.zero_grad()
        logp = logits.log_softmax(-1)[:, None]
        output = ALGORITHMS[name].loss(logp, old4.log()[:, None], A4, torch.ones(4, 1), **settings)
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
        axis.plot(line, label=name, **look(i)._asdict(), markevery=(i * 5, 25), ms=5)
axes[0].axhline(1.2, color="black", lw=1, ls=(0, (4, 2)))
axes[0].set(xlabel="steps of Adam", ylabel="ratio of the best action")
axes[1].set(xlabel="steps of Adam", ylabel="its own objective  [units of A]")
axes[1].legend(ncols=2, fontsize=9)
plt.show()
for name in ("cpg", "grpo"):  # no gradient, the objective stands still, and the ratio goes on
    ratio, *_, objective, gradient = paths[name]
    assert gradient[3:].max() < 1e-12 and objective[3:].std() < 1e-6 and ratio[200] > ratio[3] + 0.5
assert paths["cpgd"][0, 1] < 1.2 and paths["cpgd"][0].max() < 1.5 and abs(paths["pgd"][0, 200] - 2) < 1e-3
assert abs(rest[0] - 1.218) < 2e-3 and abs(rest[2] - 0.8) < 2e-3

# %% [markdown]
# `cpg` and `grpo` go hand in hand: 1.295 after one step, and from step 3 on everything is clipped and the gradient is
# 0. The objective stands still; the ratio, carried on by Adam's momentum, ends at 2.5. The clip bounds the objective,
# not the ratio, and nothing pulls back.
#
# In `cpgd` the drift pulls the clipped ones back at once, to 1.140, and afterwards the best action swings between
# about 1.2 and 1.4. The steps are too large for it to rest. With steps of 0.001 it rests at 1.218, and not at its own
# kink: the bad action is at its kink, 0.80, and what that one gives up has to go somewhere. `pgd` overshoots, and
# settles at $1 + A/\alpha = 2$. On the right each row has its own objective (that of `cpgd` and `pgd` is minus the
# drift's price): look whether a line still moves, and do not rank them.
#
# ## 5. What is proved, checked, claimed
#
# **Proved in this text**, and checked by numbers: with tokens summed, the first gradient is the policy gradient; the
# mean of k3 is the KL, with neither value nor gradient at $\pi_{\mathrm{old}}$. In one context, with exact
# expectations, a mean A of 0 and no clip: above the bound $r^* = 1 + A/\alpha$ (with the bounded drift too, if
# $\alpha > \max A / c$) and the gain $\mathrm{Var}(A)/\alpha$; below it no maximum; and the rise to the best reward
# for one α above all bounds.
#
# **Only checked**, on one example each: where clipped ratios go under Adam; that `cpgd` climbs by 1.2; that averaging
# tokens turns the gradient; `auto`, whose α changes from rollout to rollout, for rewards of 0 and 1.
#
# **Neither**: sampled advantages, many contexts with shared weights, momentum; nor an answer of several tokens. There,
# given a prefix, the mean advantage is some $m \ne 0$, even with exact expectations and unshared weights: the weights
# sum to $\alpha + m$, and the maximum is at $r^* = (\alpha + A)/(\alpha + m)$. The ratios $1 + A/\alpha$ do not even
# make a distribution; the bound $\alpha > -\min A$ survives. That `auto` is *good* is measured in `docs/results.md`.
#
# **Claimed by the paper** (arXiv 2505.12504): that its method converges, and that it trains more stably. What is taken
# from it are formulas. Its theorems are not re-proved here, and the proofs above are not its.

# %%
A, m = A4[None] + 0.3, 0.3  # after a good prefix; α = 1
assert torch.allclose(ascend("pgd", old4, A)[-1], (1 + A) / (1 + m), atol=1e-4)
print(f"mean of r* {(old4 * (1 + A) / (1 + m)).sum():.2f}, of 1 + A/alpha {(old4 * (1 + A)).sum():.2f}")

# %% [markdown]
# ## 6. Outside language
#
# Nothing in a loss knows of text. It wants log-probabilities of what was done, (B, T), a mask, and rewards in groups.
# A "prompt" is then the state one starts in, a response a row of actions, and the policy a table of logits.
#
# A world is two tables: where an action leads (−1 is the end), and the chance of a reward of 1 when it is taken. A
# bandit has 4 contexts and 10 arms; in each, one arm pays in 90 % of cases, the others in less than half. The maze has
# 4 by 4 cells, three pits, 4 starts, and a goal where alone there is a reward; a row has 12 moves at most.
#
# One run proves nothing, so 32 copies of each world stand side by side in one table and are trained together: the same
# maze 32 times, but 32 different bandits. They share one α, the largest |A| of all 128 groups; Adam does not mind that
# the mean is over more rows. The other two seeds below change the draws, not the worlds.

# %%
COPIES = 32  # fast: 4
ROLLOUTS = 30  # fast: 6


def bandit():
    contexts = torch.arange(4 * COPIES)
    pay = torch.rand(len(contexts), 10, generator=torch.Generator().manual_seed(0)) / 2
    pay[contexts, contexts % 10] = 0.9
    return torch.full(pay.shape, -1), pay, contexts, 1  # where to, chance of a reward, starts, longest row


def maze():
    row, column, copy = torch.arange(16) // 4, torch.arange(16) % 4, 16 * torch.arange(COPIES)[:, None, None]
    moves = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
    leads = torch.stack([r.clamp(0, 3) * 4 + c.clamp(0, 3) for r, c in moves], dim=1)
    goal, pits = leads == 15, torch.isin(leads, torch.tensor([5, 7, 8]))
    leads = torch.where(goal | pits, -1, leads + copy).flatten(0, 1)
    return leads, goal.float().repeat(COPIES, 1), (torch.tensor([0, 3, 12, 10]) + copy[..., 0]).flatten(), 12


# %%
def value(theta, world):
    """Exact expected reward of each copy, backwards from the last move."""
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
        alpha = auto_drift_coef(A, previous=alpha)
        groups = (mask * (actions + 1)).view(-1, G, mask.shape[1])
        same = (groups == groups[:, :1]).all(dim=2).all(dim=1)
        seen.append([alpha, (A.view(-1, G) == 0).all(dim=1).float().mean(), same.float().mean()])
        for _ in range(K):
            adam.zero_grad()
            algorithm.loss(theta.log_softmax(-1)[states, actions], old, A, mask, drift_coef=alpha).loss.backward()
            adam.step()
        values.append(value(theta, world))
    return torch.stack(values), torch.tensor(seen)


# %% [markdown]
# Gentle is 4 updates per rollout at 0.1, hard is 16 updates at 1.0; G = 8 throughout. "A = 0" and "same" are the shares
# of the last rollout's groups whose answers all earned the same, and whose answers were all the same.
#
# **Predict.** Who learns fastest when pushed gently? Who is best when pushed hard? Does anybody fall from a height?

# %%
figure, axes = plt.subplots(1, 4, figsize=(11, 3.4), sharey=True, constrained_layout=True)
panels = [(world, push) for world in (bandit, maze) for push in (("gentle", 0.1, 4), ("hard", 1.0, 16))]
history, rollouts = {}, {}
for axis, (world, (push, rate, K)) in zip(axes, panels, strict=True):
    title = f"{world.__name__}, {push}"
    print(f"{title:<15} after 5   after 30            below 0.6   A = 0    same   cpgd minus this")
    for i, name in enumerate(NAMES):
        values, seen = history[title, name], rollouts[title, name] = learn(name, world(), rate, K)
        at, low, high = mean(values[-1])
        print(f"  {name:<13} {values[5].mean():>7.2f}   {at:.2f} [{low:.2f}, {high:.2f}]", end="")
        print(f" {(values[-1] < 0.6).sum():>12} {seen[-1, 1]:>7.0%} {seen[-1, 2]:>7.0%}", end="")
        print("   {:+.3f} [{:+.3f}, {:+.3f}]".format(*mean(history[title, "cpgd"][-1] - values[-1])) if i else "")
        axis.plot(values.mean(dim=1), label=name, **look(i)._asdict(), markevery=(2 * i, 9), ms=5)
    axis.set(title=title, xlabel="rollouts")
axes[0].set_ylabel("exact expected reward")
axes[3].legend(fontsize=9, loc="lower right")
plt.show()

# %%
print("hard, other seeds: cpgd minus ", *(f"  {name:<23}" for name in NAMES[1:-1]), " pgd")
leads = []
for world in (bandit, maze):
    for seed in (1, 2):
        first, *others = (learn(name, world(), 1.0, 16, seed=seed)[0][-1] for name in NAMES)
        leads.append([mean(first - other) for other in others])
        shown = ("  {:+.3f} [{:+.3f}, {:+.3f}]".format(*lead) for lead in leads[-1])
        print(f"{world.__name__:<8} seed {seed}", " " * 14, *shown)
if COPIES == 32:
    for place in ("bandit", "maze"):
        gentle, hard = (torch.stack([history[f"{place}, {push}", n] for n in NAMES]) for push in ("gentle", "hard"))
        for values in (gentle, hard):
            assert values[0, 5].mean() < values[1:, 5].mean(dim=1).min()  # cpgd is the slowest
        assert gentle[:, -1].mean(dim=1).min() > gentle[:, -1].mean(dim=1).max() - 0.02
    leads.append([mean(hard[0, -1] - other[-1]) for other in hard[1:]])
    assert all(lead.low > 0.1 for row in leads[2:] for lead in row[:2])  # over cpg and grpo, in the hard maze
    for name in ("cpg", "grpo"):
        assert rollouts["maze, hard", name][-1, 1] > 0.95
        assert rollouts["bandit, hard", name][-1, 1] < 0.5 and rollouts["bandit, hard", name][-1, 2] > 0.95
    assert all((values[-1] > 0.5 * values.max(dim=0).values).all() for values in history.values())  # nobody fell
    alphas = torch.stack([seen[:, 0] for (_, name), seen in rollouts.items() if name in ("cpgd", "pgd")])
    assert (alphas - 7 / 8**0.5).abs().max() < 1e-3

# %% [markdown]
# Pushed gently, all four end within 0.02 of each other, and `cpgd` is the slowest: after 5 rollouts it has 0.45 in the
# bandit and 0.48 in the maze, the others 0.49 to 0.50 and 0.56 to 0.61.
#
# Pushed hard, `cpg` and `grpo` are at 0.67 to 0.70 after 5 rollouts, `cpgd` at 0.41 and 0.34. Then they stand still:
# in the maze 13 and 12 of the 32 copies end below 0.6, of `cpgd` 2. There all eight answers to a start earn the same
# in 99 % of the groups: their A is 0, and nothing more is learned. In the bandit A is 0 in only 32 % and 31 %, but in
# 98 % all eight pulled the same arm. Their A is then payout luck alone; it sums to 0, and so does the first push.
#
# `cpgd` passes them in the maze: by 0.22 to 0.28, beyond the intervals, in all three seeds. In the bandit it leads by
# 0.04 to 0.11, and its lead over `grpo` is within what another seed undoes: with seed 2 the interval contains 0.
#
# `pgd`, the drift without the clip, learns faster than `cpgd` and ends as high or a little higher: by 0.03 to 0.06 in
# the hard bandit, by 0.005 in the gentle maze; in the hard maze once by 0.04, beyond the interval, and twice
# undecided. That speaks against CPGD's clip here, and section 3 leads one to expect it: the clip costs speed where the
# drift already holds. On the language model it was the other way round: without its clip CPGD ended at 0.46 in place
# of 0.83 (`docs/results.md`, section 2).
#
# In every rollout of `cpgd` and `pgd` α was $7/\sqrt{8} = 2.47$, the largest possible with G = 8: some group of the 128
# had a single success or failure. `auto` does not adapt here. It is a fixed α, larger than many a lone world's.
#
# And nobody fell from a height, to less than half of the best exact value (the results page calls *collapse* something
# else: means of training rewards over 10 steps). A table shares no weights between its states; what goes wrong in it
# is to commit too early. Small worlds show a mechanism. They do not say how much it weighs elsewhere.
#
# ## Exercises
#
# 1. Use twice the α of `auto` in `climb` (its `rule`). By which factor does a small $p$ grow per rollout with `pgd`?
# 2. A group's mean contains the answer's own reward. For groups of G = 2 with weight `equal`, derive by what factor
#    that shrinks the mean gradient, and check it over all 225 pairs of answers.
# 3. Give GRPO the drift (`grpo_drift`) and push it hard through the maze. Is it the drift or the log-ratio that
#    matters there?

# %% solution
# Solution 1
# r* = 1 + A / alpha = 1 + (1 - p) / (2 (1 - p)) = 1.5, for p < 1/2.
shares = climb("pgd", rollouts=4, learning_rate=2.0, rule=lambda A: 2 * auto_drift_coef(A))
assert torch.allclose(shares[1:] / shares[:-1], torch.tensor(1.5), atol=0.01)

# %% solution
# Solution 2
# A_1 = R_1 - (R_1 + R_2) / 2 = (R_1 - R_2) / 2. R_2 does not depend on y_1, so it is a mere baseline, and R_1 / 2 is
# left: the factor is 1 - 1 / G = 1 / 2. That changes the step and not its direction.
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
history["maze, hard", "grpo_drift"] = learn("grpo_drift", maze(), 1.0, 16)[0]
for name in ("cpg", "grpo", "cpgd", "grpo_drift"):
    print(f"{name:<11}", "{:.2f} [{:.2f}, {:.2f}]".format(*mean(history["maze, hard", name][-1])))
# The drift. With it GRPO ends where CPGD does; `cpg`, which has the log-ratio alone, ends where GRPO does without it.
if COPIES == 32:
    with_drift, without = (mean(history["maze, hard", name][-1]) for name in ("grpo_drift", "cpg"))
    assert with_drift.low > without.high
