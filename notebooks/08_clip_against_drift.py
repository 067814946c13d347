# %% [markdown]
# # 8. The clip against the drift: why a pull towards the old policy can destroy a policy
#
# CPGD has two guards: a clip, and a penalty for drifting from the policy that sampled. One expects two guards to be
# safer than one. This notebook shows where they work against each other, and what to use instead.
#
# **After this notebook you can**
#
# - say which force acts on a token that the clip has silenced;
# - explain why the same drift destroys a policy at K = 4 and protects one at K = 64;
# - tell what is proved about this, what is measured, and what is a guess;
# - choose between a small α, a large α and a stop.
#
# The notebook takes about a minute on a laptop's CPU.

# %%
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from minicpgd import TrainConfig
from minicpgd.models import quiet
from minicpgd.plots.clip_and_drift import draw_net_force
from minicpgd.plots.style import COLOURS, DASHES, RATIO, STYLE
from minicpgd.training import Learner, seed_step

quiet()
plt.rcParams.update(STYLE)
here = Path.cwd()
RESULTS = next(p for p in (here, *here.parents) if (p / "results" / "default").is_dir()) / "results" / "default"

# %% [markdown]
# ## 1. Two forces on one token
#
# The gradient of CPGD's objective in a token's log-probability is a sum of two numbers. The surrogate gives A, or 0
# where the clip acts. The drift gives $-\alpha \min(r - 1, c)$. Both are forces: a positive number raises the token's
# probability.
#
# **Predict.** A response failed, so A = −1. One of its tokens has fallen to r = 0.6, below the clip's bound of 0.8. Which
# force acts on it now, and in which direction? Does it matter for the direction whether α is 1 or 0.01?

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
for axis, advantage in zip(axes, (-1.0, 1.0), strict=True):
    draw_net_force(axis, advantage)
axes[0].set_ylabel("force on its log-probability")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
plt.show()

# %% [markdown]
# In the grey region the clip has silenced the advantage, and the drift acts alone. It pushes the token back up, although
# its response failed. The direction is the same for every α > 0, only the strength is α(1 − r).
#
# Without the drift nothing acts on this token in the grey region. But it does not rest there: tokens share weights, so
# updates for other tokens move it, too.
#
# ## 2. Few updates: the drift gives back what was learned
#
# The next cell follows real tokens. It samples a rollout of the embedded model and makes K updates on it, twice from the
# same state: once with α = 1, once with α = 0. Then it continues from the state without drift. It keeps the ratios of the
# tokens that were uncertain before, with a probability below 0.95, since a certain token can hardly move.
#
# **Predict.** With K = 4, a token of a failed response starts at r = 1. Where is it after the four updates, without the
# drift and with it?

# %%
SEEDS = (0, 1, 2)  # fast: (0,)


def follow(passes, rollouts, learning_rate, seed, epsilon=0.2):
    """The final ratios of uncertain tokens, by (α, whether the response succeeded)."""
    settings = {"num_prompts": 8, "num_generations": 8, "num_iterations": passes, "target_kl": None, "epsilon": epsilon}
    learner = Learner.from_config(TrainConfig(learning_rate=learning_rate, seed=seed, drift_coef=0.0, **settings))
    model, optimizer = learner.policy.model, learner.optimizer
    ratios = {(alpha, good): [] for alpha in (1.0, 0.0) for good in (False, True)}
    for step in range(1, rollouts + 1):
        generators = seed_step(seed, step)
        experience = learner.collect(generators)
        rollout, A = experience.rollout, experience.advantages.flatten()[:, None]
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        moments = [{name: value.clone() for name, value in state.items()} for state in optimizer.state.values()]
        order = generators.order.get_state()
        for alpha in (1.0, 0.0):
            model.load_state_dict(weights)
            optimizer.state.clear()
            for parameter, state in zip(optimizer.param_groups[0]["params"], moments, strict=False):
                optimizer.state[parameter] = {name: value.clone() for name, value in state.items()}
            generators.order.set_state(order)
            for _ in range(passes):
                learner.train_pass(replace(experience, drift_coef=alpha), generators.order)
            r = (learner.score(rollout) - rollout.logp).exp()
            uncertain = rollout.mask & (rollout.logp.exp() < 0.95)
            for good in (False, True):
                ratios[alpha, good] += r[uncertain & ((A > 0) if good else (A < 0))].tolist()
    return {key: torch.tensor(values) for key, values in ratios.items()}


def followed(passes, rollouts, learning_rate, **settings):
    """The same for all seeds together."""
    by_seed = [follow(passes, rollouts, learning_rate, seed, **settings) for seed in SEEDS]
    return {key: torch.cat([ratios[key] for ratios in by_seed]) for key in by_seed[0]}


def draw(axis, ratios, title):
    """The share of failed tokens that end below each ratio."""
    for which, alpha in enumerate((0.0, 1.0)):
        values = ratios[alpha, False].sort().values
        shares = torch.arange(1, len(values) + 1) / len(values)
        axis.plot(values, shares, color=COLOURS[which], linestyle=DASHES[which], label=f"α = {alpha:g}")
    axis.axvline(0.8, color="black", linewidth=0.9, linestyle=(0, (4, 2)))
    axis.set(title=title, xlabel=RATIO, xlim=(0, 1.4), ylim=(0, 1))
    axis.legend(loc="upper left")


few = followed(
    passes=1, rollouts=8, learning_rate=2e-4
)  # fast: few = followed(passes=1, rollouts=2, learning_rate=2e-4)
for (alpha, good), r in few.items():
    kind = "succeeded" if good else "failed"
    print(f"K = 4, alpha = {alpha:g}, {kind:<9}  {len(r)} tokens, median ratio {r.median():.2f}, mean {r.mean():.2f}")

# %% [markdown]
# With the drift fewer failures are unlearned, and those less. Without it TODO
#
# ## 3. Many updates: the drift keeps a token from running away
#
# **Predict.** The same with 16 passes, so K = 64, and half the learning rate. Where do failed tokens end without the
# drift, and where with it? Think of the grey region.

# %%
many = followed(
    passes=16, rollouts=2, learning_rate=1e-4
)  # fast: many = followed(passes=4, rollouts=1, learning_rate=1e-4)
for (alpha, good), r in many.items():
    kind = "succeeded" if good else "failed"
    print(f"K = 64, alpha = {alpha:g}, {kind:<9}  {len(r)} tokens, median ratio {r.median():.2f}, mean {r.mean():.2f}")

figure, axes = plt.subplots(1, 2, figsize=(10, 3.7), sharey=True, layout="constrained")
draw(axes[0], few, "After K = 4 updates, failed tokens")
draw(axes[1], many, "After K = 64 updates, failed tokens")
axes[0].set_ylabel("share of tokens below")
plt.show()

# %% [markdown]
# TODO
