# %% [markdown]
# # 3. The drift: estimating a KL, differentiating it, and training with it
#
# CPGD penalises a policy for moving away from the policy that sampled. The penalty is a Kullback-Leibler divergence,
# estimated from samples. This notebook shows how, first on a policy that allows exact sums, then on a real one.
#
# **After this notebook you can**
#
# - tell k1, k2 and k3 apart by value, bias and noise;
# - say why an estimator of a KL, put into a loss, may have the gradient of something else, or none;
# - explain why CPGD trains with $\min(r - 1, c)$, and why the drift does nothing in the first update;
# - predict where a token's ratio settles for a given α, and say what a large α costs.
#
# The notebook takes about 30 seconds on a laptop's CPU.

# %%
import matplotlib.pyplot as plt
import torch

from minicpgd import TrainConfig
from minicpgd.algorithms import ALGORITHMS, LossSettings, bounded_drift, exact_kl, k1, k2, k3, max_advantage_coef
from minicpgd.models import quiet
from minicpgd.plots.style import COLOURS, DASHES, KL, MARKERS, STYLE, line_style
from minicpgd.training import Learner, seed_step

quiet()
plt.rcParams.update(STYLE)
ESTIMATORS = (k1, k2, k3)

# %% [markdown]
# ## 1. Three estimators of one number
#
# How far is a policy q from a policy p? The KL divergence is a sum over all actions a,
#
# $$ \mathrm{KL}(p \,\|\, q) = \sum_a p(a)\,\ln\frac{p(a)}{q(a)} $$
#
# in nats. A language model has too many actions for this sum. But p has sampled some, and for each sample we know $e =
# \ln q - \ln p$. The mean of each of three functions of e is this KL, or nearly: k1 $= -e$, k2 $= e^2/2$, k3 $=
# \exp(e) - 1 - e$.
#
# Our policy here is a softmax over six actions, so `exact_kl` can compute the sum. We move it further and further, and
# take 100 000 samples each time.
#
# **Predict.** All three are nearly right on average, as long as p and q are close. Which one has the most noise? Which
# one becomes wrong first as the distance grows?

# %%
generator = torch.Generator().manual_seed(0)
old, direction = torch.randn(2, 6, generator=generator, dtype=torch.float64)
rows, biases = [], []
for size in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0):
    new = old + size * direction
    actions = torch.multinomial(old.softmax(0), 100_000, replacement=True, generator=generator)
    e = (new.log_softmax(0) - old.log_softmax(0))[actions]
    rows.append((exact_kl(old, new).item(), [(k(e).mean().item(), k(e).std().item()) for k in ESTIMATORS]))
    everywhere = new.log_softmax(0) - old.log_softmax(0)  # this replaces sampling: each action has its probability
    biases.append([(old.softmax(0) * k(everywhere)).sum().item() / rows[-1][0] - 1 for k in ESTIMATORS])
    print(f"KL {rows[-1][0]:.5f}   mean and deviation:", end="")
    print(*(f"  {k.__name__} {m:.5f} ± {s:.4f}" for k, (m, s) in zip(ESTIMATORS, rows[-1][1], strict=True)))

for truth, sampled in rows:
    for mean, deviation in (sampled[0], sampled[2]):  # the means of k1 and k3 are right, within five standard errors
        assert abs(mean - truth) < 5 * deviation / 100_000**0.5
assert all(abs(bias[0]) < 1e-9 and abs(bias[2]) < 1e-9 for bias in biases)

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
truths = [truth for truth, _ in rows]
for which, k in enumerate(ESTIMATORS):
    style = line_style(which)._asdict()
    axes[0].plot(truths, [100 * bias[which] for bias in biases], label=k.__name__, **style)
    axes[1].plot(truths, [s[which][1] / t for t, s in rows], label=k.__name__, **style)
axes[0].set(xscale="log", title="Bias", xlabel="exact KL  [nats]", ylabel="error of the mean [% of the KL]")
axes[1].set(xscale="log", yscale="log", title="Noise", xlabel="exact KL  [nats]", ylabel="deviation / KL")
axes[0].legend()
plt.show()

