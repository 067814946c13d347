# %% [markdown]
# # 4. The collapse of the baselines
#
# With many updates on each rollout and a large learning rate, a policy can lose what it had learned. This notebook
# shows at which settings that happens, and to which algorithm. Then it examines one such collapse step by step and
# token by token.
#
# **After this notebook you can**
#
# - read a map of final accuracy over learning rate and K, with its intervals, and say what it does not show;
# - make a policy collapse, and see in which step, at which tokens and through which ratios it happens;
# - say which metric warns of a collapse, how many steps ahead, how often falsely, and for whom it does not warn;
# - name what these results say against CPGD as well as what they say for it.
#
# The notebook takes about 40 seconds on a laptop's CPU.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from minicpgd import TrainConfig, load_run, plots, train
from minicpgd.algorithms import k3
from minicpgd.experiments.catalogue import HARD
from minicpgd.experiments.early_warning import Rule, collapse_step, first_alarm, judge, load_traces
from minicpgd.experiments.endurance import REMEDIES
from minicpgd.experiments.runner import BASE
from minicpgd.experiments.statistics import wilson
from minicpgd.experiments.tables import fair_summary, hard_cell, named_table, percent, stabilisers_summary
from minicpgd.models import quiet
from minicpgd.plots.style import COLOURS, STYLE, line_style, ribbons
from minicpgd.training import Callbacks, Learner, seed_step
from minicpgd.training.run_folder import read_lines

quiet()
plt.rcParams.update(STYLE)
RESULTS = Path("../results")

# %% [markdown]
# ## 1. Which settings does each algorithm tolerate?
#
# Two numbers say how aggressively a policy is trained: the learning rate, and K, the number of updates on one rollout.
# At K = 1 the samples are always fresh. At K = 64 the last update uses samples of a policy that has changed 63 times.
#
# The map below has runs of `minicpgd study stabilisers`, with three seeds in each cell. A run *collapsed* if the mean
# reward of its last ten steps is below half of its best mean over any ten, or below that of the model before training.
# A run is *healthy* if it did not collapse and gets at least half of the held-out problems right.
#
# α weighs CPGD's drift. Its authors' code has 0.01; *max A* is the largest |A| of each rollout. A *stop* ends the
# updates on a rollout when the KL of a minibatch exceeds a number, and β weighs a KL to the model before training.
# *CPGD, default* is this package's: α = 0.01, and a stop at 0.003.
#
# **Predict.** At which corner of the map do the algorithms collapse? Which of the three remedies, a large α, a stop or
# β, moves this corner furthest?

# %%
plots.map_heat(RESULTS / "stabilisers")

# %%
table = stabilisers_summary(RESULTS / "stabilisers").set_index("remedy")
table.iloc[:, :4]

# %% [markdown]
# All of them collapse in the right column, at 1e-3, whatever the remedy. Without a remedy they collapse in the upper
# right as well. GRPO and CPGD with its authors' α are healthy on about half of the map, and REINFORCE++ on less. With
# the stop both CPGD and GRPO are healthy on three quarters: everywhere but in the right column. β = 0.04 and α = max A
# lie between: at K = 64 they keep a policy alive at 1e-4, where GRPO falls, and not at 3e-4. One cell of twelve is 8
# points, and three seeds are few. So the map shows no consistent difference between GRPO and CPGD, neither without the
# stop nor with it.
#
# These runs have 20 steps, and show no slow decline. In [runs of 500 rollouts](../docs/default.md) with K = 4 a policy
# with α = max A decays with every seed, and at the default none of twenty collapsed.
#
# **Predict.** With the stop, how many of the 64 updates are made? And what does GRPO reach in the time that this takes?

# %%
plots.stabilisers_price(RESULTS / "stabilisers")

# %%
fair_summary(RESULTS / "fair").set_index("algorithm")

