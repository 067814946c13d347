# %% [markdown]
# # 1. CPGD, step by step
#
# A language model writes eight answers. A rule says which are right. An update makes the right answers likelier. This
# notebook prints every number on the way, next to its formula. The algorithm is CPGD, Clipped Policy Gradient
# Optimization with Policy Drift (arXiv 2505.12504). [Notebook 0](00_cpgd_on_one_page.ipynb) shows the whole algorithm
# on one page; read it first.
#
# **After this notebook you can**
#
# - say what goes into one step of rule-based reinforcement learning, and what comes out, with every shape;
# - compute an advantage, a log-ratio, a clip and a drift by hand, and check yourself against the package;
# - explain why clip and drift do nothing in the first update, and what they do from the second on;
# - read a line of `metrics.jsonl` and say where each number in it comes from.
#
# The notebook takes about 20 seconds on a laptop's CPU.

# %%
import math

import matplotlib.pyplot as plt
import torch

from minicpgd import TrainConfig
from minicpgd.algorithms import LossSettings, k3
from minicpgd.models import quiet
from minicpgd.plots import token_text
from minicpgd.plots.style import COLOURS, STYLE
from minicpgd.training import Learner, seed_step

quiet()
plt.rcParams.update(STYLE)
torch.set_printoptions(precision=3, sci_mode=False)

# %% [markdown]
# ## The policy
#
# A *policy* is a language model seen as an actor. Given the text so far, it has a probability for each next token, and
# it draws one. Our policy is tiny: a Llama of 108 thousand parameters whose tokens are single characters. It comes with
# the package.
#
# Its problems are sums. One works them out from left to right and keeps the last digit: `7+5*3=` asks for (7 + 5) · 3 =
# 36, so the answer is `6`, and 2 − 4 is 8. The model may guess, `#6`, or write its working first, `7+5=2,2*3=6#6`. The
# reward depends only on the digit after the `#`.
#
# A `Learner` holds the policy and everything that trains it. The settings are those of `minicpgd train`, only smaller:
# N = 2 problems, and G = 4 answers to each. The weight α of the drift is not the default, but the largest |A| of the
# rollout (`max_advantage`), so that one can see the drift. No pass is ended early (`target_kl`).

# %%
SHOW_DRIFT = {"drift_coef": "max_advantage", "target_kl": None}
small = {"num_prompts": 2, "num_generations": 4, "num_minibatches": 1, "num_iterations": 4}
config = TrainConfig(algorithm="cpgd", **small, **SHOW_DRIFT)
learner = Learner.from_config(config)
print(f"{learner.policy.model.num_parameters():,} parameters, {len(learner.policy.tokenizer)} tokens")

# %% [markdown]
# ## 1. The rollout
#
# `collect` samples the answers and computes their rewards. All random numbers of a step come from `(seed, step)`, so
# your run prints the same answers.
#
# **Predict.** The model was taught to guess mostly, and to write its working now and then. How many of eight answers
# will show their working? How many will be right?

# %%
generators = seed_step(seed=0, step=1)
experience = learner.collect(generators)
rollout = experience.rollout

for problem, text, reward in zip(experience.problems, rollout.completions, experience.rewards.flatten(), strict=True):
    print(f"{problem['prompt']:<14} {text:<34} reward {reward:.0f}")

# %% [markdown]
# Two of eight answers show their working, and both are right. Six are guesses. Every guess at the second problem was
# `0`, so all four answers to it got the reward. Section 2 shows what follows from that.
#
# A rollout consists of a few tensors. It has B = N · G = 8 rows, one for each answer, padded to the T tokens of the
# longest. The *mask* says which tokens are real, and is computed from the answers' lengths. (Other ways to compute it
# lead to a classic bug; see [notebook 6](06_bug_museum.ipynb).)

# %%
for name in ("completion_ids", "mask", "lengths", "logp"):
    print(f"{name:<15} {tuple(getattr(rollout, name).shape)}")
print("lengths        ", rollout.lengths.tolist())
print("probability of the tokens of answer 0:", rollout.logp[0, :3].exp())

# %% [markdown]
# The end of an answer, `<eos>`, is a token like the others: the model chose to stop, and training can reinforce that
# choice. `logp` is $\ell_{\mathrm{old}} = \ln \pi_{\mathrm{old}}(y_t \mid x, y_{<t})$, the logarithm of the probability
# with which each token was drawn. The sampling policy is called *old*, because training changes it.
#
# ## 2. Rewards to advantages
#
# A reward of 1 says "right". An *advantage* says "better than expected for this problem". The expectation is the mean μ
# of the group, which is the G answers to the same problem. The unit is the group's standard deviation σ:
#
# $$ A = w(x)\,(R - \mu), \qquad w(x) = \frac{1}{\sigma + 10^{-4}} $$
#
# **Predict.** The first group has rewards 1, 1, 0, 0, the second 1, 1, 1, 1. What are the eight advantages?

