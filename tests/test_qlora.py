"""With QLoRA the model is frozen in 4 bit, an adapter learns, and the two can be exported as one model."""

import random
import sys
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from minicpgd import ALGORITHMS, TrainConfig, UserError, evaluate, load_run, train
from minicpgd.cli.model_card import write_card
from minicpgd.config import ModelSettings, SamplingSettings
from minicpgd.experiments import run_all
from minicpgd.models import EMBEDDED, Policy, generate, load_policy, token_logprobs
from minicpgd.models.precision import choose_dtype
from minicpgd.tasks import get_task, load_task
from minicpgd.training import Callbacks, Experience, Learner, export, open_policy, respond, seed_step
from minicpgd.training.export import dequantised

QLORA = {"load_in_4bit": True, "lora_r": 16}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return runs of 10 steps of the embedded model with three seeds, made in a process of their own."""
    folder = str(tmp_path_factory.mktemp("qlora"))
    common = {**QLORA, "num_prompts": 8, "learning_rate": 3e-4, "max_steps": 10}
    configs = [TrainConfig(output_dir=f"{folder}/{seed}", seed=seed, **common) for seed in range(3)]
    return list(run_all(configs, on_wait=lambda: None, jobs=1))


def prompts(n, seed=0):
    return [p["prompt"] for p in get_task("chain_arithmetic").sample(n, random.Random(seed))]


def sample(policy, n=8, group=4, seed=0, **changes):
    settings = SamplingSettings(**({"max_completion_length": 40} | changes))
    return generate(policy, prompts(n), group, settings, generator=torch.Generator().manual_seed(seed))


def experience_of(rollout, advantages):
    """Return a rollout with given advantages (B,), one response to each prompt."""
    column = advantages[:, None]
    return Experience(
        [{}] * len(advantages), rollout, column, column, 1.0, ref_logp=None, used=torch.ones(len(column)).bool()
    )


def test_an_adapter_on_4_bit_weights_learns(trained):
    for run in trained:
        accuracy = load_run(run).metrics["eval_accuracy"]
        assert accuracy[0] < 0.3
        assert accuracy[-1] >= 0.9, (run, accuracy[-1])


def test_only_the_adapter_is_trained_and_saved(trained):
    run = trained[0]
    policy, _ = open_policy(run)
    fresh = load_policy(ModelSettings(**QLORA))
    names = [n for n, p in fresh.model.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in n for n in names)
    assert {p.dtype for p in fresh.model.parameters() if p.requires_grad} == {torch.float32}
    ours, theirs = (dequantised(p.peft.get_base_model()) for p in (policy, fresh))
    assert len(ours) == 14  # Each of the two blocks has seven linear layers.
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    checkpoint = run / "checkpoints" / "step-000010.safetensors"
    with safe_open(checkpoint, "pt") as file:
        stored = set(file.keys())
    assert {name for name in stored if name.startswith("model.")} == {f"model.{n}" for n in names}
    assert all(name.startswith(("model.", "optimizer.")) for name in stored)
    assert sorted(p.name for p in (run / "adapter").iterdir() if "token" not in p.name) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert not (run / "model").exists()


def test_peft_alone_loads_the_adapter(trained):
    """On the model in full precision, PEFT's loading gives the same numbers as ours."""
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(EMBEDDED), trained[0] / "adapter").eval()
    config = load_run(trained[0]).config
    ours = load_policy(replace(config, load_in_4bit=False), adapter=trained[0] / "adapter")
    plain = load_policy("embedded")
    ids, mask = ours.encode(prompts(4))
    with torch.no_grad():
        a, b, c = (m.eval()(input_ids=ids, attention_mask=mask).logits for m in (theirs, ours.model, plain.model))
    torch.testing.assert_close(a, b)
    assert (a - c).abs().max() > 1
    assert evaluate(trained[0], num_problems=32, num_samples=1)["accuracy"] > 0.8