# %% [markdown]
# At K = 64 and 1e-4 GRPO with the stop makes about six updates in place of 64. It ends at 0.99, in a sixth of the time.
# In that time GRPO without it has reached 0.45 on average. A drift and a KL to the reference make all 64 updates. At
# 3e-4 the stop allows about two, so its rows for K = 16 and 64 are nearly the same. It does not make 64 updates
# possible: it finds out how many are.
#
# The last table gave each algorithm the same short search for its own settings: twelve draws of learning rate, ε, β,
# and in every other draw the stop; one seed each, K = 64 throughout. The best draw of each has the stop. Then none
# collapses, and they differ by at most 0.03: REINFORCE++, which collapses first on the map, ends highest in
# accuracy, and lowest by training reward. So this search, with one seed per draw, chose the stop each time. For
# REINFORCE++ a draw without it, at the smallest rate, was nearly as good.
#
# ## 2. A collapse, live
#
# Now we make a run collapse: K = 64 and a learning rate of 1e-4, as in the study above, with 6 problems in place of 8
# to save time. The baseline is REINFORCE++ without a stop, because it collapses first on the map, and we make only
# eight steps. The setting is neither its best nor a typical one. Beside it runs CPGD as this package has it: α = 0.01
# and a stop.
#
# We tried seeds 0 to 7 of REINFORCE++ beforehand. It collapsed in all eight, from steps 4 to 6 on. We show seed 3
# because its reward rises high before it collapses. With seed 0 there would be no good policy to lose.
#
# From here on, the *collapse step* is the first step whose reward, and its mean with the next two, are below 80 % of
# the best earlier mean of three, or of the reward before training if that is larger. Some runs have such a step and do
# not count as collapsed.
#
# **Predict.** Which of the two curves is higher after four steps? And which of the four panels shows the collapse
# first?

# %%
SEED = 3
STEPS = 8  # fast: 2
PASSES = 16  # fast: 2
folder = Path(tempfile.mkdtemp())
states = {}  # this maps a run to its weights after every step; entry 0 has those before training


def train_and_keep(name, remedy):
    """Train, and keep the policy's weights after each step."""
    models, kept = [], []

    def keep(*_):
        kept.append({key: value.clone() for key, value in models[0].state_dict().items()})

    settings = BASE | HARD | remedy | {"seed": SEED, "num_prompts": 6, "num_iterations": PASSES}
    settings |= {"max_steps": STEPS, "logging_steps": 1}
    config = TrainConfig(**settings, output_dir=str(folder / name))
    states[name] = kept
    return train(config, callbacks=Callbacks(on_load=lambda policy: models.append(policy.model), on_step=keep))


remedies = {"reinforce_pp": REMEDIES["REINFORCE++"], "cpgd": REMEDIES["CPGD, default"]}
runs = {name: train_and_keep(name, remedy) for name, remedy in remedies.items()}
plots.training_curves(runs.values())

# %%
for name, path in runs.items():
    metrics = load_run(path).metrics
    accuracy = metrics["eval_accuracy"][~np.isnan(metrics["eval_accuracy"])]
    print(f"{name:<13} greedy accuracy {accuracy.round(2)}  collapse step {collapse_step(metrics['reward']):.0f}")
    print(f"{'':<13} updates of each step {metrics['updates'][1:].astype(int)}")
    assert STEPS < 8 or np.isnan(collapse_step(metrics["reward"])) == (name == "cpgd")

# %%
table = hard_cell(named_table(RESULTS / "stabilisers"))  # K = 64 and a learning rate of 1e-4
steps = pd.read_csv(RESULTS / "stabilisers/steps.csv.gz").merge(table[["run", "name", "seed", "collapsed"]], on="run")
for name in ("REINFORCE++", "GRPO", "RLOO", "CPGD, α = 0.01", "CPGD, default", "GRPO, stop 0.003"):
    seeds = steps[steps["name"] == name].groupby("seed")
    starts = seeds["reward"].apply(lambda reward: collapse_step(reward.to_numpy()))
    print(f"{name:<16} collapsed {seeds['collapsed'].first().sum()} of {len(starts)}, collapse steps {starts.tolist()}")

# %% [markdown]
# The run that collapses is higher at first. REINFORCE++ has a greedy accuracy of 0.83 after step 4, when CPGD has 0.23.
# At step 6 it has 0.09, and CPGD has 0.95. After step 4 one would choose the wrong one. The KL differs from the first
# step on by at least a factor of 18, at step 5 by two hundred: the stop ends CPGD's updates after two to six of 64. The
# panels of KL and clipped tokens show the collapse from step 4 or 5 on. The answers of the collapsing run become longer
# up to step 7, as they do in a run that learns.
#
# One run proves nothing, so the last cell read the committed study: three other seeds, twenty steps. It agrees:
# REINFORCE++ collapsed in 3 of 3, from steps 4 to 6 on. GRPO, RLOO and CPGD without a stop have a collapse step with
# each seed, from 8 to 13, and count as collapsed in 1, 2 and 2 of 3, as the rule is slow. With the stop no run has one.
#
# ## 3. The anatomy of that collapse
#
# All random numbers of a step come from (seed, step). So the weights before a step give its rollout again, and the
# weights after it give d of every token: how far the K updates moved it. The table has one row per step:
#
# - *A > 0*: the number of answers, out of 48, with a positive advantage;
# - *guesses*: the number of answers that begin with `#`; *ended*: how many of them ended after one digit;
# - *lowest A*: the most negative advantage;
# - *sum d*: the mean of $\ln \pi_\theta(y) - \ln \pi_{\mathrm{old}}(y)$ over whole answers y, with A > 0 and with A <
#   0;
# - *past the clip*: the share of the KL on tokens with A < 0 and $r < 1 - \varepsilon = 0.8$.
#
# A token past the clip has no surrogate gradient.
#
# **Predict.** Which gradients break the policy: those that raise probabilities or those that lower them? And how much
# of the movement is on tokens whose own gradient is 0?


