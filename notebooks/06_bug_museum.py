# %% [markdown]
# # 6. A museum of bugs
#
# Code for reinforcement learning seldom crashes when it is wrong. It trains, only worse, or just as well for a while.
# Here stand eight classic bugs, each put in by a few lines, with the marks it leaves in the log, or does not.
#
# **After this notebook you can**
#
# - recognise seven of eight bugs by a number in your own log (two share one), and the eighth beside a right run;
# - say why a reward that rises proves little about the code that made it rise;
# - name, for each bug, the test that fails when somebody puts it in.
#
# About 50 seconds on a laptop's CPU.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import torch

from minicpgd import ALGORITHMS, TrainConfig
from minicpgd.algorithms import Algorithm
from minicpgd.experience import Draws
from minicpgd.learner import Learner
from minicpgd.plots.style import COLOURS, STYLE, look, ribbon_legend, ribbons
from minicpgd.policy import quiet
from minicpgd.rollout import Rollout
from minicpgd.surrogates import ratio

quiet()
plt.rcParams.update(STYLE)
grpo, rloo = ALGORITHMS["grpo"], ALGORITHMS["rloo"]
SEEDS = range(3)  # fast: range(1)
STEPS = 5  # fast: 1

# %% [markdown]
# ## How an exhibit is shown
#
# `make` builds a learner, with a bug or without, `run` lets it make some steps from each of three seeds, and `compare`
# draws both: a thin line per seed, a thick one for their mean. All begin with the same problems and the same draws.
# The settings push hard, on purpose: eight updates on each rollout (K = 8), at twice the default learning rate. What
# goes wrong *between* the updates of a rollout cannot show where there is only one.


# %%
def make(kind=Learner, row=grpo, seed=0, **changes):
    settings = {"num_prompts": 4, "num_generations": 8, "num_minibatches": 1, "num_iterations": 8}
    settings |= {"learning_rate": 2e-4, "max_completion_length": 48, "max_steps": 999, "eval_steps": 999}
    learner = kind.from_config(TrainConfig(algorithm=row.name, seed=seed, **(settings | changes)))
    learner.algorithm = row
    return learner


def run(steps=STEPS, change=lambda learner: None, **bug):
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
            table, style = frame.pivot(index="step", columns="seed", values=metric), look(number)._asdict()
            axis.plot(table, **(style | {"marker": ""}), linewidth=0.8, alpha=0.6)
            axis.plot(table.mean(axis=1), **style, markersize=5, label=label.replace("_", " "))
        axis.set(title=metric, xlabel="step", ylabel=unit, xticks=sorted(set(frame.step)))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs))
    plt.show()


REWARD = {"reward": "mean reward"}
right = run()
trained = []  # learners of exhibit 3

# %% [markdown]
# ## 1. The clip, upside down
#
# PPO's clip takes the *smaller* of $r A$ and $\mathrm{clip}(r) A$. With a loss in place of an objective the sign turns
# around and the smaller becomes the larger, and whoever turns one of the two and not the other has this bug: a `max`. A
# token that went too far the right way is pushed on; one that went the wrong way is let go.
#
# **Predict.** Will the wrong runs learn more slowly in the first steps, or faster? And is the clipped share larger?


# %%
def upside_down(log_ratio, advantage, logp, low, high):
    free = ratio(log_ratio) * advantage
    return torch.maximum(free, ratio(log_ratio.clamp(low, high)) * advantage), free


unbounded = run(row=replace(grpo, surrogate=upside_down))
compare(REWARD | {"clip_frac_neg": "share of tokens", "kl_old": "nats per token"}, right=right, max_for_min=unbounded)
first = [frame[frame.step == 1] for frame in (right, unbounded)]
print("step 1, clipped with A < 0:", *(frame.clip_frac_neg.round(3).tolist() for frame in first))
assert (first[1].clip_frac_neg < first[0].clip_frac_neg / 5).all() and (first[1].kl_old > first[0].kl_old).all()

