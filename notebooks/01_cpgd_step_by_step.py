# %% [markdown]
# # 1. CPGD, step by step
#
# A language model writes eight answers, a rule says which are right, and an update makes the right ones likelier.
# That is all of it, and here every number on the way is printed, next to the formula that it comes from. The
# algorithm is CPGD, Clipped Policy Gradient Optimization with Policy Drift (arXiv 2505.12504).
#
# **After this notebook you can**
#
# - say what goes into one step of rule-based reinforcement learning, and what comes out, with every shape;
# - compute an advantage, a log-ratio, a clip and a drift by hand, and check yourself against the package;
# - explain why clip and drift do nothing in the first update, and what they do from the second on;
# - read a line of `metrics.jsonl` and say where each number in it comes from.
#
# About 20 seconds on a laptop's CPU.

# %%
import math

import matplotlib.pyplot as plt
import torch

from minicpgd import TrainConfig
from minicpgd.divergence import k3
from minicpgd.experience import Draws
from minicpgd.learner import Learner
from minicpgd.plots import token_text
from minicpgd.plots.style import COLOURS, STYLE
from minicpgd.policy import quiet

quiet()
plt.rcParams.update(STYLE)
torch.set_printoptions(precision=3, sci_mode=False)

# %% [markdown]
# ## The policy
#
# A *policy* is a language model seen as something that acts: given the text so far, it has a probability for each
# next token, and draws one. Ours is tiny, a Llama of 108 thousand parameters whose tokens are single characters. It
# comes with the package.
#
# Its problems are sums to be worked out from left to right, on a clock of ten: `7+5*3=` asks for (7 + 5) · 3 = 36, so
# `6`, and 2 − 4 is 8. The model may guess, `#6`, or write its working first, `7+5=2,2*3=6#6`. Only what stands after
# the `#` is judged.
#
# A `Learner` holds the policy and all that trains it. The settings are those of `minicpgd train`, only smaller: N = 2
# problems, G = 4 answers to each.

# %%
config = TrainConfig(algorithm="cpgd", num_prompts=2, num_generations=4, num_minibatches=1, num_iterations=4)
learner = Learner.from_config(config)
print(f"{learner.policy.model.num_parameters():,} parameters, {len(learner.policy.tokenizer)} tokens")

# %% [markdown]
# ## 1. The rollout
#
# `experience` samples the answers and judges them. Each draw of the step, which problems, which tokens, comes from
# `(seed, step)`, so your run prints the answers that stand here.
#
# **Predict.** The model was taught to guess mostly, and to work things out now and then. How many of eight answers
# will show their working? How many will be right?

# %%
draws = Draws.at(seed=0, step=1)
made = learner.experience(draws)
rollout = made.rollout

for problem, text, reward in zip(made.problems, rollout.completions, made.rewards.flatten(), strict=True):
    print(f"{problem['prompt']:<14} {text:<34} reward {reward:.0f}")

# %% [markdown]
# Two of eight are worked out, and both of these are right. Six are guesses; to the second problem every guess was
# `0`, and all four answers got the reward, which has consequences in a moment.
#
# Inside, a rollout is a handful of tensors. B = N · G = 8 answers stand below each other, filled up to the longest
# one, T tokens. The *mask* says which tokens are real, and is made from the answers' lengths. (Made in another way it
# is a classic bug, to be seen in [notebook 6](06_bug_museum.ipynb).)

# %%
for name in ("completion_ids", "mask", "lengths", "logp"):
    print(f"{name:<15} {tuple(getattr(rollout, name).shape)}")
print("lengths        ", rollout.lengths.tolist())
print("probability of the tokens of answer 0:", rollout.logp[0, :3].exp())

# %% [markdown]
# The end of an answer, `<eos>`, is a token like the others: the model chose to stop, and can be praised for it.
# `logp` is $\ell_{\mathrm{old}} = \ln \pi_{\mathrm{old}}(y_t \mid x, y_{<t})$, the logarithm of the probability with
# which each token was drawn. The policy that drew is called *old*, because it is about to change.
#
# ## 2. Rewards to advantages
#
# A reward of 1 says "right". An *advantage* says "better than could be expected for this problem". What could be
# expected is the mean μ of the group, the G answers to the same problem, and the unit is the group's standard
# deviation σ:
#
# $$ A = w(x)\,(R - \mu), \qquad w(x) = \frac{1}{\sigma + 10^{-4}} $$
#
# **Predict.** The first group has rewards 1, 1, 0, 0, the second 1, 1, 1, 1. What are the eight advantages?

