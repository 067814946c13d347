"""Sampling and scoring: the same policy, the same tokens, the same numbers."""

import copy
import os
import random
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import minicpgd.logprobs
from minicpgd.errors import NonFiniteError
from minicpgd.logprobs import logp_and_entropy, position_ids, token_logprobs
from minicpgd.policy import Policy, load_policy
from minicpgd.rollout import generate
from minicpgd.tasks import get_task


def problems(n, seed=0):
    return [p["prompt"] for p in get_task("chain_arithmetic").sample(n, random.Random(seed))]


def roll(policy, prompts, group=4, seed=0, **changes):
    generator = torch.Generator(policy.device).manual_seed(seed) if seed is not None else None
    return generate(policy, prompts, group, generator=generator, **({"max_completion_length": 48} | changes))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_sampled_and_scored_logprobs_agree(policy, temperature):
    """Prompts of different lengths: some are padded, some are not. The on-policy ratio is 1 within 1e-4."""
    prompts = problems(12)
    assert len({len(p) for p in prompts}) > 3
    rollout = roll(policy, prompts, temperature=temperature)
    ids, mask, longest = rollout.inputs(torch.arange(48))
    logp, entropy = token_logprobs(policy.model, ids, mask, longest, temperature)
    ratio = (logp - rollout.logp)[rollout.mask].exp()
    assert (ratio - 1).abs().max() < 1e-4
    assert (entropy - rollout.entropy)[rollout.mask].abs().max() < 1e-4
    if temperature != 1.0:  # scored at another temperature they would not
        other, _ = token_logprobs(policy.model, ids, mask, longest, 1.0)
        assert ((other - rollout.logp)[rollout.mask].exp() - 1).abs().max() > 0.1


def test_padding_changes_nothing(policy):
    """Each row scored alone, without any padding, as in the batch."""
    rollout = roll(policy, problems(6), group=2)
    ids, mask, longest = rollout.inputs(torch.arange(12))
    together, entropies = token_logprobs(policy.model, ids, mask, longest)
    for i in range(12):
        n = int(rollout.lengths[i])
        alone = ids[i][mask[i].bool()][None]
        logp, entropy = token_logprobs(policy.model, alone, torch.ones_like(alone), n)
        torch.testing.assert_close(together[i, :n], logp[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entropies[i, :n], entropy[0], atol=1e-5, rtol=1e-5)


def test_a_masked_token_is_as_good_as_absent_wherever_it_stands(policy):
    ids, mask = torch.tensor([[2, 3, 4, 5, 6, 7]]), torch.tensor([[1, 1, 0, 1, 1, 1]])
    masked, _ = token_logprobs(policy.model, ids, mask, 2)
    absent, _ = token_logprobs(policy.model, ids[mask.bool()][None], torch.ones(1, 5, dtype=torch.long), 2)
    torch.testing.assert_close(masked, absent, atol=1e-5, rtol=1e-5)


def test_positions_count_real_tokens_only():
    assert position_ids(torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])).tolist() == [
        [0, 0, 0, 1, 2, 2],
        [0, 1, 2, 3, 4, 5],
    ]


def test_logprobs_and_entropy_by_hand():
    logits = torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.0, float("-inf")]])
    logp, entropy = logp_and_entropy(logits, torch.tensor([1, 0]))
    p = [torch.tensor([2.0, 1.0, -1.0]).softmax(-1), torch.tensor([0.5, 0.5])]
    assert logp.tolist() == pytest.approx([p[0][1].log().item(), p[1][0].log().item()])
    assert entropy.tolist() == pytest.approx([-(q * q.log()).sum().item() for q in p])
    assert logp_and_entropy(logits.bfloat16(), torch.tensor([1, 0]))[0].dtype == torch.float32


def test_greedy_decoding_is_transformers_own(policy):
    """Our loop against `generate` of transformers, with padding, finished rows and all."""
    prompts = problems(24, seed=3)
    ours = roll(policy, prompts, group=1, seed=None)
    ids, mask = policy.encode(prompts)
    theirs = policy.model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=48)
    theirs = theirs[:, ids.shape[1] :]
    for i in range(24):
        n = int(ours.lengths[i])
        assert ours.completion_ids[i, :n].tolist() == theirs[i, :n].tolist()
        assert ours.truncated[i] == (policy.eos_ids[0] not in theirs[i])


