"""Other people's models: each is sampled and scored alike, or refused in one line before anything is learned."""

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from minicpgd import TrainConfig, UserError, evaluate, load_run, train
from minicpgd.cli.main import main
from minicpgd.config import ModelSettings, SamplingSettings, TaskSettings
from minicpgd.models import sampling
from minicpgd.models.logprobs import num_positions, position_ids, split_network, token_logprobs
from minicpgd.models.lora import add_adapter
from minicpgd.models.policy import load_policy
from minicpgd.models.sampling import check_sampler, generate, largest_gap
from minicpgd.models.source import EMBEDDED
from minicpgd.training import export

SIZES = {
    "vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2,
}  # fmt: skip
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
LATENT = {
    "num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": 16,
    "kv_lora_rank": 16,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOW = {"sliding_window": 8, "head_dim": 16}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
ARCHITECTURES = {
    # They scale their logits, or what the output layer is given.
    "granite": {"logits_scaling": 8.0}, "granitemoe": {"logits_scaling": 8.0, **EXPERTS},
    "granitemoeshared": {"logits_scaling": 8.0, **EXPERTS}, "granite_swa": {"logits_scaling": 4.0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "logits_scaling": 4.0, **MAMBA},
    "cohere": {"logit_scale": 0.25}, "cohere2": {"logit_scale": 0.25}, "hyperclovax": {"logits_scaling": 4.0},
    "minicpm3": {"head_dim": 16, "dim_model_base": 8, **LATENT},
    "falcon_h1": {"lm_head_multiplier": 0.3, "mamba_d_ssm": 128, "mamba_d_state": 8, **MAMBA},
    # They cap their logits.
    "gemma2": {"final_logit_softcapping": 3.0, **WINDOW}, "nanochat": {}, "vaultgemma": {"head_dim": 16},
    # Some layers have a state in place of keys and values.
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}, "qwen3_next": {**LINEAR, **EXPERTS},
    "qwen3_5_text": LINEAR, "bamba": {"attn_layer_indices": [1], **MAMBA},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "num_experts": 2},
    # The decoder has another name, or another place.
    "llama4_text": EXPERTS, "modernbert-decoder": {}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 64}, "mpt": {},
    # The rest has windows, biases, experts, latent attention, and positions of all kinds.
    "mistral": WINDOW, "mixtral": EXPERTS, "phi": {}, "gpt_neox": {}, "olmo2": {}, "smollm3": {}, "bloom": {},
    "deepseek_v3": {"n_group": 1, "topk_group": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, **LATENT},
    "gemma3": {"text_config": SIZES | WINDOW, "vision_config": VISION},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], **WINDOW}, "starcoder2": {}, "glm": {},
}  # fmt: skip
REFUSED = ("bert", "mamba", "recurrent_gemma", "rwkv")


def random_model(kind, **changes):
    """Return a random model, whose weights are large enough for its distributions to differ from uniform ones."""
    torch.manual_seed(0)
    sizes = SIZES | ({"n_layers": 2, "n_heads": 4, "d_model": 64} if kind == "mpt" else {})
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **sizes | ARCHITECTURES.get(kind, {}) | changes)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


@pytest.fixture
def folder_of(tmp_path):
    """Return a function that saves a random model with the tokenizer of the embedded one; changes are of its config."""

    def save(kind="llama", change=lambda model, tokenizer: None, **changes):
        model, tokenizer = random_model(kind, **changes), AutoTokenizer.from_pretrained(EMBEDDED)
        model.generation_config.eos_token_id = 1
        change(model, tokenizer)
        model.save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        return str(tmp_path / kind)

    return save


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_is_scored_is_what_was_sampled(kind, folder_of):
    """The prompts have different lengths, and the tokens are scored in chunks, too."""
    policy = load_policy(folder_of(kind))
    rollout = generate(policy, ["1+2=", "7+5*3-4+1*2=", "9*9="], 3, generator=torch.Generator().manual_seed(0))
    for chunk in (None, 5):
        scored = rollout.score(policy.model, chunk_size=chunk)
        torch.testing.assert_close(scored, rollout.logp, atol=1e-4, rtol=1e-4)
    assert rollout.logp[rollout.mask].std() > 0.05
    check_sampler(policy, ["1+2=", "7+5*3-4+1*2="], SamplingSettings())


