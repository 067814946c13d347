# %% [markdown]
# # 5. QLoRA: a large model on one GPU
#
# Training all weights of a model of seven billion parameters takes more than a hundred gigabytes. Two ideas reduce that
# to the memory of one card: store the weights in four bits, and train small matrices next to them. This notebook takes
# both apart, on a model so small that we can print everything.
#
# **After this notebook you can**
#
# - decode a 4-bit weight by hand, and say how large its error is and how many bits it takes;
# - say what an adapter is, why training begins exactly at the loaded model, and why a reference needs no memory;
# - say what uses the memory of a training step, and what 4-bit weights do and do not save;
# - train one, here or on a card, and choose the weights that the result is merged into.
#
# The notebook takes about 40 seconds on a laptop's CPU. What it says about cards is predicted, not measured.

# %%
import tempfile
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import torch

from minicpgd import TrainConfig, UserError, load_run, train
from minicpgd.config import ModelSettings
from minicpgd.memory import model_config, predict_recipe
from minicpgd.memory.predict import GIB, optimizer, weights
from minicpgd.memory.predict import trained as trained_bytes
from minicpgd.memory.simulate import shape_of
from minicpgd.models import load_policy, quiet
from minicpgd.plots import memory_bars
from minicpgd.plots.style import STYLE, line_style
from minicpgd.recipes import load_recipe
from minicpgd.training import Learner, seed_step
from minicpgd.training.export import dequantised
from minicpgd.training.metrics import peak_memory

quiet()
plt.rcParams.update(STYLE)
torch.set_printoptions(precision=3, sci_mode=False)
QLORA = {"load_in_4bit": True, "lora_r": 16, "dtype": "float32"}  # with this dtype a GPU gives the same numbers

# %% [markdown]
# ## 1. What is quantised
#
# QLoRA stores each matrix of the model's layers with four bits per number, in a format called NF4. Four bits can encode
# 16 values, and these 16 are the same for every matrix. Only the scale differs: the weights are cut into blocks of 64,
# and each block is divided by its largest absolute value before it is rounded.
#
# **Predict.** Trained weights have roughly a normal distribution around 0. Where would you place the 16 values: evenly
# from −1 to 1, or elsewhere?

# %%
from bitsandbytes.functional import dequantize_blockwise, quantize_4bit  # quiet() first, so that this prints nothing

small = ModelSettings(**QLORA)
policy, full = load_policy(small), load_policy("embedded")
published = full.model.model.layers[0].mlp.up_proj.weight.detach().cpu()
layer = policy.peft.get_base_model().model.layers[0].mlp.up_proj
stored, state = layer.base_layer.weight.data.cpu(), layer.base_layer.weight.quant_state
values = state.code.cpu()

print("as published:", tuple(published.shape), published.dtype)
print("as stored:   ", tuple(stored.shape), stored.dtype, "and", len(state.absmax), "scales")
print("the values:  ", values)

# %% [markdown]
# They are closer together in the middle, where most weights are. The matrix has 192 × 64 weights and takes half as many
# bytes, so each byte stores two. One value is exactly 0. The largest weight of a block is always at −1 or 1.
#
# We can read the bytes ourselves. The first half of a byte is one weight, the second half the next:
#
# $$ \hat{W} = \mathrm{value}[\,\mathrm{code}\,] \cdot \mathrm{scale} $$

# %%
codes = torch.stack([stored.flatten() >> 4, stored.flatten() & 15], dim=1).flatten().long()
scales = (dequantize_blockwise(state.absmax, state.state2) + state.offset).cpu()
by_hand = (values[codes].view(-1, 64) * scales[:, None]).view(192, 64)
rounded = dequantised(policy.peft.get_base_model())["model.layers.0.mlp.up_proj"]

print("first byte:", stored[0].item(), "= codes", codes[:2].tolist(), "-> values", values[codes[:2]])
print("times the scale:", by_hand[0, :2], "   as published:", published[0, :2])
assert torch.allclose(by_hand, rounded, atol=1e-6)
error = (rounded - published).std() / published.std()
print(f"error: {error:.1%} of the weights' own spread")
assert 0.08 < error < 0.10

# %%
blocks, styles = published.view(-1, 64), [line_style(0), line_style(1)]
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
scaled = (blocks / blocks.abs().max(dim=1, keepdim=True).values).flatten()
axes[0].hist(scaled, bins=81, color=styles[0].color, alpha=0.6)
for value in values.tolist():
    axes[0].axvline(value, color=styles[1].color, linewidth=1.2, linestyle=styles[1].linestyle)
