# %% [markdown]
# # 6. A museum of bugs
#
# Code for reinforcement learning seldom crashes when it is wrong. It trains, only worse, or just as well for a while.
# Here stand eight classic bugs, each put in by a few lines, with the marks it leaves in the log, or does not.
#
# **After this notebook you can**
#
# - recognise eight bugs by their signature, and say which number in your own log to look at;
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
#
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
        axis.set_yscale("log" if metric == "kl_ref" else "linear")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs))
    plt.show()


REWARD = {"reward": "mean reward"}
right = run()

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
# **Predict.** β = 1 is a strong leash. Where does `kl_ref`, the distance to the reference, go on a wrong one?


# %%
class K1(Algorithm):
    def loss(self, logp, *rest, beta, ref_logp, token_weights, **settings):
        output = super().loss(logp, *rest, beta=1e-12, ref_logp=ref_logp, token_weights=token_weights, **settings)
        return replace(output, loss=output.loss + beta * (token_weights * (logp - ref_logp)).sum())


held, wrong = (run(min(STEPS, 2), beta=1.0, num_iterations=4, row=row) for row in (grpo, K1(**vars(grpo))))
compare({"kl_ref": "nats per token, k3", "reward": "mean reward"}, k3=held, k1_in_the_loss=wrong)
first = [frame[frame.step == 1].kl_ref for frame in (held, wrong)]
print("kl_ref at step 1:", *(kl.round(3).tolist() for kl in first))
assert (first[1] > 5 * first[0]).all()

# %% [markdown]
# Away, at once: 0.085, 0.54 and 22.6 nats per token, where k3 has 0.011, 0.013 and 0.024. (The metric is k3 for both.)
# The reward is even higher with the bug, at step 2: a leash costs reward, and this one holds nothing.
#
# *In your own log:* a `kl_ref` that does not fall when β is raised.
# *Caught by* `test_gradients.py::test_the_reference_kl` and
# `test_training.py::test_beta_holds_the_policy_to_its_start`.
#
# ## 3. The end, masked out
#
# Many tokenizers fill up with EOS, the token that ends a response. A mask made by `ids != pad_id` then drops the EOS
# that the model *chose*, together with the filling. Nothing teaches it any more when to stop.
#
# Our model stops reliably, so we first make it forget: EOS's row in the output layer is scaled by 0.3.
#
# **Predict.** Which of the two learns to stop again?


# %%
class NoEnd(Learner):
    def sample(self, draws):
        problems, rollout = super().sample(draws)
        ends = torch.isin(rollout.completion_ids, self.policy.eos_ids)
        return problems, replace(rollout, mask=rollout.mask & ~ends)


trained = []


@torch.no_grad()
def forget(learner):
    learner.policy.model.get_output_embeddings().weight[learner.policy.eos_ids] *= 0.3
    trained.append(learner)


cases = {"right": {}, "EOS_masked": {"kind": NoEnd}, "right_but_token_mean": {"aggregation": "token_mean"}}
runs = {name: run(min(STEPS, 4), forget, num_iterations=4, **case) for name, case in cases.items()}
compare(REWARD | {"completion_length": "tokens", "grad_norm": "before clipping"}, **runs)

# %% [markdown]
# No curve betrays the bug, if anything it did better. So let us ask the models directly: with what probability do they
# stop, at places where the untrained model stopped?

# %%
forget(learner := make())
probe = learner.experience(Draws.at(100, 1)).rollout
ends = torch.isin(probe.completion_ids, learner.policy.eos_ids) & probe.mask
chances = [f"{model.score(probe)[ends].exp().mean():.2f}" for model in trained]
for number, name in enumerate([*cases, "before training"]):
    print(f"{name:<20}", *chances[number * len(SEEDS) : (number + 1) * len(SEEDS)])

