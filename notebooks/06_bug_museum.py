# %% [markdown]
# # 6. A museum of bugs
#
# Wrong code for reinforcement learning seldom crashes. It trains, but worse, or for a while just as well. This notebook
# inserts eight classic bugs, by a few lines each, and looks for their traces in the log.
#
# **After this notebook you can**
#
# - recognise seven of eight bugs by a number in your own log (two share one), and the eighth beside a right run;
# - say why a reward that rises proves little about the code that made it rise;
# - name, for each bug, the test that fails when somebody inserts it.
#
# The notebook takes about 50 seconds on a laptop's CPU.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import torch

from minicpgd import ALGORITHMS, TrainConfig
from minicpgd.algorithms import Algorithm
from minicpgd.algorithms.surrogates import ratio
from minicpgd.models import Rollout, quiet
from minicpgd.plots.style import COLOURS, STYLE, line_style, ribbon_legend, ribbons
from minicpgd.training import Learner, seed_step

quiet()
plt.rcParams.update(STYLE)
grpo, rloo = ALGORITHMS["grpo"], ALGORITHMS["rloo"]
SEEDS = range(3)  # fast: range(1)
STEPS = 5  # fast: 1

# %% [markdown]
# ## How the notebook shows a bug
#
# `make` builds a learner, with a bug or without. `run_seeds` lets it make some steps from each of three seeds.
# `compare` draws both: a thin line per seed, and a thick one for their mean. All begin with the same problems and the
# same random numbers. The settings are aggressive on purpose: eight updates on each rollout (K = 8), at twice the
# default learning rate. One update would not show what goes wrong *between* updates.


# %%
def make(kind=Learner, row=grpo, seed=0, **changes):
    settings = {"num_prompts": 4, "num_generations": 8, "num_minibatches": 1, "num_iterations": 8}
    settings |= {"learning_rate": 2e-4, "max_completion_length": 48, "max_steps": 999, "eval_steps": 999}
    settings |= {"target_kl": None}  # A stop would hide what goes wrong.
    learner = kind.from_config(TrainConfig(algorithm=row.name, seed=seed, **(settings | changes)))
    learner.algorithm = row
    return learner


def run_seeds(steps=STEPS, change=lambda learner: None, **bug):
    frames = []
    for seed in SEEDS:
        learner = make(seed=seed, **bug)
        change(learner)
        frames.append(pd.DataFrame([{"seed": seed, "step": s, **learner.step(s).metrics} for s in range(1, steps + 1)]))
    return pd.concat(frames)


def compare(names, **runs):
    figure, axes = plt.subplots(1, len(names), figsize=(9, 3), layout="constrained")
    for axis, (metric, unit) in zip(axes, names.items(), strict=True):
        for number, (label, frame) in enumerate(runs.items()):
            table, style = frame.pivot(index="step", columns="seed", values=metric), line_style(number)._asdict()
            axis.plot(table, **(style | {"marker": ""}), linewidth=0.8, alpha=0.6)
            axis.plot(table.mean(axis=1), **style, markersize=5, label=label.replace("_", " "))
        axis.set(title=metric, xlabel="step", ylabel=unit, xticks=sorted(set(frame.step)))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs))
    plt.show()


REWARD = {"reward": "mean reward"}
right = run_seeds()
trained = []  # section 3 collects its learners here

# %% [markdown]
# ## 1. The clip, upside down
#
# PPO's clip takes the *smaller* of $r A$ and $\mathrm{clip}(r) A$. A loss is minus an objective, so there the smaller
# becomes the larger. Whoever changes only one of the two gets this bug: a `max`. Then a token that went too far the
# right way keeps its gradient, and one that went the wrong way loses it.
#
# **Predict.** Will the wrong runs learn more slowly in the first steps, or faster? Is their clipped share larger?


# %%
def upside_down(log_ratio, advantage, logp, low, high):
    free = ratio(log_ratio) * advantage
    return torch.maximum(free, ratio(log_ratio.clamp(low, high)) * advantage), free


