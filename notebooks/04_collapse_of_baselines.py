# %% [markdown]
# # 4. The collapse of the baselines
#
# Reuse a rollout often enough, with steps large enough, and a policy that was learning forgets how to write. This
# notebook shows when that happens and to whom, then takes one such fall apart, step by step and token by token.
#
# **After this notebook you can**
#
# - read a map of final accuracy over learning rate and K, with its intervals, and say what it does not show;
# - make a policy collapse, and see in which step, at which tokens and through which ratios it breaks;
# - say which metric gives warning, how many steps ahead, how often in vain, and for whom it stays silent;
# - name what speaks against CPGD in these results, as well as what speaks for it.
#
# About 40 seconds on a laptop's CPU.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from minicpgd import TrainConfig, load_run, plots, train
from minicpgd.divergence import k3
from minicpgd.experience import Draws
from minicpgd.learner import Learner
from minicpgd.plots.style import COLOURS, STYLE, look, ribbons
from minicpgd.policy import quiet
from minicpgd.runlog import read_lines
from minicpgd.stats import share
from minicpgd.studies import BASE, HARD
from minicpgd.summary import anatomy_summary, display_name, fair_summary, map_summary, percent
from minicpgd.trainer import Listener
from minicpgd.warning import Rule, fall_step, first_alarm, judge, load_traces

quiet()
plt.rcParams.update(STYLE)
RESULTS = Path("../results")

# %% [markdown]
# ## 1. How hard may each be pushed?
#
# Two numbers say how hard a policy is pushed: the learning rate, and K, the number of updates made on one rollout. At
# K = 1 the samples are always fresh. At K = 64 the last updates learn from a policy that is long gone.
#
# The map below has 240 runs, five seeds in each cell, and was made before this notebook, by `minicpgd study map`. A
# run *collapsed* if the mean reward of its last ten steps is below half of its best over any ten, or below that of
# the model before training. It is *healthy* if it did not, and gets at least half of the held-out problems right.
#
# **Predict.** Four algorithms, the same rollouts. Which corner of the map is lost, and is it lost to CPGD, too?

# %%
plots.map_heat(RESULTS / "map")

# %%
table = map_summary(RESULTS / "map").set_index("algorithm")
table.iloc[:, :4]

# %% [markdown]
# The upper right corner is lost, and CPGD loses it as well: at K = 64 and 3e-4 it fell in five seeds of five. What
# differs is the edge. CPGD is healthy on 62 % [58, 65] of the map, GRPO on 52 % [50, 55], RLOO on 53 % [50, 57],
# REINFORCE++ on 43 % [42, 47]. One cell of twelve is 8 points, and its lead over RLOO is one cell in every seed: K =
# 64 at 1e-4 in three, K = 16 at 3e-4 in two.
#
# In the top row CPGD bears about twice the learning rate that RLOO bears, 2.6 times [1.8, 3.4] GRPO's, and at least
# 5.5 times [4.5, 6.4] REINFORCE++'s. In the bottom row there is no lead: up to 1e-4 all four end between 0.96 and
# 1.00, CPGD lowest at 1e-4, and at 3e-4 RLOO has 0.78 where CPGD has 0.70. What it buys is room for error.
#
# **Predict.** CPGD is a clip and a drift. Which of the two holds the policy? And what happens to GRPO when it is
# given the drift and nothing else?

# %%
plots.anatomy_rows(RESULTS / "anatomy")

# %%
anatomy_summary(RESULTS / "anatomy").set_index("variant")[["final accuracy", "collapsed"]]

# %%
final = pd.read_csv(RESULTS / "anatomy/study.csv").query("beta == 0").groupby("algorithm")["accuracy_final"].mean()
assert final["grpo_drift"] > final["cpgd"] > 2 * max(final["grpo"], final["cpg"])
fair_summary(RESULTS / "fair").set_index("algorithm")