# %%
first = torch.tensor([1.0, 1.0, 0.0, 0.0])
by_hand = (first - first.mean()) / (first.std() + 1e-4)
print("by hand:", by_hand)
print("package:", made.advantages)
assert torch.allclose(made.advantages[:4], by_hand) and (made.advantages[4:] == 0).all()

# %% [markdown]
# In the first group μ = 0.5, and σ = 0.577 (the squares are summed and divided by G − 1 = 3). So A = ±0.5 / 0.577 =
# ±0.866. The second group has nothing to teach: its answers cannot be told apart by their rewards, so all its
# advantages are 0, exactly.
#
# Each token of an answer gets the advantage of the whole answer. Nobody said which of its tokens were good.
#
# ## 3. The log-ratio, before anything has changed
#
# Everything that follows is about how far the new policy $\pi_\theta$ has moved from the old one, token by token:
#
# $$ d = \ln \pi_\theta - \ln \pi_{\mathrm{old}}, \qquad r = \exp(d) = \frac{\pi_\theta}{\pi_{\mathrm{old}}} $$
#
# `learner.score` asks the policy as it is now for $\ln \pi_\theta$ of the tokens that were sampled.
#
# **Predict.** No update has been made yet. What are d and r?

# %%
d = learner.score(rollout) - rollout.logp
print(f"largest |d|: {d.abs().max():.6f}")
assert d.abs().max() < 1e-5

# %% [markdown]
# d = 0 and r = 1, but for the rounding of float32.
#
# ## 4. The first loss
#
# For each token CPGD maximises
#
# $$ \min\!\left(d A,\ \mathrm{clip}(d, \ln(1-\varepsilon), \ln(1+\varepsilon)) A\right) - \alpha\,\mathrm{drift}(d) $$
#
# The first part is the *surrogate*. It stands in for the expected reward, which nobody can compute, and has the same
# gradient where the policy has not moved yet. The `clip` holds d between $\ln 0.8$ and $\ln 1.2$ (ε is 0.2); the
# `min` takes the worse of the two, and section 6 shows what that is good for.
#
# The second part is the price of having moved. $\mathrm{drift}(d)$ is called k3, $r - 1 - d$; it is 0 at d = 0 and
# positive elsewhere. Its mean over tokens is a Kullback-Leibler divergence (KL), the usual distance between policies;
# [notebook 3](03_kl_drift.ipynb) is about it. Its slope in d is r − 1, and from r = 3 on the trained drift goes on in
# a straight line, so that the slope never exceeds c = 2. α is set to the largest |A| of the rollout, a rule of this
# package.
#
# The loss is minus the mean of all this, over the tokens of each answer and then over the answers.
#
# **Predict.** With d = 0: what is the value of the loss? And has it a gradient?

# %%
algorithm = learner.algorithm


def loss_at(d):
    """The loss of CPGD at log-ratios d, (B, T), and its gradient in d."""
    d = d.clone().requires_grad_()
    out = algorithm.loss(d, torch.zeros_like(d), made.advantages, rollout.mask, drift_coef=learner.drift_coef)
    out.loss.backward()
    return out, d.grad


out, gradient = loss_at(torch.zeros_like(d))
print(f"alpha = {learner.drift_coef:.3f}, loss = {out.loss:.3f}")
print("gradient, first 3 tokens of answers 0 to 3:")
print(gradient[:4, :3])

# %% [markdown]
# The loss is 0 and its gradient is not. A loss in reinforcement learning is no distance from a goal; only its slope
# means something.
#
# The slope is $-A$ times the token's share in the mean. Answer 0 has 3 tokens and there are 8 answers, so each has a
# share of 1/24, and $-0.866 / 24 = -0.036$: raising the log-probability of `#4` lowers the loss. In answer 2 the sign
# is the other one. In answer 1 a token has less, because 32 tokens share one answer's eighth. This is plain policy
# gradient, clip idle, drift idle. At d = 0 the surrogates of GRPO (Group Relative Policy Optimization) and RLOO
# (REINFORCE leave-one-out) have the slope A as well; RLOO only computes another A. The three algorithms part with the
# second update.

# %%
share = 1 / (8 * rollout.lengths)
assert torch.allclose(gradient[:, 0], -made.advantages * share)
print("weight of a token:", share[:4])

# %% [markdown]
# ## 5. One update
#
# A *pass* goes once over all answers. It may be cut into minibatches, with an update after each (four by default);
# ours is not, so a pass is one update. `passes` makes them one by one: each `next(passes)` is an update. An update is
# a gradient, its norm bounded, and a step of AdamW, an optimizer with momentum: it remembers past gradients.
#
# **Predict.** Answer 1 was right and long, answers 2 and 3 wrong and short. Which tokens will move most?