def test_a_rollout_is_what_it_says(policy):
    prompts = problems(5)
    rollout = roll(policy, prompts, group=8, max_completion_length=20)
    assert rollout.mask.sum(dim=1).tolist() == rollout.lengths.tolist()
    assert rollout.mask.dtype == rollout.truncated.dtype == torch.bool
    assert rollout.truncated.any()
    assert not rollout.truncated.all()
    for i, text in enumerate(rollout.completions):
        n = int(rollout.lengths[i])
        ended = int(rollout.completion_ids[i, n - 1]) == int(policy.eos_ids[0])
        assert ended != bool(rollout.truncated[i])  # the end-of-sequence token belongs to the response
        assert len(text) == n - ended
        assert rollout.prompt_mask[i].sum() == len(prompts[i // 8])  # a group stands together
        assert (rollout.logp[i, n:] == 0).all()
        assert (rollout.entropy[i, n:] == 0).all()
        assert (rollout.completion_ids[i, n:] == policy.pad_id).all()
    assert len(set(rollout.completions)) > 5
    with pytest.raises(FrozenInstanceError):
        rollout.mask = rollout.prompt_mask


def test_sampling_follows_its_distribution(policy):
    """The first token of 4,000 samples against the model's probabilities; top_k and top_p cut, log-probs do not."""
    prompt = problems(1)
    ids, mask = policy.encode(prompt)
    p = policy.model(input_ids=ids, attention_mask=mask).logits[0, -1].softmax(-1)
    rollout = roll(policy, prompt, group=4000, max_completion_length=1)
    counts = torch.bincount(rollout.completion_ids[:, 0], minlength=len(p)) / 4000
    assert (counts - p).abs().max() < 4 * (0.25 / 4000) ** 0.5
    assert len(rollout.completion_ids.unique()) > 1
    for cut in ({"top_k": 1}, {"top_p": 0.01}):
        cut_rollout = roll(policy, prompt, group=50, max_completion_length=1, **cut)
        assert cut_rollout.completion_ids.unique().tolist() == [p.argmax().item()]
        torch.testing.assert_close(cut_rollout.logp[0, 0], p.max().log())


def test_every_tensor_is_made_where_the_model_is(policy):
    """Without a GPU, this shows where the default is a device that holds no numbers."""
    here = roll(policy, problems(4), batch_size=5)
    with torch.device("meta"):
        there = roll(policy, problems(4), batch_size=5)
        scored = [there.score(policy.model, tokens=60), there.score(policy.model, size=3, chunk_size=7)]
    assert there.completions == here.completions
    assert torch.equal(there.truncated, here.truncated)
    assert torch.equal(there.entropy, here.entropy)
    assert here.completion_ids.shape == here.mask.shape == here.entropy.shape == (16, here.lengths.max())
    assert here.lengths.max() < 48
    for logp in (there.logp, *scored):
        torch.testing.assert_close(logp, here.logp, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("size", "tokens", "wanted"),
    [
        (None, 30, [3, 3]),
        (None, 29, [2, 2, 2]),
        (2, 30, [2, 2, 2]),
        (2, 100, [2, 2, 2]),
        (None, 60, [6]),
        (4, None, [4, 2]),
    ],
)
def test_micro_batches_by_hand(policy, size, tokens, wanted):
    """Six rows of ten tokens, four of them the prompt's."""
    rollout = replace(roll(policy, problems(2), 3), prompt_mask=torch.ones(6, 4), lengths=torch.full((6,), 6))
    assert [len(part) for part in rollout.micro_batches(torch.arange(6), size, tokens)] == wanted


def watched(model):
    """Two lists that grow as it works: the shapes of the ids it is given, and for how many tokens it makes logits."""
    shapes, rows = [], []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, given: shapes.append(given["input_ids"].shape), with_kwargs=True
    )
    model.get_output_embeddings().register_forward_hook(
        lambda module, given, logits: rows.append(logits.numel() // logits.shape[-1])
    )
    return shapes, rows


def test_scores_are_computed_in_parts_of_the_size_asked_for(policy):
    rollout = roll(policy, problems(4))
    shapes, rows = watched(policy.model)
    rollout.score(policy.model, size=3)
    assert [shape[0] for shape in shapes] == [3, 3, 3, 3, 3, 1]
    shapes.clear()
    rollout.score(policy.model, tokens=60)
    assert all(shape.numel() <= 60 or shape[0] == 1 for shape in shapes)
    rows.clear()
    rollout.score(policy.model, chunk_size=7)
    assert max(rows) == 7


def test_a_prompt_is_read_once_and_asked_for_its_last_logits_only(policy):
    shapes, rows = watched(policy.model)
    roll(policy, problems(3), group=4, max_completion_length=2)
    assert [shape[0] for shape in shapes] == rows == [3, 12]


@pytest.mark.parametrize(("group", "seed"), [(2, 0), (2, 1), (2, 2), (8, 0)])
def test_responses_that_have_ended_leave_once_they_are_half_of_the_batch(policy, group, seed):
    shapes, _ = watched(policy.model)
    lengths = roll(policy, problems(2), group=group, seed=seed).lengths
    batch, wanted = 2 * group, [2]  # each prompt is read once
    for t in range(1, int(lengths.max())):
        running = int((lengths > t).sum())
        batch = running if 2 * running <= batch else batch
        wanted.append(batch)
    assert [shape[0] for shape in shapes] == wanted


@pytest.mark.parametrize("training", [True, False])
def test_sampling_is_without_dropout_and_leaves_the_model_as_it_was(policy, training):
    plain = roll(policy, problems(4))
    for layer in policy.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    policy.model.train(training)
    rollout = roll(policy, problems(4))
    assert rollout.completions == plain.completions
    assert policy.model.training == training
    assert not rollout.logp.requires_grad
    assert not rollout.score(policy.model).requires_grad


@pytest.mark.parametrize("seed", [None, 0])
def test_logits_that_are_not_finite_are_told_and_nothing_is_drawn(policy, seed):
    with torch.no_grad():
        policy.model.lm_head.weight[3] = float("nan")
    with pytest.raises(NonFiniteError, match="^the model's logits are not finite$"):
        roll(policy, problems(1), seed=seed)


def test_the_same_seed_gives_the_same_rollout(policy):
    first, again, other = (roll(policy, problems(4), seed=s) for s in (5, 5, 6))
    assert first.completions == again.completions
    assert torch.equal(first.logp, again.logp)
    assert first.completions != other.completions


def test_pad_may_be_eos(policy):
    """Where a tokenizer pads with EOS, the EOS that ends a response still counts."""
    plain = roll(policy, problems(4))
    policy.tokenizer.pad_token = policy.tokenizer.eos_token
    same = roll(policy, problems(4))
    assert policy.pad_id == int(policy.eos_ids[0])
    assert same.mask.tolist() == plain.mask.tolist()
    assert same.completions == plain.completions


MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {"head_dim": 16, "final_logit_softcapping": 3.0, "sliding_window": 4},
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {}),  # its positions are absolute: it notices padding that is counted
}