# %% [markdown]
# The drift does most of the work, and others may have it, too. CPGD ends at 0.83 [0.79, 0.88], without its drift at
# 0.25 [0.17, 0.33], without its clip at 0.46 [0.41, 0.50]. GRPO goes from 0.25 [0.16, 0.37] to 0.85 [0.79, 0.90] with
# the drift alone, and a KL to the reference does as well; REINFORCE++ gets half-way, from 0.12 to 0.55 [0.47, 0.62].
# CPGD's other idea, that no ratio multiplies the advantage, made no difference that eight seeds could show, once
# there is a clip: CPGD without drift is GRPO with d in place of r, and both end at 0.25. Without a clip it is the
# worse of the two, 0.06 beside 0.14.
#
# The last table gave each algorithm the same short search for its own settings: twelve draws of learning rate, ε and
# β, one seed each, K = 64 throughout. Now none collapses, and REINFORCE++, the first to fall on the map, ends level
# with CPGD: 0.97 both. RLOO is 0.03 behind, with an interval that holds 0; GRPO is 0.08 behind, with one that does
# not. A short search repairs most of what the map shows. (What it found for REINFORCE++ includes a small β: that one
# is held by a reference.)
#
# ## 2. A fall, live
#
# Now our own fall: K = 64 and a learning rate of 1e-4, as in the study above, with 6 problems in place of 8 to save
# time. The baseline is REINFORCE++, because the map says that it falls first and eight steps are all we have time
# for. It is not the baseline's best setting, nor a typical one.
#
# This was tried beforehand with seeds 0 to 7. REINFORCE++ fell in all eight, beginning at steps 4 to 6; CPGD in none
# within ten steps. Seed 3 is shown because it climbs well before it falls; with seed 0 there would be no good policy
# to lose. At seed 1 CPGD had only reached a greedy accuracy of 0.54 after ten steps.
#
# The *fall* begins, for all that follows, at the first step whose reward, and its mean with the next two, are below
# 80 % of the best mean of three so far, or of the start's.
#
# **Predict.** Which of the two curves is ahead after four steps? And which of the four panels shows the fall first?

# %%
SEED = 3
STEPS = 8  # fast: 2
PASSES = 16  # fast: 2
folder = Path(tempfile.mkdtemp())
states = {}  # of each run, the weights after every step; at 0, those before training


def run(name):
    """Train, and keep what the policy was after each step."""
    models, kept = [], []

    def keep(*_):
        kept.append({key: value.clone() for key, value in models[0].state_dict().items()})

    settings = BASE | HARD | {"algorithm": name, "seed": SEED, "num_prompts": 6, "num_iterations": PASSES}
    settings |= {"max_steps": STEPS, "logging_steps": 1}
    config = TrainConfig(**settings, output_dir=str(folder / name))
    listener = Listener(loaded=lambda policy: models.append(policy.model), step=keep)
    states[name] = kept
    return train(config, listener=listener)


runs = {name: run(name) for name in ("reinforce_pp", "cpgd")}
plots.training_curves(runs.values())

# %%
for name, path in runs.items():
    metrics = load_run(path).metrics
    accuracy = metrics["eval_accuracy"][~np.isnan(metrics["eval_accuracy"])]
    print(f"{name:<13} greedy accuracy {accuracy.round(2)}  reward falls at step {fall_step(metrics['reward']):.0f}")
    assert STEPS < 8 or np.isnan(fall_step(metrics["reward"])) == (name == "cpgd")

# %%
steps = pd.read_csv(RESULTS / "anatomy/steps.csv.gz").merge(pd.read_csv(RESULTS / "anatomy/study.csv"), on="run")
for name in ("reinforce_pp", "grpo", "rloo", "cpgd"):
    seeds = steps[(steps["algorithm"] == name) & (steps["beta"] == 0)].groupby("seed")
    falls = seeds["reward"].apply(lambda reward: fall_step(reward.to_numpy()))
    print(
        f"{name:<13} collapsed {seeds['collapsed'].first().sum()} of {len(falls)}, the falls begin at {falls.tolist()}"
    )