# %%
def inside(name, step):
    """A step's experience, sampled again, and the log-ratios d of its tokens after the K updates."""
    learner = Learner.from_config(load_run(runs[name]).config)
    learner.policy.model.load_state_dict(states[name][step - 1])
    experience = learner.collect(seed_step(SEED, step))
    learner.policy.model.load_state_dict(states[name][step])
    d = learner.score(experience.rollout) - experience.rollout.logp
    logged = load_run(runs[name]).metrics["reward"][step]
    assert abs(experience.rewards.mean().item() - logged) < 1e-6  # it is the same rollout
    return learner, experience, d


def row(name, step):
    """One step in a few numbers; the sums are over the tokens of an answer, in nats."""
    _, experience, d = inside(name, step)
    rollout, A = experience.rollout, experience.advantages.flatten()
    clipped = (d < np.log(0.8)) & (A < 0)[:, None] & rollout.mask  # these have no gradient of their own
    total = d.sum(dim=1)
    guesses = [
        length for length, text in zip(rollout.lengths.tolist(), rollout.completions, strict=True) if text[0] == "#"
    ]
    return {
        "run": name,
        "step": step,
        "reward": experience.rewards.mean().item(),
        "A > 0": (A > 0).sum().item(),
        "guesses": len(guesses),
        "ended": sum(length == 3 for length in guesses),
        "length": rollout.lengths.double().mean().item(),
        "entropy": rollout.entropy[rollout.mask].mean().item(),
        "lowest A": A.min().item(),
        "sum d, A > 0": total[A > 0].mean().item(),
        "sum d, A < 0": total[A < 0].mean().item(),
        "KL": k3(d[rollout.mask]).mean().item(),
        "past the clip": (k3(d)[clipped].sum() / k3(d)[rollout.mask].sum()).item(),
    }


rows = pd.DataFrame(row(name, step) for name in runs for step in range(1, STEPS + 1))
broken = rows[rows["run"] == "reinforce_pp"].set_index("step")
assert STEPS < 8 or (broken["sum d, A < 0"][5] < -10 and broken["sum d, A > 0"][5] < 1)
broken.drop(columns="run").round(3)

# %%
rows[rows["run"] == "cpgd"].drop(columns="run").set_index("step").round(3)

# %% [markdown]
# The gradients that lower probabilities break it. In the REINFORCE++ run the right answers gain at most 0.4 nats before
# the collapse, and 0.02 and 0.20 in the updates of steps 4 and 5. The wrong ones lose 2.1 nats in step 3, 10.0 in step
# 4, and 23.6 in step 5. The logarithm explains this. A nearly certain right answer cannot become much likelier, since
# $\ln \pi$ is at most 0. It has no lower limit.
#
# In step 5 more than 99 % of the KL is on tokens past the clip. (These have moved furthest, so a large share is no
# surprise; but this is all of it.) They have no gradient of their own, and still become rarer. We did not measure what
# moves them: they share parameters with tokens that have a gradient, and the optimizer has momentum. A clip bounds the
# objective, not the ratio. In the CPGD run wrong answers lose between 0.14 and 0.77 nats a step, because the updates
# end early.
#
# The size of A alone does not explain the collapse. The lowest A was −3.77 in step 3, after which the reward rose, and
# −1.30 in step 5. Nor does the KL: at step 1 it was 0.154, and the reward rose. Section 4 returns to that. The entropy
# reacts only afterwards: it is 0.07 in step 4, 0.10 in step 5, and reaches 0.50 in step 7, after the collapse.
#
# Which tokens are these? For each step, the figures below show the problem whose answers moved most, so they show
# extremes. A triangle below a token says r < 0.8, one above says r > 1.2; ■ is the end of an answer.
#
# **Predict.** A wrong guess such as `#6■` has three tokens, and each of them gets A = −3.77. Which of the three did
# nothing wrong? What will the policy do after many updates that lower its probability?