@pytest.mark.parametrize("base", ["full", "dequantised"])
def test_the_exported_model_answers_the_same(base, trained, tmp_path):
    """With the weights of the training, all 128 answers are the same. With the published ones nearly all are."""
    result = export(trained[0], tmp_path / "out", base=base, num_problems=128)
    assert result.rounding < 1e-3
    assert result.accuracy_trained >= 0.9
    assert abs(result.accuracy_exported - result.accuracy_trained) <= 0.05
    if base == "dequantised":
        assert result.same_answers == 1
        assert result.mean_difference < 1e-6
    else:
        assert 0.8 < result.same_answers < 1
        assert 1e-4 < result.mean_difference < 0.05
    # transformers loads the folder alone, without PEFT.
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    policy, config = open_policy(trained[0])
    exported = Policy(alone, policy.tokenizer)
    settings = SamplingSettings(max_completion_length=64)
    task = load_task(config)
    answers = [respond(p, task, 128, settings, greedy=True)[0].completions for p in (policy, exported)]
    assert sum(map(str.__eq__, *answers)) / 128 == result.same_answers


def test_the_card_has_the_results_of_the_run_and_its_command(trained, tmp_path):
    metrics, text = load_run(trained[0]).metrics, write_card(tmp_path, trained[0]).read_text()
    before, after = metrics["eval_accuracy"][0], metrics["eval_accuracy"][-1]
    assert f"| {before:.3f} | {after:.3f} |" in text
    assert before < after
    assert f"in the last 10 steps | {metrics['reward'][0]:.3f} | {metrics['reward'][-10:].mean():.3f} |" in text
    flags = "--load-in-4bit --lora-r 16 --max-steps 10 --num-prompts 8 --learning-rate 0.0003"
    assert f"minicpgd train {flags}" in text


def test_merging_into_four_bit_weights_rounds_a_small_adapter_away(trained):
    """So `export` does not merge into them. This adapter has a hundredth of the usual size."""
    policy, _ = open_policy(trained[0])
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            parameter.mul_(0.01 if "lora_B" in name else 1)
    before = dequantised(policy.peft.get_base_model())
    matrix = policy.peft.get_base_model().model.layers[0].mlp.up_proj
    delta = matrix.get_delta_weight("default")
    with warnings.catch_warnings(action="ignore"):
        merged = policy.peft.merge_and_unload()
    change = dequantised(merged)["model.layers.0.mlp.up_proj"] - before["model.layers.0.mlp.up_proj"]
    assert abs((change * delta).sum() / delta.square().sum()) < 0.2  # It is 1 if nothing is rounded away.


def stop_after(number):
    steps = []
    return Callbacks(on_step=lambda step, *_: steps.append(step), should_stop=lambda: len(steps) >= number)