# %% [markdown]
# The one that falls is ahead. REINFORCE++ has a greedy accuracy of 0.83 after step 4, when CPGD has 0.27; at step 6
# it has 0.09. CPGD comes later, to 0.95. Whoever stops at step 4 would choose the other one. The KL panel differs
# from the first step on, at least fourfold, at step 6 a hundredfold. The panels of KL and clipped tokens tell the
# fall from step 4 or 5 on. The answers of the falling run grow longer up to step 7, as those of a learning one do.
#
# One run proves nothing, so the last cell asked the committed study, eight other seeds and twenty steps. It agrees:
# REINFORCE++ collapsed in 8 of 8, CPGD in 0 of 8. It also shows three CPGD runs that begin to fall, at steps 18, 18
# and 20, too late to be counted as collapsed. And each run of GRPO and RLOO begins to fall, also those that did not
# collapse.
#
# ## 3. The anatomy of that fall
#
# A step's randomness comes from (seed, step) alone. So with the weights before a step we get its rollout again, and
# with the weights after it, d of every token: how far the K updates have moved what was sampled. One row per step:
#
# - *praised*: answers out of 48 with A > 0; *guesses*: those that begin with `#`, and how many *ended* after one
#   digit;
# - *lowest A*: the most negative advantage;
# - *sum d*: the mean of $\ln \pi_\theta(y) - \ln \pi_{\mathrm{old}}(y)$ over whole answers y, with A > 0 and with A <
#   0;
# - *of it, past the clip*: the share of the KL that sits on tokens with A < 0 and $r < 1 - \varepsilon = 0.8$.
#
# A token past the clip has no gradient of its own any more. That is what the clip is for.
#
# **Predict.** Is the policy broken by what it is told to do more often, or by what it is told to do less often? And
# how much of the movement is on tokens whose own gradient is 0?


# %%
def inside(name, step):
    """A step's experience again, and the log-ratios d at which its K updates left the tokens."""
    learner = Learner.from_config(load_run(runs[name]).config)
    learner.policy.model.load_state_dict(states[name][step - 1])
    made = learner.experience(Draws.at(SEED, step))
    learner.policy.model.load_state_dict(states[name][step])
    d = learner.score(made.rollout) - made.rollout.logp
    assert abs(made.rewards.mean().item() - load_run(runs[name]).metrics["reward"][step]) < 1e-6  # the same rollout
    return learner, made, d


def row(name, step):
    """One step in a few numbers; the sums are over the tokens of an answer, in nats."""
    _, made, d = inside(name, step)
    rollout, good, bad = made.rollout, made.advantages > 0, made.advantages < 0
    done = (d < np.log(0.8)) & bad[:, None] & rollout.mask  # beyond the clip: these no longer pull
    total = d.sum(dim=1)
    guesses = [
        length for length, text in zip(rollout.lengths.tolist(), rollout.completions, strict=True) if text[0] == "#"
    ]
    return {
        "run": name,
        "step": step,
        "reward": made.rewards.mean().item(),
        "praised": good.sum().item(),
        "guesses": len(guesses),
        "ended": sum(length == 3 for length in guesses),
        "length": rollout.lengths.double().mean().item(),
        "entropy": rollout.entropy[rollout.mask].mean().item(),
        "lowest A": made.advantages.min().item(),
        "sum d, A > 0": total[good].mean().item(),
        "sum d, A < 0": total[bad].mean().item(),
        "KL": k3(d[rollout.mask]).mean().item(),
        "of it, past the clip": (k3(d)[done].sum() / k3(d)[rollout.mask].sum()).item(),
    }


rows = pd.DataFrame(row(name, step) for name in runs for step in range(1, STEPS + 1))
broken = rows[rows["run"] == "reinforce_pp"].set_index("step")
assert STEPS < 8 or (broken["sum d, A < 0"][5] < -10 and broken["sum d, A > 0"][5] < 1)
broken.drop(columns="run").round(3)

# %%
rows[rows["run"] == "cpgd"].drop(columns="run").set_index("step").round(3)

