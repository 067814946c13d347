"""Sampling and scoring give the same numbers for the same tokens of the same policy."""

import inspect
import os
import random
import subprocess
import sys
import warnings
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

import minicpgd.models.logprobs
from minicpgd.config import ModelSettings, SamplingSettings, TrainConfig
from minicpgd.errors import ConfigError, NonFiniteError
from minicpgd.models.logprobs import logp_and_entropy, position_ids, token_logprobs
from minicpgd.models.lora import add_adapter
from minicpgd.models.policy import Policy, load_policy
from minicpgd.models.sampling import cache_argument, generate
from minicpgd.models.source import EMBEDDED
from minicpgd.tasks import get_task


def problems(n, seed=0):
    return [p["prompt"] for p in get_task("chain_arithmetic").sample(n, random.Random(seed))]


def sample(policy, prompts, group=4, seed=0, **changes):
    """Sample with the settings that `changes` names; greedily if the seed is None."""
    settings = SamplingSettings(**({"max_completion_length": 48} | changes))
    generator = torch.Generator(policy.device).manual_seed(seed) if seed is not None else None
    return generate(policy, prompts, group, settings, generator=generator, greedy=seed is None)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_sampled_and_scored_logprobs_agree(policy, temperature):
    """The prompts have different lengths, so some are padded. The on-policy ratio is 1 within 1e-4."""
    prompts = problems(12)
    assert len({len(p) for p in prompts}) > 3
    rollout = sample(policy, prompts, temperature=temperature)
    ids, mask, longest = rollout.inputs(torch.arange(48))
    logp, entropy = token_logprobs(policy.model, ids, mask, longest, temperature)
    ratio = (logp - rollout.logp)[rollout.mask].exp()
    assert (ratio - 1).abs().max() < 1e-4
    assert (entropy - rollout.entropy)[rollout.mask].abs().max() < 1e-4
    if temperature != 1.0:  # At another temperature the scores differ.
        other, _ = token_logprobs(policy.model, ids, mask, longest, 1.0)
        assert ((other - rollout.logp)[rollout.mask].exp() - 1).abs().max() > 0.1


def test_padding_changes_nothing(policy):
    """Each row has the same scores alone, without any padding, and in the batch."""
    rollout = sample(policy, problems(6), group=2)
    ids, mask, longest = rollout.inputs(torch.arange(12))
    together, entropies = token_logprobs(policy.model, ids, mask, longest)
    for i in range(12):
        n = int(rollout.lengths[i])
        alone = ids[i][mask[i].bool()][None]
        logp, entropy = token_logprobs(policy.model, alone, torch.ones_like(alone), n)
        torch.testing.assert_close(together[i, :n], logp[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entropies[i, :n], entropy[0], atol=1e-5, rtol=1e-5)


def test_a_masked_token_in_the_middle_has_no_influence(policy):
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


def test_greedy_decoding_agrees_with_transformers(policy):
    """Our loop is compared with `generate` of transformers, on prompts with padding and rows that end early."""
    prompts = problems(24, seed=3)
    ours = sample(policy, prompts, group=1, seed=None)
    ids, mask = policy.encode(prompts)
    theirs = policy.model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=48)
    theirs = theirs[:, ids.shape[1] :]
    for i in range(24):
        n = int(ours.lengths[i])
        assert ours.completion_ids[i, :n].tolist() == theirs[i, :n].tolist()
        assert ours.truncated[i] == (policy.eos_ids[0] not in theirs[i])