unbounded = run_seeds(row=replace(grpo, surrogate=upside_down))
compare(REWARD | {"clip_frac_neg": "share of tokens", "kl_old": "nats per token"}, right=right, max_for_min=unbounded)
first = [frame[frame.step == 1] for frame in (right, unbounded)]
print("step 1, clipped with A < 0:", *(frame.clip_frac_neg.round(3).tolist() for frame in first))
assert (first[1].clip_frac_neg < first[0].clip_frac_neg / 5).all() and (first[1].kl_old > first[0].kl_old).all()

# %% [markdown]
# They learn faster at first: at step 2 the wrong runs have a mean reward of 0.73, the right ones 0.47. At step 5 it is
# 0.17 against 0.83. After two steps one would have called the bug an improvement. The clipped share is *smaller*, 0.008
# in place of 0.124 for the first seed. The wrong clip acts only on tokens that move against their advantage, and few
# do.
#
# *In your own log:* `clip_frac_neg` and `clip_frac_pos` are near zero while `kl_old` is large.
# *Caught by* `test_gradients.py::test_one_token_by_hand_and_by_difference`.
#
# ## 2. k1 as a loss
#
# The KL to a reference is often logged as k1, $\ln \pi_\theta - \ln \pi_{\mathrm{ref}}$. Its mean is the KL, so one
# might put it into the loss. But autograd differentiates only $\ln \pi_\theta$ of the sampled tokens, and the reference
# drops out of the gradient. On fresh samples that gradient has mean zero. On old samples it lowers the probability of
# all sampled tokens, good or bad, without end.
#
# **Predict.** β goes from 0.0001, almost no penalty, to β = 1, a strong one. How does `kl_ref`, the distance to the
# reference, change with k3 in the loss, and with k1?


# %%
class K1(Algorithm):
    def loss(self, logp, old_logp, advantages, mask, settings, *, ref_logp, token_weights):
        tensors, weights = (logp, old_logp, advantages, mask), {"ref_logp": ref_logp, "token_weights": token_weights}
        output = super().loss(*tensors, replace(settings, beta=1e-12), **weights)
        return replace(output, loss=output.loss + settings.beta * (token_weights * (logp - ref_logp)).sum())


(figure, axis), betas = plt.subplots(figsize=(9, 3.2), layout="constrained"), [1e-4, 0.1, 1.0]
for number, (label, row) in enumerate({"k3": grpo, "k1 in the loss": K1(**vars(grpo))}.items()):
    table = torch.tensor([run_seeds(1, beta=beta, num_iterations=4, row=row).kl_ref.tolist() for beta in betas])
    axis.plot(betas, table, **line_style(number)._asdict())
    for beta, kl in zip(betas, table.tolist(), strict=True):
        print(f"{label:<15} beta {beta:<7} kl_ref at step 1:", *(f"{x:.3f}" for x in kl))
    assert (table.diff(dim=0) > 0).all() if number else (table[-1] < table[0] / 2).all()
axis.set(xscale="log", yscale="log", xlabel="beta  (log scale)", ylabel="kl_ref, nats per token (log)", xticks=betas)
axis.minorticks_off()
figure.legend(axis.lines[:: len(SEEDS)], ["k3", "k1 in the loss"], loc="outside right center")
plt.show()

# %% [markdown]
# There is one line per seed, and the metric is k3 for both. With k3 a larger β keeps the policy closer: from 0.032,
# 0.055 and 3.749 nats per token to 0.011, 0.013 and 0.024. With k1 it moves the policy away: from 0.032, 0.055 and
# 4.233 to 0.085, 0.540 and 22.605. Not all of that 22.605 is due to the bug: the third seed is at 4.233 with almost no
# penalty.
#
# *In your own log:* a `kl_ref` that does not decrease but grows when you raise β.
# *Caught by* `test_gradients.py::test_the_reference_kl`, `test_training.py::test_beta_keeps_the_policy_near_its_start`.
#
# ## 3. The end, masked out
#
# Many tokenizers pad with EOS, the token that ends a response. A mask made by `ids != pad_id` then drops the padding
# and also the EOS that the model *chose*. So EOS has no gradient of its own any more: training neither reinforces it in
# right answers nor makes it rarer in wrong ones. Our model stops reliably, so we first make it forget that, by scaling
# EOS's row in the output layer by 0.3.
#
# **Predict.** Which of the two will stop more often after training, the right code or the masked one?