# %% [markdown]
# Faster, at first: at step 2 the wrong runs have a mean reward of 0.73, the right ones 0.47. At step 5 it is 0.17
# against 0.83. Who had stopped after two steps would have called the bug an improvement. The clipped share is
# *smaller*, 0.008 in place of 0.124 for the first seed: the wrong clip holds only tokens that move against their
# advantage, and those are few.
#
# *In your own log:* `clip_frac_neg` and `clip_frac_pos` near zero while `kl_old` is large.
# *Caught by* `test_gradients.py::test_one_token_by_hand_and_by_difference`.
#
# ## 2. k1 as a loss
#
# The KL to a reference is often logged as k1, $\ln \pi_\theta - \ln \pi_{\mathrm{ref}}$. Its mean is the KL, so why not
# put it into the loss? Because what is differentiated there is $\ln \pi_\theta$ of the sampled tokens, nothing else:
# the reference drops out of the gradient. On fresh samples that gradient has mean zero. On old ones it pushes down what
# was sampled, good or bad, without end.
#
# **Predict.** From β = 0.0001, which is nearly no leash, to β = 1, a strong one: where does `kl_ref`, the distance to
# the reference, go with k3 in the loss, and where with k1?


# %%
class K1(Algorithm):
    def loss(self, logp, *rest, beta, ref_logp, token_weights, **settings):
        output = super().loss(logp, *rest, beta=1e-12, ref_logp=ref_logp, token_weights=token_weights, **settings)
        return replace(output, loss=output.loss + beta * (token_weights * (logp - ref_logp)).sum())


(figure, axis), betas = plt.subplots(figsize=(9, 3.2), layout="constrained"), [1e-4, 0.1, 1.0]
for number, (label, row) in enumerate({"k3": grpo, "k1 in the loss": K1(**vars(grpo))}.items()):
    table = torch.tensor([run(1, beta=beta, num_iterations=4, row=row).kl_ref.tolist() for beta in betas])
    axis.plot(betas, table, **look(number)._asdict())
    for beta, kl in zip(betas, table.tolist(), strict=True):
        print(f"{label:<15} beta {beta:<7} kl_ref at step 1:", *(f"{x:.3f}" for x in kl))
    assert (table.diff(dim=0) > 0).all() if number else (table[-1] < table[0] / 2).all()
axis.set(xscale="log", yscale="log", xlabel="beta  (log scale)", ylabel="kl_ref, nats per token (log)", xticks=betas)
axis.minorticks_off()
figure.legend(axis.lines[:: len(SEEDS)], ["k3", "k1 in the loss"], loc="outside right center")
plt.show()

# %% [markdown]
# A line per seed; the metric is k3 for both. With k3 a higher β holds: from 0.032, 0.055 and 3.749 nats per token to
# 0.011, 0.013 and 0.024. With k1 it drives away: from 0.032, 0.055 and 4.233 to 0.085, 0.540 and 22.605. Not all of
# that 22.605 is the bug's, as nearly without a leash the third seed is at 4.233 already.
#
# *In your own log:* a `kl_ref` that does not fall but grows when β is raised.
# *Caught by* `test_gradients.py::test_the_reference_kl`, `test_training.py::test_beta_holds_the_policy_to_its_start`.
#
# ## 3. The end, masked out
#
# Many tokenizers fill up with EOS, the token that ends a response. A mask made by `ids != pad_id` then drops the EOS
# that the model *chose*, together with the filling. Nothing teaches it *directly* any more when to stop.
# Our model stops reliably, so we first make it forget: EOS's row in the output layer is scaled by 0.3.
#
# **Predict.** Which of the two learns to stop again?


# %%
class NoEnd(Learner):
    def sample(self, draws):
        problems, rollout = super().sample(draws)
        return problems, replace(rollout, mask=rollout.mask & ~torch.isin(rollout.completion_ids, self.policy.eos_ids))


@torch.no_grad()
def forget(learner):
    learner.policy.model.get_output_embeddings().weight[learner.policy.eos_ids] *= 0.3
    trained.append(learner)


cases = {"right": {}, "EOS_masked": {"kind": NoEnd}, "right_but_token_mean": {"aggregation": "token_mean"}}
runs = {name: run(min(STEPS, 4), forget, num_iterations=4, **case) for name, case in cases.items()}
units = {"completion_length": "tokens", "grad_norm": "before clipping"}
compare(REWARD | units, right=runs["right"], EOS_masked=runs["EOS_masked"])
last = pd.concat(runs, names=["case"]).query("step == step.max()").groupby("case", sort=False)
print(last[["reward", "completion_length", "grad_norm"]].mean().round(2))
assert STEPS == 1 or last.completion_length.min()["right"] > last.completion_length.max()["EOS_masked"]