@pytest.mark.parametrize("kind", ["granite", "cohere", "gemma2", "gemma3", "llama4_text", "modernbert-decoder"])
@pytest.mark.parametrize("adapter", [False, True])
def test_scores_and_gradients_are_those_of_the_models_own_logits(kind, adapter):
    model = random_model(kind)
    if adapter:
        targets = "all-linear" if kind == "modernbert-decoder" else "q_proj"  # PEFT cannot wrap Llama 4's router.
        model = add_adapter(model, ModelSettings(lora_r=2, lora_target_modules=targets))
    ids = torch.randint(3, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    logits = model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False).logits
    wanted = logits[:, 3:-1].log_softmax(-1).gather(-1, ids[:, 4:, None]).squeeze(-1)
    wanted.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for chunk in (None, 3):
        model.zero_grad()
        logp, _ = token_logprobs(model, ids, mask, 5, chunk_size=chunk)
        torch.testing.assert_close(logp, wanted, atol=1e-5, rtol=1e-5)
        logp.sum().backward()
        for name, parameter in model.named_parameters():
            if name in gradients:
                torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-3, rtol=1e-3)
    assert "forward" not in vars(split_network(model)[1])  # The decoder is as it was.


def test_scoring_restores_a_forward_that_another_library_put_on_the_decoder():
    """accelerate, for example, replaces a module's forward."""
    model, ids = random_model("llama"), torch.tensor([[3, 4, 5]])
    decoder, calls = model.get_decoder(), []
    plain = decoder.forward

    def counted(*args, **options):
        calls.append(1)
        return plain(*args, **options)

    decoder.forward = counted
    for _ in range(2):
        token_logprobs(model, ids, torch.ones_like(ids), 2)
    assert calls == [1, 1]
    assert decoder.forward is counted


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_be_sampled_is_refused_before_its_folder_is_made(kind, folder_of, small, tmp_path):
    extra = {"block_types": ["recurrent", "attention"]} if kind == "recurrent_gemma" else {}
    model = folder_of(kind, **extra, **({"is_decoder": True} if kind == "bert" else {}))
    if kind == "bert":
        config = json.loads(Path(model, "config.json").read_text()) | {"is_decoder": False}
        Path(model, "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="differ by .* nats|cannot be sampled from"):
        train(small(model=model))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("scale", "is_refused"), [(1.0, False), (1.0001, False), (1.1, True)])
def test_a_scorer_that_disagrees_with_the_sampler_is_refused(scale, is_refused, policy):
    """The sampler's logits are scaled, those of the scorer are not."""
    network, decoder = split_network(policy.model)
    forward = network.forward

    def scaled(*args, **options):
        output = forward(*args, **options)
        output.logits *= 1.0 if "forward" in vars(decoder) else scale
        return output

    network.forward = scaled
    check = (policy, ["1+2=", "7*8+1="], SamplingSettings())
    if is_refused:
        with pytest.raises(UserError, match=r"model = 'embedded': .* differ by 0\.\d+ nats; at most 0.01 is right"):
            check_sampler(*check)
    else:
        check_sampler(*check)


def test_the_check_samples_four_short_responses_to_each_prompt(policy, monkeypatch):
    """It uses the run's temperature, and leaves the model in training mode, as it found it."""
    asked, modes = [], []

    def record(policy, prompts, num_generations, settings, *, generator):
        asked.append((prompts, num_generations, settings, generator.initial_seed()))
        return generate(policy, prompts, num_generations, settings, generator=generator)

    monkeypatch.setattr(sampling, "generate", record)
    policy.model.register_forward_pre_hook(lambda model, _: modes.append(model.training))
    policy.model.train()
    for limit in (64, 5):
        check_sampler(policy, ["1+2=", "7*8+1="], SamplingSettings(limit, 0.5, top_k=3))
    wanted = [(["1+2=", "7*8+1="], 4, SamplingSettings(min(limit, 16), 0.5), 0) for limit in (64, 5)]
    assert asked == wanted
    assert policy.model.training
    assert set(modes) == {False}


def test_the_check_passes_a_full_memory_on_and_names_every_other_error(policy):
    def fail(error):
        policy.model.forward = lambda **_: (_ for _ in ()).throw(error)
        check_sampler(policy, ["1+2="], SamplingSettings())

    with pytest.raises(RuntimeError, match="^not enough memory"):
        fail(RuntimeError("not enough memory: 8 bytes"))
    name = re.escape(policy.name)
    with pytest.raises(UserError, match=f"^{name}: cannot be sampled from token by token: RuntimeError: no luck$"):
        fail(RuntimeError("no luck"))