# %% [markdown]
# What it is told to do less often. In the REINFORCE++ run the right answers gain 0.4 nats at most before the fall,
# and 0.02 and 0.20 in the updates of steps 4 and 5. The wrong ones lose 2.1 nats in step 3, 10.0 in step 4, 23.6 in
# step
# 5. There is a reason in the shape of a logarithm: a right answer that is nearly certain has no higher to go, since
#    $\ln \pi$ ends at 0. Downwards there is no end.
#
# In step 5 more than 99 % of the KL sits on tokens that are past the clip. (Such tokens are the far ones, so a large
# share is no surprise; all of it is.) They have no gradient of their own, and go on falling all the same. What moves
# them is not measured here: they share the model's parameters with tokens that still pull, and the optimizer has
# momentum. A clip bounds the objective, not the ratio. In the CPGD run wrong answers lose between 0.15 and 0.46 nats,
# since a token below its old probability is pulled back, by $\alpha (r - 1)$.
#
# The size of A alone does not explain it: the lowest A was −3.77 in step 3, after which the reward rose, and −1.30 in
# step 5. Nor does the KL: at step 1 it was 0.154, and the reward rose. Keep that in mind for section 4. And the
# entropy follows, it does not lead: 0.07 in step 4, 0.10 in step 5, and 0.50 only in step 7, when all is over.
#
# Which tokens, then? The text below has of each step the problem whose answers moved most, so it shows the extremes.
# A triangle below a token says r < 0.8, one above r > 1.2; ■ is the end of an answer.
#
# **Predict.** A wrong guess such as `#6■` has three tokens, and each of them gets A = −3.77. Which of the three did
# nothing wrong? What will the policy do, once that one has been punished long enough?

# %%
BEFORE = 3  # fast: 1
CRACK = 4  # fast: 1
BREAK = 5  # fast: 2
AFTER = 8  # fast: 2


def show(name, step, title):
    """Of one step: the problem whose answers have moved most, and its first four different answers."""
    learner, made, d = inside(name, step)
    moved = (k3(d) * made.rollout.mask).sum(dim=1).view(made.rewards.shape).sum(dim=1).argmax().item()
    first = moved * made.rewards.shape[1]
    places = {made.rollout.completions[i]: i for i in reversed(range(first, first + made.rewards.shape[1]))}
    chosen = sorted(places.values())[:4]
    pieces = learner.policy.tokens(made.rollout.completion_ids[chosen], made.rollout.lengths[chosen])
    tokens = [["■" if piece == "<eos>" else piece for piece in answer][:40] for answer in pieces]
    labels = [f"{made.problems[first]['prompt']} A={made.advantages[i]:+.2f}" for i in chosen]
    low, high = np.log([0.8, 1.2])
    return plots.token_text(tokens, d[chosen], labels=labels, low=low, high=high, limit=3, unit="d", title=title)


show("reinforce_pp", BEFORE, f"Step {BEFORE}, before the fall")

# %%
show("reinforce_pp", CRACK, f"Step {CRACK}, the first crack")

# %%
show("reinforce_pp", BREAK, f"Step {BREAK}: its updates break the policy")

# %%
show("reinforce_pp", AFTER, f"Step {AFTER}, afterwards")

# %% [markdown]
# - **Step 3.** Guessing is unlearned, and working is learned, in the first token, where the choice is made. Good. The
#   `■` of the wrong guesses has hardly moved.
# - **Step 4.** The `#` and the digit have been pushed down before; now the `■` goes as well (after `#6`, d is beyond
#   −3). It only said that the answer is over. The first answer is a guess that did not end, a rare accident, and the
#   signs that it wandered through are all pushed down.
# - **Step 5.** Of ten guesses only six still ended, the table says; of the seven in step 6, one. The third answer is
#   one that could not stop. The fourth was good working up to one wrong sign, `1*6` for `1+6`; it is pushed as hard.
#   The reward of step 5 is 0.58 still. That of step 6 is 0.17.
# - **Step 8.** Rows of `-`. The grammar is going. Three of 48 answers are right and are pulled up hard, with A =
#   +4.67; all that the other 45 wrote is pushed down.
#
# So the tale of this run: wrong answers get rare, what remains to be done is to unlearn them, and unlearning has no
# floor. That the end of an answer went first is no law. In a second look, not printed here, guesses also stopped
# ending with seed 2, but with seeds 4 and 5 all of them ended to the last, and these policies fell as well.
#
# Now the same inside one step: its 16 passes over one rollout. The two runs have been different policies for four
# steps, so compare the shapes, not the digits. (Dark: from 1 % to 99 % of the tokens; pale: smallest to largest.)
#
# **Predict.** Both algorithms clip at 0.8. Where is the 1 % quantile of the ratios after 16 passes?

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 3.4), layout="constrained")
axes[1].sharey(axes[0])
for i, (name, path) in enumerate(runs.items()):
    lines = pd.DataFrame(read_lines(path / "passes.jsonl")).query("step == @BREAK")
    ratios = [lines[f"ratio_{which}"].clip(lower=1e-6) for which in ("min", "p01", "p99", "max")]
    ribbons(axes[i], lines["pass"], ratios, COLOURS[i], bounds=(0.8, 1.2))
    axes[i].set(yscale="log", title=display_name(name), xlabel="pass", ylabel="" if i else "ratio r")
    axes[2].plot(
        lines["pass"], lines["kl_old"].replace(0, np.nan), label=display_name(name), markersize=4, **look(i)._asdict()
    )
