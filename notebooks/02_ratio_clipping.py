# %% [markdown]
# # 2. The ratio, and what a clip does to it
#
# How hard is a token pulled? Each algorithm answers with a function of one number, the ratio r. Here these functions
# are drawn, and then the tokens of a real rollout walk through them.
#
# **After this notebook you can**
#
# - say for any ratio and advantage whether a token is clipped, and how hard PPO, CPG and CPGD pull on it;
# - explain why a clip bounds the objective and not the ratio;
# - find the tokens that are clipped in a text, and say why it is these;
# - say how much of PPO's famous unbounded side there is to see in a rollout, and how little.
#
# About 30 seconds on a laptop's CPU.

# %%
import matplotlib.pyplot as plt
import torch

from minicpgd import TrainConfig
from minicpgd.algorithms import ALGORITHMS
from minicpgd.experience import Draws
from minicpgd.learner import Learner
from minicpgd.plots import objective_curves, token_regions, token_text
from minicpgd.plots.objectives import objective_and_weight
from minicpgd.plots.style import COLOURS, DASHES, STYLE
from minicpgd.policy import quiet

quiet()
plt.rcParams.update(STYLE)

# %% [markdown]
# ## 1. Four cases
#
# A token was sampled by $\pi_{\mathrm{old}}$. Since then the policy has changed, and the token's probability with it,
# by the ratio $r = \pi_\theta / \pi_{\mathrm{old}}$. Its logarithm is $d = \ln r$. PPO (Proximal Policy
# Optimization), and with it GRPO, maximises
#
# $$ J = \min\!\left(r A,\ \mathrm{clip}(r, 1-\varepsilon, 1+\varepsilon)\, A\right) $$
#
# for each token, CPG (CPGD without its drift) the same with d in place of r, and bounds $\ln(1-\varepsilon)$ and
# $\ln(1+\varepsilon)$. ε is 0.2. What an optimizer feels of J is its derivative in $\ln \pi_\theta$, the token's
# log-probability. We call it the *gradient weight*, here just weight: positive means make the token likelier, and 1
# is the weight that plain policy gradient gives at A = 1.
#
# Nothing below is worked out by hand. `objective_and_weight` asks the package's own loss for J and lets autograd find
# the weight.
#
# **Predict.** Four tokens: r = 0.7 or 1.3, with A = +1 or A = −1. Two of them are clipped. Which?

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
# A clip ends a job that is done: a good token has risen far enough (A > 0, r > 1 + ε), a bad one has fallen far
# enough (A < 0, r < 1 − ε). It never ends a job that went wrong. A good token at r = 0.7 has *fallen*, and is pulled
# on; so is a bad one at r = 1.3. That is all the `min` does: it takes the pessimistic one of two numbers. For A = −1
# and r = 1.3 they are −1.3 and, clipped, −1.2; it takes −1.3, and with it the slope.
#
# Where a token is free, `grpo` gives it the weight r · A and `cpg` gives it A. Where it is clipped, both give 0.
# `cpgd` adds its drift, here with α = 1, and is 0 nowhere in this table.
#
# ## 2. The objective
#
# A fourth row joins: `grpo_dual_clip` is GRPO with a second clip, for A < 0 only, which lets J sink to 3 A and no
# further. (The 3 is a constant of that method.)
#
# **Predict.** For A < 0 and a ratio that grows and grows, which of these objectives has a floor?

# %%
names = ("grpo", "grpo_dual_clip", "cpg", "cpgd")
objective_curves(names)