# %%
first = torch.tensor([1.0, 1.0, 0.0, 0.0])
by_hand = (first - first.mean()) / (first.std() + 1e-4)
print("by hand:", by_hand)
print("package:", experience.advantages)
assert torch.allclose(experience.advantages[0], by_hand) and (experience.advantages[1] == 0).all()

# %% [markdown]
# In the first group μ = 0.5 and σ = 0.577. (The sum of squares is divided by G − 1 = 3.) So A = ±0.5 / 0.577 = ±0.866.
# In the second group all rewards are equal, so all advantages are exactly 0.
#
# Each token of an answer gets the advantage of the whole answer. The reward does not say which tokens were good.
#
# ## 3. The log-ratio before the first update
#
# The rest of the notebook measures how far the new policy $\pi_\theta$ has moved from the old one, token by token:
#
# $$ d = \ln \pi_\theta - \ln \pi_{\mathrm{old}}, \qquad r = \exp(d) = \frac{\pi_\theta}{\pi_{\mathrm{old}}} $$
#
# `learner.score` computes $\ln \pi_\theta$ of the sampled tokens under the current policy.
#
# **Predict.** No update has been made yet. What are d and r?

# %%
d = learner.score(rollout) - rollout.logp
print(f"largest |d|: {d.abs().max():.6f}")
assert d.abs().max() < 1e-5

# %% [markdown]
# d = 0 and r = 1, up to the rounding of float32.
#
# ## 4. The first loss
#
# For each token CPGD maximises
#
# $$ \min\!\left(d A,\ \mathrm{clip}(d, \ln(1-\varepsilon), \ln(1+\varepsilon)) A\right) - \alpha\,\mathrm{drift}(d) $$
#
# The first part is the *surrogate*. It replaces the expected reward, which nobody can compute, and has the same
# gradient as long as the policy has not moved. The `clip` keeps d between $\ln 0.8$ and $\ln 1.2$ (ε is 0.2). The `min`
# takes the smaller of the two; section 6 shows its purpose.
#
# The second part penalises movement. The penalty is k3, $\mathrm{drift}(d) = r - 1 - d$. It is 0 at d = 0 and positive
# elsewhere. Its mean over tokens is a Kullback-Leibler divergence (KL), the usual measure of how much two policies
# differ; [notebook 3](03_kl_drift.ipynb) treats it. The slope of k3 in d is r − 1. From r = 3 on, the trained drift
# continues as a straight line, so its slope never exceeds c = 2. The coefficient α is the largest |A| of the rollout,
# which is a rule of this package.
#
# The loss is minus the mean of this objective, first over the tokens of each answer and then over the answers.
#
# **Predict.** d = 0. What is the value of the loss? Does it have a gradient?

# %%
algorithm = learner.algorithm
settings = LossSettings(drift_coef=experience.drift_coef)


def loss_at(d):
    """The loss of CPGD at log-ratios d, (B, T), and its gradient in d."""
    d = d.clone().requires_grad_()
    out = algorithm.loss(d, torch.zeros_like(d), experience.advantages.flatten(), rollout.mask, settings)
    out.loss.backward()
    return out, d.grad


out, gradient = loss_at(torch.zeros_like(d))
print(f"alpha = {experience.drift_coef:.3f}, loss = {out.loss:.3f}")
print("gradient, first 3 tokens of answers 0 to 3:")
print(gradient[:4, :3])

# %% [markdown]
# The loss is 0 and its gradient is not. In reinforcement learning the value of the loss does not measure the distance
# to a goal. Only its slope has a meaning.
#
# The slope is $-A$ times the token's share in the mean. Answer 0 has 3 tokens and there are 8 answers, so each token's
# share is 1/24, and $-0.866 / 24 = -0.036$: a larger log-probability of `#4` lowers the loss. In answer 2 the sign is
# reversed. In answer 1 the slope is smaller, because 32 tokens divide one answer's eighth. At d = 0 this is the plain
# policy gradient; clip and drift have no effect. The surrogates of GRPO (Group Relative Policy Optimization) and RLOO
# (REINFORCE leave-one-out) have the slope A there as well. RLOO only computes another A. From the second update on the
# three algorithms differ.

# %%
share = 1 / (8 * rollout.lengths)
assert torch.allclose(gradient[:, 0], -experience.advantages.flatten() * share)
print("weight of a token:", share[:4])

# %% [markdown]
# ## 5. One update
#
# A *pass* goes once over all answers. It can be cut into minibatches, with an update after each; four is the default.
# Ours is not cut, so a pass is one update. `learner.train_pass` makes one pass. An update computes a gradient, bounds
# its norm, and makes a step of AdamW. AdamW is an optimizer with momentum: it remembers past gradients.
#
# **Predict.** Answer 1 was right and long. Answers 2 and 3 were wrong and short. Which tokens will move most?