axes[0].set(title="All weights, and the 16 values", xlabel="weight / largest of its block", ylabel="number of weights")
order = blocks[0].argsort()
axes[1].plot(rounded.view(-1, 64)[0][order], color=styles[1].color, drawstyle="steps-mid", label="4-bit")
axes[1].plot(blocks[0][order], "o", color=styles[0].color, markersize=3.5, label="as published")
axes[1].set(title="The first block, sorted", xlabel="rank of the weight", ylabel="weight")
axes[1].legend()
plt.show()

# %% [markdown]
# On the left the values are dense where the weights are. The right shows what a layer really uses: a staircase whose
# largest steps are at the ends.
#
# How much do these 16 values gain over 16 even ones, with the same blocks?

# %%
exact = blocks.abs().max(dim=1).values
even = torch.linspace(-1, 1, 16)
nearest = ((blocks / exact[:, None])[..., None] - even).abs().argmin(dim=-1)
even_error = (even[nearest] * exact[:, None] - blocks).std() / published.std()
print(f"16 even values: {even_error:.1%}   NF4: {error:.1%}")
assert error < even_error < 1.2 * error

# %% [markdown]
# They gain little: in blocks of 64, 16 even values are nearly as good.
#
# ### The scales are quantised, too
#
# One float32 scale for 64 weights takes 32 / 64 = 0.5 bits per weight. So QLoRA stores the scales themselves in 8 bits,
# with one float32 number for each 256 of them. This is its *double quantisation*.
#
# **Predict.** How many bits does a weight take now? And how large do the errors of the scales become?

# %%
bits = 4 + 8 / 64 + 32 / (64 * 256)
print(f"{bits:.3f} bits a weight; with float32 scales {4 + 32 / 64:.3f}, published in bfloat16 16")
print(f"scales, exact:  {exact[:4]}")
print(f"scales, stored: {scales[:4]}")
print(f"off by {(scales / exact - 1).abs().max():.1%} at most, {(scales / exact - 1).abs().mean():.2%} on average")
assert (scales / exact - 1).abs().max() < 0.01

# %% [markdown]
# This saves 0.37 bits per weight, with an error below one per cent. Rounding the weights themselves has an error of
# nine per cent. Embeddings, norms and the output layer are not quantised.
#
# ## 2. What is trained
#
# One cannot change a number slightly if it has only 16 values, so the 4-bit weights are frozen. Next to each of their
# matrices are two thin matrices, A and B, and these are trained. With r = 16 and $\alpha = 32$ (LoRA's α, which has
# nothing to do with the drift's)
#
# $$ y = \hat{W} x + \frac{\alpha}{r} B A x $$
#
# **Predict.** The matrix above maps 64 numbers to 192. How many numbers do its A and B have together? And which values
# must they have at the start, so that the model begins unchanged?

# %%
down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
print("A", tuple(down.shape), "spread", f"{down.std():.3f}", "  B", tuple(up.shape), "largest", up.abs().max().item())
trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
number = sum(p.numel() for p in trained.values())
print(f"{len(trained)} matrices, {number:,} numbers, all float32; the model has {full.model.num_parameters():,}")
assert down.numel() + up.numel() == 16 * (64 + 192)
assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
assert not any(p.any() for name, p in trained.items() if "lora_B" in name)

# %% [markdown]
# B is 0, so BA is 0 for any A. A must not be 0 as well, or both would have a zero gradient for ever. The trained
# numbers are float32, so that rounding does not erase the small steps of an optimizer.
#
# Here the adapter has 38 % as many numbers as the model, because a rank of 16 is large for matrices with 64 rows. At
# this size nobody needs QLoRA; here it serves as an example.
#
# **Predict.** Three models score the same 64 answers: one in full precision, one in 4 bits, and one in 4 bits with its
# fresh adapter. Which of the three agree?

# %%
SMALL = {"num_prompts": 8, "num_generations": 8, "eval_problems": 128}
learner = Learner.from_config(TrainConfig(learning_rate=2e-4, **SMALL, **QLORA))
rollout = learner.collect(seed_step(0, 1, learner.policy.device)).rollout
four_bit = load_policy(replace(small, lora_r=0)).model
with_adapter, without = learner.score(rollout), learner.score(rollout, four_bit)
change = learner.score(rollout, full.model) - without
print(f"adapter against none:    {(with_adapter - without).abs().max():.4f} nats at most")
print(f"4-bit against published: {change[rollout.mask].abs().mean():.3f} nats a token")
assert (with_adapter - without).abs().max() < 1e-5 and change[rollout.mask].abs().mean() > 0.01