# %% [markdown]
# The dashed verticals are the bounds 0.8 and 1.2. To the right of 1.2 with A = +1, and to the left of 0.8 with A =
# −1, three of the curves are flat: there is nothing more to gain. `cpgd` bends down instead. It is the only one with
# a reason to come back.
#
# Only `grpo_dual_clip` has a floor, at J = −3, from r = 3 on. The curve of `cpg` falls without end, too, but as the
# logarithm of r, so on this axis along a straight line.
#
# Height is of no account: `grpo` is 1 at r = 1 where `cpg` is 0. What moves the policy is slope.
#
# ## 3. The weight
#
# **Predict.** At A = −1, where does each weight go as r grows from 1 to 5? And at A = +1, as r falls to 0.2?

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
# At r = 1, in the first update, all four agree: the weight is A. Further out they do not.
#
# - **`grpo`** has r · A. A bad token that rose to r = 5 is pushed down five times as hard as at the start, and
#   nothing bounds it; at r = 50 it is fifty times. A good token that fell to 0.2 is pulled up with a fifth of the
#   force, and the further it falls the less.
# - **`grpo_dual_clip`** is the same, but at A < 0 and r > 3 the weight is 0. The token is not held any more, it is
#   given up.
# - **`cpg`** has A or nothing.
# - **`cpgd`** has $A - \alpha \min(r - 1, c)$, with $c = 2$, and without the A where it is clipped. Here, where α =
#   |A|, it jumps across zero *at the bound* and pulls back beyond it, with a force that grows with the distance, and
#   that stops growing at r = 3. (With α larger than |A|/ε it turns before the bound, at $r = 1 + A/\alpha$.)
#
# Look at A = −1 between 0.8 and 3: `cpgd` lies on top of `grpo`. With α = −A the weight $A - \alpha(r - 1)$ is $r A$.
# So CPGD does push harder on a bad token that rises. What it does not do is push harder without a bound.

# %% [markdown]
# ## 4. A rollout walks through it
#
# Now with a real policy. We sample 64 answers once, and make 16 passes over them with 4 updates each, 64 updates in
# all. After each pass the algorithm's own loss says for every token where it stands. All algorithms get the same
# policy and the same rollout.

# %%
PASSES = 16  # fast: 4
SEEDS = 3  # fast: 1


def walk(name, seed=0, passes=PASSES, **settings):
    """The learner, its rollout, and what the loss says of it after each pass."""
    settings = {"num_prompts": 8, "num_generations": 8, "num_iterations": passes, "seed": seed, **settings}
    learner = Learner.from_config(TrainConfig(algorithm=name, **settings))
    draws = Draws.at(seed, step=1)
    made = learner.experience(draws)
    outputs = {}
    for number, _ in enumerate(learner.passes(made, draws.order), start=1):
        args = learner.score(made.rollout), made.rollout.logp, made.advantages, made.rollout.mask
        outputs[number] = learner.algorithm.loss(*args, drift_coef=learner.drift_coef)
    return learner, made, outputs


walks = {(name, seed): walk(name, seed) for seed in range(SEEDS) for name in ("grpo", "cpgd")}
learner, made, grpo = walks["grpo", 0]
_, same, cpgd = walks["cpgd", 0]
assert torch.equal(made.rollout.completion_ids, same.rollout.completion_ids)
print(f"{int(made.rollout.mask.sum())} tokens, A from {made.advantages.min():.2f} to {made.advantages.max():.2f}")