def tiny(name, vocabulary=18):
    model_class, config_class, extra = MODELS[name]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.3, **extra
    )  # fmt: skip
    return model_class(config).eval()


@pytest.mark.parametrize("name", MODELS)
def test_other_architectures(name, policy, tmp_path):
    """From a folder: sampling, scoring, the model's own forward pass, and chunks agree; softcapped logits too."""
    Policy(tiny(name), policy.tokenizer).save(tmp_path)
    loaded = load_policy(str(tmp_path))
    rollout = roll(loaded, problems(4), max_completion_length=12)
    ids, mask, longest = rollout.inputs(torch.arange(16))
    logp, entropy = token_logprobs(loaded.model, ids, mask, longest)
    assert (logp - rollout.logp)[rollout.mask].abs().max() < 1e-4
    plain = {}
    for chunk in (None, 1, 7, 10_000):
        loaded.model.zero_grad()
        logp, entropy = token_logprobs(loaded.model, ids, mask, longest, 0.7, chunk)
        (logp * rollout.mask).sum().backward()
        plain[chunk] = (logp, entropy, [p.grad.clone() for p in loaded.model.parameters()])
        for ours, first in zip(plain[chunk][:2], plain[None][:2], strict=True):
            torch.testing.assert_close(ours, first, atol=1e-5, rtol=1e-5)
        for ours, first in zip(plain[chunk][2], plain[None][2], strict=True):
            torch.testing.assert_close(ours, first, atol=1e-3, rtol=1e-4)


def test_a_model_of_more_than_text_squashes_its_logits_as_its_text_part_says():
    model, ids = tiny("llama"), torch.tensor([[2, 3, 4, 5, 6]])
    text = copy.deepcopy(model.config)
    text.final_logit_softcapping = 3.0
    model.config.get_text_config = lambda *args, **more: text
    logp, _ = token_logprobs(model, ids, torch.ones_like(ids), 4)
    squashed = (3 * (model(input_ids=ids).logits[:, :-1] / 3).tanh()).log_softmax(-1)
    torch.testing.assert_close(logp, squashed.gather(-1, ids[:, 1:, None]).squeeze(-1))


