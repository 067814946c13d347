# %% [markdown]
# # 2. The ratio, and what a clip does to it
#
# Each algorithm gives a token a gradient, and its size is a function of one number, the ratio r. This notebook draws
# these functions, and then the tokens of a real rollout.
#
# **After this notebook you can**
#
# - say for any ratio and advantage whether a token is clipped, and which gradient weight PPO, CPG and CPGD give it;
# - explain why a clip bounds the objective and not the ratio;
# - find the clipped tokens in a text, and say why it is these;
# - say how often the well-known unbounded side of PPO occurs in a rollout.
#
# The notebook takes about 30 seconds on a laptop's CPU.

# %%
import matplotlib.pyplot as plt
import torch

from minicpgd import TrainConfig
from minicpgd.algorithms import ALGORITHMS, LossSettings
from minicpgd.models import quiet
from minicpgd.plots import objective_curves, token_regions, token_text
from minicpgd.plots.objectives import objective_and_weight
from minicpgd.plots.style import COLOURS, DASHES, STYLE
from minicpgd.training import Learner, seed_step

quiet()
plt.rcParams.update(STYLE)

# %% [markdown]
# ## 1. Four cases
#
# The policy $\pi_{\mathrm{old}}$ sampled a token. Since then training has changed the policy, and so the token's
# probability, by the ratio $r = \pi_\theta / \pi_{\mathrm{old}}$. Its logarithm is $d = \ln r$. PPO (Proximal Policy
# Optimization) and GRPO maximise, for each token,
#
# $$ J = \min\!\left(r A,\ \mathrm{clip}(r, 1-\varepsilon, 1+\varepsilon)\, A\right) $$
#
# CPG (CPGD without its drift) maximises the same with d in place of r, and with the bounds $\ln(1-\varepsilon)$ and
# $\ln(1+\varepsilon)$. ε is 0.2. An optimizer uses only the derivative of J in $\ln \pi_\theta$, the token's
# log-probability. We call it the *gradient weight*, or just weight. A positive weight makes the token likelier. The
# plain policy gradient has the weight 1 at A = 1.
#
# We compute nothing below by hand. `objective_and_weight` takes J from the package's own loss, and autograd finds the
# weight.
#
# **Predict.** Four tokens have r = 0.7 or 1.3, and A = +1 or A = −1. Two of them are clipped. Which?

# %%
corners = {}
for A in (1.0, -1.0):
    for r in (0.7, 1.3):
        line = f"A = {A:+.0f}  r = {r}"
        for name in ("grpo", "cpg", "cpgd"):
            _, weight, clipped = objective_and_weight(ALGORITHMS[name], [r], A, drift_coef=1.0)
            corners[A, r, name] = weight.item(), clipped.item()
            line += f"   {name}: {weight.item():+.2f} {'clipped' if clipped else '       '}"
        print(line)

for name in ("grpo", "cpg", "cpgd"):
    assert corners[1, 1.3, name][1] and corners[-1, 0.7, name][1]
    assert not corners[1, 0.7, name][1] and not corners[-1, 1.3, name][1]

# %% [markdown]
# The clip acts on a token that has moved far enough in the intended direction: a good token that became likelier (A >
# 0, r > 1 + ε), or a bad one that became rarer (A < 0, r < 1 − ε). It never acts on a token that moved in the wrong
# direction. A good token at r = 0.7 keeps its gradient, and so does a bad one at r = 1.3. The `min` makes this
# distinction, because it takes the more pessimistic number. For A = −1 and r = 1.3 the numbers are −1.3 and, clipped,
# −1.2. The `min` takes −1.3 and its slope.
#
# Where a token is not clipped, `grpo` gives it the weight r · A and `cpg` gives it A. Where it is clipped, both give 0.
# `cpgd` adds its drift, here with α = 1, and is 0 nowhere in this table.
#
# ## 2. The objective
#
# We add a fourth row. `grpo_dual_clip` is GRPO with a second clip, for A < 0 only: J cannot go below 3 A. (The 3 is a
# constant of that method.)
#
# **Predict.** For A < 0 and a ratio that grows without limit, which of these objectives has a lower bound?