@pytest.mark.parametrize(
    "changes", [{}, {"optim": "paged_adamw_8bit", "lora_r": 64}, {"beta": 0.1, "load_in_4bit": False}]
)
def test_resume_is_bit_for_bit(changes, small):
    """This includes moments in 8 bit. At rank 64 the larger matrices have them."""
    changes = QLORA | changes | {"max_steps": 4, "save_steps": 1, "num_iterations": 2, "learning_rate": 1e-3}
    whole = train(small("whole", **changes))
    folder = train(small(**changes), callbacks=stop_after(2))
    assert not (folder / "adapter").exists()
    train(small(**changes), resume=True)
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors", "checkpoints/step-000004.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    with safe_open(whole / "checkpoints/step-000004.safetensors", "pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert ("U8" in kinds) == ("optim" in changes)


def test_the_reference_is_the_model_without_its_adapter(small):
    learner = Learner.from_config(small(beta=0.1, **QLORA))
    assert learner.policy.frozen_copy is None
    with torch.no_grad():
        for name, parameter in learner.policy.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    experience = learner.collect(seed_step(0, 1))
    rollout, ref_logp = experience.rollout, experience.ref_logp
    plain = learner.score(rollout, load_policy(ModelSettings(load_in_4bit=True)).model)
    torch.testing.assert_close(ref_logp, plain)
    assert (ref_logp[~rollout.mask] == 0).all()
    assert (ref_logp - rollout.logp)[rollout.mask].abs().max() > 0.1  # The adapter was on while sampling.
    torch.testing.assert_close(learner.score(rollout), rollout.logp, atol=1e-4, rtol=1e-4)  # It is on again.


def test_the_adapter_is_as_the_settings_say():
    r"""The named layers compute $W x + (\alpha / r) B A x$. The seed decides A. B is 0 at the start."""
    settings = ModelSettings(lora_r=4, lora_alpha=12, lora_target_modules="q_proj, down_proj")
    policy, same, other = (load_policy(replace(settings, seed=seed)) for seed in (1, 1, 2))
    parameters = dict(policy.model.named_parameters())
    names = {name.split(".lora_")[0].split(".")[-1] for name in parameters if "lora_" in name}
    assert names == {"q_proj", "down_proj"}
    for (name, a), b, c in zip(parameters.items(), same.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c) == ("lora_A" not in name)
        assert "lora_B" not in name or not a.any()
    layer = policy.peft.get_base_model().model.layers[0].self_attn.q_proj
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        up.normal_()
        x = torch.randn(3, 64)
        torch.testing.assert_close(layer(x), x @ layer.base_layer.weight.T + 3 * x @ down.T @ up.T)


def make_tokenizer(n):
    """Make a tokenizer with n ids, the embedded model's characters among them."""
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<eos>", *"0123456789+-*=,#"])}
    vocabulary |= {f"w{i}": i for i in range(len(vocabulary), n)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder_of_random_weights(request, tmp_path_factory):
    shape = {
        "vocab_size": 4_000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "pad_token_id": 0, "eos_token_id": 1,
        "bos_token_id": None, "tie_word_embeddings": request.param == "qwen3",
    }  # fmt: skip
    torch.manual_seed(0)
    model = (
        LlamaForCausalLM(LlamaConfig(**shape)) if request.param == "llama" else Qwen3ForCausalLM(Qwen3Config(**shape))
    )
    folder = tmp_path_factory.mktemp(request.param)
    Policy(model, make_tokenizer(4_000)).save(folder / "model")
    return folder / "model"


def longer_is_better(prompts, completions, **_):
    return [len(c) / 50 + (i % 3) for i, c in enumerate(completions)]


def test_gradient_checkpointing_changes_no_gradient(folder_of_random_weights, small):
    """In two steps of every algorithm, on another architecture in 4 bit, all gradients are the same, bit for bit."""
    common = {**QLORA, "model": str(folder_of_random_weights), "max_completion_length": 5, "num_minibatches": 1}
    common |= {"learning_rate": 1e-3, "num_generations": 3}
    learners = [Learner.from_config(small(gradient_checkpointing=on, **common)) for on in (False, True)]
    decoders_ = [learner.policy.model.get_decoder() for learner in learners]
    assert [d.layers[0].gradient_checkpointing for d in decoders_] == [False, True]
    start = [p.detach().clone() for p in learners[0].policy.model.parameters() if p.requires_grad]
    for name, algorithm in ALGORITHMS.items():
        gradients = []  # by learner, by update, by parameter
        for learner in learners:
            parameters = [p for p in learner.policy.model.parameters() if p.requires_grad]
            with torch.no_grad():
                for parameter, value in zip(parameters, start, strict=True):
                    parameter.copy_(value)
            optimizer = torch.optim.AdamW(parameters, 1e-3)
            updates = []
            optimizer.register_step_pre_hook(
                lambda o, *_, updates=updates: updates.append([p.grad.clone() for p in o.param_groups[0]["params"]])
            )
            config = replace(learner.config, algorithm=name)
            changed = {"algorithm": algorithm, "config": config, "reward": longer_is_better, "optimizer": optimizer}
            for step in (1, 2):
                replace(learner, **changed).step(step)
            gradients.append(updates)
        assert len(gradients[0]) == 2
        for plain, checkpointed in zip(*gradients, strict=True):
            assert max(g.abs().max() for g in plain) > 1e-5, name
            for a, b in zip(plain, checkpointed, strict=True):
                torch.testing.assert_close(a, b, atol=0, rtol=0, msg=name)


def test_half_precision_is_scored_again(small):
    """Sampler and scorer round differently in bfloat16. The first update of a step has ratios of 1 nevertheless."""
    learner = Learner.from_config(small(dtype="bfloat16", num_minibatches=1, **QLORA))
    rollout = sample(learner.policy)
    differences = (learner.score(rollout) - rollout.logp)[rollout.mask].exp() - 1
    assert 1e-3 < differences.abs().max() < 0.2
    metrics = learner.step(1).metrics
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1


@pytest.mark.parametrize("width", [64, 96, 128])
def test_widths_that_a_cpu_reads_wrongly_are_refused(tmp_path, width):
    """Only those are refused. Other weights have 4 bit's own error of 9 %."""
    shape = {"hidden_size": width, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=18, num_hidden_layers=1, eos_token_id=1, **shape)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    load_policy("embedded").tokenizer.save_pretrained(tmp_path / "model")
    if width % 64:
        with pytest.raises(UserError, match="a multiple of 64, and model.layers.0.self_attn.q_proj is 96"):
            load_policy(ModelSettings(str(tmp_path / "model"), load_in_4bit=True, lora_r=4))
        return
    policy = load_policy(ModelSettings(str(tmp_path / "model"), load_in_4bit=True, lora_r=4))
    plain = dict(LlamaForCausalLM.from_pretrained(tmp_path / "model").named_modules())
    for name, weight in dequantised(policy.peft.get_base_model()).items():
        original = plain[name].weight
        assert (weight - original).std() < 0.12 * original.std()


def test_float16_keeps_small_gradients(small):
    """With the scale they agree with those of float32, to rounding. Without it small ones would be 0."""
    gradients = {}
    for dtype in ("float32", "float16"):
        learner = Learner.from_config(small(dtype=dtype, num_minibatches=1, max_grad_norm=1e9, **QLORA))
        rollout = sample(load_policy("embedded"))  # Both learners get the same tokens.
        rollout = replace(rollout, logp=learner.score(rollout))
        learner.optimizer.register_step_pre_hook(
            lambda o, *_, d=dtype: gradients.update({d: [p.grad.clone() for p in o.param_groups[0]["params"]]})
        )
        advantages = 1e-3 * torch.linspace(-1, 1, len(rollout.lengths))  # They are small, as late in training.
        learner.update(experience_of(rollout, advantages), torch.arange(len(rollout.lengths)))
    flat = {dtype: torch.cat([g.flatten() for g in tensors]) for dtype, tensors in gradients.items()}
    assert torch.cosine_similarity(flat["float16"], flat["float32"], dim=0) > 0.999
    assert abs(flat["float16"].norm() / flat["float32"].norm() - 1) < 0.02


def test_dtypes_and_their_reasons(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    for supported, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, answer=supported: answer)
        dtype, reason = choose_dtype("auto", adapter=True, device=cuda)
        assert dtype == expected
    assert "Tesla T4 has no bfloat16" in reason
    assert choose_dtype("auto", adapter=True, device=cpu)[0] == torch.float32
    assert choose_dtype("auto", adapter=False, device=cuda)[0] == torch.float32
    assert choose_dtype("bfloat16", adapter=True, device=cpu)[0] == torch.bfloat16


@pytest.mark.parametrize(("size", "tokens"), [(None, 60), (None, 300), (3, 300), (2, None), (None, 1)])
def test_micro_batches_fit_and_change_no_gradient(size, tokens, small, policy):
    rollout = sample(policy)
    rows = torch.randperm(32, generator=torch.Generator().manual_seed(0))[:20]
    parts = rollout.micro_batches(rows, size, tokens)
    assert sorted(torch.cat(parts).tolist()) == list(range(20))
    for part in parts:
        ids, mask, t = rollout.inputs(rows[part])
        assert size is None or len(part) <= size
        assert tokens is None or ids.numel() <= tokens or len(part) == 1
        assert mask.sum(dim=1).max() <= ids.shape[1]
        assert (mask[:, 0] == 1).any()  # No column has padding only.
        assert (mask[:, -1] == 1).any()
    if tokens is not None:  # The longest come first.
        totals = (rollout.prompt_mask.sum(dim=1) + rollout.lengths)[rows[torch.cat(parts)]].tolist()
        assert totals == sorted(totals, reverse=True)
        for part, following in pairwise(parts):  # No further row would fit.
            larger = torch.cat([part, following[:1]])
            assert rollout.inputs(rows[larger])[0].numel() > tokens or len(larger) > (size or 20)
    if tokens == 300 and size is None:  # Rows of similar length need less padding.
        assert sum(rollout.inputs(rows[part])[0].numel() for part in parts) < 0.8 * rollout.inputs(rows)[0].numel()
    gradients = []
    for changes in ({}, {"micro_batch_size": size, "micro_batch_tokens": tokens}):
        learner = Learner.from_config(small(max_grad_norm=1e9, **changes))
        learner.optimizer.register_step_pre_hook(
            lambda o, *_: gradients.append([p.grad.clone() for p in o.param_groups[0]["params"]])
        )
        outputs = learner.update(experience_of(rollout, torch.linspace(-1, 1, 32)), rows).outputs
    assert len(outputs) == len(parts)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_responses_generated_in_parts(policy):
    """Greedy texts are the same. Sampled ones have the log-probabilities that they were sampled with."""
    whole, parts = (
        generate(policy, prompts(10), 1, SamplingSettings(40, rollout_batch_size=size), greedy=True)
        for size in (None, 4)
    )
    assert whole.completions == parts.completions
    assert torch.equal(whole.truncated, parts.truncated)
    sampled = sample(policy, n=5, rollout_batch_size=7, max_completion_length=20)
    ids, mask, t = sampled.inputs(torch.arange(20))
    logp, _ = token_logprobs(policy.model, ids, mask, t)
    assert (logp - sampled.logp)[sampled.mask].abs().max() < 1e-4
    assert sampled.truncated.tolist() == [
        int(sampled.completion_ids[i, n - 1]) != int(policy.eos_ids[0]) for i, n in enumerate(sampled.lengths)
    ]


def test_the_chat_template(policy):
    """It is applied if there is one. It brings its own special tokens, so the tokenizer adds no more."""
    letters = policy.encode(["1+2="])[0][0].tolist()
    begin = processors.TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    policy.tokenizer.backend_tokenizer.post_processor = begin
    plain = policy.encode(["1+2="])[0]
    assert plain.tolist() == [[0, *letters]]
    policy.tokenizer.chat_template = (
        "{% for m in messages %}<eos>{{ m.content }}{% endfor %}{% if add_generation_prompt %}#{% endif %}"
    )
    assert policy.encode(["1+2="])[0].tolist() == [[1, *letters, 17]]
    policy.settings = ModelSettings(chat_template=False)
    assert torch.equal(policy.encode(["1+2="])[0], plain)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"load_in_4bit": True}, "lora_r = 0"),
        ({"dtype": "bfloat16"}, "dtype = bfloat16: without an adapter"),
        ({"dtype": "int8"}, "dtype = 'int8'"),
        ({"optim": "sgd"}, "optim = 'sgd'"),
        ({"lora_r": -1}, "lora_r = -1"),
        ({"lora_r": 4, "lora_target_modules": "q_prjo"}, "lora_target_modules = 'q_prjo': choose all-linear, or from"),
        ({"model": "nobody/nothing", "lora_r": 4}, "hf download nobody/nothing --local-dir nothing"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation = 'flash_attention_2': "),
    ],
)
def test_bad_settings_are_one_line(changes, line, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        train(small(**changes))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_extra_is_one_line(small, monkeypatch):
    for package, changes in (("peft", {"lora_r": 4}), ("bitsandbytes", QLORA)):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, package, None)
            with pytest.raises(UserError, match=rf"need {package}: pip install 'minicpgd\[qlora\]'"):
                train(small(package, **changes))


def test_an_adapter_for_another_model_is_refused(trained, folder_of_random_weights):
    with pytest.raises(UserError, match="not an adapter for this model"):
        load_policy(str(folder_of_random_weights), adapter=trained[0] / "adapter")
    with pytest.raises(UserError, match="not an adapter"):
        load_policy("embedded", adapter=trained[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_on_some_layers_is_exported(dtype, small, tmp_path):
    """The sum is computed and saved in float32, also if the run computed in bfloat16."""
    run = train(small(max_steps=1, lora_target_modules="q_proj,v_proj", dtype=dtype, learning_rate=1e-2, **QLORA))
    result = export(run, tmp_path / "out", num_problems=8)
    assert result.num_problems == 8
    assert result.rounding < 1e-3
    assert load_policy(str(tmp_path / "out")).model.dtype == torch.float32
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118 (not a dict)


def test_export_refuses_models_without_an_adapter_and_existing_folders(small, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = train(small(max_steps=1))
    with pytest.raises(UserError, match="has no adapter; .*model can be used as it is"):
        export(whole, tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        export(trained[0], tmp_path)
    with pytest.raises(UserError, match="embedded: has no adapter: name the folder of a run"):
        export(Path("embedded"), tmp_path / "out")