# %%
labels = [f"{p['prompt']} A={a:+.2f}" for p, a in zip(made.problems, made.advantages.tolist(), strict=True)]
pieces = learner.policy.tokens(rollout.completion_ids, rollout.lengths)
tokens = [["■" if piece == "<eos>" else piece for piece in row] for row in pieces]
passes = learner.passes(made, draws.order)
low, high = torch.tensor(algorithm.clip_bounds(config.epsilon)).log().tolist()


def show(title):
    """The answers, coloured by how far each token has moved since it was sampled."""
    moved = learner.score(rollout) - rollout.logp
    return token_text(tokens, moved, labels=labels, low=low, high=high, limit=0.8, unit="log-ratio d", title=title)


next(passes)
show("After 1 update (■ is the end of an answer)")

# %% [markdown]
# Four things to see.
#
# - Nearly all of the movement is in two places: the digit of a guess, and the *first* token, where the model decides
#   whether to guess or to work. Everything after `7` was all but certain already, and what is certain has little to
#   move.
# - `#` went down in answer 0, though that answer was right. The same `#` stands in answers 2 and 3, which are wrong,
#   and two against one win: tokens are not separate knobs, they share the model's parameters.
# - The second problem moved, too, without any advantage. Beginning with a digit has become likelier *everywhere*.
#   That is learning, and it is also how things get away from us.
# - One token wears a triangle: its ratio has left the range from 0.8 to 1.2 (▲ above, ▼ below), after a single
#   update.
#
# ## 6. More updates on the same rollout
#
# Sampling is expensive, so a rollout is used more than once. From the second update on d is not 0, and clip and drift
# wake up. By hand: the surrogate pulls a token with A, or, once it is clipped, not at all. The drift's slope is min(r
# − 1, c), so it pulls with −α · min(r − 1, c). Both together have to be what autograd finds in the package's loss.
#
# **Predict.** After four updates: is a token that has been clipped standing still?

# %%
for _ in passes:
    pass
show("After 4 updates")

# %%
d = learner.score(rollout) - rollout.logp
out, gradient = loss_at(d)
print("answer token      A       d      r  clipped   surrogate   drift    both")
for row, t in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (3, 1), (6, 0)):
    A, dt, clipped = made.advantages[row].item(), d[row, t].item(), bool(out.clipped[row, t])
    surrogate = 0.0 if clipped else A
    pull = -learner.drift_coef * min(math.exp(dt) - 1, config.drift_clip)
    both = -gradient[row, t].item() * 8 * rollout.lengths[row].item()
    print(
        f"{row:>4}   {tokens[row][t]}      {A:+.2f}  {dt:+.3f}  {math.exp(dt):.2f}  "
        f"{'yes' if clipped else 'no ':<7}   {surrogate:+.3f}      {pull:+.3f}   {both:+.3f}"
    )
    assert abs(surrogate + pull - both) < 1e-4

# %% [markdown]
# Read the table row by row; the last column is what the optimizer is told.
#
# - **`4` in answer 0** went beyond 1.2 and is clipped: its surrogate pulls no more. Yet it does not stand still. The
#   drift pulls it *back*.
# - **`7` in answer 1** has a ratio of 2.25, far beyond the clip's bound. A clip bounds the objective, not the ratio:
#   it takes the token's own pull away, and other tokens and the optimizer's momentum may carry it on. Only the drift
#   aims at undoing that.
# - **`#`** has the same d in answers 0 and 2, and is clipped in one of them. With A > 0 a ratio below 0.8 is a
#   mistake to be undone, so the surrogate pulls on, in full. With A < 0 it is a job done. That is what the `min` is
#   for.
# - **`1` in answer 2** was beyond the bound after the first update, and came back within it.
# - **`6` in answer 6** has no advantage. Still the drift holds it near the policy that sampled.
#
# A surrogate with a ratio in it (PPO's, GRPO's) would pull with r · A in place of A. Notebook 2 draws the two side by
# side.
#
# ## 7. The numbers in the log
#
# A run writes one line per step to `metrics.jsonl`. Most of its numbers you have just seen. `accuracy` is the share
# of right answers, here the same as the reward. `entropy` says how undecided the policy was, in nats per token: 0 is
# certain.
#
# `kl_old` is the mean of k3 over the tokens: how far the policy has moved, in nats per token. `clip_frac_pos` and
# `clip_frac_neg` are the shares of tokens that are clipped, with A > 0 and with A < 0. ([Every
# metric](../docs/metrics.md) has a page.)
#
# **Predict.** The line is written by the last pass, which looks at each answer *before* its own update. Is its
# `kl_old` larger or smaller than the one we compute now, after the last update?