# %%
BEFORE = 3  # fast: 1
CRACK = 4  # fast: 1
BREAK = 5  # fast: 2
AFTER = 8  # fast: 2


def show(name, step, title):
    """The problem of a step whose answers have moved most, and its first four different answers."""
    learner, experience, d = inside(name, step)
    rollout, A, shape = experience.rollout, experience.advantages.flatten(), experience.rewards.shape
    moved = (k3(d) * rollout.mask).sum(dim=1).view(shape).sum(dim=1).argmax().item()
    first = moved * shape[1]
    places = {rollout.completions[i]: i for i in reversed(range(first, first + shape[1]))}
    chosen = sorted(places.values())[:4]
    pieces = learner.policy.tokens(rollout.completion_ids[chosen], rollout.lengths[chosen])
    tokens = [["■" if piece == "<eos>" else piece for piece in answer][:40] for answer in pieces]
    labels = [f"{experience.problems[first]['prompt']} A={A[i]:+.2f}" for i in chosen]
    low, high = np.log([0.8, 1.2])
    return plots.token_text(tokens, d[chosen], labels=labels, low=low, high=high, limit=3, unit="d", title=title)


show("reinforce_pp", BEFORE, f"Step {BEFORE}, before the collapse")

# %%
show("reinforce_pp", CRACK, f"Step {CRACK}, the first signs")

# %%
show("reinforce_pp", BREAK, f"Step {BREAK}: its updates break the policy")

# %%
show("reinforce_pp", AFTER, f"Step {AFTER}, afterwards")

# %% [markdown]
# - **Step 3.** The policy unlearns guessing and learns to write its working, in the first token, where it makes that
#   choice. The `■` of the wrong guesses has hardly moved.
# - **Step 4.** Earlier updates lowered the `#` and the digit; now the `■` decreases as well (after `#6`, d is below
#   −3), though it only ended the answer. The first answer is a guess that did not end, a rare accident. All its tokens
#   become rarer.
# - **Step 5.** The table says that only six of ten guesses still ended; of the seven in step 6, one did. The third
#   answer could not stop. The fourth was good working up to one wrong sign, `1*6` for `1+6`, and its tokens become as
#   rare. The reward of step 5 is still 0.58. That of step 6 is 0.17.
# - **Step 8.** The policy writes rows of `-` and loses the grammar. Three of 48 answers are right and have A = +4.67.
#   All that the other 45 contain becomes rarer.
#
# So in this run wrong answers became rare, the updates made them rarer still, and a log-probability has no lower limit.
# The end of an answer does not always go first. In a second look, not printed here, guesses also stopped ending with
# seed 2. With seeds 4 and 5 all guesses ended to the last, and these policies collapsed as well.
#
# Now we look at the 16 passes of step 5, four updates each. (The dark area goes from 1 % to 99 % of the tokens, the
# pale one from the smallest to the largest.)
#
# **Predict.** The algorithm clips at 0.8. Where is the 1 % quantile of the ratios after 16 passes? And after how many
# passes would a stop at a KL of 0.003 have ended this step?

# %%
lines = pd.DataFrame(read_lines(runs["reinforce_pp"] / "passes.jsonl")).query("step == @BREAK")
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
ratios = [lines[f"ratio_{which}"].clip(lower=1e-6) for which in ("min", "p01", "p99", "max")]
ribbons(axes[0], lines["pass"], ratios, COLOURS[0], bounds=(0.8, 1.2))
axes[0].set(yscale="log", title="REINFORCE++, step 5", xlabel="pass", ylabel="ratio r")
axes[1].plot(lines["pass"], lines["kl_old"], markersize=4, **line_style(0)._asdict())
axes[1].axhline(0.003, color="black", linestyle=":")
axes[1].annotate("the stop", (1, 0.003), xycoords=("axes fraction", "data"), ha="right", va="bottom")
axes[1].set(yscale="log", title="Distance", xlabel="pass", ylabel="KL [nats per token]")
plt.show()