def test_the_fields_of_a_rollout_agree_with_each_other(policy):
    prompts = problems(5)
    rollout = sample(policy, prompts, group=8, max_completion_length=20)
    assert rollout.mask.sum(dim=1).tolist() == rollout.lengths.tolist()
    assert rollout.mask.dtype == rollout.truncated.dtype == torch.bool
    assert rollout.truncated.any()
    assert not rollout.truncated.all()
    for i, text in enumerate(rollout.completions):
        n = int(rollout.lengths[i])
        ended = int(rollout.completion_ids[i, n - 1]) == int(policy.eos_ids[0])
        assert ended != bool(rollout.truncated[i])  # The end-of-sequence token belongs to the response.
        assert len(text) == n - ended
        assert rollout.prompt_mask[i].sum() == len(prompts[i // 8])  # The responses of a group stand together.
        assert (rollout.logp[i, n:] == 0).all()
        assert (rollout.entropy[i, n:] == 0).all()
        assert (rollout.completion_ids[i, n:] == policy.pad_id).all()
    assert len(set(rollout.completions)) > 5
    with pytest.raises(FrozenInstanceError):
        rollout.mask = rollout.prompt_mask
    ids = rollout.token_ids()
    assert [type(token) for row in ids for token in row] == [int] * int(rollout.mask.sum())
    assert [len(row) for row in ids] == rollout.lengths.tolist()
    assert [row[-1] in policy.eos_ids.tolist() for row in ids] == (~rollout.truncated).tolist()


def test_sampling_follows_its_distribution(policy):
    """The first tokens of 4,000 samples have the model's probabilities. top_k and top_p limit only the sampling."""
    prompt = problems(1)
    ids, mask = policy.encode(prompt)
    p = policy.model(input_ids=ids, attention_mask=mask).logits[0, -1].softmax(-1)
    rollout = sample(policy, prompt, group=4000, max_completion_length=1)
    counts = torch.bincount(rollout.completion_ids[:, 0], minlength=len(p)) / 4000
    assert (counts - p).abs().max() < 4 * (0.25 / 4000) ** 0.5
    assert len(rollout.completion_ids.unique()) > 1
    for limit in ({"top_k": 1}, {"top_p": 0.01}):
        limited = sample(policy, prompt, group=50, max_completion_length=1, **limit)
        assert limited.completion_ids.unique().tolist() == [p.argmax().item()]
        torch.testing.assert_close(limited.logp[0, 0], p.max().log())


def test_every_tensor_is_created_on_the_models_device(policy):
    """The default device is one whose tensors hold no numbers. So the test needs no GPU."""
    usual = sample(policy, problems(4), rollout_batch_size=5)
    with torch.device("meta"):
        other = sample(policy, problems(4), rollout_batch_size=5)
        scored = [other.score(policy.model, tokens=60), other.score(policy.model, size=3, chunk_size=7)]
    assert other.completions == usual.completions
    assert torch.equal(other.truncated, usual.truncated)
    assert torch.equal(other.entropy, usual.entropy)
    assert usual.completion_ids.shape == usual.mask.shape == usual.entropy.shape == (16, usual.lengths.max())
    assert usual.lengths.max() < 48
    for logp in (other.logp, *scored):
        torch.testing.assert_close(logp, usual.logp, atol=1e-5, rtol=1e-4)


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
    """There are six rows of ten tokens each. Four tokens are the prompt's."""
    rollout = replace(sample(policy, problems(2), 3), prompt_mask=torch.ones(6, 4), lengths=torch.full((6,), 6))
    assert [len(part) for part in rollout.micro_batches(torch.arange(6), size, tokens)] == wanted


def record_shapes(model):
    """Return two lists that grow at each forward pass: the shape of the ids, and the number of tokens with logits."""
    shapes, rows = [], []

    def append_shape(decoder, args, keywords):
        if "forward" not in vars(decoder):  # Else the decoder is asked for its output once more, without computing it.
            shapes.append(keywords["input_ids"].shape)

    model.get_decoder().register_forward_pre_hook(append_shape, with_kwargs=True)
    model.get_output_embeddings().register_forward_hook(
        lambda module, hidden, logits: rows.append(logits.numel() // logits.shape[-1])
    )
    return shapes, rows


def test_scores_are_computed_in_parts_of_the_given_size(policy):
    rollout = sample(policy, problems(4))
    shapes, rows = record_shapes(policy.model)
    rollout.score(policy.model, size=3)
    assert [shape[0] for shape in shapes] == [3, 3, 3, 3, 3, 1]
    shapes.clear()
    rollout.score(policy.model, tokens=60)
    assert all(shape.numel() <= 60 or shape[0] == 1 for shape in shapes)
    rows.clear()
    rollout.score(policy.model, chunk_size=7)
    assert max(rows) == 7


def test_a_prompt_is_encoded_once_and_only_its_last_logits_are_computed(policy):
    shapes, rows = record_shapes(policy.model)
    sample(policy, problems(3), group=4, max_completion_length=2)
    assert [shape[0] for shape in shapes] == rows == [3, 12]


@pytest.mark.parametrize(("group", "seed"), [(2, 0), (2, 1), (2, 2), (8, 0)])
def test_ended_responses_are_dropped_once_they_are_half_of_the_batch(policy, group, seed):
    shapes, _ = record_shapes(policy.model)
    lengths = sample(policy, problems(2), group=group, seed=seed).lengths
    batch, wanted = 2 * group, [2]  # Each prompt is encoded once.
    for t in range(1, int(lengths.max())):
        running = int((lengths > t).sum())
        batch = running if 2 * running <= batch else batch
        wanted.append(batch)
    assert [shape[0] for shape in shapes] == wanted


@pytest.mark.parametrize("training", [True, False])
def test_sampling_uses_no_dropout_and_restores_the_mode_of_the_model(policy, training):
    plain = sample(policy, problems(4))
    for layer in policy.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    policy.model.train(training)
    rollout = sample(policy, problems(4))
    assert rollout.completions == plain.completions
    assert policy.model.training == training
    assert not rollout.logp.requires_grad
    assert not rollout.score(policy.model).requires_grad


@pytest.mark.parametrize("seed", [None, 0])
def test_logits_that_are_not_finite_are_an_error(policy, seed):
    with torch.no_grad():
        policy.model.lm_head.weight[3] = float("nan")
    with pytest.raises(NonFiniteError, match="^the model's logits are not finite$"):
        sample(policy, problems(1), seed=seed)


def test_sampling_needs_a_generator_and_greedy_decoding_ignores_one(policy):
    with pytest.raises(ValueError, match="sampling needs a generator; greedy=True needs none"):
        generate(policy, problems(1), 2)
    greedy, with_generator = (
        generate(policy, problems(4), 2, generator=generator, greedy=True)
        for generator in (None, torch.Generator().manual_seed(0))
    )
    assert greedy.completions == with_generator.completions
    assert greedy.completions[::2] == greedy.completions[1::2]


def test_by_default_a_response_has_at_most_64_tokens_at_temperature_1(policy):
    rollout = generate(policy, problems(4), 4, generator=torch.Generator().manual_seed(0))
    same = sample(policy, problems(4), max_completion_length=64, temperature=1.0, top_p=1.0, top_k=0)
    assert rollout.completions == same.completions
    config = TrainConfig(num_prompts=2)  # A config is a SamplingSettings too.
    again = generate(policy, problems(4), 4, config, generator=torch.Generator().manual_seed(0))
    assert again.completions == same.completions


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        *((SamplingSettings, "temperature", value) for value in (0.0, -1.0, 1e31, float("nan"), "1")),
        *((SamplingSettings, "top_p", value) for value in (0.0, 1.1)),
        *((SamplingSettings, "top_k", value) for value in (-1, 2.0)),
        *((SamplingSettings, "max_completion_length", value) for value in (0, None)),
        *((SamplingSettings, "rollout_batch_size", value) for value in (0, True)),
        *((ModelSettings, "lora_r", value) for value in (-1, 10**5)),
        *((ModelSettings, "dtype", value) for value in ("int8", None)),
        *((ModelSettings, "model", value) for value in (3, "a\0b")),
        *((ModelSettings, "seed", value) for value in (-1, 2**63)),
        *((ModelSettings, "load_in_4bit", 1), (ModelSettings, "lora_alpha", 0)),
    ],
)
def test_settings_of_sampling_and_of_the_model_check_their_values_without_a_config(kind, field, value):
    with pytest.raises(ConfigError, match=f"^{field} = ") as caught:
        kind(**{field: value})
    assert "\n" not in str(caught.value)
    assert kind() == kind()


def test_settings_without_limits_keep_the_other_fields():
    settings = SamplingSettings(7, 0.5, top_p=0.9, top_k=3, rollout_batch_size=2)
    assert settings.without_limits() == SamplingSettings(7, 0.5, rollout_batch_size=2)
    assert TrainConfig(max_completion_length=7, top_k=3).without_limits() == SamplingSettings(7)


@pytest.mark.parametrize(("threads", "wanted"), [(3, 1), (1, 1)])
def test_the_embedded_model_samples_and_scores_on_one_thread(policy, record_threads, threads, wanted):
    """The caller's number of threads is restored."""
    torch.set_num_threads(threads)
    used = record_threads(policy.model)
    rollout = sample(policy, problems(4))
    assert len(used) == rollout.lengths.max()
    rollout.score(policy.model)
    assert len(used) == rollout.lengths.max() + 1
    assert set(used) == {wanted}
    assert torch.get_num_threads() == threads


def test_a_model_of_more_than_a_million_parameters_uses_the_threads_of_the_caller(policy, record_threads):
    torch.set_num_threads(3)
    model = tiny("llama", vocabulary=20_000)
    used = record_threads(model)
    sample(Policy(model, policy.tokenizer), problems(1), max_completion_length=2).score(model)
    assert set(used) == {3}


def test_an_error_while_sampling_restores_the_number_of_threads(policy, record_threads):
    torch.set_num_threads(3)
    used = record_threads(policy.model)
    rollout = sample(policy, problems(1))
    with torch.no_grad():
        policy.model.lm_head.weight[3] = float("nan")
    with pytest.raises(NonFiniteError):
        sample(policy, problems(1))
    assert torch.get_num_threads() == 3
    with pytest.raises(RuntimeError, match="split_size"):
        rollout.score(policy.model, chunk_size=-1)
    assert torch.get_num_threads() == 3
    assert set(used) == {1}


def test_the_same_seed_gives_the_same_rollout(policy):
    first, again, other = (sample(policy, problems(4), seed=s) for s in (5, 5, 6))
    assert first.completions == again.completions
    assert torch.equal(first.logp, again.logp)
    assert first.completions != other.completions


def test_pad_may_be_eos(policy):
    """If a tokenizer pads with EOS, the EOS that ends a response still counts."""
    plain = sample(policy, problems(4))
    policy.tokenizer.pad_token = policy.tokenizer.eos_token
    same = sample(policy, problems(4))
    assert policy.pad_id == int(policy.eos_ids[0])
    assert same.mask.tolist() == plain.mask.tolist()
    assert same.completions == plain.completions


MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 16, "final_logit_softcapping": 3.0, "sliding_window": 4}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {}),  # Its positions are absolute, so padding must not be counted.
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
def test_the_cache_has_the_name_that_the_installed_transformers_uses(name):
    """Under this name the model fills the cache, and transformers does not warn."""
    model, ids = tiny(name), torch.tensor([[2, 3, 4]])
    cache, old_cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with warnings.catch_warnings(action="error"):
        model(input_ids=ids, **{cache_argument(model): cache})
    assert cache.get_seq_length() == 3
    assert cache_argument(model) in inspect.signature(type(model).forward).parameters
    if cache_argument(model) != "past_key_values":  # The old name still works, but transformers warns.
        with pytest.warns(FutureWarning, match="past_key_values"):
            model(input_ids=ids, past_key_values=old_cache)