# %%
class NoEnd(Learner):
    def collect(self, generators):
        experience = super().collect(generators)
        rollout = experience.rollout
        without = rollout.mask & ~torch.isin(rollout.completion_ids, self.policy.eos_ids)
        return replace(experience, rollout=replace(rollout, mask=without))


@torch.no_grad()
def forget(learner):
    learner.policy.model.get_output_embeddings().weight[learner.policy.eos_ids] *= 0.3
    trained.append(learner)


token_mean = grpo.override(aggregation="token_mean")
cases = {"right": {}, "EOS_masked": {"kind": NoEnd}, "right_but_token_mean": {"row": token_mean}}
runs = {name: run_seeds(min(STEPS, 4), forget, num_iterations=4, **case) for name, case in cases.items()}
units = {"completion_length": "tokens", "grad_norm": "before clipping"}
compare(REWARD | units, right=runs["right"], EOS_masked=runs["EOS_masked"])
last = pd.concat(runs, names=["case"]).query("step == step.max()").groupby("case", sort=False)
print(last[["reward", "completion_length", "grad_norm"]].mean().round(2))
assert STEPS == 1 or last.completion_length.min()["right"] > last.completion_length.max()["EOS_masked"]

# %% [markdown]
# The masked code stops more often, and looks better. At step 4 its reward is 0.40 against 0.26, where seeds overlap.
# Its responses have 10.85 tokens against 22.71, where none do. Its gradients are larger, 2.06 against 0.88. How can a
# model learn to stop without a gradient of EOS? The next cell computes the probability of EOS where the model stopped
# before it forgot: after a guess (`#` and a digit, 3 tokens with EOS), and after a worked answer.

# %%
experience = make(num_prompts=32).collect(seed_step(100, 1))
probe, rewards = experience.rollout, experience.rewards.flatten()
forget(make())  # this learner stays untrained
ends, guess = torch.isin(probe.completion_ids, trained[0].policy.eos_ids) & probe.mask, probe.lengths == 3
scores = [model.score(probe) for model in trained]
for kind, rows in {"a guess": guess, "work": ~guess}.items():
    print(f"after {kind}: {(ends & rows[:, None]).sum()} ends, {rewards[rows].mean():.2f} of them right")
    chances = [f"{score[ends & rows[:, None]].exp().mean():.2f}" for score in scores]
    for number, name in enumerate([*cases, "before training"]):
        print(f"   {name:<20}", *chances[number * len(SEEDS) : (number + 1) * len(SEEDS)])

# %% [markdown]
# The masked runs learned to stop in both places (0.87, 0.85, 0.84 and 0.90, 0.87, 0.87), but indirectly. A wrong
# response that goes on makes its additional tokens rarer, and their probability goes to the other tokens, EOS among
# them. The right runs have this effect as well, but their EOS also gets its response's advantage. Of the guesses 79 in
# 100 are wrong, so after a guess that advantage is mostly negative, and they unlearned to stop there (0.28, 0.34, 0.58,
# from 0.65). After work they changed little (0.76, 0.68, 0.79, from 0.73). In a guess EOS is one of three tokens, so it
# gets a third of that gradient. With the same weight for all tokens (`token_mean`) the right code learns to stop after
# guesses too, in two of three seeds (0.84, 0.63, 0.83).
#
# So here the bug removed mostly negative gradients, and that helped; in another setting it would remove positive ones.
# The lesson is not that the mask is right. The lesson is that behaviour does not reveal this bug, and a count does.
#
# *In your own log:* `completion_length` and `grad_norm` differ from a right run; alone, neither looks wrong. Count
# once: the mask of a rollout must have as many tokens as its `lengths` say.
# *Caught by* `test_policy_and_sampling.py::test_pad_may_be_eos`.
#
# ## 4 and 5. Two temperatures, and padding that is seen
#
# Bug 4 samples at temperature 0.6 and scores at 1. The code divides the logits in one place only, so
# $\ell_{\mathrm{old}}$ and $\ell$ belong to different distributions. Bug 5 concerns prompts of different lengths, which
# are padded on the left: in scoring, the mask does not mark the padding. The model reads it as text, and scores
# something else than it sampled.
#
# **Predict.** The two leave the same trace in the first pass over the first rollout. In which metric, and which value
# should it have?