def test_the_gap_is_the_largest_in_float32_and_the_mean_in_half_precision():
    differences = torch.tensor([0.5, -2.0, 1.0, 0.5])
    assert largest_gap(differences, torch.float32) == (2.0, 0.01)
    dtypes = (torch.float32, torch.bfloat16)
    assert {type(number) for dtype in dtypes for number in largest_gap(differences, dtype)} == {float}
    assert largest_gap(differences, torch.bfloat16) == (1.0, 25 / 2**7)
    assert largest_gap(differences, torch.float16) == (1.0, 25 / 2**10)


@pytest.mark.parametrize(("gap", "is_refused"), [(0.25, False), (0.26, True), (float("nan"), True)])
def test_a_gap_may_be_as_large_as_the_limit(gap, is_refused, policy, monkeypatch):
    monkeypatch.setattr(sampling, "largest_gap", lambda *_: (gap, 0.25))
    words = "the log-probability of a token when it is sampled and when it is scored"
    line = f"{policy.name}: {words} differ by {gap:.2g} nats; at most 0.25 is right"
    with pytest.raises(UserError, match=f"^{re.escape(line)}$") if is_refused else nullcontext():
        check_sampler(policy, ["1+2="], SamplingSettings())


def test_nothing_follows_the_end_of_a_response(policy):
    settings = SamplingSettings(temperature=2.5)  # Some responses end long before half of them have.
    rollout = generate(policy, ["1+2=", "7*8+1-4="], 16, settings, generator=torch.Generator().manual_seed(0))
    ends = torch.isin(rollout.completion_ids, policy.eos_ids) & rollout.mask
    assert rollout.lengths.unique().numel() >= 3
    for row in range(32):
        last = [] if rollout.truncated[row] else [rollout.lengths[row].item() - 1]
        assert ends[row].nonzero().flatten().tolist() == last


# The end of a response, the vocabulary, and the positions


@pytest.mark.parametrize(
    ("of_model", "of_tokenizer", "wanted"),
    [
        (1, "<eos>", [1]), ([1, 5], "<eos>", [1, 5]), (1, "+", "both"), (None, "<eos>", [1]), (5, None, [5]),
        (0, "<eos>", [0, 1]), (0, None, [0]), ([5], "<eos>", [5, 1]),
    ],
)  # fmt: skip
def test_a_response_ends_with_the_tokens_of_model_and_tokenizer(of_model, of_tokenizer, wanted, folder_of):
    def change(model, tokenizer):
        model.generation_config.eos_token_id = model.config.eos_token_id = of_model
        tokenizer.eos_token = of_tokenizer

    policy = load_policy(folder_of(change=change, eos_token_id=None))
    plus = policy.tokenizer.convert_tokens_to_ids("+")
    assert policy.eos_ids.tolist() == ([1, plus] if wanted == "both" else wanted)


def without_end(model, tokenizer):
    model.generation_config.eos_token_id = tokenizer.eos_token = None


def with_large_token(model, tokenizer):
    tokenizer.add_tokens([AddedToken(f"<extra{i}>", special=True) for i in range(32)])