# %% [markdown]
# k1 and k3 have no bias at all. k2 and k3 are never negative, because k2 is a square and $\exp(e) \ge 1 + e$. The error
# of k2 is 0.5 % at the smallest distance here and 39 % at the largest. It is a good approximation for small moves.
#
# The noise differs more. At the smallest distance the deviation of k1 is 93 times the KL. In the first row of the table
# its mean over 100 000 samples is still 17 % wrong, and many single values are negative, which a KL never is. The
# deviation of k3 is about as large as the KL itself, at every distance. Therefore runs report k3.
#
# ## 2. Estimating is not differentiating
#
# Now we put such a number into a loss. In one case the samples come from $\pi_\theta$ itself, and the distance is that
# to a *reference*, usually the model before training: $e = \ln \pi_{\mathrm{ref}} - \ln \pi_\theta$. Autograd
# differentiates the mean of k over the samples. It treats the samples as constants, although another θ would have
# sampled others.
#
# In the other case, CPGD's, the samples come from $\pi_{\mathrm{old}}$, which does not change, and $e = d = \ln
# \pi_\theta - \ln \pi_{\mathrm{old}}$. We let the reference be the old policy, so that one figure shows both cases.
#
# **Predict.** In the first case all three estimate $\mathrm{KL}(\pi_\theta \,\|\, \pi_{\mathrm{ref}})$, in the second
# $\mathrm{KL}(\pi_{\mathrm{old}} \,\|\, \pi_\theta)$. For which of the three is the mean of the derivatives the
# gradient of that KL?

# %%
new = old + direction


def slope(function, logits):
    """The gradient of a function of the policy's logits."""
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(function(logits), logits)[0]


def mean_gradient(k, sampler, sign):
    """The gradient that autograd finds for the mean of k(e) at `new`, with all samples at their probabilities."""
    return slope(
        lambda logits: (sampler.softmax(0) * k(sign * (logits.log_softmax(0) - old.log_softmax(0)))).sum(), new
    )


own = {k: mean_gradient(k, new, sign=-1) for k in ESTIMATORS}  # e = ln ref - ln theta
others = {k: mean_gradient(k, old, sign=1) for k in ESTIMATORS}  # e = ln theta - ln old
to_old, from_old = slope(lambda theta: exact_kl(theta, old), new), slope(lambda theta: exact_kl(old, theta), new)
for k, target in ((k1, torch.zeros_like(new)), (k2, to_old), (k3, from_old)):
    assert torch.allclose(own[k], target)
assert torch.allclose(others[k1], from_old) and torch.allclose(others[k3], from_old)
assert not torch.allclose(others[k2], from_old, atol=1e-2)

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.7), sharey=True, layout="constrained")
cases = (("samples from θ itself", own), ("samples from old", others))
for axis, (title, gradients) in zip(axes, cases, strict=True):
    for which, k in enumerate(ESTIMATORS):
        place = torch.arange(6) + 0.25 * (which - 1)
        hatch = (None, "//", "..")[which]
        axis.bar(
            place, gradients[k], width=0.22, color=COLOURS[which], hatch=hatch, edgecolor="white", label=k.__name__
        )
    axis.plot(range(6), from_old, "_", color="black", markersize=26, label="exact, KL(old ∥ θ)")
    axis.plot(range(6), to_old, "x", color="black", markersize=7, label="exact, KL(θ ∥ old)")
    axis.set(title=title, xlabel="action")
axes[0].set_ylabel("gradient in the action's logit")
handles, labels = axes[0].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside lower center", ncols=5)
plt.show()