# %%
line = Learner.from_config(config).step(1).metrics
for name in ("reward", "accuracy", "completion_length", "entropy", "drift_coef", "ratio_min", "ratio_max", "kl_old"):
    print(f"{name:<20} {line[name]:.4f}")
print(f"clipped, A > 0       {line['clip_frac_pos']:.4f}")
print(f"clipped, A < 0       {line['clip_frac_neg']:.4f}")

here = out.metrics
print(f"\nkl_old after the last update: {here['kl_old']:.4f}")
assert line["reward"] == made.rewards.mean() and line["kl_old"] < here["kl_old"]
assert abs(here["kl_old"] - k3(d[rollout.mask]).mean().item()) < 1e-6

# %% [markdown]
# Smaller: it is one update behind. K, the number of updates made on a rollout, is passes times minibatches. At K = 1
# `kl_old` is 0 in every line, and no metric will tell you whether your clip works.
#
# ## 8. Does it help?
#
# Four updates on eight answers are little. Here are twenty steps of eight problems with eight answers each, two
# passes of four updates on each rollout, with three seeds: the reward, and how long the answers are.
#
# **Predict.** The reward says nothing about length. What will the length do?

# %%
STEPS = 20  # fast: 2

figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for seed, colour, dashes in zip(range(3), COLOURS, ("-", "--", ":"), strict=False):
    run = Learner.from_config(TrainConfig(num_prompts=8, num_generations=8, num_iterations=2, seed=seed))
    lines = [run.step(step).metrics for step in range(1, STEPS + 1)]
    for axis, name in zip(axes, ("reward", "completion_length"), strict=True):
        values = [line[name] for line in lines]
        axis.plot(range(1, STEPS + 1), values, color=colour, linestyle=dashes, label=f"seed {seed}")
axes[0].set(title="Reward", xlabel="step", ylabel="mean reward", ylim=(0, 1))
axes[1].set(title="Length", xlabel="step", ylabel="tokens", ylim=(0, None))
axes[0].legend()
plt.show()

# %% [markdown]
# A worked answer is right more often than a guess, so working becomes likelier, and answers grow from 8 tokens to
# about 30. Nobody rewarded length; a 0/1 reward was enough. With seed 0 the reward fell before it rose: it had begun
# with a lucky rollout. (Asked this gently, with eight updates a rollout, other algorithms learn it as well, and as
# fast. What sets them apart comes with more, in [notebook 4](04_collapse_of_baselines.ipynb).)
#
# ## Exercises
#
# 1. *One line.* Ask for the advantages of our rollout with `advantage_weight="equal"`, and with `"clip_filter"`.
#    Predict both first; the table stands in `minicpgd/advantages.py`.
# 2. *By hand.* One answer of eight is right. Work out A of the right one and of a wrong one, with the weight `std`,
#    and check yourself. Which of the two pulls harder? And the right one against all wrong ones together?
# 3. *An experiment.* `cpg` is CPGD without its drift. From the same rollout, with 16 passes in place of 4, compare
#    the two: the largest ratio, and `kl_old`. Use more than one seed.

# %% solution
# Solution 1
for weight in ("equal", "clip_filter"):
    print(weight, algorithm.advantages(made.rewards, rollout.lengths.view(2, 4), advantage_weight=weight)[0])
# equal: R - 0.5. clip_filter: one of two prompts says something, so its answers count twice.

# %% solution
# Solution 2
one = torch.tensor([[1.0] + [0.0] * 7])
A = algorithm.advantages(one, torch.ones(1, 8))
print(A)
# The mean is 1/8 and sigma = sqrt((49 + 7) / 64 / 7) = 0.3536; with 1e-4 added, A = (7/8) / 0.3537 = 2.474,
# and (-1/8) / 0.3537 = -0.353.
# The right one pulls seven times as hard, and the two sides are equal in all: advantages of a group add up to 0.
assert abs(A[0, 0] - 2.475) < 1e-2 and A.sum().abs() < 1e-5

# %% solution
# Solution 3
for seed in range(3):
    for name in ("cpgd", "cpg"):
        small = {"num_prompts": 2, "num_generations": 4, "num_minibatches": 1, "num_iterations": 16}
        line = Learner.from_config(TrainConfig(algorithm=name, seed=seed, **small)).step(1).metrics
        print(f"seed {seed}  {name:<4}  largest ratio {line['ratio_max']:6.2f}  kl_old {line['kl_old']:.4f}")
# The drift holds both: ratios stay near 2, and kl_old is 3.7 to 12 times smaller, with every seed.