axes[2].set(yscale="log", title="Distance", xlabel="pass", ylabel="KL [nats per token]")
axes[2].legend(fontsize=9)
plt.show()

# %% [markdown]
# For REINFORCE++ it is below 0.001, a factor of a thousand past the clip, and still sinking. For CPGD nearly all
# ratios stay near the two dashed lines, and the KL levels off after three passes.
#
# ## 4. Early warning
#
# By step 6 anybody sees it. Which metric would have told us sooner? The study `warning` looked through all runs of
# the other studies. For each metric it fitted one threshold on the runs with even seeds, and judged it on those with
# odd seeds. An alarm *announces* a collapse if it comes at least one step before the fall; it is *in vain* if the run
# does not collapse.
#
# **Predict.** Which is the better sentinel: entropy, length, the largest ratio, or the KL to the sampling policy?
# Does it work for CPGD?

# %%
plots.warning_signals(RESULTS / "warning")

# %% [markdown]
# `kl_old` and the outer quantiles of the ratios come first. Entropy and length are no use: their alarms go off as
# often in runs that do not collapse. `ratio_max` announces much because it cries often, in more than half of the
# healthy runs. And for the metrics that are any use the blue diamonds stand on the left: with the drift hardly
# anything is announced.
#
# The published false alarms of `kl_old`, 13 %, are a share of *all* runs without collapse, also of those with a
# drift. Let us part them.
#
# **Predict.** In runs with the drift the alarm hardly ever goes off. Is 13 % then too high or too low for the others?

# %%
_, odd = load_traces([RESULTS / name for name in ("map", "drift", "anatomy", "fair")])
table = pd.read_csv(RESULTS / "warning/study.csv").set_index("signal")
rule = Rule("kl_old", 1, table["threshold"]["kl_old"])
halves = {"without drift": [t for t in odd if not t.drift], "with drift": [t for t in odd if t.drift]}
for name, traces in halves.items():
    found = judge(rule, traces)
    announced = percent(share(found["announced"], found["collapsed"]))
    false = percent(share(found["false_alarms"], found["not_collapsed"]))
    print(f"{name:<14} announced {found['announced']} of {found['collapsed']}, {announced}")
    print(f"{'':<14} in vain   {found['false_alarms']} of {found['not_collapsed']}, {false}")
counts = [judge(rule, traces)["false_alarms"] for traces in halves.values()]
assert sum(counts) == table["false_alarms"]["kl_old"] and counts[1] == 0

# %% [markdown]
# Too low. All 16 false alarms are in runs without a drift: 16 of 65, a quarter. For those runs the alarm catches 72 %
# [59, 82] of the collapses and cries wolf in 25 % [16, 36] of the others. For runs with a drift it catches 1 of 21,
# and never cries. Not crying is no sign of health there: the 21 collapsed all the same. The drift holds the KL down
# while the policy falls, so with CPGD watch the reward itself.
#
# How much time does it leave?

# %%
fallen = [t for t in halves["without drift"] if t.collapsed]
leads = pd.Series([t.fall - first_alarm(rule, t.metrics) for t in fallen])
figure, axis = plt.subplots(figsize=(9, 3.0), layout="constrained")
for late, label in ((True, "too late, or at the fall"), (False, "in time")):
    bars = leads[(leads < 1) == late].value_counts()
    axis.bar(bars.index, bars, color=COLOURS[late], hatch="//" * late, edgecolor="white", label=label)
axis.set(xlabel="steps from the alarm to the fall of the reward", ylabel="runs", title="kl_old above 0.11, no drift")
axis.yaxis.get_major_locator().set_params(integer=True)
axis.legend()
plt.show()
print(f"median of all {len(leads)}: {leads.median():.0f} steps; at the fall or later: {(leads < 1).sum()}")
print(f"fell at step 1, before which there is nothing: {sum(t.fall == 1 for t in fallen)}")