# %% [markdown]
# It is below 0.001, a factor of nearly a thousand past the clip, and still decreases. A stop would have ended this step
# in its second pass: after the first the KL is 0.002, after the second 0.035. Exercise 3 tries what then would have
# become of the policy.
#
# ## 4. Early warning
#
# At step 6 everybody sees the collapse. Which metric shows it earlier? The study `warning` used the runs of the map and
# of the race. For each metric it fitted one threshold on even seeds, and judged it on odd seeds. An alarm *announces* a
# collapse if it comes at least one step before the collapse step. It is *false* if the run does not collapse.
#
# **Predict.** Which metric warns best: entropy, length, the largest ratio, or the KL to the sampling policy? Does it
# work for CPGD?

# %%
plots.warning_signals(RESULTS / "warning")

# %% [markdown]
# `kl_old` and `ratio_p01` warn best. Entropy and length do not help: the alarm of entropy sounds in nearly all runs,
# that of length in hardly any. `ratio_max` announces as many collapses, but also sounds in more than half of the
# healthy runs. And for all useful metrics the blue diamonds are further left: with a large drift they announce fewer
# collapses. All collapses on which the rules are judged have one seed, 101, so the intervals are too narrow.
#
# The published share of false alarms refers to *all* runs without collapse, also to those with a drift or a stop. The
# next cell separates them.
#
# **Predict.** A drift and a stop keep the KL small. Is the published share then too high or too low for the others?

# %%
_, odd = load_traces([RESULTS / name for name in ("stabilisers", "fair")])
table = pd.read_csv(RESULTS / "warning/study.csv").set_index("signal")
rule = Rule("kl_old", 1, table["threshold"]["kl_old"])
groups = {guard: [t for t in odd if t.guard == guard] for guard in ("neither", "drift", "stop")}
for name, traces in groups.items():
    found = judge(rule, traces)
    announced = percent(wilson(found["announced"], found["collapsed"]))
    false = percent(wilson(found["false_alarms"], found["not_collapsed"]))
    print(f"{name:<14} announced    {found['announced']} of {found['collapsed']}, {announced}")
    print(f"{'':<14} false alarms {found['false_alarms']} of {found['not_collapsed']}, {false}")
assert sum(judge(rule, traces)["false_alarms"] for traces in groups.values()) == table["false_alarms"]["kl_old"]

# %% [markdown]
# It is too low. Of the runs with neither a drift nor a stop, the alarm announces 20 of 45 collapses, and it is false in
# 22 of the 65 others: a third. With a large drift it announces 6 of 29 collapses, and is false once. So its silence
# does not mean health there: the drift keeps the KL small while the policy collapses. With a stop all 24 collapses are
# at a learning rate of 1e-3, where the first update already moves the policy far, and it announces each.
#
# How many steps ahead does the alarm come?

# %%
fallen = [t for t in groups["neither"] if t.collapsed]
leads = pd.Series([t.collapse - first_alarm(rule, t.metrics) for t in fallen])
figure, axis = plt.subplots(figsize=(9, 3.0), layout="constrained")
for late, label in ((True, "too late, or at the collapse step"), (False, "in time")):
    bars = leads[(leads < 1) == late].value_counts()
    axis.bar(bars.index, bars, color=COLOURS[late], hatch="//" * late, edgecolor="white", label=label)
axis.set(
    xlabel="steps from the alarm to the collapse step",
    ylabel="runs",
    title=f"kl_old above {rule.threshold:.2g}, neither drift nor stop",
)
axis.yaxis.get_major_locator().set_params(integer=True)
axis.legend()
plt.show()
print(f"median of all {len(leads)}: {leads.median():.0f} steps; at the collapse step or later: {(leads < 1).sum()}")
print(f"collapse step 1, which no alarm can precede: {sum(t.collapse == 1 for t in fallen)}")