def test_the_cache_has_its_old_name_in_an_older_transformers():
    class Old(torch.nn.Module):
        def forward(self, input_ids, past_key_values=None):
            pass

    class New(torch.nn.Module):
        def forward(self, input_ids, cache=None):
            pass

    assert cache_argument(Old()) == "past_key_values"
    assert cache_argument(New()) == "cache"


@pytest.mark.parametrize("adapter", [False, True])
def test_sampling_causes_no_warning_about_the_cache(policy, adapter):
    """PEFT's wrapper takes any argument, so its own signature says nothing about the name."""
    if adapter:
        policy.model = add_adapter(policy.model, ModelSettings(lora_r=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        rollout = sample(policy, problems(3))
    assert rollout.lengths.max() > 2
    torch.testing.assert_close(rollout.score(policy.model), rollout.logp, atol=1e-5, rtol=1e-4)


BARS = """
import sys
from pathlib import Path
from minicpgd.models import load_policy
load_policy().save(Path(sys.argv[1]))
load_policy(sys.argv[1])
"""


def test_loading_and_saving_print_nothing_in_a_fresh_interpreter(tmp_path):
    done = subprocess.run([sys.executable, "-c", BARS, str(tmp_path / "model")], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_loading_and_saving_show_no_progress_bar_and_keep_the_callers_choice(tmp_path, capfd):
    logging.enable_progress_bar()
    try:
        load_policy().save(tmp_path / "model")
        load_policy(str(tmp_path / "model"))
        assert capfd.readouterr().err == ""
        assert logging.is_progress_bar_enabled()
        AutoModelForCausalLM.from_pretrained(EMBEDDED)
        assert "%" in capfd.readouterr().err  # This is what transformers shows by itself.
    finally:
        logging.disable_progress_bar()
    load_policy()
    assert not logging.is_progress_bar_enabled()


@pytest.mark.parametrize("name", MODELS)
def test_other_architectures(name, policy, tmp_path):
    """Loaded from a folder, they sample and score alike, in chunks too, and with softcapped logits."""
    Policy(tiny(name), policy.tokenizer).save(tmp_path)
    loaded = load_policy(str(tmp_path))
    rollout = sample(loaded, problems(4), max_completion_length=12)
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


@pytest.mark.parametrize("chunk", [None, 7])
def test_chunked_logprobs_agree_with_plain_ones(chunk):
    """With V = 150,000, value and gradient agree with a log-softmax over the model's own logits, to 1e-5."""
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
    model.lm_head.register_forward_hook(lambda module, hidden, logits: rows.append(logits.numel() // 150_000))
    logp, _ = token_logprobs(model, ids, mask, 40, chunk_size=chunk)
    assert max(rows) == (chunk or 2**24 // 150_000)  # The default limits the logits to 64 MiB.
    logp.mean().backward()
    torch.testing.assert_close(logp, plain, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-5)
    assert max(g.abs().max() for g in expected.values()) > 1e-2


def test_a_chunk_is_one_token_if_the_vocabulary_is_larger_than_the_limit(policy, monkeypatch):
    monkeypatch.setattr(minicpgd.models.logprobs, "LOGITS_AT_ONCE", 5)  # The vocabulary has 18 words.
    ids, rows = torch.tensor([[2, 3, 4, 5, 6]]), []
    policy.model.lm_head.register_forward_hook(lambda module, hidden, logits: rows.append(logits.numel() // 18))
    logp, entropy = token_logprobs(policy.model, ids, torch.ones_like(ids), 3)
    assert rows == [1, 1, 1]
    # autograd.grad goes another way through checkpoints than `backward`.
    (g,) = torch.autograd.grad(logp.sum(), policy.model.lm_head.weight)
    assert g.abs().max() > 0
    assert not entropy.requires_grad


def test_bfloat16_logits_are_divided_by_the_temperature_in_float32(policy):
    model, ids = tiny("llama").bfloat16(), torch.tensor([[2, 3, 4, 5, 6, 7, 8, 9]])
    logp, entropy = token_logprobs(model, ids, torch.ones_like(ids), 7, 0.7)
    wanted = (model(input_ids=ids).logits[:, :-1].float() / 0.7).log_softmax(-1)
    torch.testing.assert_close(logp, wanted.gather(-1, ids[:, 1:, None]).squeeze(-1), atol=1e-5, rtol=1e-5)
    assert logp.dtype == entropy.dtype == torch.float32
    prompt = policy.tokenizer.decode(ids[0])
    rollout = sample(Policy(model, policy.tokenizer), [prompt], max_completion_length=1, temperature=0.7)
    wanted = (model(input_ids=ids).logits[0, -1].float() / 0.7).log_softmax(-1)
    torch.testing.assert_close(rollout.logp, wanted[rollout.completion_ids], atol=1e-5, rtol=1e-5)


MEMORY = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from minicpgd.models.logprobs import token_logprobs
model = LlamaForCausalLM(LlamaConfig(vocab_size=150_000, hidden_size=16, intermediate_size=64, num_hidden_layers=1,
                                     num_attention_heads=4))
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
with Watch():  # The peak excludes what is loaded only once, and the watching itself.
    token_logprobs(model, ids[:1, :4], torch.ones_like(ids[:1, :4]), 2, 1.0, 1)[0].sum().backward()
before = peak()
for chunk in map(int, sys.argv[1:]):
    model.zero_grad()
    largest = 0
    with Watch():
        logp, _ = token_logprobs(model, ids, torch.ones_like(ids), 64, 1.0, chunk)
        logp.sum().backward()
    print(largest, peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_chunks_keep_the_logits_small():
    """With V = 150,000 and 4 x 64 tokens, no tensor of V columns has more rows than a chunk. The peak is small too."""
    # Otherwise glibc keeps freed memory, sometimes more and sometimes less, and the peak is not the tensors'.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    chunks, peaks = (16, 10_000), {}  # A peak of a process never falls, so the small one comes first.
    command = [sys.executable, "-c", MEMORY, *map(str, chunks)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    for chunk, line in zip(chunks, out.stdout.splitlines(), strict=True):
        rows, peaks[chunk] = (float(x) for x in line.split())
        # The output layer itself has V columns and 16 rows, which is no more than a chunk.
        assert rows == min(chunk, 4 * 64)
    assert peaks[16] < peaks[10_000] / 8


@pytest.mark.gpu
def test_on_a_gpu_sampled_and_scored_logprobs_agree(policy):
    rollout = sample(policy, problems(12))
    ids, mask, longest = rollout.inputs(torch.arange(48, device=policy.device))
    logp, _ = token_logprobs(policy.model, ids, mask, longest)
    assert policy.device.type == "cuda"
    assert ((logp - rollout.logp)[rollout.mask].exp() - 1).abs().max() < 1e-3