# %% [markdown]
# On the left the bars of k1 have no height. Its value is right and its gradient is 0, because the mean of $\nabla \ln
# \pi_\theta$ over samples of $\pi_\theta$ is 0 for any policy: $\sum_a \pi \nabla \ln \pi = \sum_a \nabla \pi = \nabla
# 1 = 0$. In a loss such a penalty only adds noise. (In the reward it works, and `reinforce_pp` has it there: nobody
# differentiates a reward.) k2, which has a bias, has the gradient of $\mathrm{KL}(\pi_\theta \,\|\,
# \pi_{\mathrm{ref}})$. k3 has the gradient of the KL in the *other* direction.
#
# On the right the samples do not depend on θ, so the derivative of the mean is the mean of the derivatives. An
# estimator without bias then has a gradient without bias. k2 does not even have the gradient that it has on the left.
# This is CPGD's case.
#
# ## 3. From k3 to the term that is trained
#
# With samples of $\pi_{\mathrm{old}}$ both k1 and k3 are right. Their derivatives in $\ln \pi_\theta$ of one token are
# −1 and $r - 1$.
#
# **Predict.** Before the first update every ratio is 1. Which gradient does each of the two give a token then? And a
# token whose ratio has grown to 20?

# %%
d = torch.linspace(-3, 3, 601, dtype=torch.float64)
ratios = d.exp()
terms = {"k1": k1, "k3": k3, "bounded_drift, c = 2": bounded_drift}
figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
for which, (name, term) in enumerate(terms.items()):
    color, linestyle, _ = line_style(which)
    shape = {"color": color, "linestyle": linestyle, "linewidth": 3.4 - 0.7 * which}
    axes[0].plot(ratios, term(d), label=name, **shape)
    axes[1].plot(ratios, slope(lambda x, term=term: term(x).sum(), d), label=name, **shape)
axes[0].set(
    xscale="log", ylim=(-3, 9), title="Value", xlabel="ratio r  (log scale)", ylabel="term of one token  [nats]"
)
axes[1].set(
    xscale="log", ylim=(-2, 9), title="Slope", xlabel="ratio r  (log scale)", ylabel=r"derivative in $\ln \pi_\theta$"
)
for axis in axes:
    axis.set_xticks([0.05, 0.2, 1, 3, 20], ["0.05", "0.2", "1", "3", "20"])
    axis.set_xticks([], minor=True)
axes[0].legend()
plt.show()

# %% [markdown]
# k1 gives every sampled token the same gradient at every ratio, towards a larger probability. At r = 1 these gradients
# cancel on average, since probabilities add up to 1, but in a sample they do not, and that is noise. k3 gives a token
# at r = 1 no gradient.
#
# At r = 20 its gradient is 19. One such token can outweigh all others of an update. Where the gradient's norm is
# bounded (`max_grad_norm`), the others are scaled down with it. CPGD therefore bounds the *slope* of the trained term
# to $\min(r - 1, c)$ with c = 2. `bounded_drift` is a function with this slope. It is k3 up to r = 1 + c = 3, and from
# there on a straight line in d:
#
# $$ \mathrm{k3}\!\left(\min(d, \ln(1 + c))\right) + c \max(0,\ d - \ln(1 + c)) $$
#
# Beyond r = 3 the trained term is therefore not a KL. Runs still *report* k3.
#
# The slope is not symmetric. For a token whose ratio decreases, its size never exceeds 1, however small the ratio.
#
# ## 4. Zero at first, then active
#
# Now we use the embedded model, and passes over 64 answers with 4 updates each. All passes are made, although the
# package's default would end them at a KL of 0.003, and α is the largest |A| of the rollout.
#
# **Predict.** Before the first update, how large is the drift, and its gradient? And after one pass?

# %%
PASSES = 8  # fast: 2
SEEDS = 3  # fast: 1


def walk(name, seed, **settings):
    """The experience of a rollout, and the log-ratios before the first pass and after each pass."""
    drift = {"drift_coef": "max_advantage"} if ALGORITHMS[name].drift else {}
    usual = {"num_prompts": 8, "num_generations": 8, "num_iterations": PASSES, "target_kl": None} | drift
    learner = Learner.from_config(TrainConfig(algorithm=name, seed=seed, **(usual | settings)))
    generators = seed_step(seed, step=1)
    experience = learner.collect(generators)
    rollout = experience.rollout
    log_ratios = [learner.score(rollout) - rollout.logp]
    for _ in range(PASSES):
        learner.train_pass(experience, generators.order)
        log_ratios.append(learner.score(rollout) - rollout.logp)
    return experience, log_ratios