# %% [markdown]
# The two part, and the wrong one looks better. At step 4 its reward is 0.40 against 0.26, where seeds overlap; its
# responses have 10.85 tokens against 22.71, where none do; its gradients are larger, 2.06 against 0.88. So let us ask
# the models: with what probability do they stop where the model stopped before it forgot? We look at two kinds of
# places apart, after a guess (`#` and a digit, 3 tokens with EOS) and after a worked answer.

# %%
made = make(num_prompts=32).experience(Draws.at(100, 1))
probe, rewards = made.rollout, made.rewards.flatten()
forget(make())  # before training
ends, guess = torch.isin(probe.completion_ids, trained[0].policy.eos_ids) & probe.mask, probe.lengths == 3
scores = [model.score(probe) for model in trained]
for kind, rows in {"a guess": guess, "work": ~guess}.items():
    print(f"after {kind}: {(ends & rows[:, None]).sum()} ends, {rewards[rows].mean():.2f} of them right")
    chances = [f"{score[ends & rows[:, None]].exp().mean():.2f}" for score in scores]
    for number, name in enumerate([*cases, "before training"]):
        print(f"   {name:<20}", *chances[number * len(SEEDS) : (number + 1) * len(SEEDS)])

# %% [markdown]
# After a guess the right runs unlearned to stop (0.28, 0.34, 0.58, from 0.65); after work they are about where they
# began (0.76, 0.68, 0.79, from 0.73). The masked ones learned it in both places (0.87, 0.85, 0.84 and 0.90, 0.87,
# 0.87): where a model goes on and is wrong, the tokens it went on with are pushed down, and what they lose goes to the
# others, EOS among them. In the right code EOS is judged itself, too, with its whole response. Of the guesses 79 in 100
# are wrong, and under the mean over each response's tokens the EOS of their three bears a third of the blame. It fits
# that with all tokens weighing the same (`token_mean`) the right code learns it after guesses as well, in two of three
# seeds (0.84, 0.63, 0.83). So what the mask took away was mostly blame. That it looked better says something of these
# guesses and these four steps; it does not make the mask right.
#
# *In your own log:* `completion_length` and `grad_norm`, but only beside a right run; alone, neither looks wrong. Count
# once: the mask of a rollout has as many tokens as its `lengths` say.
# *Caught by* `test_policy_and_rollout.py::test_pad_may_be_eos`.
#
# ## 4 and 5. Two temperatures, and padding that is seen
#
# Bug 4: sampled at temperature 0.6, scored at 1. The logits are divided in one place and not in the other, so
# $\ell_{\mathrm{old}}$ belongs to one distribution and $\ell$ to another. Bug 5: prompts of different lengths are
# padded on the left, and the mask does not say so when tokens are scored. The model reads the padding as text, and
# again it scores something else than it sampled.
#
# **Predict.** The two share a signature, in the first pass over the first rollout. Which metric, and what should it be?


# %%
class TwoTemperatures(Learner):
    def sample(self, draws):
        return Learner.sample(replace(self, config=replace(self.config, temperature=0.6)), draws)


class PaddingSeen(Rollout):
    def inputs(self, rows):
        ids, mask, longest = super().inputs(rows)
        return ids, torch.ones_like(mask), longest


class SeesPadding(Learner):
    def sample(self, draws):
        problems, rollout = super().sample(draws)
        return problems, PaddingSeen(**vars(rollout))


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
# `ratio_min` and `ratio_max`; in pass 1 both should be 1. (Figure and table are one seed, one step.) With two
# temperatures the ratios reach from 0.810 to 2.903, with visible padding from 0.000, before any update. By pass 8 the
# first bug has vanished in the crowd: a `kl_old` of 0.074 beside 0.061 is nothing that anybody would look into.
#
# *In your own log:* `ratio_min` and `ratio_max` of the very first pass, in `passes.jsonl`, with one minibatch.
# *Caught by* `test_policy_and_rollout.py::test_sampled_and_scored_logprobs_agree` and `test_padding_changes_nothing`; a
# learner that forgets its temperature by `test_museum.py::test_the_learner_scores_at_the_temperature_it_sampled_at`.
#
# ## 6. No old log-probabilities
#
# Some trainers save the scoring of the old policy and put `logp.detach()` in its place. With one update per rollout
# that is exact. With more, $d$ is 0 and $r$ is 1 *by construction*: the gradient is right at the first update only, and
# clip and drift never act.
#
# **Predict.** What will `kl_old`, the ratios and the clipped shares be? And the reward?