# %%
names = ("grpo", "grpo_dual_clip", "cpg", "cpgd")
objective_curves(names)

# %% [markdown]
# The dashed vertical lines are the bounds 0.8 and 1.2. To the right of 1.2 with A = +1, and to the left of 0.8 with A =
# −1, three of the curves are flat: the objective cannot increase any more. `cpgd` decreases there instead. It is the
# only one whose gradient points back.
#
# Only `grpo_dual_clip` has a lower bound, J = −3, which it reaches at r = 3. The curve of `cpg` also decreases without
# end. It does so as the logarithm of r, which is a straight line on this axis.
#
# The height of a curve has no meaning: at r = 1 `grpo` is 1 and `cpg` is 0. Only the slope moves the policy.
#
# ## 3. The weight
#
# **Predict.** At A = −1, how does each weight change as r grows from 1 to 5? And at A = +1, as r decreases to 0.2?

# %%
objective_curves(names, weight=True)

# %%
ratios = torch.tensor([0.2, 0.5, 1.0, 2.0, 5.0])
for name in names:
    weights = objective_and_weight(ALGORITHMS[name], ratios, -1.0)[1]
    rising = objective_and_weight(ALGORITHMS[name], ratios, 1.0)[1]
    print(f"{name:<15} A=+1:", *(f"{w:+.1f}" for w in rising), "   A=-1:", *(f"{w:+.1f}" for w in weights))

between = {name: objective_and_weight(ALGORITHMS[name], [0.85, 1.5, 2.9], -1.0)[1] for name in names}
assert torch.allclose(between["cpgd"], between["grpo"])

# %% [markdown]
# At r = 1, in the first update, all four have the weight A. Elsewhere they differ.
#
# - **`grpo`** has r · A. A bad token with r = 5 gets a weight five times as large as at the start, and at r = 50 fifty
#   times; nothing bounds it. A good token with r = 0.2 gets a fifth of the weight at the start. The smaller its ratio,
#   the smaller its weight.
# - **`grpo_dual_clip`** is the same, except that the weight is 0 for A < 0 and r > 3. It does not lower the probability
#   of such a token any more.
# - **`cpg`** has A or 0.
# - **`cpgd`** has $A - \alpha \min(r - 1, c)$ with $c = 2$, and the same without A where the token is clipped. Here
#   α = |A|, so the weight changes its sign *at the bound*. Beyond the bound it points back, and grows with the distance
#   up to r = 3. (With α larger than |A|/ε it changes its sign before the bound, at $r = 1 + A/\alpha$.)
#
# Compare the curves at A = −1 for r between 0.8 and 3: `cpgd` and `grpo` are equal. In the surrogate of CPGD no ratio
# multiplies A. But with α = −A the weight of surrogate and drift together, $A - \alpha(r - 1)$, *is* $r A$. So for such
# a token the gradient of CPGD grows with the ratio as GRPO's does, up to r = 3. From there on it stays constant, and
# GRPO's does not.

# %% [markdown]
# ## 4. The tokens of a rollout
#
# We sample 64 answers of a real policy once and make 16 passes over them with 4 updates each: 64 updates. After each
# pass the algorithm's own loss gives each token's ratio, and says whether it is clipped. All algorithms get the same
# policy and the same rollout. By default the package ends the passes at a KL of 0.003, and CPGD's α is 0.01. Here all
# passes are made, and α is the largest |A| of the rollout, so that clip and drift can be seen.

# %%
PASSES = 16  # fast: 4
SEEDS = 3  # fast: 1


def walk(name, seed=0, passes=PASSES, **settings):
    """The learner, the experience of its rollout, and the output of the loss after each pass."""
    drift = {"drift_coef": "max_advantage"} if ALGORITHMS[name].drift else {}
    usual = {"num_prompts": 8, "num_generations": 8, "num_iterations": passes, "target_kl": None} | drift
    learner = Learner.from_config(TrainConfig(algorithm=name, seed=seed, **(usual | settings)))
    generators = seed_step(seed, step=1)
    experience = learner.collect(generators)
    rollout, advantages = experience.rollout, experience.advantages.flatten()
    loss_settings, outputs = LossSettings(drift_coef=experience.drift_coef), {}
    for number in range(1, passes + 1):
        learner.train_pass(experience, generators.order)
        logp = learner.score(rollout)
        outputs[number] = learner.algorithm.loss(logp, rollout.logp, advantages, rollout.mask, loss_settings)
    return learner, experience, outputs