walks = {(name, seed): walk(name, seed) for seed in range(SEEDS) for name in ("cpg", "cpgd", "grpo", "grpo_drift")}


experience, log_ratios = walks["cpgd", 0]
for passes in (0, 1):
    d = log_ratios[passes][experience.rollout.mask].double()
    value, gradient = bounded_drift(d).mean().item(), slope(lambda x: bounded_drift(x).sum(), d).abs().max().item()
    print(f"after {passes} passes: mean value {value:.6f}, largest gradient of a token {gradient:.6f}")
    assert (value < 1e-6 and gradient < 1e-4) == (passes == 0)

# %% [markdown]
# Value and gradient are 0 up to rounding, since every r is 1. So the drift cannot limit the first update. It does not
# prevent a step that is too large; it corrects it afterwards. It has no effect without a second update on the same
# rollout.
#
# **Predict.** From the same rollouts, after 8 passes: how large is the KL with the drift and without it, for CPG and
# for GRPO?

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
ends = {}
for axis, pair in zip(axes, (("cpg", "cpgd"), ("grpo", "grpo_drift")), strict=True):
    for which, name in enumerate(pair):
        for seed in range(SEEDS):
            experience, log_ratios = walks[name, seed]
            values = [k3(d[experience.rollout.mask]).mean().item() for d in log_ratios]
            axis.plot(values, markersize=4, label=name if seed == 0 else None, **line_style(which)._asdict())
            ends[name, seed] = values[-1]
    axis.set(title=f"{pair[0]}, and with drift", xlabel="passes over the rollout", ylim=(0, None))
    axis.legend()
axes[0].set_ylabel(KL)
plt.show()

for seed in range(SEEDS):
    print(f"seed {seed}", {name: round(ends[name, seed], 4) for name in ("cpg", "cpgd", "grpo", "grpo_drift")})
    assert ends["cpgd", seed] < ends["cpg", seed] / 2 and ends["grpo_drift", seed] < ends["grpo", seed] / 2

# %% [markdown]
# With every seed the KL ends between 0.038 and 0.057 without the drift, and between 0.002 and 0.007 with it. After one
# pass the curves already differ; the drift acted in three of its four updates.
#
# The two panels are nearly the same. The ratio in GRPO's surrogate, or the log-ratio in CPG's, hardly changes this
# number. The drift does change it, and for GRPO as much. This figure gives no reason to prefer CPGD to GRPO with a
# drift.
#
# ## 5. α is the stiffness of a spring
#
# How large must α be? We return to the small policy, where expectations are exact. Without a clip the gradient weight
# of a token is $A - \alpha (r - 1)$, which is 0 at
#
# $$ r^* = 1 + \frac{A}{\alpha} $$
#
# It behaves like a spring: A is the force, α the stiffness, and $r - 1$ the extension. We maximise the objective of
# `pgd`, CPGD without clip, on all six actions, each with the weight $\pi_{\mathrm{old}}$. One action is bad and the
# others are good. A has mean 0 and deviation 1.
#
# **Predict.** For which α does the ratio of the bad action never settle?

# %%
p = old.softmax(0)
rewards = torch.ones(6, dtype=torch.float64)
rewards[1] = 0.0
A = (rewards - (p * rewards).sum()) / (p * (rewards - (p * rewards).sum()).square()).sum().sqrt()
print("pi_old:", *(f"{x:.3f}" for x in p), "  A:", *(f"{x:+.2f}" for x in A))


def ascend(alpha, steps=1500):
    """The ratios at each step of gradient ascent on the six logits, (steps, 6)."""
    logits, path = old.clone().requires_grad_(), []
    optimizer, settings = torch.optim.SGD([logits], lr=0.15), LossSettings(drift_coef=alpha)
    for _ in range(steps):
        logp = logits.log_softmax(0)
        path.append((logp - old.log_softmax(0)).detach().exp())
        tensors = logp[:, None], old.log_softmax(0)[:, None], A, torch.ones(6, 1)
        out = ALGORITHMS["pgd"].loss(*tensors, settings, token_weights=p[:, None])
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    return torch.stack(path)