# %% [markdown]
# The fresh adapter changes nothing; the rounding does. The rounded model differs a little from the published one, and
# training starts from the rounded one.
#
# ## 3. Where the memory goes
#
# Adam keeps two moments for each trained number, and each number has a gradient. If everything is trained in float32,
# that makes 16 bytes per parameter. `minicpgd.memory` counts the bytes from a model's config alone, without a download.
#
# **Predict.** Qwen2.5 7B, before it reads a single token: how many GiB for all weights, for LoRA, for QLoRA?

# %%
recipe = load_recipe("qwen2.5-7b-24gb").config
ways = {
    "all weights": (replace(recipe, load_in_4bit=False, lora_r=0), torch.float32),
    "LoRA": (replace(recipe, load_in_4bit=False), torch.bfloat16),
    "QLoRA": (recipe, torch.bfloat16),
}
rows = {}
for name, (config, dtype) in ways.items():
    shape = shape_of(model_config(config.model), config, dtype)
    learns = trained_bytes(shape)
    parts = [weights(shape, config.load_in_4bit), learns * (config.lora_r > 0), learns]
    parts.append(optimizer(shape, eight_bit=config.lora_r > 0))
    rows[name] = [part / GIB for part in [*parts, sum(parts)]]
table = pd.DataFrame(rows, index=["weights", "adapter", "gradients", "moments", "in all"])
print(table.round(2).to_string())
sizes = {learns: sum(p.numel() for p in shape.parameters() if p.requires_grad == learns) for learns in (True, False)}
print(f"\nthe adapter: {sizes[True] / 1e6:.0f} million numbers, {sizes[True] / sizes[False]:.1%} of the model's")
assert table["all weights"]["in all"] > 100 and table["QLoRA"]["in all"] < 6

# %% [markdown]
# They need 113, 14.6 and 5.5 GiB. LoRA saves the most: the frozen weights need neither gradients nor moments, and can
# be stored in bfloat16. (The adapter's own moments are counted in 8 bits, as on a card.) Four bits then make the
# weights 2.7 times smaller, not 3.9 times, because the embeddings and the output layer are not quantised.
#
# This memory is in use all the time. A training step needs more, at its peak far more. The next cell predicts it for
# three recipes.
#
# **Predict.** In the smallest of them, what takes the most memory?

# %%
SIZES = ["0.5b-8gb", "3b-16gb", "7b-24gb"]  # fast: ["0.5b-8gb"]

predicted = {f"qwen2.5-{size}": predict_recipe(f"qwen2.5-{size}") for size in SIZES}
smallest = predicted["qwen2.5-0.5b-8gb"].moments["last layer"]
print({name: f"{size / GIB:.2f} GiB" for name, size in smallest.items() if size})
assert max(smallest, key=smallest.get) == "one layer" and smallest["weights"] < 0.2 * sum(smallest.values())
memory_bars(predicted, {name: load_recipe(name).card_gib for name in predicted})

# %% [markdown]
# It is not the weights. During its backward pass one layer keeps all its intermediate results for the tokens of a
# micro-batch: 1.74 GiB, beside 0.43 of weights. In a small model 4-bit weights save half a GiB, and a smaller
# `micro_batch_tokens` saves more. In the large model the weights matter: without quantisation both bars would be 9 GiB
# longer, and little of a card of 24 GB would be left.
#
# The white part is an assumption about the memory of CUDA itself. The rest was compared with measurements of small
# models on a CPU. Of 38 predicted peaks 36 were within 6 %. Two predictions were 40 % too small: with an adapter in
# bfloat16, and with moments in 8 bits. The recipes use both. (We suspect temporary memory of the CPU's kernels.)
# Nothing was measured on a card.
#
# ## 4. Training
#
# We run CPGD again: ten steps of 64 answers, with four updates on each rollout. Three seeds have a learning rate of
# 2e-4, three have 1e-3.
#
# **Predict.** Adapters usually get a larger learning rate than the weights themselves, for which 1e-4 is the default
# here. We use 2e-4. Is 1e-3 better still?

# %%
STEPS = 10  # fast: 2
SEEDS = range(3)  # fast: range(1)