# %%
answers = zip(experience.problems, experience.advantages.flatten().tolist(), strict=True)
labels = [f"{problem['prompt']} A={advantage:+.2f}" for problem, advantage in answers]
pieces = learner.policy.tokens(rollout.completion_ids, rollout.lengths)
tokens = [["■" if piece == "<eos>" else piece for piece in row] for row in pieces]
low, high = torch.tensor(algorithm.clip_bounds(config.epsilon)).log().tolist()


def show(title):
    """The answers, coloured by how far each token has moved since it was sampled."""
    moved = learner.score(rollout) - rollout.logp
    return token_text(tokens, moved, labels=labels, low=low, high=high, limit=0.8, unit="log-ratio d", title=title)


learner.train_pass(experience, generators.order)
show("After 1 update (■ is the end of an answer)")

# %% [markdown]
# The figure shows four things.
#
# - Nearly all movement is in two places: the digit of a guess, and the *first* token, where the model decides whether
#   to guess or to work. After the first `7` the tokens were almost certain, and such tokens move little.
# - The probability of `#` decreased in answer 0, although that answer was right. The same `#` is in answers 2 and 3,
#   which are wrong, and two outweigh one. The tokens are not independent, since they share the model's parameters.
# - The second problem moved too, without any advantage. To begin with a digit became likelier *everywhere*. Training
#   generalises this way, to effects that nobody wanted as well.
# - One token has a triangle. Its ratio left the range from 0.8 to 1.2 (▲ above, ▼ below) after a single update.
#
# ## 6. More updates on the same rollout
#
# Sampling is expensive, so a rollout is used more than once. From the second update on, d is not 0, and clip and drift
# have an effect. The surrogate gives a token the gradient A, or 0 once the token is clipped. The drift's slope is min(r
# − 1, c), so the drift adds the gradient −α · min(r − 1, c). The sum must be what autograd finds in the package's loss.
#
# **Predict.** After four updates: does a clipped token stand still?

# %%
for _ in range(config.num_iterations - 1):
    learner.train_pass(experience, generators.order)
show("After 4 updates")

# %%
d = learner.score(rollout) - rollout.logp
out, gradient = loss_at(d)
print("answer token      A       d      r  clipped   surrogate   drift    both")
for row, t in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (3, 1), (6, 0)):
    A, dt, clipped = experience.advantages.flatten()[row].item(), d[row, t].item(), bool(out.clipped[row, t])
    surrogate = 0.0 if clipped else A
    drift = -experience.drift_coef * min(math.exp(dt) - 1, config.drift_clip)
    both = -gradient[row, t].item() * 8 * rollout.lengths[row].item()
    print(
        f"{row:>4}   {tokens[row][t]}      {A:+.2f}  {dt:+.3f}  {math.exp(dt):.2f}  "
        f"{'yes' if clipped else 'no ':<7}   {surrogate:+.3f}      {drift:+.3f}   {both:+.3f}"
    )
    assert abs(surrogate + drift - both) < 1e-4

# %% [markdown]
# Read the table row by row. The last column is the gradient that the optimizer receives.
#
# - **`4` in answer 0** has a ratio above 1.2 and is clipped, so its surrogate has no gradient. Yet the token does not
#   stand still: the drift lowers its probability again.
# - **`7` in answer 1** has a ratio of 2.25, far beyond the clip's bound. A clip bounds the objective, not the ratio. It
#   removes the token's own gradient, but other tokens and the optimizer's momentum can move the token further. Of the
#   loss's terms only the drift counteracts that.
# - **`#`** has the same d in answers 0 and 2, and only one of the two is clipped. With A > 0 a ratio below 0.8 is a
#   mistake, so the surrogate keeps its full gradient. With A < 0 it is the intended result. The `min` makes this
#   distinction.
# - **`1` in answer 2** was beyond the bound after the first update, and is within it now.
# - **`6` in answer 6** has no advantage. The drift still pulls it towards its old probability.
#
# In the surrogates of PPO and GRPO the gradient is r · A in place of A. Notebook 2 draws the two side by side.
#
# ## 7. The numbers in the log
#
# A run writes one line per step to `metrics.jsonl`. You have seen most of its numbers already. `accuracy` is the share
# of right answers; here it equals the reward. `entropy` measures how undecided the policy was, in nats per token; 0
# means certain.
#
# `kl_old` is the mean of k3 over the tokens: how far the policy has moved, in nats per token. `clip_frac_pos` and
# `clip_frac_neg` are the shares of clipped tokens, with A > 0 and with A < 0. ([Every metric](../docs/metrics.md) has a
# page.)
#
# **Predict.** The line describes the last pass, and each answer in it *before* its own update. We compute `kl_old`
# after the last update. Which of the two is larger?