walks = {(name, seed): walk(name, seed) for seed in range(SEEDS) for name in ("grpo", "cpgd")}
learner, experience, grpo = walks["grpo", 0]
_, same, cpgd = walks["cpgd", 0]
rollout, advantages = experience.rollout, experience.advantages
assert torch.equal(rollout.completion_ids, same.rollout.completion_ids)
print(f"{int(rollout.mask.sum())} tokens, A from {advantages.min():.2f} to {advantages.max():.2f}")

# %% [markdown]
# **Predict.** The clip's bounds are 0.8 and 1.2. How far do the ratios move under GRPO? The next figure shades the
# regions where the surrogate is clipped. Does a token in such a region stay where it is?

# %%
token_regions({name: {k: seen[k] for k in (1, 4, PASSES)} for name, seen in {"grpo": grpo, "cpgd": cpgd}.items()})

# %%
for name, seen in {"grpo": grpo, "cpgd": cpgd}.items():
    for k in (1, 4, PASSES):
        numbers = seen[k].metrics
        print(
            f"{name}  pass {k:>2}   ratios {numbers['ratio_min']:.3f} to {numbers['ratio_max']:.2f}   "
            f"clipped, A>0: {numbers['clip_frac_pos']:.1%}, A<0: {numbers['clip_frac_neg']:.1%}"
        )
assert grpo[PASSES].metrics["ratio_max"] > 3 > cpgd[PASSES].metrics["ratio_max"]
assert grpo[PASSES].metrics["ratio_min"] < 0.1 < cpgd[PASSES].metrics["ratio_min"]

# %% [markdown]
# Each mark is a token. The tokens of one answer share A, so they form a row (the figure shifts them a little).
#
# Under GRPO the ratios range from 0.005 to 4.35. The tokens beyond the bounds are orange: they are clipped, and their
# weight is 0. But they did not stop there. A clip bounds the objective. It does not bound the ratio.
#
# The green triangles moved too. Where all answers of a group had the same reward, A is 0. These tokens have no
# surrogate gradient, and there is nothing to clip. They move because all tokens share the model's parameters.
#
# In the upper left and the lower right of each panel tokens moved in the wrong direction, and $r A$ and $A$ differ
# most. These regions are nearly empty; see section 7.
#
# Under CPGD the smallest ratio after the first pass is 0.058, close to GRPO's 0.040. In the first of the pass's four
# updates the drift is zero, because every r is 1. Later it can only correct. By pass 4 all ratios are between 0.77 and
# 1.58. (The 1.58 is that same token, which has A < 0; it went too far back. After 16 passes the range is 0.72 to 1.85.)
#
# ## 5. What moves a clipped token?
#
# **Predict.** Take the tokens that were clipped after the first pass. While they are clipped, their surrogate has no
# gradient. How far from $d = 0$ will they be later, under GRPO and under CPGD?

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
for axis, name in zip(axes, ("grpo", "cpgd"), strict=True):
    for seed in range(SEEDS):
        seen = walks[name, seed][2]
        early = seen[1].clipped & seen[1].mask
        away = [out.log_ratio[early].abs().median().item() for out in seen.values()]
        axis.plot(seen.keys(), away, color=COLOURS[seed], linestyle=DASHES[seed], label=f"seed {seed}")
        print(f"{name} seed {seed}: {int(early.sum()):>2} tokens, median |d| from {away[0]:.2f} to {away[-1]:.2f}")
        assert (away[-1] > away[0]) == (name == "grpo")
    axis.axhline(0.2, color="black", linewidth=0.9, linestyle=(0, (4, 2)))
    axis.set(title=name, xlabel="passes over the rollout", ylim=(0, None))
axes[0].set_ylabel("median |d|  [nats]")
axes[0].legend()
plt.show()