start = learner.evaluate_before_training().metrics["eval_accuracy"]
learners, accuracy = {}, {}
for rate in (2e-4, 1e-3):
    for seed in SEEDS:
        run = Learner.from_config(TrainConfig(learning_rate=rate, seed=seed, eval_steps=2, **SMALL, **QLORA))
        lines = [run.step(step).metrics for step in range(1, STEPS + 1)]
        accuracy[rate, seed] = [start] + [line["eval_accuracy"] for line in lines[1::2]]
        learners[rate, seed] = run
        print(f"learning rate {rate:g}  seed {seed} ", *(f"{a:.2f}" for a in accuracy[rate, seed]))

figure, axis = plt.subplots(figsize=(9, 3.4), layout="constrained")
for which, rate in enumerate((2e-4, 1e-3)):
    for seed in SEEDS:
        style = line_style(which)._asdict() | ({"label": f"learning rate {rate:g}"} if seed == 0 else {})
        axis.plot(range(0, STEPS + 1, 2), accuracy[rate, seed], **style, linewidth=1.5)
axis.set(title="128 held-out problems, three seeds each", xlabel="step", ylabel="greedy accuracy", ylim=(0, 1.03))
axis.legend(loc="lower right")
plt.show()
if STEPS == 10:
    final = {rate: [accuracy[rate, seed][-1] for seed in SEEDS] for rate in (2e-4, 1e-3)}
    assert min(final[2e-4]) > 0.9 and max(final[1e-3]) < min(final[2e-4])

# %% [markdown]
# At 2e-4 all three seeds go from 0.21 to 0.98: 41 thousand numbers on a rounded model are enough. At 1e-3 the start is
# faster; seed 2 is at 0.70 after four steps. The end is lower: 0.75 to 0.94, and for seeds 1 and 2 below their own
# best. Three seeds of one task say that 1e-3 is too large here, and nothing about your model.
#
# ## 5. The reference needs no memory
#
# Some algorithms keep the policy near the model before training (`beta`). If all weights are trained, that takes a
# second, frozen copy. Here the frozen model already exists: it is the model without its adapter.
#
# **Predict.** What do you get if you switch the adapter off after training?

# %%
run = learners[2e-4, 0]
with run.policy.reference() as reference:
    off = run.score(rollout, reference)
on = run.score(rollout)
print(f"adapter off, against the untrained model: {(off - without).abs().max():.4f} nats at most")
print(f"adapter on, against the untrained model:  {(on - without).abs().max():.2f} nats at most")
print("a copy was made:", run.policy.frozen_copy is not None)
assert (off - without).abs().max() < 1e-5 < 0.01 < (on - without).abs().max() and run.policy.frozen_copy is None

# %% [markdown]
# You get the untrained model, up to the rounding of float32, without a copy. But it is the *rounded* model: a KL to
# this reference does not include the effect of quantisation.
#
# ## 6. How to merge the adapter
#
# In the end one may want a single model, $W + \frac{\alpha}{r} B A$. Which W should it contain? The model was trained
# on the rounded weights, written out in full (`dequantised`). The published weights differ from them (`full`). And one
# may round the sum to 4 bits again (`4-bit`). We measured all three with the embedded model, 30 steps, three seeds.
# *Off by* is the change of log-probabilities by the merge, divided by that by the training. Above 1 the merge changed
# more than the training.
#
# **Predict.** After a training at the small learning rate 1e-5, which of the three is wrong, and by how much?

# %%
merging = pd.read_csv("../benchmarks/results/merging.csv")
columns = ["same answers", "accuracy trained", "accuracy merged", "off by"]
means = merging.groupby(["learning_rate", "merged into"])[columns].mean()
print(means.round(2).to_string())
assert (means["off by"].xs("dequantised", level=1) < 1e-4).all()
assert (means.loc[1e-5, "off by"][["full", "4-bit"]] > 0.9).all()

# %% [markdown]
# Two of them are wrong. With the published weights, the merge undoes the rounding, which changes more than the training
# did. With the 4-bit weights, rounding removes every change smaller than half a step of the staircase, so almost
# nothing of the training remains. After training at a larger rate both merges work, but change the model a little.
# `minicpgd export` uses the dequantised weights unless you ask for others.
#
# ## 7. On a card
#
# With a GPU, the next cell trains a recipe for three steps: Qwen2.5 0.5B on grade-school mathematics. It downloads
# about 1 GB and needs `pip install 'minicpgd[qlora,math,data]'`. Without a GPU, the cell prints what it would do. We
# had no GPU, so the recipe's learning rate is a guess, and its memory a prediction.