# %%
class NoOld(Algorithm):
    def loss(self, logp, old_logp, *rest, **settings):
        return super().loss(logp, logp.detach(), *rest, **settings)


wrong = run(row=NoOld(**vars(grpo)))
compare(REWARD | {"kl_old": "nats per token", "ratio_max": "ratio"}, right=right, no_old=wrong)
assert (wrong.kl_old == 0).all() and (wrong.ratio_max == 1).all() and (wrong.clip_frac_pos == 0).all()

# %% [markdown]
# All gauges are perfect: `kl_old` exactly 0, all ratios exactly 1, nothing clipped. The reward leaps to 0.76 at step 2
# and then falls, to 0.40 at step 5. It is bug 1's missing brake, with the gauges unplugged.
#
# *In your own log:* metrics that are too good. A `kl_old` of 0 at K > 1 is no calm policy but a broken gauge.
# *Caught by* `test_training.py::test_passes_of_a_rollout`: `kl_old` must leave 0.
#
# ## 7. RLOO, divided
#
# RLOO's advantage is the reward minus the mean of the other G − 1, and nothing divides it. Copied from GRPO's code, a
# division by the group's σ slips in: still centred, still sensible, no longer RLOO. Prompts that are nearly solved or
# nearly hopeless now weigh more, and its gradient is no longer unbiased.
#
# **Predict.** Rewards are 0 or 1. How large can an advantage of RLOO be? Which curve will show the difference?

# %%
plain, divided = (run(min(STEPS, 3), row=row, num_iterations=4) for row in (rloo, replace(rloo, weight="std")))
compare(REWARD | {"completion_length": "tokens", "advantage_max": "largest A"}, right=plain, divided=divided)
first = [frame[frame.step == 1].advantage_max for frame in (plain, divided)]
print("largest A at step 1:", *(largest.round(2).tolist() for largest in first))
assert (plain.advantage_max <= 1 + 1e-6).all() and divided.advantage_max.max() > 1

# %% [markdown]
# At most 1: right alone among wrong ones, 1 − 0. At step 1 the largest A is 1.0, 0.86 and 1.0; divided, it is 2.83
# (which is $\sqrt{G}$), 1.85 and 2.83. Reward and length are the same within the spread of the seeds: AdamW does not
# care for a gradient's scale, and only the weights of prompts differ. Neither reward nor length will find this one; the
# third panel does.
#
# *In your own log:* `advantage_max`. With rewards in [0, 1] it cannot exceed 1 in RLOO.
# *Caught by* `test_advantages.py::test_leave_one_out`.
#
# ## 8. The wrong axis
#
# Rewards are (N, G): a row is a prompt, a column the i-th response to each. Take mean and deviation over `dim=0`, and
# every response is compared with answers to *other* problems. No shape complains. An easy prompt's responses are now
# mostly praised and a hard one's mostly blamed.
#
# **Predict.** In a group where all rewards are equal, what are the advantages? Will it learn at all?


# %%
class WrongAxis(Algorithm):
    def advantages(self, rewards, lengths, **settings):
        return super().advantages(rewards.T, lengths.T, **settings).T


for name, row in (("right", grpo), ("wrong axis", WrongAxis(**vars(grpo)))):
    made = make(row=row).experience(Draws.at(0, 1))
    sums = made.advantages.view(4, 8).sum(dim=1)
    print(f"{name:<11} sum of A per prompt:", *(round(A, 2) + 0.0 for A in sums.tolist()))
    assert (sums.abs().max() < 1e-4) == (name == "right")