# %%
line = Learner.from_config(config).step(1).metrics
for name in ("reward", "accuracy", "completion_length", "entropy", "drift_coef", "ratio_min", "ratio_max", "kl_old"):
    print(f"{name:<20} {line[name]:.4f}")
print(f"clipped, A > 0       {line['clip_frac_pos']:.4f}")
print(f"clipped, A < 0       {line['clip_frac_neg']:.4f}")

here = out.metrics
print(f"\nkl_old after the last update: {here['kl_old']:.4f}")
assert line["reward"] == experience.rewards.mean() and line["kl_old"] < here["kl_old"]
assert abs(here["kl_old"] - k3(d[rollout.mask]).mean().item()) < 1e-6

# %% [markdown]
# The logged value is smaller, because it is one update behind. K, the number of updates on a rollout, is the number of
# passes times the number of minibatches. At K = 1 `kl_old` is 0 in every line, and no metric shows whether your clip
# works.
#
# ## 8. Does it help?
#
# Four updates on eight answers are few. The next cell makes twenty steps of eight problems with eight answers each, and
# two passes of four updates on each rollout, with three seeds.
#
# **Predict.** The reward says nothing about length. What will the length do?

# %%
STEPS = 20  # fast: 2

figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for seed, colour, dashes in zip(range(3), COLOURS, ("-", "--", ":"), strict=False):
    run = Learner.from_config(TrainConfig(num_prompts=8, num_generations=8, num_iterations=2, seed=seed, **SHOW_DRIFT))
    lines = [run.step(step).metrics for step in range(1, STEPS + 1)]
    for axis, name in zip(axes, ("reward", "completion_length"), strict=True):
        values = [line[name] for line in lines]
        axis.plot(range(1, STEPS + 1), values, color=colour, linestyle=dashes, label=f"seed {seed}")
axes[0].set(title="Reward", xlabel="step", ylabel="mean reward", ylim=(0, 1))
axes[1].set(title="Length", xlabel="step", ylabel="tokens", ylim=(0, None))
axes[0].legend()
plt.show()

# %% [markdown]
# A worked answer is right more often than a guess, so working becomes likelier, and answers grow from 8 tokens to about
# 30. Nobody rewarded length; a reward of 0 or 1 was enough. With seed 0 the reward decreased before it increased,
# because its first rollout was a lucky one. (With few updates per rollout other algorithms learn this, too, and sooner
# than with so large an α. With 64 updates all of them need a stop; see [notebook 4](04_collapse_of_baselines.ipynb).)
#
# ## Exercises
#
# 1. *One line.* Compute the advantages of our rollout with `advantage_weight="equal"` and with `"clip_filter"`. Predict
#    both first; `minicpgd/algorithms/advantages.py` has a table.
# 2. *By hand.* One answer of eight is right. Compute A of the right one and of a wrong one, with the weight `std`, and
#    check yourself. Which has the larger gradient weight? How does the right one compare with all wrong ones together?
# 3. *An experiment.* `cpg` is CPGD without its drift. Use 16 passes in place of 4 on the same rollout, and compare the
#    largest ratio and `kl_old` of the two. Use more than one seed.

# %% solution
# Solution 1
for weight in ("equal", "clip_filter"):
    lengths = rollout.lengths.view(2, 4)
    print(weight, algorithm.advantages(experience.rewards, lengths, advantage_weight=weight)[0])
# With `equal` A is R - 0.5. With `clip_filter` A is twice that, because one of two prompts has unequal rewards.

# %% solution
# Solution 2
one = torch.tensor([[1.0] + [0.0] * 7])
A = algorithm.advantages(one, torch.ones(1, 8))
print(A)
# The mean is 1/8, and sigma = sqrt((49 + 7) / 64 / 7) = 0.3536. With 1e-4 added, A = (7/8) / 0.3537 = 2.474 for the
# right answer, and A = (-1/8) / 0.3537 = -0.353 for a wrong one.
# The right one has seven times the weight of a wrong one, and as much as all wrong ones together: the sum of A is 0.
assert abs(A[0, 0] - 2.475) < 1e-2 and A.sum().abs() < 1e-5

# %% solution
# Solution 3
for seed in range(3):
    for name in ("cpgd", "cpg"):
        settings = small | {"algorithm": name, "num_iterations": 16, "target_kl": None}
        if name == "cpgd":
            settings |= SHOW_DRIFT
        line = Learner.from_config(TrainConfig(seed=seed, **settings)).step(1).metrics
        print(f"seed {seed}  {name:<4}  largest ratio {line['ratio_max']:6.2f}  kl_old {line['kl_old']:.4f}")
# The drift limits both numbers: ratios stay near 2, and kl_old is 3.7 to 12 times smaller, with every seed.