# %% [markdown]
# In 24 of 45 runs the alarm comes at the collapse step. All of them collapse at step 1, at a learning rate of 1e-3, and
# nothing can announce that. In one it never comes. In the others it comes two to nine steps ahead. Such an alarm helps
# a program that stops the updates, not a person who looks in the evening: the stop is such a program.
#
# In our run the alarm came five steps ahead, which the rules count as a success. But it came at step 1, stopped for
# two steps, and came back at step 4, two before the collapse step. Half of the KL of step 1 was on a single odd
# answer (`0+1=1,1*1=1,*7=1#1`), and the policy improved after it. A long lead can be luck, and the study's rules do not
# detect that. CPGD raised no alarm, rightly.
#
# The conclusions of this notebook:
#
# - What keeps a policy alive most surely here, for 20 rollouts, is a smaller learning rate, fewer updates, or a stop.
#   The stop finds out how many updates are possible.
# - CPGD with its authors' α collapses where GRPO does. A large α protects at K = 64 and a rate of 1e-4, and harms long
#   runs at K = 4. So [the default](../docs/default.md) has a small α and a stop. GRPO with the stop is as good on the
#   map.
# - At a learning rate of 1e-3 everything collapses.
# - All this was measured on a model of 108 thousand parameters.
#
# ## Exercises
#
# 1. *One line.* Repeat the count for `ratio_max`, with its own threshold. Predict first: does it announce more
#    collapses, or fewer? How many more false alarms does it raise?
# 2. *By hand.* With neither drift nor stop the alarm announces h = 20/45 of the collapses, and is raised in f = 22/65
#    of the other runs. In this study 41 % of such runs collapse. Assume that 5 % of yours do. How often is an alarm
#    right?
# 3. *An experiment.* Take the REINFORCE++ policy before step 5, and make one step from there with REINFORCE++ alone,
#    with the stop, with a large drift, and with CPGD at α = 0.01, on the same rollout. Compare `kl_old` and the
#    accuracy after it. Use more than one rollout (another `seed`). Which of them break the policy?

# %% solution
# Solution 1
other = Rule("ratio_max", 1, table["threshold"]["ratio_max"])
for name, traces in groups.items():
    found = judge(other, traces)
    print(f"{name:<14} announced {found['announced']} of {found['collapsed']}, ", end="")
    print(f"false alarms {found['false_alarms']} of {found['not_collapsed']}")
# With neither it announces one more collapse, and raises an alarm in 46 of the 65 other runs. A single token often has
# an extreme ratio. A rule that always raises an alarm announces every collapse.
assert judge(other, groups["neither"])["false_alarms"] > 2 * judge(rule, groups["neither"])["false_alarms"]

# %% solution
# Solution 2
found = judge(rule, groups["neither"])
hit, false = found["announced"] / found["collapsed"], found["false_alarms"] / found["not_collapsed"]
for rate in (found["collapsed"] / len(groups["neither"]), 0.05):
    right = rate * hit / (rate * hit + (1 - rate) * false)
    print(f"{rate:.0%} of the runs collapse: an alarm is right in {right:.0%}")
# By Bayes' rule an alarm is right with probability p h / (p h + (1 - p) f). So the value of a rule depends on how rare
# a collapse is. The study trained aggressively, so its collapses are frequent.
assert right < 0.15

# %% solution
# Solution 3
SEEDS = (3, 4, 5)  # fast: (3,)
STARTS = {
    "REINFORCE++": REMEDIES["REINFORCE++"],
    "REINFORCE++, stop": REMEDIES["REINFORCE++"] | {"target_kl": 0.003},
    "REINFORCE++, drift": {"algorithm": "reinforce_pp_drift", "drift_coef": "max_advantage", "target_kl": None},
    "CPGD, α = 0.01": REMEDIES["CPGD, α = 0.01"],
    "CPGD, default": REMEDIES["CPGD, default"],
}
left = {}
for seed in SEEDS:
    for name, changes in STARTS.items():
        settings = vars(load_run(runs["reinforce_pp"]).config) | changes | {"seed": seed, "max_steps": BREAK}
        learner = Learner.from_config(TrainConfig(**settings))
        learner.policy.model.load_state_dict(states["reinforce_pp"][BREAK - 1])
        line = learner.step(BREAK).metrics
        left[name, seed] = line["eval_accuracy"]
        print(f"rollout of seed {seed}  {name:<18} {line['updates']:3.0f} updates, ", end="")
        print(f"kl_old {line['kl_old']:.4f}, accuracy {line['eval_accuracy']:.2f}")
    assert BREAK < 5 or left["REINFORCE++", seed] < 0.65 < left["CPGD, α = 0.01", seed] < 0.78
    safe = ("REINFORCE++, stop", "REINFORCE++, drift", "CPGD, default")
    assert BREAK < 5 or min(left[name, seed] for name in safe) > 0.78
# REINFORCE++ breaks the policy, which had 0.83, with each rollout: 0.45 to 0.62 are left. CPGD with its authors' α and
# no stop harms it, too. With the stop, which allows one or two updates, or with a large drift, which allows all 64, the
# policy keeps 0.79 to 0.88. (The optimizer starts anew here, without the momentum of the run.)