# %%
worst = A.abs().max().item()
figure, axis = plt.subplots(figsize=(9, 3.5), layout="constrained")
for which, factor in enumerate((4, 2, 1, 0.8)):
    path, rest = ascend(factor * worst), 1 + A / (factor * worst)
    shape = {"color": COLOURS[which], "linestyle": DASHES[which]}
    axis.plot(path[:, 1], label=f"α = {factor} max |A|", **shape)
    if factor > 1:
        axis.plot(len(path) * 1.02, rest[1], MARKERS[which], color=COLOURS[which], markersize=8)
        assert torch.allclose(path[-1], rest, atol=1e-3)
    values = [f"r = {path[-1, a]:.4f}, 1 + A/alpha = {rest[a]:+.4f}" for a in (1, 0)]
    print(f"alpha = {factor:<3} max|A|   bad action: {values[0]}   a good one: {values[1]}")
axis.set(yscale="log", ylim=(1e-4, 2), xlabel="step of gradient ascent", ylabel="ratio of the bad action  (log scale)")
axis.legend(loc="lower left")
plt.show()

# %% [markdown]
# For α larger than max |A| each ratio settles at the value of the formula, to three digits: the bad action at 0.75 and
# at 0.50. Twice the stiffness halves the distance.
#
# For smaller α the formula gives the bad action a negative ratio, which is impossible. The drift's gradient on a token
# with a small ratio is at most α, and here the surrogate's, −A, is larger. Each step multiplies the probability of the
# bad action by about the same factor below 1, so the curve is a straight line on this axis. The limit between the two
# cases is α = −min A, which here is also max |A|. There r* is 0, and the ratio approaches it without ever reaching it.
# [Notebook 7](07_theory_you_can_check.ipynb) derives all this.
#
# `drift_coef="max_advantage"` sets α = max |A| for each rollout, which is never below −min A. If the largest |A| of a
# rollout belongs to a negative A, then α equals −min A. This rule is the package's, not the paper's. It was the
# package's first default, and is no longer: [in long runs with few updates per rollout it harms a
# policy](../docs/default.md).
#
# ## 6. α in a real policy
#
# In the real policy tokens share parameters, a clip acts as well, and the optimizer has momentum, so the formula does
# not hold for single tokens. The effect of α should still be visible.
#
# **Predict.** With α = 0, 0.3, 1, 3, 10 on the same rollout: how do the largest ratio and the *gain* change? The gain
# is the mean of $A\,(r - 1)$ over all tokens. It estimates what the updates aim at.

# %%
ALPHAS = (0, 0.3, 1, "max |A|", 3, 10)
runs = {(alpha, s): walk("cpgd", s, drift_coef=alpha) for s in range(SEEDS) for alpha in (0.3, 1.0, 3.0, 10.0)}
runs |= {(0, s): walks["cpg", s] for s in range(SEEDS)}  # `cpg` is `cpgd` with alpha = 0
runs |= {("max |A|", s): walks["cpgd", s] for s in range(SEEDS)}

kl, gain = {}, {}
for (alpha, seed), (experience, log_ratios) in runs.items():
    mask = experience.rollout.mask
    d, A = log_ratios[-1][mask], experience.advantages.view(-1, 1).expand_as(mask)[mask]
    kl[alpha, seed], gain[alpha, seed] = k3(d).mean().item(), (A * d.expm1()).mean().item()
for alpha in ALPHAS:
    print(f"alpha = {alpha:<7}", *(f"  KL {kl[alpha, s]:.4f} gain {gain[alpha, s]:.4f}" for s in range(SEEDS)))
print("max |A| is", *(f"{runs['max |A|', seed][0].drift_coef:.2f}" for seed in range(SEEDS)))
for seed in range(SEEDS):
    assert kl[0, seed] > kl[1, seed] > kl[10, seed] and gain[0, seed] > gain[1, seed] > gain[10, seed]

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.7), layout="constrained")
for which, alpha in enumerate(ALPHAS):
    largest = [max(runs[alpha, s][1][n].exp().max().item() for s in range(SEEDS)) for n in range(PASSES + 1)]
    axes[0].plot(largest, label=f"α = {alpha}", markersize=4, **line_style(which)._asdict())
    gains = [gain[alpha, seed] for seed in range(SEEDS)]
    axes[1].plot([which] * SEEDS, gains, MARKERS[which], color=COLOURS[which], markersize=6)