# %%
class TwoTemperatures(Learner):
    def collect(self, generators):
        return Learner.collect(replace(self, config=replace(self.config, temperature=0.6)), generators)


class PaddingSeen(Rollout):
    def inputs(self, rows):
        ids, mask, longest = super().inputs(rows)
        return ids, torch.ones_like(mask), longest


class SeesPadding(Learner):
    def collect(self, generators):
        experience = super().collect(generators)
        return replace(experience, rollout=PaddingSeen(**vars(experience.rollout)))


kinds = {"right": Learner, "temperatures": TwoTemperatures, "padding": SeesPadding}
passes = {name: pd.DataFrame(make(kind).step(1).passes) for name, kind in kinds.items()}
figure, axes = plt.subplots(1, 3, figsize=(9, 3.3), sharey=True, layout="constrained")
for axis, (name, seen), colour in zip(axes, passes.items(), COLOURS, strict=False):
    ratios = [seen[f"ratio_{end}"].clip(lower=1e-4) for end in ("min", "p01", "p99", "max")]
    ribbons(axis, seen["pass"], ratios, colour, (0.8, 1.2))
    axis.set(yscale="log", title=name, xlabel="pass over the first rollout")
axes[0].set_ylabel("ratio r  (log scale)")
figure.legend(handles=ribbon_legend(), loc="outside lower center", ncols=3)
plt.show()
rows = {f"{name}, pass {n}": seen.iloc[n - 1] for name, seen in passes.items() for n in (1, 8)}
table = pd.DataFrame(rows).T[["ratio_min", "ratio_max", "kl_old"]]
print(table.astype(float).round(3))
assert abs(table.ratio_min["right, pass 1"] - 1) < 1e-3
assert table.ratio_min["temperatures, pass 1"] < 0.9 and table.ratio_min["padding, pass 1"] < 0.1

# %% [markdown]
# The metrics are `ratio_min` and `ratio_max`; in pass 1 both should be 1. (Figure and table show one seed and one
# step.) Before any update the ratios range from 0.810 to 2.903 with two temperatures, and down to 0.000 with visible
# padding. By pass 8 one cannot see the first bug any more: nobody would examine a `kl_old` of 0.074 in place of 0.061.
#
# *In your own log:* `ratio_min` and `ratio_max` of the very first pass, in `passes.jsonl`, with one minibatch.
# *Caught by* `test_policy_and_sampling.py::test_sampled_and_scored_logprobs_agree` and `test_padding_changes_nothing`;
# a learner that forgets its temperature by `test_museum.py::test_the_learner_scores_at_the_temperature_it_sampled_at`.
#
# ## 6. No old log-probabilities
#
# Some trainers do not score the old policy, and use `logp.detach()` in its place. With one update per rollout that is
# exact. With more, $d$ is 0 and $r$ is 1 *by construction*. The gradient is right at the first update only, and clip
# and drift never act.
#
# **Predict.** Which values will `kl_old`, the ratios and the clipped shares have? And the reward?


# %%
class NoOld(Algorithm):
    def loss(self, logp, old_logp, *rest, **tensors):
        return super().loss(logp, logp.detach(), *rest, **tensors)


wrong = run_seeds(row=NoOld(**vars(grpo)))
compare(REWARD | {"kl_old": "nats per token", "ratio_max": "ratio"}, right=right, no_old=wrong)
assert (wrong.kl_old == 0).all() and (wrong.ratio_max == 1).all() and (wrong.clip_frac_pos == 0).all()