@pytest.mark.parametrize("chunk", [None, 7])
def test_chunked_logprobs_are_the_plain_ones(chunk):
    """V = 150,000: value and gradient against log-softmax over the model's own logits, to 1e-5."""
    model = tiny("llama", vocabulary=150_000)
    ids = torch.randint(0, 150_000, (6, 50), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[:3, :4] = 0
    plain = model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask)).logits[:, 9:-1].log_softmax(-1)
    plain = plain.gather(-1, ids[:, 10:, None]).squeeze(-1)
    plain.mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    rows = []
    model.lm_head.register_forward_hook(lambda module, given, logits: rows.append(logits.numel() // 150_000))
    logp, _ = token_logprobs(model, ids, mask, 40, chunk_size=chunk)
    assert max(rows) == (chunk or 2**24 // 150_000)  # by itself no more than 64 MiB of logits
    logp.mean().backward()
    torch.testing.assert_close(logp, plain, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-5)
    assert max(g.abs().max() for g in expected.values()) > 1e-2


def test_one_token_at_a_time_where_the_vocabulary_is_larger_than_what_fits(policy, monkeypatch):
    monkeypatch.setattr(minicpgd.logprobs, "LOGITS_AT_ONCE", 5)  # of 18
    ids, rows = torch.tensor([[2, 3, 4, 5, 6]]), []
    policy.model.lm_head.register_forward_hook(lambda module, given, logits: rows.append(logits.numel() // 18))
    logp, entropy = token_logprobs(policy.model, ids, torch.ones_like(ids), 3)
    assert rows == [1, 1, 1]
    (g,) = torch.autograd.grad(
        logp.sum(), policy.model.lm_head.weight
    )  # of one tensor: not what .backward() goes through
    assert g.abs().max() > 0
    assert not entropy.requires_grad


def test_bfloat16_logits_are_divided_by_the_temperature_in_float32(policy):
    model, ids = tiny("llama").bfloat16(), torch.tensor([[2, 3, 4, 5, 6, 7, 8, 9]])
    logp, entropy = token_logprobs(model, ids, torch.ones_like(ids), 7, 0.7)
    wanted = (model(input_ids=ids).logits[:, :-1].float() / 0.7).log_softmax(-1)
    torch.testing.assert_close(logp, wanted.gather(-1, ids[:, 1:, None]).squeeze(-1), atol=1e-5, rtol=1e-5)
    assert logp.dtype == entropy.dtype == torch.float32
    prompt = policy.tokenizer.decode(ids[0])
    drawn = roll(Policy(model, policy.tokenizer), [prompt], max_completion_length=1, temperature=0.7)
    wanted = (model(input_ids=ids).logits[0, -1].float() / 0.7).log_softmax(-1)
    torch.testing.assert_close(drawn.logp, wanted[drawn.completion_ids], atol=1e-5, rtol=1e-5)


MEMORY = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from minicpgd.logprobs import token_logprobs
model = LlamaForCausalLM(LlamaConfig(vocab_size=150_000, hidden_size=16, intermediate_size=64, num_hidden_layers=1,
                                     num_attention_heads=4))
chunk = eval(sys.argv[1])
largest = 0
class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        global largest
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.dim() and t.shape[-1] == 150_000:
                largest = max(largest, t.numel() // 150_000)
        return out
ids = torch.randint(0, 150_000, (4, 80))
def peak():
    return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) / 1024
with Watch():  # what is loaded once, and the watching itself, are not to be counted
    token_logprobs(model, ids[:1, :4], torch.ones_like(ids[:1, :4]), 2, 1.0, 1)[0].sum().backward()
before, largest = peak(), 0
with Watch():
    logp, _ = token_logprobs(model, ids, torch.ones_like(ids), 64, 1.0, chunk)
    logp.sum().backward()
print(largest, peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_chunks_keep_the_logits_from_existing():
    """V = 150,000, 4 x 64 tokens: no tensor of V columns has more rows than the chunk, and the peak shows it."""
    peaks = {}
    for chunk in (10_000, 16):
        # glibc would keep what was freed, now more and now less of it; the peak is to be that of the tensors
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, "-c", MEMORY, str(chunk)]
        out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        rows, peaks[chunk] = (float(x) for x in out.stdout.split())
        # (the output layer itself is V columns by 16 rows: fewer than a chunk)
        assert rows == min(chunk, 4 * 64)
    assert peaks[16] < peaks[10_000] / 8


@pytest.mark.gpu
def test_on_a_gpu_sampled_and_scored_logprobs_agree(policy):
    rollout = roll(policy, problems(12))
    ids, mask, longest = rollout.inputs(torch.arange(48, device=policy.device))
    logp, _ = token_logprobs(policy.model, ids, mask, longest)
    assert policy.device.type == "cuda"
    assert ((logp - rollout.logp)[rollout.mask].exp() - 1).abs().max() < 1e-3