axes[0].set(title="Largest ratio, of all seeds", xlabel="passes over the rollout", ylabel="ratio r")
axes[1].set(title="Gain, a mark per seed", xlabel="α", ylabel="mean of A (r − 1)", ylim=(0, None))
axes[1].set_xticks(range(6), [str(alpha) for alpha in ALPHAS])
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
plt.show()

# %% [markdown]
# A larger α gives a smaller KL, with every seed, and mostly smaller ratios. With max |A|, where no r* is above 2, the
# largest ratio of all seeds is between 1.8 and 2.2. Yet they do not settle: each minibatch has another gradient, and
# momentum carries them past r*.
#
# The right panel shows the cost. α does not only limit accidents, it also limits what the updates aim at. At α = 10
# only 4, 10 and 17 % of the gain at α = 0 remain, by seed. By this measure α = 0 is best. But the gain uses the answers
# that were trained on, so it favours the policy that follows them furthest. [The
# map of the results](../docs/results.md#1-the-map-every-remedy-and-its-price) has whole runs for α from 0 to 3. At K =
# 64 and 1e-4 CPGD without drift collapses, and the more slowly it learns with a larger α, the more of its accuracy it
# keeps: with α = 0.01 as little as without, with α = 3 or max |A| more than 0.8. In [long runs with few
# updates](../docs/default.md) the large α does harm.
#
# ## Exercises
#
# 1. *One line.* Of 16 answers 15 are right. Which α does `max_advantage` take, with the weight `std` and with `equal`?
#    And if 8 of 16 are right?
# 2. *By hand.* Show that the mean of k3 over samples of p is the KL. Which part of k3 has mean 0? How does that follow
#    from the sum of all probabilities?
# 3. *An experiment.* A rollout is small. With 64 samples and the distances of section 1, how often is the estimate by
#    k1 negative? And by k3?

# %% solution
# Solution 1
for right in (15, 8):
    group = torch.tensor([[1.0] * right + [0.0] * (16 - right)])
    for weight in ("std", "equal"):
        A = ALGORITHMS["cpgd"].advantages(group, torch.ones(1, 16), advantage_weight=weight)
        alpha = max_advantage_coef(A, previous=1.0)
        print(f"{right:>2} right, {weight:<5}  A from {A.min():+.2f} to {A.max():+.2f}   alpha = {alpha:.2f}")
        assert alpha >= -A.min().item()
# A rarer outcome has a larger |A|. With `std` the effect is stronger: -15 / sqrt(16) = -3.75 in place of -15 / 16.

# %% solution
# Solution 2
e = new.log_softmax(0) - old.log_softmax(0)
print(f"mean of exp(e) - 1: {(p * e.expm1()).sum():.6f}")
# exp(e) is q/p, so its mean over p is the sum of q, which is 1. So exp(e) - 1 has mean 0. The rest of k3 is -e, which
# is k1, and its mean is the KL. exp(e) - 1 is negative where -e is positive, so the noise of the two cancels.
assert (p * e.expm1()).sum().abs() < 1e-12 and torch.isclose((p * k3(e)).sum(), exact_kl(old, new))

# %% solution
# Solution 3
for size in (0.05, 0.2, 1.0):
    e = (old + size * direction).log_softmax(0) - old.log_softmax(0)
    samples = e[torch.multinomial(p, 64 * 1000, replacement=True, generator=generator)].view(1000, 64)
    shares = [(k(samples).mean(dim=1) < 0).double().mean().item() for k in (k1, k3)]
    print(f"KL {exact_kl(old, old + size * direction):.5f}   negative: k1 {shares[0]:.0%}, k3 {shares[1]:.0%}")
    assert shares[1] == 0