@pytest.mark.parametrize(
    ("change", "changes", "line"),
    [
        (without_end, {"eos_token_id": None}, "neither its tokenizer nor its generation config names an end-of-seq"),
        (with_large_token, {}, "its embedding has 32 rows, and its token '<extra31>' has the id"),
    ],
)
def test_a_model_whose_parts_do_not_fit_is_one_line(change, changes, line, folder_of):
    with pytest.raises(UserError, match=line):
        load_policy(folder_of(change=change, **changes))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_prompt_and_response_have_to_fit_among_the_models_positions(kind, folder_of, tmp_path):
    """Rotary positions go on silently after the last one, and learned ones end in an IndexError."""
    policy = load_policy(folder_of(kind, max_position_embeddings=40))
    prompts = ["1+2=", "1+" * 11 + "2="]  # 24 tokens
    assert generate(policy, prompts, 1, greedy=True, max_completion_length=16).completion_ids.shape[1] <= 16
    with pytest.raises(
        UserError, match=r"prompt = '1\+1\+.*': its 24 tokens and max_completion_length = 17 exceed .* 40"
    ):
        generate(policy, prompts, 1, greedy=True, max_completion_length=17)
    rows = [{"prompt": "1+" * 60 + f"{i}=", "answer": "3"} for i in range(64)]
    data = tmp_path / "long.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="positions of model = "):
        train(TrainConfig(model=policy.settings.model, task="jsonl", data=str(data), output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_the_number_of_positions():
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    assert num_positions(random_model("llama")) == 256
    multimodal = random_model("gemma3")
    multimodal.config.text_config.max_position_embeddings = 64
    assert num_positions(multimodal) == 64
    assert num_positions(random_model("llama", max_position_embeddings=64, rope_parameters=rope)) == 256
    original = random_model("llama")
    original.config.rope_parameters = {"original_max_position_embeddings": 512}
    assert num_positions(original) == 512
    without = random_model("bloom")  # It has biases in place of positions.
    del without.config.max_position_embeddings
    assert num_positions(without) == float("inf")


# Weights in 4 bit, tied weights, adapters


def in_4_bit(path):
    """Save the embedded model again, in bitsandbytes' 4 bit."""
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(EMBEDDED, quantization_config=quantised).save_pretrained(path)
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(path)
    return str(path)


def test_a_folder_in_4_bit_trains_an_adapter_and_is_exported(small, tmp_path):
    model = in_4_bit(tmp_path / "model")
    run = train(small(model=model, load_in_4bit=True, lora_r=4, learning_rate=1e-3))
    report = export(run, tmp_path / "exported", num_problems=8)
    assert report.rounding < 1e-4
    assert report.mean_difference < 1e-4
    exported = load_policy(str(tmp_path / "exported"))
    assert {p.dtype for p in exported.model.parameters()} == {torch.float32}
    assert evaluate(ModelSettings(model, load_in_4bit=True), num_problems=4, num_samples=1)["accuracy"] <= 1


@pytest.mark.parametrize(
    ("stored", "settings", "line"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {}, "--load-in-4bit --lora-r 16 trains an adapter"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            {"lora_r": 4},
            "stored in 4 bit and cannot be trained",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            {},
            "quantised by 'bitsandbytes'; choose the model in",
        ),
        ({"quant_method": "gptq", "bits": 4}, {"lora_r": 4}, "its weights are quantised by 'gptq'; choose the model"),
        ({"quant_method": "awq", "bits": 4}, {"load_in_4bit": True, "lora_r": 4}, "quantised by 'awq'"),
        ({"quant_method": "fp8"}, {}, "quantised by 'fp8'"),
    ],
)
def test_other_quantised_folders_are_refused_at_the_start(stored, settings, line, folder_of, small, tmp_path):
    model = folder_of()
    config = json.loads(Path(model, "config.json").read_text()) | {"quantization_config": stored}
    Path(model, "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=line):
        train(small(model=model, **settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("targets", ["q_proj,lm_head", "v_proj,embed_tokens", "lm_head", "all-linear"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_export_is_what_was_trained(targets, tied, folder_of, small, tmp_path):
    """If lm_head is tied to the embedding, merging into one would change the other: so they are untied at the start."""
    model = folder_of(tie_word_embeddings=tied)
    run = train(small(model=model, lora_r=4, lora_target_modules=targets, learning_rate=1e-2, drift_coef=0.1))
    assert load_file(run / "adapter" / "adapter_model.safetensors")
    report = export(run, tmp_path / "exported", num_problems=8)
    assert report.rounding < 1e-4
    assert report.same_answers == 1
    exported = load_policy(str(tmp_path / "exported")).model
    shared = exported.get_input_embeddings().weight is exported.get_output_embeddings().weight
    assert shared == (tied and targets == "all-linear")


def test_an_export_above_the_bound_is_refused(small, tmp_path, monkeypatch):
    run = train(small(lora_r=4))
    monkeypatch.setitem(export.__globals__, "MAX_ROUNDING", -1.0)
    with pytest.raises(UserError, match=r"changes a log-probability by .* nats; at most -1.0 is right; nothing is exp"):
        export(run, tmp_path / "exported", num_problems=4)
    assert not (tmp_path / "exported").exists()


def test_training_starts_from_a_saved_adapter(small, tmp_path):
    """Its rank is stored. Greedy answers before training are those of the finished first run."""
    first = train(small("first", lora_r=6, lora_alpha=5, learning_rate=1e-3, drift_coef=0.1))
    second = train(small("second", adapter=str(first / "adapter"), learning_rate=1e-3))
    config, metrics, _ = load_run(second)
    assert (config.lora_r, config.lora_alpha, config.trains_adapter) == (6, 5, True)
    assert metrics["eval_accuracy"][0] == load_run(first).metrics["eval_accuracy"][-1]
    before, after = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (first, second))
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)
    assert train(replace(config, max_steps=4), resume=True) == second


def test_an_adapter_folder_as_a_model_is_told_as_one(small, tmp_path):
    run = train(small(lora_r=4))
    with pytest.raises(
        UserError, match=r"an adapter; `minicpgd train --model \S+embedded --adapter \S+adapter` starts"
    ):
        load_policy(str(run / "adapter"))
    for name, line in {"model": "no readable adapter_config.json", "none": "no readable adapter_config.json"}.items():
        with pytest.raises(UserError, match=line):
            train(small("other", adapter=str(tmp_path / name)))
    with pytest.raises(UserError, match="beta: with adapter, the reference would be"):
        small("other", adapter=str(run / "adapter"), beta=0.1)


# Chat templates

CHAT = "{% for m in messages %}{{ m.role[0] }}{{ m.content }};{% endfor %}"
DATED = CHAT + "{{ strftime_now('%Y') }}"


def chat_model(folder_of, template=CHAT):
    """A model whose tokenizer knows the letters of the template."""

    def change(model, tokenizer):
        tokenizer.add_tokens(list("sua;x"))
        tokenizer.chat_template = template

    return folder_of(change=change, vocab_size=48)


def text_of(policy, prompt):
    ids, mask = policy.encode([prompt])
    return policy.tokenizer.decode(ids[0][mask[0].bool()])


def test_a_conversation_and_a_system_prompt_go_through_the_template(folder_of):
    model = chat_model(folder_of)
    talk = [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"}, {"role": "user", "content": "4"}]
    assert text_of(load_policy(model), "1+2=") == "u1+2=;"
    assert text_of(load_policy(model), talk) == "u1+2;a3;u4;"
    system = load_policy(ModelSettings(model, system_prompt="x"))
    assert text_of(system, "1+2=") == "sx;u1+2=;"
    assert text_of(system, talk) == "sx;u1+2;a3;u4;"
    assert text_of(system, [{"role": "system", "content": "5"}, talk[0]]) == "s5;u1+2;"


@pytest.mark.parametrize(
    ("settings", "prompt", "line"),
    [
        (
            {},
            [{"role": "user", "content": "1"}],
            "the conversation .* needs a chat template, and the tokenizer has none",
        ),
        ({"system_prompt": "x"}, "1+2=", "a system_prompt needs a chat template, and the tokenizer has none"),
        ({"chat_template": False}, [{"role": "user", "content": "1"}], "--no-chat-template switches it off"),
    ],
)
def test_without_a_template_a_conversation_is_one_line(settings, prompt, line):
    with pytest.raises(UserError, match=line):
        load_policy(ModelSettings(**settings)).encode([prompt])


def test_a_template_prints_the_date_of_the_runs_start(folder_of, small, monkeypatch):
    """The date is stored. So a resumed run has the prompts that it had, also on another day."""
    model = chat_model(folder_of, DATED)
    run = train(small(model=model, max_steps=2))
    config = load_run(run).config
    assert config.chat_date == date.today().isoformat()
    assert load_run(train(small("plain"))).config.chat_date is None  # The embedded model's tokenizer has no template.
    assert text_of(load_policy(ModelSettings(model, chat_date="1999-12-31")), "1=") == "u1=;1999"
    old = train(small("old", model=model, chat_date="1999-12-31", max_steps=2))
    with pytest.raises(UserError, match="chat_date was 1999-12-31, is 2001-01-01"):
        train(small("old", model=model, chat_date="2001-01-01"), resume=True)
    assert load_run(train(small("old", model=model), resume=True)).config.chat_date == "1999-12-31"
    assert len(load_run(old).metrics["step"]) == 4


@pytest.mark.parametrize("given", ["today", "31.1.2026", "2026-13-01", ""])
def test_a_date_that_is_none_is_one_line(given):
    with pytest.raises(UserError, match=r"chat_date = .*: a date is needed, as 2026-01-31"):
        ModelSettings(chat_date=given)


# Paths and commands


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"{i % 10}+{i // 10}=", "answer": str((i % 10 + i // 10) % 10)} for i in range(100)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "p.jsonl"


def test_a_run_with_relative_paths_is_used_from_another_folder(data, small, folder_of, tmp_path, monkeypatch):
    folder_of()
    monkeypatch.chdir(tmp_path)
    run = train(small(model="llama", task="jsonl", data="p.jsonl", lora_r=2))
    monkeypatch.chdir("/")
    config = load_run(run).config
    assert (config.data, config.model) == (str(data), str(tmp_path / "llama"))
    assert evaluate(run, num_problems=2, num_samples=1)["accuracy"] <= 1
    train(replace(config, max_steps=4), resume=True)
    monkeypatch.chdir(tmp_path)
    relative = {"model": "llama", "data": "p.jsonl", "max_steps": 5}
    assert train(replace(config, **relative), resume=True) == run
    assert load_run(run).metrics["step"][-1] == 5


def test_a_bare_model_is_evaluated_on_data_with_a_reward_and_a_length(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "rewards_of_ours.py").write_text(
        "def half(completion_ids, **_):\n    return [len(ids) and 0.5 for ids in completion_ids]\n"
    )
    with pytest.raises(UserError, match="max_completion_length = 0"):
        evaluate("embedded", max_completion_length=0)
    monkeypatch.syspath_prepend(tmp_path)
    result = evaluate(
        "embedded",
        task=TaskSettings("jsonl", str(data), reward="rewards_of_ours:half"),
        num_problems=4,
        num_samples=1,
        max_completion_length=2,
    )
    assert result["reward"] == 0.5
    assert result["completion_length"] <= 2
    words = ["--data", str(data), "--reward", "rewards_of_ours:half", "--max-completion-length", "2"]
    for command, seen in {"evaluate": "reward                0.500", "sample": "reward 0.50  "}.items():
        monkeypatch.setattr("sys.argv", ["minicpgd", command, "embedded", *words, "--num-problems", "3"])
        main()
        assert seen in capsys.readouterr().out


def test_a_run_on_data_is_sampled_with_the_data_where_it_is_now(data, small, tmp_path, monkeypatch, capsys):
    run = train(small(task="jsonl", data=str(data)))
    moved = data.rename(tmp_path / "moved.jsonl")
    with pytest.raises(UserError, match="there is no such file"):
        evaluate(run, num_problems=2, num_samples=1)
    monkeypatch.setattr("sys.argv", ["minicpgd", "sample", str(run), "--data", str(moved), "--num-problems", "3"])
    main()
    assert "of 3 right" in capsys.readouterr().out


def test_the_accuracy_is_the_tasks_and_the_evaluated_reward_the_runs(data, small, tmp_path, monkeypatch):
    """On a reward of the user's the accuracy may stay 0 while the reward is high."""
    (tmp_path / "rewards_of_mine.py").write_text("def high(completions, **_):\n    return [0.95] * len(completions)\n")
    monkeypatch.syspath_prepend(tmp_path)
    metrics = load_run(train(small(reward="rewards_of_mine:high", eval_steps=1, max_completion_length=2))).metrics
    assert metrics["eval_reward"] == pytest.approx([0.95] * 4)
    assert (metrics["eval_accuracy"] < 0.9).all()
    own = load_run(train(small("own", eval_steps=1))).metrics
    assert (own["eval_reward"] == own["eval_accuracy"]).all()


# Logs


@pytest.mark.parametrize(
    "character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r", "\r\n"]
)
def test_a_log_is_whole_whatever_its_responses_contain(character, small, tmp_path):
    """`str.splitlines` splits at each of these. Then what follows would be unread, and a resume would delete it."""
    rows = [{"prompt": f"{i}+1{character}=", "answer": "3"} for i in range(200)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def change(tokenizer):
        tokenizer.add_tokens(sorted(set(character)))

    model, tokenizer = random_model("llama", vocab_size=48), AutoTokenizer.from_pretrained(EMBEDDED)
    change(tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = {"model": str(tmp_path / "model"), "task": "jsonl", "data": str(tmp_path / "p.jsonl")}
    run = train(small(**settings, logging_steps=1, max_steps=2))
    samples = load_run(run).samples
    assert len(samples) == 2 * 8
    assert all(character in row["prompt"] for row in samples)
    written = (run / "samples.jsonl").read_bytes()
    train(small(**settings, logging_steps=1, max_steps=3), resume=True)
    assert (run / "samples.jsonl").read_bytes().startswith(written)
    assert [row["step"] for row in load_run(run).samples] == [1] * 8 + [2] * 8 + [3] * 8


def test_generate_takes_settings_by_name_and_refuses_one_that_does_not_exist(policy):
    assert generate(policy, ["1+2="], 2, greedy=True, max_completion_length=1).lengths.tolist() == [1, 1]
    with pytest.raises(TypeError, match="max_length"):
        generate(policy, ["1+2="], 2, greedy=True, max_length=3)