# %% [markdown]
# Two steps, in the middle. In 15 of 54 runs it comes at the fall or after it; nine fell at step 1, which nothing can
# announce. An alarm that leaves a step or two is one for a program that stops, not for a person who looks in the
# evening.
#
# In our run it went off five steps ahead, which counts as a success by the rules. Look closer: it went off at step 1,
# was silent for three steps, and came back at step 5, one before the fall. Half of the KL of step 1 sat on a single
# odd answer (`0+1=1,1*1=1,*7=1#1`), and the policy got better after it. Long leads can be luck, and the study's rules
# do not tell them apart. CPGD raised no alarm, rightly.
#
# What to take home: CPGD bears more than its baselines do, mostly because of its drift, which helps GRPO and RLOO as
# much, and REINFORCE++ half-way. It falls, too, when the steps are too large, and then mostly without this warning.
# Tuned baselines come near to it or level with it; pushed gently, all four learn as well. All this was seen on a
# model of 108 thousand parameters.
#
# ## Exercises
#
# 1. *One line.* Ask the same question of `ratio_max`, with its own threshold. Predict first: more collapses
#    announced, or fewer? At what price?
# 2. *By hand.* Without drift the alarm announces h = 39/54 of the collapses, and goes off in f = 16/65 of the other
#    runs. In this study 45 % of such runs collapse. Say that 5 % of yours do. How often is an alarm right?
# 3. *An experiment.* Take the REINFORCE++ policy as it was before step 5, and make one step from there with
#    `reinforce_pp`, `reinforce_pp_drift` and `cpgd`, on the same rollout. Compare `kl_old` and the accuracy after it.
#    Use more than one rollout (another `seed`). Which of the three breaks the policy?

# %% solution
# Solution 1
other = Rule("ratio_max", 1, table["threshold"]["ratio_max"])
for name, traces in halves.items():
    found = judge(other, traces)
    print(f"{name:<14} announced {found['announced']} of {found['collapsed']}, ", end="")
    print(f"in vain {found['false_alarms']} of {found['not_collapsed']}")
# Three more collapses are announced without drift, and the alarm goes off in 48 of the 65 others. One token is easily
# far off. An alarm that always rings announces everything.
assert judge(other, halves["without drift"])["false_alarms"] > 2 * judge(rule, halves["without drift"])["false_alarms"]

# %% solution
# Solution 2
found = judge(rule, halves["without drift"])
hit, false = found["announced"] / found["collapsed"], found["false_alarms"] / found["not_collapsed"]
for rate in (found["collapsed"] / len(halves["without drift"]), 0.05):
    right = rate * hit / (rate * hit + (1 - rate) * false)
    print(f"{rate:.0%} of the runs collapse: an alarm is right in {right:.0%}")
# Bayes: p h / (p h + (1 - p) f). What a rule is worth depends on how rare the thing is; the study's runs were pushed.
assert right < 0.15

# %% solution
# Solution 3
SEEDS = (3, 4)  # fast: (3,)
left = {}
for seed in SEEDS:
    for name in ("reinforce_pp", "reinforce_pp_drift", "cpgd"):
        settings = vars(load_run(runs["reinforce_pp"]).config)
        learner = Learner.from_config(TrainConfig(**settings | {"algorithm": name, "seed": seed, "max_steps": BREAK}))
        learner.policy.model.load_state_dict(states["reinforce_pp"][BREAK - 1])
        line = learner.step(BREAK).metrics
        left[name, seed] = line["eval_accuracy"]
        print(f"rollout of seed {seed}  {name:<19} kl_old {line['kl_old']:.4f}  accuracy {line['eval_accuracy']:.2f}")
    assert BREAK < 5 or left["reinforce_pp", seed] < 0.7 < min(left["reinforce_pp_drift", seed], left["cpgd", seed])
# REINFORCE++ breaks the policy, which had 0.83, with either rollout: 0.45 and 0.54 are left. With the drift it is not
# broken: 0.82 and 0.80. CPGD: 0.77 and 0.80. So the drift alone would have held it here, whatever the row is called.
# (The optimizer begins afresh, without the momentum of the run.)