print("right answers of 8, per prompt:", *made.rewards.sum(dim=1).int().tolist())
wrong = run(row=WrongAxis(**vars(grpo)))
compare(REWARD | {"completion_length": "tokens", "kl_old": "nats per token"}, right=right, wrong_axis=wrong)

# %% [markdown]
# It learns: 0.64 at step 5, from 0.39. The right code has 0.83, and the seeds overlap: other problems are a poor
# baseline, but a baseline. In the right code each prompt's advantages add up to 0. In the wrong one the second prompt,
# which all eight answered rightly, receives 8.83 in praise for being easy.
#
# *In your own log:* in `samples.jsonl` stands a whole group. Its advantages must add up to 0.
# *Caught by* `test_advantages.py::test_group_normalised`, `test_museum.py::test_a_group_is_the_responses_to_one_prompt`
#
# ## What the museum teaches
#
# Two bugs showed in the reward at last, and both had shone first. The masked end looked better than the right code,
# RLOO divided much the same, and the wrong axis like bad luck. Such bugs are found by tests: a number worked out by
# hand, an identity that must hold before the first update. How large the marks are depends on this tiny model and on
# settings that push hard; which number to look at does not.
#
# ## Exercises
#
# 1. *One line.* Put bug 1 into CPGD: the `max` of $d A$ and $\mathrm{clip}(d) A$, in the row `cpgd`. Predict the
#    largest ratio: does the drift hold what the clip let go? (The row `cpg` is the same without the drift.)
# 2. *By hand.* Show that with samples of $\pi_{\mathrm{old}}$, *minimising* the mean of k1, $\ln \pi_\theta - \ln
#    \pi_{\mathrm{ref}}$, is *maximising* $\mathrm{KL}(\pi_{\mathrm{old}} \,\|\, \pi_\theta)$. Check the gradient on a
#    policy of three actions with `exact_kl`.
# 3. *An experiment.* A ninth bug: rewards come back in another order, so each response gets its neighbour's. Override
#    `Learner.advantages` with `rewards.roll(1, dims=1)`. Which metric gives it away?


# %% solution
# Solution 1
def upside_down_too(d, A, logp, low, high):
    return torch.maximum(d * A, d.clamp(low, high) * A), d * A


bare, drift = (run(1, row=replace(ALGORITHMS[name], surrogate=upside_down_too)).ratio_max for name in ("cpg", "cpgd"))
print("largest ratio per seed with max: cpg (no drift)", bare.round(1).tolist(), "cpgd", drift.round(1).tolist())
assert (drift < bare).all()
# The drift pulls back with alpha * (r - 1) where the clip lets go. A second brake hides that the first is broken.

# %% solution
# Solution 2
# E_old[ln pi_theta - ln pi_ref] = -KL(old || theta) + E_old[ln pi_old - ln pi_ref], and the second part is a constant.
from minicpgd.divergence import exact_kl

old, theta = torch.tensor([0.2, -0.5, 1.0]), torch.tensor([0.6, 0.1, 0.3], requires_grad=True)
(of_k1,) = torch.autograd.grad((old.softmax(-1) * theta.log_softmax(-1)).sum(), theta)
(of_kl,) = torch.autograd.grad(exact_kl(old, theta), theta)
print(of_k1, of_kl)
assert torch.allclose(of_k1, -of_kl, atol=1e-6) and of_k1.abs().max() > 0.01


# %% solution
# Solution 3
class NeighboursReward(Learner):
    def advantages(self, rollout, rewards, ref_logp):
        return super().advantages(rollout, rewards.roll(1, dims=1), ref_logp)


frame = run(kind=NeighboursReward, steps=min(STEPS, 3), num_iterations=4)
print(frame.groupby("step")[["reward", "completion_length", "clip_frac_pos", "advantage_max"]].mean().round(3))
print(frame.pivot(index="step", columns="seed", values="reward").round(2))
# No gauge does: the clip works, A adds up to 0. But this is not mere noise. Let s_i be the gradient of response i's
# log-probability. For all j other than i, E[A_j s_i] is the same, as the others are alike; and all A of a group add up
# to 0. So it is -1 / (G - 1) of E[A_i s_i]: at first, a seventh of the right gradient, downhill. The mean reward falls,
# which fits, but proves little: at step 3 one seed of three is below its step 1.