# %% [markdown]
# They look perfect: `kl_old` is exactly 0, all ratios are exactly 1, and nothing is clipped. The reward jumps to 0.76
# at step 2, and is 0.40 at step 5. As with bug 1 nothing limits the updates, and here no metric shows it.
#
# *In your own log:* metrics that are too good. At K > 1 a `kl_old` of 0 means that the metric is broken.
# *Caught by* `test_training.py::test_passes_of_a_rollout`: `kl_old` must become positive.
#
# ## 7. RLOO, divided
#
# RLOO's advantage is the reward minus the mean of the other G − 1, and nothing divides it. Somebody copies GRPO's code
# with its division by the group's σ. The advantages still have mean 0, but this is not RLOO any more. Prompts that are
# nearly solved or nearly hopeless now have a larger weight, and the gradient has a bias.
#
# **Predict.** Rewards are 0 or 1. How large can an advantage of RLOO be? Which curve will show the difference?

# %%
rows = (rloo, rloo.override(advantage_weight="std"))
plain, divided = (run_seeds(min(STEPS, 3), row=row, num_iterations=4) for row in rows)
compare(REWARD | {"completion_length": "tokens", "advantage_max": "largest A"}, right=plain, divided=divided)
first = [frame[frame.step == 1].advantage_max for frame in (plain, divided)]
print("largest A at step 1:", *(largest.round(2).tolist() for largest in first))
assert (plain.advantage_max <= 1 + 1e-6).all() and divided.advantage_max.max() > 1

# %% [markdown]
# It is at most 1: a single right answer among wrong ones has 1 − 0. At step 1 the largest A is 1.0, 0.86 and 1.0. With
# the division it is 2.83 (which is $\sqrt{G}$), 1.85 and 2.83. Reward and length are the same within the spread of the
# seeds. AdamW's step does not depend on the gradient's scale, so only the weights of prompts differ. The third panel
# shows this bug, reward and length do not.
#
# *In your own log:* `advantage_max`. With rewards in [0, 1] it cannot exceed 1 in RLOO.
# *Caught by* `test_advantages.py::test_leave_one_out`.
#
# ## 8. The wrong axis
#
# Rewards are (N, G): a row is a prompt, and a column the i-th response to each. With mean and deviation over `dim=0`,
# every response is compared with answers to *other* problems. All shapes still fit. Most responses to an easy prompt
# now have A > 0, and most responses to a hard one A < 0.
#
# **Predict.** In a group where all rewards are equal, what are the advantages? Will the policy learn at all?


# %%
class WrongAxis(Algorithm):
    def advantages(self, rewards, lengths, **settings):
        return super().advantages(rewards.T, lengths.T, **settings).T


for name, row in (("right", grpo), ("wrong axis", WrongAxis(**vars(grpo)))):
    experience = make(row=row).collect(seed_step(0, 1))
    sums = experience.advantages.sum(dim=1)
    print(f"{name:<11} sum of A per prompt:", *(round(A, 2) + 0.0 for A in sums.tolist()))
    assert (sums.abs().max() < 1e-4) == (name == "right")
print("right answers of 8, per prompt:", *experience.rewards.sum(dim=1).int().tolist())
wrong = run_seeds(row=WrongAxis(**vars(grpo)))
compare(REWARD | {"completion_length": "tokens", "kl_old": "nats per token"}, right=right, wrong_axis=wrong)