# %%
recipe, expected = load_recipe("qwen2.5-0.5b-8gb"), predicted["qwen2.5-0.5b-8gb"]
config = recipe.config
print(f"{config.model}, adapter of rank {config.lora_r}, {config.task}, reward {config.reward}")
print(f"{config.max_steps} steps of {config.num_prompts} x {config.num_generations} answers, at most", end=" ")
print(f"{config.max_completion_length} tokens each; learning rate {config.learning_rate:g}")
for what, size in (("rollout", expected.rollout), ("update", expected.update), ("in all", expected.peak)):
    print(f"predicted {what:<8} {size / GIB:.1f} GiB")
if not torch.cuda.is_available():
    print("No GPU was found, so nothing is trained here.")
else:
    try:
        with tempfile.TemporaryDirectory() as folder:
            few = replace(config, max_steps=3, eval_steps=3, eval_problems=32, output_dir=f"{folder}/run")
            print("rewards:", load_run(train(few)).metrics["reward"])
        print(f"largest so far, this notebook's tensors: {peak_memory() / GIB:.1f} GiB")
    except UserError as error:  # the network or an extra may be missing; the message says what to do
        print(error)

# %% [markdown]
# `minicpgd train --recipe qwen2.5-0.5b-8gb --dry-run` prints more about it on the command line. `minicpgd memory
# --model Qwen/Qwen2.5-7B-Instruct --gpu 16` says what fits on your card.
#
# ## Exercises
#
# 1. *One line.* Put the adapter on `q_proj` and `v_proj` alone, with rank 4. Predict how many numbers are trained. In
#    the embedded model both matrices are 64 × 64, and there are two layers.
# 2. *By hand.* Qwen2.5 7B has 6.53 billion weights in the matrices of its layers. Its embeddings and its output layer
#    have 152,064 × 3,584 numbers each, and stay in bfloat16. Compute the GiB of its weights in 4 bits, and what double
#    quantisation saves.
# 3. *An experiment.* Take the change that training made to the matrix of section 1, $\frac{\alpha}{r} B A$
#    (`get_delta_weight("default")`), times s. Add it to the rounded weights and round again, with `quantize_4bit` and
#    `dequantize_4bit`. Which share of the change remains, for s from 0.1 to 3, and each seed?

# %% solution
# Solution 1
few = load_policy(replace(small, lora_r=4, lora_target_modules="q_proj,v_proj"))
count = sum(p.numel() for p in few.model.parameters() if p.requires_grad)
print(count)
assert count == 2 * 2 * 4 * (64 + 64)  # the factors: layers, matrices, and r rows of A and r columns of B

# %% solution
# Solution 2
layers, words = 6.53e9, 2 * 152_064 * 3584
gib = (layers * bits / 8 + words * 2) / GIB
print(f"{gib:.2f} GiB; double quantisation saves {layers * (4.5 - bits) / 8 / GIB:.2f} GiB")
assert abs(gib / table["QLoRA"]["weights"] - 1) < 0.01  # the rest consists of norms, biases and tables

# %% solution
# Solution 3
from bitsandbytes.functional import dequantize_4bit


def round_again(weights):
    """Round to 4 bits and back, as loading the model did."""
    return dequantize_4bit(*quantize_4bit(weights, quant_type="nf4", compress_statistics=True))


print("s, and the share that remains of s times the change; its size in brackets, as a share of the weights'")
for seed in SEEDS:
    matrix = learners[2e-4, seed].policy.peft.get_base_model().model.layers[0].mlp.up_proj
    change = matrix.get_delta_weight("default").detach().cpu()
    line = f"seed {seed}"
    for s in (0.1, 0.3, 1, 3):
        arrived = round_again(rounded + s * change) - round_again(rounded)
        share = (arrived * change).sum() / (s * change.square().sum())
        line += f"   {s}: {share:+.2f} ({s * change.std() / published.std():.1%})"
        assert STEPS < 10 or (share < 0.05 if s < 1 else 0.2 < share < 0.5 if s == 1 else share > 0.8)
    print(line)
# Changes of 5 % raised the accuracy from 0.21 to nearly 1, although rounding had changed the weights by 9 %: training
# changes them in a useful direction, and rounding does not. Yet a second rounding removes more than half of the
# change in this matrix, and nearly all of 0.3 times the change. (The merged model of section 6 hardly differs at 1e-4,
# but there we compared answers of which the model is nearly certain.)