# %% [markdown]
# The masked runs learned to stop (0.81, 0.79, 0.74, from 0.60), and the right ones *unlearned* it (0.40, 0.37, 0.52). A
# token need not be in the loss to become likelier: where the model went on and was wrong, the tokens it went on with
# are pushed down, and what they lose goes to the others, EOS among them. And in the right runs EOS pays for its place:
# under the mean over each response's tokens, the EOS of a three-token wrong guess weighs a third, that of a worked
# answer a thirtieth. With all tokens weighing the same (`token_mean`) the right code learns it, too, in two of three
# seeds: 0.74, 0.57, 0.78. So a bug can hide another weakness, and look like progress.
#
# *In your own log:* nothing. Count once: the mask of a rollout has as many tokens as its `lengths` say.
# *Caught by* `test_policy_and_rollout.py::test_pad_may_be_eos`.
#
# ## 4. Two temperatures
#
# Sampled at temperature 0.6, scored at 1: the logits are divided in one place and not in the other, so
# $\ell_{\mathrm{old}}$ belongs to one distribution and $\ell$ to another.
#
# ## 5. Padding that is seen
#
# Prompts of different lengths are padded on the left. If the mask does not say so when tokens are scored, the model
# reads the padding as text, and again it scores something else than it sampled.
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
# `ratio_min` and `ratio_max`; in pass 1 both should be 1. With two temperatures the ratios reach from 0.810 to 2.903,
# with visible padding from 0.000, before any update. By pass 8 the first bug has vanished in the crowd: a `kl_old` of
# 0.074 beside 0.061 is nothing that anybody would look into.
#
# *In your own log:* `ratio_min` and `ratio_max` of the very first pass, in `passes.jsonl`, with one minibatch.
# *Caught by* `test_policy_and_rollout.py::test_sampled_and_scored_logprobs_agree` and `test_padding_changes_nothing`; a
# learner that forgets its temperature by `test_museum.py::test_the_learner_scores_at_the_temperature_it_sampled_at`.
#
# To count the padding among the *positions* is a relative of bug 5 that a model with rotary positions cannot notice.
# GPT-2 would; `test_museum.py::test_positions_count_real_tokens_only` has a small one.
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
# *Caught by* `test_training.py::test_passes_of_a_rollout`: from pass to pass `kl_old` must grow.
#
# ## 7. RLOO, divided
#
# RLOO's advantage is the reward minus the mean of the other G − 1, and nothing divides it. Copied from GRPO's code, a
# division by the group's σ slips in: still centred, still sensible, no longer RLOO. Prompts that are nearly solved or
# nearly hopeless now weigh more, and its gradient is no longer unbiased.
#
# **Predict.** Rewards are 0 or 1. How large can an advantage of RLOO be? Which curve will show the difference?

# %%
plain, divided = (run(min(STEPS, 4), row=row, num_iterations=4) for row in (rloo, replace(rloo, weight="std")))
compare(REWARD | {"completion_length": "tokens", "advantage_max": "largest A"}, right=plain, divided=divided)
assert (plain.advantage_max <= 1 + 1e-6).all() and divided.advantage_max.max() > 1

# %% [markdown]
# At most 1: right alone among wrong ones, 1 − 0. Divided, the largest A begins at 2.83, which is $\sqrt{G}$, in two of
# three seeds. Reward and length are the same within the spread of the seeds: AdamW does not care for a gradient's
# scale, and all that is left is how prompts are weighed. No curve will find this one.
#
# *In your own log:* `advantage_max`. With rewards in [0, 1] it cannot exceed 1 in RLOO.
# *Caught by* `test_advantages.py::test_leave_one_out`.
#
# ## 8. The wrong axis
#
# Rewards are (N, G): a row is a prompt, a column the i-th response to each. Take mean and deviation over `dim=0`, and
# every response is compared with answers to *other* problems. No shape complains. An easy prompt's responses are now
# good and a hard one's bad, whatever they say.
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
# *Caught by* `test_advantages.py::test_group_normalised`, and, where the learner forms its groups wrongly, by
# `test_museum.py::test_a_group_is_the_responses_to_one_prompt`.
#
# ## What the museum teaches
#
# Two bugs showed in the reward at last, and both had shone first. Two looked better than the right code, RLOO divided
# looked the same, and the wrong axis looked like bad luck. Such bugs are found by tests: a number worked out by hand,
# an identity that must hold before the first update. How large the marks are depends on this tiny model and on settings
# that push hard; which number to look at does not.
#
# ## Exercises
#
# 1. *One line.* Put bug 1 into CPGD: the `max` of $d A$ and $\mathrm{clip}(d) A$, in the row `cpgd`. Predict the
#    largest ratio: does the drift hold what the clip let go?
# 2. *By hand.* Show that with samples of $\pi_{\mathrm{old}}$, *minimising* the mean of k1, $\ln \pi_\theta - \ln
#    \pi_{\mathrm{ref}}$, is *maximising* $\mathrm{KL}(\pi_{\mathrm{old}} \,\|\, \pi_\theta)$. Check the gradient on a
#    policy of three actions with `exact_kl`.
# 3. *An experiment.* A ninth bug: rewards come back in another order, so each response gets its neighbour's. Override
#    `Learner.advantages` with `rewards.roll(1, dims=1)`. Which metric gives it away?


# %% solution
# Solution 1
def upside_down_too(d, A, logp, low, high):
    return torch.maximum(d * A, d.clamp(low, high) * A), d * A


frame = run(1, row=replace(ALGORITHMS["cpgd"], surrogate=upside_down_too))
print("largest ratio per seed, cpgd, max:", *frame.ratio_max.round(1))
print("largest ratio per seed, grpo, max:", *unbounded[unbounded.step == 1].ratio_max.round(1))
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


table = run(kind=NeighboursReward, steps=min(STEPS, 3), num_iterations=4).groupby("step")
print(table[["reward", "completion_length", "kl_old", "clip_frac_pos", "advantage_max"]].mean().round(3))
# The reward does not rise, and the length falls. The clip works, A adds up to 0: the signal is noise.