# %% [markdown]
# **Predict.** The clip's bounds are 0.8 and 1.2. How far do ratios go under GRPO? The next figure shades the regions
# where the surrogate is clipped. Once a token is in there, does it stay where it is?

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
# Each mark is a token; those of one answer share A, so they stand in a row (shifted a little, or they would hide each
# other).
#
# Under GRPO ratios go from 0.005 to 4.35, and the clip held none of those far ones. It did what it says: they are
# orange, and their weight is 0. A clip bounds the objective. It does not bound the ratio.
#
# Look at the green triangles, too. Where all answers of a group had the same reward, A is 0: no surrogate pulls on
# these tokens, and there is nothing to clip. They travel all the same. Tokens share the model's parameters, and are
# moved by what others ask for.
#
# The upper left and the lower right of each panel are where a job went wrong, and where $r A$ and $A$ differ most.
# They are nearly empty. Section 7 comes back to that.
#
# Under CPGD the first pass leaves a ratio of 0.058, nearly as wild as GRPO's 0.040. The drift is blind in the first
# of the pass's four updates, where every r is 1, and afterwards it can only answer what has happened. By pass 4 it
# has: all ratios are between 0.77 and 1.58. (The 1.58 is that same token, with A < 0; it overshot. After 16 passes
# they are between 0.72 and 1.85.)
#
# ## 5. Who pushes a clipped token?
#
# **Predict.** Take the tokens that were clipped after the first pass. As long as they are clipped, no surrogate asks
# anything of them. How far from $d = 0$ will they be later, under GRPO and under CPGD?

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
# Under GRPO, with every seed, they go on: from 0.25 to 0.85, from 0.50 to 0.74, from 0.36 to 0.66. Under CPGD, with
# every seed, they come closer: from 0.26 to 0.09, from 0.52 to 0.38, from 0.35 to 0.20.
#
# So the name is easily misread. "Clipped" says that a token no longer pushes itself. It is pushed by tokens that are
# free, and by the optimizer's momentum, which remembers past gradients. Nothing aims to pull it back, though others
# may happen to: with seed 1 GRPO's line goes down again. Under CPGD the drift does aim at it. Where a token ends is a
# balance of everybody's pulls, on either side of the bound. (The dashed line is at |d| = 0.2; the bounds themselves
# are −0.22 and 0.18.)
#
# ## 6. Which tokens are these?
#
# **Predict.** An answer is a guess, `#6`, or shows its working, `7+7=4,4+2=6#6`. Which tokens will be clipped after
# all passes: the results of calculations, the commas, the end?

# %%
pieces = learner.policy.tokens(made.rollout.completion_ids, made.rollout.lengths)
pieces = [["\N{BLACK SQUARE}" if piece == "<eos>" else piece for piece in row] for row in pieces]
labels = [f"{p['prompt']} A={a:+.2f}" for p, a in zip(made.problems, made.advantages.tolist(), strict=True)]
low, high = torch.tensor([0.8, 1.2]).log().tolist()


def clipped_text(seen, title):
    """One group of answers; only clipped tokens have a colour, their log-ratio."""
    d = torch.where(seen.clipped, seen.log_ratio, 0.0)[:8]
    bounds = {"low": low, "high": high, "limit": 1.5}
    return token_text(pieces[:8], d, labels=labels[:8], unit="d, if clipped", title=title, **bounds)


clipped_text(grpo[PASSES], "Clipped under GRPO (\N{BLACK SQUARE} is the end of an answer)")

# %%
clipped_text(cpgd[PASSES], "Clipped under CPGD")

# %% [markdown]
# The working is not touched. What is clipped is the first token, where the policy decides whether to work or to
# guess, and the digit of a guess. GRPO drove all of these beyond the bounds, CPGD three of them.
#
# One group is eight answers. Here are all 64, with every seed. The entropy of a token, in nats, says how undecided
# the policy was when it was drawn: 0 is certain, $\ln 10 = 2.3$ is any of ten digits alike.