# %% [markdown]
# Under GRPO they move further away, with every seed: from 0.25 to 0.85, from 0.50 to 0.74, from 0.36 to 0.66. Under
# CPGD they move closer, with every seed: from 0.26 to 0.09, from 0.52 to 0.38, from 0.35 to 0.20.
#
# The word "clipped" is easy to misread. It says only that a token's own surrogate has no gradient. Other tokens still
# move it, and so does the optimizer's momentum, which remembers past gradients. In GRPO no term of the loss brings it
# back, although other tokens may: with seed 1 GRPO's line decreases again. In CPGD the drift does. The final ratio is a
# balance of all these gradients, on either side of the bound. (The dashed line is at |d| = 0.2; the bounds themselves
# are −0.22 and 0.18.)
#
# ## 6. Which tokens are clipped?
#
# **Predict.** An answer is a guess, `#6`, or shows its working, `7+7=4,4+2=6#6`. Which tokens will be clipped after all
# passes: the results of calculations, the commas, or the end?

# %%
pieces = learner.policy.tokens(rollout.completion_ids, rollout.lengths)
pieces = [["\N{BLACK SQUARE}" if piece == "<eos>" else piece for piece in row] for row in pieces]
answers = zip(experience.problems, advantages.flatten().tolist(), strict=True)
labels = [f"{problem['prompt']} A={advantage:+.2f}" for problem, advantage in answers]
low, high = torch.tensor([0.8, 1.2]).log().tolist()


def clipped_text(seen, title):
    """One group of answers. Only clipped tokens have a colour, which shows their log-ratio."""
    d = torch.where(seen.clipped, seen.log_ratio, 0.0)[:8]
    bounds = {"low": low, "high": high, "limit": 1.5}
    return token_text(pieces[:8], d, labels=labels[:8], unit="d, if clipped", title=title, **bounds)


clipped_text(grpo[PASSES], "Clipped under GRPO (\N{BLACK SQUARE} is the end of an answer)")

# %%
clipped_text(cpgd[PASSES], "Clipped under CPGD")

# %% [markdown]
# No token of the working is clipped. The clipped tokens are the first one, where the policy decides whether to work or
# to guess, and the digit of a guess. GRPO moved all of these beyond the bounds, CPGD three of them.
#
# One group is eight answers. The next cell counts over all 64, with every seed. The entropy of a token, in nats, says
# how undecided the policy was when it drew the token: 0 is certain, and $\ln 10 = 2.3$ means ten equally likely digits.

# %%
for name in ("grpo", "cpgd"):
    for seed in range(SEEDS):
        _, walked, seen = walks[name, seed]
        rollout, clipped = walked.rollout, seen[PASSES].clipped & seen[PASSES].mask
        place = torch.arange(rollout.mask.shape[1]).expand_as(clipped)
        guess = rollout.lengths[:, None] == 3
        where = {"first": place == 0, "digit of a guess": guess & (place == 1)}
        where["any other"] = ~(where["first"] | where["digit of a guess"])
        counts = [
            f"{key}: {int((clipped & at).sum()):>2} of {int((rollout.mask & at).sum())}" for key, at in where.items()
        ]
        undecided = rollout.entropy[clipped].mean(), rollout.entropy[rollout.mask & ~clipped].mean()
        print(f"{name} seed {seed}   {',  '.join(counts)}   entropy {undecided[0]:.2f}, not clipped {undecided[1]:.2f}")
        assert not (clipped & where["any other"]).any()

# %% [markdown]
# The number of clipped tokens differs from seed to seed, their places do not: no other token is clipped. After `7+7=`
# the policy is almost certain of `4`, and a nearly certain token moves little. Most tokens of a text are like that. A
# clip acts on the few tokens where the policy decides something. In the first row 66 of all 512 tokens are clipped, 13
# %; of the deciding tokens, 66 of 118 are.
#
# ## 7. How often does the unbounded side occur?
#
# The weight $r A$ is largest where A < 0 and r is large. Dual clip was made for that case.
#
# **Predict.** From the same rollouts, does `grpo_dual_clip` lead to other results than `grpo`? And with ten times the
# learning rate?