# %% [markdown]
# It learns: from 0.39 to 0.64 at step 5. The right code has 0.83, and the seeds overlap. The reward on other problems
# is a poor baseline, but it is one. In the right code each prompt's advantages add up to 0. In the wrong one those of
# the second prompt add up to 8.83, because it is easy: all eight responses to it were right.
#
# *In your own log:* `samples.jsonl` has whole groups. The advantages of each must add up to 0.
# *Caught by* `test_advantages.py::test_group_normalised`, `test_museum.py::test_a_group_is_the_responses_to_one_prompt`
#
# ## What these bugs teach
#
# Two bugs lowered the reward in the end, and both had raised it at first. With the masked end the reward was higher
# than with the right code. With RLOO divided it was the same, and the wrong axis looked like bad luck. Tests find such
# bugs: a number computed by hand, or an identity that must hold before the first update. The size of the traces depends
# on this tiny model and on aggressive settings; which metric to look at does not.
#
# ## Exercises
#
# 1. *One line.* Put bug 1 into CPGD: the `max` of $d A$ and $\mathrm{clip}(d) A$, in the row `cpgd`. Predict the
#    largest ratio: does the drift limit it without a working clip? (The row `cpg` is the same without the drift.)
# 2. *By hand.* Show that with samples of $\pi_{\mathrm{old}}$, *minimising* the mean of k1, $\ln \pi_\theta - \ln
#    \pi_{\mathrm{ref}}$, is *maximising* $\mathrm{KL}(\pi_{\mathrm{old}} \,\|\, \pi_\theta)$. Check the gradient on a
#    policy of three actions with `exact_kl`.
# 3. *An experiment.* Insert a ninth bug: rewards come back in another order, so each response gets its neighbour's.
#    Override `Algorithm.advantages` with `rewards.roll(1, dims=1)`. Which metric reveals it?


# %% solution
# Solution 1
def upside_down_too(d, A, logp, low, high):
    return torch.maximum(d * A, d.clamp(low, high) * A), d * A


without, with_drift = (replace(ALGORITHMS[name], surrogate=upside_down_too) for name in ("cpg", "cpgd"))
bare = run_seeds(1, row=without).ratio_max
drift = run_seeds(1, row=with_drift, drift_coef="max_advantage").ratio_max
print("largest ratio per seed with max: cpg (no drift)", bare.round(1).tolist(), "cpgd", drift.round(1).tolist())
assert (drift < bare).all()
# A large drift limits it: its gradient alpha * (r - 1) acts where the wrong clip does not. So it hides the wrong clip.

# %% solution
# Solution 2
# E_old[ln pi_theta - ln pi_ref] = -KL(old || theta) + E_old[ln pi_old - ln pi_ref], and the second part is a constant.
from minicpgd.algorithms.divergence import exact_kl

old, theta = torch.tensor([0.2, -0.5, 1.0]), torch.tensor([0.6, 0.1, 0.3], requires_grad=True)
(of_k1,) = torch.autograd.grad((old.softmax(-1) * theta.log_softmax(-1)).sum(), theta)
(of_kl,) = torch.autograd.grad(exact_kl(old, theta), theta)
print(of_k1, of_kl)
assert torch.allclose(of_k1, -of_kl, atol=1e-6) and of_k1.abs().max() > 0.01


# %% solution
# Solution 3
class NeighboursReward(Algorithm):
    def advantages(self, rewards, lengths, **settings):
        return super().advantages(rewards.roll(1, dims=1), lengths, **settings)


frame = run_seeds(row=NeighboursReward(**vars(grpo)), steps=min(STEPS, 3), num_iterations=4)
print(frame.groupby("step")[["reward", "completion_length", "clip_frac_pos", "advantage_max"]].mean().round(3))
print(frame.pivot(index="step", columns="seed", values="reward").round(2))
# No metric reveals it: the clip works, and A adds up to 0. But the bug makes more than noise. Let s_i be the gradient
# of response i's log-probability. The right mean gradient is E[A_i s_i]. With the bug it is E[A_j s_i] for a neighbour
# j.
# 1. The A of a group add up to 0, whatever s_i is. So E[A_1 s_i] + ... + E[A_G s_i] = 0.
# 2. All responses are independent samples of one policy. So E[A_j s_i] is the same for each of the G - 1 other j.
# 3. One term of the sum is E[A_i s_i], and the other G - 1 are equal. So each of these is -E[A_i s_i] / (G - 1).
# With G = 8 the first update uses minus a seventh of the right gradient, which lowers the expected reward. The mean
# reward does decrease, but that proves little: at step 3 only one seed of three is below its step 1.