# %%
for name in ("grpo", "cpgd"):
    for seed in range(SEEDS):
        _, experience, seen = walks[name, seed]
        rollout, clipped = experience.rollout, seen[PASSES].clipped & seen[PASSES].mask
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
# How many are clipped differs from seed to seed. Where they are does not: there is not one clipped token among the
# rest. After `7+7=` the policy is all but certain of `4`, and what is certain can hardly move. Most of the tokens in
# a text are like that. A clip acts on the few where something is decided. In the first row 66 of all 512 tokens are
# clipped, 13 %; of the tokens that decide, it is 66 of 118.
#
# ## 7. How much of the unbounded side is there to see?
#
# The weight $r A$ is at its most alarming where A < 0 and r is large. Dual clip was made for that corner: beyond r =
# 3 it is silent.
#
# **Predict.** From the same rollouts, does `grpo_dual_clip` end elsewhere than `grpo`? And with ten times the
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
# Each bracket counts, pass by pass, the tokens with A < 0 and r > 3; there is one bracket per seed.
#
# At the default learning rate there is none. Under GRPO no bad token got past r = 1.71 in these four passes, so dual
# clip never acts, and the two are the same run. PPO's weight is without bound on that side, but nobody goes far
# there.
#
# With ten times the learning rate one or two tokens get there with most seeds, and then something else happens than
# the word "unbounded" suggests. GRPO, whose push grows with r, has them back by the second pass. Dual clip, which is
# silent there, leaves them there, to the end with two seeds and for three passes with the third. CPG, whose push does
# not grow, has them back with two seeds of three. So a strong push *against* a mistake undoes it; it does not make it
# worse. (One or two tokens a seed are an anecdote, and no more.)
#
# Does the factor r matter in whole runs? [Section 2 of the results](../docs/results.md#2-anatomy) has eight seeds of
# whole runs, with K = 64 updates on each rollout and a learning rate of 1e-4: GRPO ends at an accuracy of 0.25, with
# dual clip at 0.26, and `cpg`, without any r, at 0.25. It does not. `cpgd` ends at 0.83, and `grpo_drift`, GRPO with
# CPGD's drift, at 0.85. What matters is whether something pulls back, and that is the subject of [notebook
# 3](03_kl_drift.ipynb).
#
# ## Exercises
#
# 1. *One line.* Draw the weights of `grpo_unclipped`, `cispo`, `pg` and `pgd`. Predict first: which of the four are
#    never 0, and which is held by something other than a clip?
# 2. *By hand.* A token has A = 2, and α is 4. At which ratio is the weight of `pgd`, CPGD without its clip, zero?
#    Where does the weight of `cpgd` change its sign?
# 3. *An experiment.* A clip does not bound the ratio. Does it do anything? Compare `grpo_unclipped`, `grpo` and `cpg`
#    by `kl_old` after 4 passes, with more than one seed. Which difference is larger: with a clip or without, r or d?

# %% solution
# Solution 1
objective_curves(("grpo_unclipped", "cispo", "pg", "pgd"), weight=True)
# r A grows without bound, for A > 0 and for A < 0; cispo stops growing at 1.2; pg is A everywhere.
# None of these three is ever 0.
# pgd is: at A = +1 the drift holds it, and A - alpha (r - 1) = 0 at r = 1 + A / alpha = 2.

# %% solution
# Solution 2
for name in ("pgd", "cpgd"):
    weights = objective_and_weight(ALGORITHMS[name], [1.19, 1.21, 1.49, 1.51], 2.0, drift_coef=4.0)[1]
    print(f"{name:<5}", *(f"{weight:+.2f}" for weight in weights))
# pgd: A - alpha (r - 1) = 0 at r = 1 + 2 / 4 = 1.5.
# cpgd: at the clip's bound, r = 1.2, where 2 - 4 * 0.2 = 1.2 becomes -0.8.
assert objective_and_weight(ALGORITHMS["pgd"], [1.5], 2.0, drift_coef=4.0)[1].abs() < 1e-9

# %% solution
# Solution 3
for seed in range(SEEDS):
    kl = {name: walk(name, seed, passes=4)[2][4].metrics["kl_old"] for name in ("grpo_unclipped", "grpo", "cpg")}
    print(f"seed {seed}", {name: round(value, 3) for name, value in kl.items()})
    assert kl["grpo_unclipped"] > 2 * kl["grpo"] and abs(kl["cpg"] / kl["grpo"] - 1) < 0.1
# The clip does a lot: without it the policy drifts several times as far.
# Once there is a clip, r or d makes little difference.