# %%
for rate in (1e-4, 1e-3):
    for name in ("grpo", "grpo_dual_clip", "cpg", "cpgd")[: 2 if rate == 1e-4 else 4]:
        line = f"{rate:<7} {name:<15}"
        for seed in range(SEEDS):
            seen = walk(name, seed, passes=4, learning_rate=rate)[2]
            bad = [out.log_ratio[out.mask & (out.advantages < 0)].exp() for out in seen.values()]
            beyond, largest = [int((r > 3).sum()) for r in bad], max(r.max().item() for r in bad)
            line += f"   {beyond} r up to {largest:5.2f}"
            assert largest < 3 or rate > 1e-4
        print(line)

# %% [markdown]
# Each bracket counts the tokens with A < 0 and r > 3, pass by pass; there is one bracket per seed.
#
# At the default learning rate there is no such token. Under GRPO no bad token exceeded r = 1.71 in these four passes,
# so dual clip never acts, and the two runs are the same.
#
# With ten times the learning rate one or two tokens go there with most seeds. Then the word "unbounded" misleads. GRPO,
# whose weight grows with r, brings them back by the second pass. Dual clip, whose weight is 0 there, leaves them there:
# to the end with two seeds, and for three passes with the third. CPG, whose weight does not grow, brings them back with
# two seeds of three. So a large weight *against* a mistake corrects it and does not make it worse. (One or two tokens
# prove nothing.)
#
# Does the factor r matter in whole runs? [The map of the
# results](../docs/results.md#1-the-map-every-remedy-and-its-price) has them, over learning rates and K. GRPO is healthy
# on about half of it, and so are GRPO with dual clip and `cpg`, without any r (there it is "CPGD, α = 0"). So the
# map shows no effect of the factor r. What helps there is to limit how far the policy moves in a rollout. The drift,
# the subject of [notebook 3](03_kl_drift.ipynb), does that if α is large; a stop at a KL does it with fewer updates.
#
# ## Exercises
#
# 1. *One line.* Draw the weights of `grpo_unclipped`, `cispo`, `pg` and `pgd`. Predict first: which of the four are
#    never 0, and which is limited by something other than a clip?
# 2. *By hand.* A token has A = 2, and α is 4. At which ratio is the weight of `pgd`, CPGD without its clip, zero? Where
#    does the weight of `cpgd` change its sign?
# 3. *An experiment.* A clip does not bound the ratio. Does it have any effect? Compare the `kl_old` of
#    `grpo_unclipped`, `grpo` and `cpg` after 4 passes, with more than one seed. Which choice makes the larger
#    difference: the clip, or r against d?

# %% solution
# Solution 1
objective_curves(("grpo_unclipped", "cispo", "pg", "pgd"), weight=True)
# The weight r A of `grpo_unclipped` grows without bound, for A > 0 and for A < 0. The weight of `cispo` stops growing
# at r = 1.2. The weight of `pg` is A everywhere. None of these three is ever 0.
# The weight of `pgd` is. At A = +1 the drift limits it: A - alpha (r - 1) = 0 at r = 1 + A / alpha = 2.

# %% solution
# Solution 2
for name in ("pgd", "cpgd"):
    weights = objective_and_weight(ALGORITHMS[name], [1.19, 1.21, 1.49, 1.51], 2.0, drift_coef=4.0)[1]
    print(f"{name:<5}", *(f"{weight:+.2f}" for weight in weights))
# The weight of `pgd` is A - alpha (r - 1), which is 0 at r = 1 + 2 / 4 = 1.5.
# The weight of `cpgd` changes its sign at the clip's bound: at r = 1.2 it jumps from 2 - 4 * 0.2 = 1.2 to -0.8.
assert objective_and_weight(ALGORITHMS["pgd"], [1.5], 2.0, drift_coef=4.0)[1].abs() < 1e-9

# %% solution
# Solution 3
for seed in range(SEEDS):
    kl = {name: walk(name, seed, passes=4)[2][4].metrics["kl_old"] for name in ("grpo_unclipped", "grpo", "cpg")}
    print(f"seed {seed}", {name: round(value, 3) for name, value in kl.items()})
    assert kl["grpo_unclipped"] > 2 * kl["grpo"] and abs(kl["cpg"] / kl["grpo"] - 1) < 0.1
# The clip has a large effect: without it the policy drifts several times as far.
# With a clip, the choice between r and d makes little difference.
