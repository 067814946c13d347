"""Predictions of memory agree with published sizes, with formulas by hand, and with what the allocator hands out."""

import json
import math
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import load_script
from transformers import AutoConfig

from minicpgd import TrainConfig, UserError, plots
from minicpgd.cli.main import parse
from minicpgd.cli.plan import USUAL
from minicpgd.memory import GIB, fit_card, known_architectures, model_config, predict, simulate
from minicpgd.memory.predict import (
    dequantised,
    gradients,
    kv_cache,
    logits_drawn,
    logits_scored,
    optimizer,
    rollout_batch,
    weights,
)
from minicpgd.models import EMBEDDED

ROOT = Path(__file__).parent.parent
benchmark = load_script(ROOT / "benchmarks" / "memory.py")

PUBLISHED = {
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "google/gemma-3-1b-it": 999_885_952,
}
QLORA = TrainConfig(
    load_in_4bit=True,
    lora_r=16,
    num_prompts=8,
    num_generations=8,
    max_completion_length=512,
    micro_batch_tokens=4096,
    eval_problems=8,
)
SMALL = model_config("Qwen/Qwen2.5-0.5B-Instruct")


def shallow(layers):
    """Return the architecture of Qwen2.5-0.5B with fewer layers."""
    return AutoConfig.for_model(**(known_architectures()["Qwen/Qwen2.5-0.5B-Instruct"] | {"num_hidden_layers": layers}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_known_architectures_have_the_published_sizes(name):
    assert set(known_architectures()) == set(PUBLISHED)
    shape = simulate.shape_of(model_config(name), TrainConfig(), torch.bfloat16)
    assert sum(p.numel() for p in shape.parameters()) == PUBLISHED[name]
    assert weights(shape, four_bit=False) == 2 * PUBLISHED[name]


CASES = (
    "all weights, micro-batches",
    "large vocabulary, chunks",
    "activations, recomputed",
    "many prompts",
    "adapter, thin and deep",
    "4-bit, one row at a time",
    "4-bit in bfloat16",
    "sliding windows",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares with what a CPU's allocator hands out")
@pytest.mark.parametrize("case", CASES)
def test_predictions_agree_with_measurements(case, models):
    """Random models sample and update. Permanent components agree to the byte, both phases within 7 %."""
    shorter = {"max_completion_length": 4} if "micro-batches" not in case else {}
    shorter |= {"num_prompts": 4} if case == "sliding windows" else {}
    _, pairs = benchmark.compare(case, models, **shorter)
    for part in ("weights", "reference", "adapter", "optimizer"):
        predicted, measured = pairs.pop(part)
        assert predicted == measured, part
    assert set(pairs) == {"rollout", "update"}
    for phase, (predicted, measured) in pairs.items():
        assert predicted == pytest.approx(measured, rel=0.07), phase


def test_the_committed_table_is_within_15_percent_and_complete():
    table = pd.read_csv(ROOT / "benchmarks" / "results" / "memory.csv")
    assert list(table["case"].unique()) == list(benchmark.CASES)
    plain = table[table["note"].isna()]
    assert (plain["error"].abs() < 0.15).all()
    assert len(plain[plain["part"] == "update"]) >= 12
    assert plain["worst_moment"].nunique() >= 6


def test_optimizer_in_eight_bit():
    """A moment takes a byte, and 256 share a scale of four. Small tensors stay in 32 bit. bitsandbytes agrees."""
    bnb = pytest.importorskip("bitsandbytes")
    shape = torch.nn.Linear(100, 100)
    assert optimizer(shape, eight_bit=True) == 2 * (10_000 + 4 * 40) + 2 * 4 * 100
    assert optimizer(shape, eight_bit=False) == 2 * 4 * 10_100 + 2 * 4
    adam = bnb.optim.AdamW8bit(shape.parameters())
    shape(torch.ones(1, 100)).sum().backward()
    adam.step()
    sizes = [t.nbytes for s in adam.state.values() for k, t in s.items() if torch.is_tensor(t) and "qmap" not in k]
    assert optimizer(shape, eight_bit=True) == sum(sizes)


def test_kv_cache_by_hand():
    """Qwen2.5-0.5B has 24 layers of 2 heads of 64 numbers, in bfloat16. The windows of Gemma have 512 tokens."""
    assert kv_cache(SMALL, 64, 712, 2) == 2 * 64 * 712 * 24 * 2 * 64 * 2
    gemma = model_config("google/gemma-3-1b-it")
    assert kv_cache(gemma, 1, 1000, 2) == 2 * 256 * 2 * (22 * 512 + 4 * 1000)
    kept = simulate.token(SMALL, TrainConfig(), torch.bfloat16, 4, 100).kept
    assert kept == kv_cache(SMALL, 4, 100, 2)


def test_activations_with_checkpointing_by_hand():
    """Each layer keeps only its input: batch x length x width numbers."""
    kept = {}
    for layers in (3, 4):
        config = replace(QLORA, gradient_checkpointing=True)
        kept[layers] = simulate.update(shallow(layers), config, torch.bfloat16, 4, 100).kept
    assert kept[4] - kept[3] == 4 * 100 * 896 * 2


def test_lora_keeps_its_inputs_in_float32():
    """An adapter on one more matrix keeps a float32 copy of its input, and r numbers for each token. No more."""
    kept = {}
    for names in ("up_proj", "up_proj,gate_proj"):
        config = replace(QLORA, lora_target_modules=names)
        four, three = (simulate.update(shallow(n), config, torch.bfloat16, 2, 50).kept for n in (4, 3))
        kept[names] = four - three
    assert kept["up_proj,gate_proj"] - kept["up_proj"] == 2 * 50 * (896 + 16) * 4


def test_logits_by_hand():
    assert logits_scored(110, SMALL, 2) == 110 * 151_936 * 22
    assert logits_scored(110, SMALL, 4) == 110 * 151_936 * 24
    assert logits_drawn(3, 151_936) == 3 * 151_936 * 20
    memory = predict(replace(QLORA, chunk_size=64), SMALL, prompt_length=200)
    assert memory.moments["loss"]["logits"] == 64 * 151_936 * 22
    assert memory.moments["draw"]["logits"] == 64 * 151_936 * 20


def test_each_setting_saves_the_memory_that_it_should():
    architecture = shallow(4)
    before = predict(QLORA, architecture, prompt_length=200)
    assert before.peak == before.total(before.worst) + before.assumed
    assert max(before.rollout, before.update) == before.total(before.worst)
    for change, moment, component in (
        ({"gradient_checkpointing": True}, "last layer", "activations"),
        ({"micro_batch_tokens": 712}, "last layer", "activations"),
        ({"lora_r": 4}, "step", "gradients"),
        ({"chunk_size": 16}, "loss", "logits"),
        ({"num_generations": 4}, "token", "KV cache"),
    ):
        after = predict(replace(QLORA, **change), architecture, prompt_length=200)
        assert after.moments[moment][component] < 0.7 * before.moments[moment][component], change
    full = predict(replace(QLORA, load_in_4bit=False), architecture, prompt_length=200)
    matrices = 4 * (2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864)  # numbers of q and o, of k and v, of the MLP
    saved = full.moments["step"]["weights"] - before.moments["step"]["weights"]
    assert saved == pytest.approx(matrices * (2 - (4 + 8 / 64 + 32 / 64 / 256) / 8), rel=1e-3)
    assert full.moments["step"]["dequantised"] == 0
    whole = predict(TrainConfig(beta=0.1), architecture, prompt_length=200)
    assert whole.moments["step"]["reference"] == whole.moments["step"]["weights"]
    assert predict(replace(QLORA, beta=0.1), architecture, prompt_length=200).moments["step"]["reference"] == 0


def test_the_largest_matrix_is_dequantised_with_its_scales():
    """The MLP has a matrix of 896 x 4864 numbers in bfloat16, and each 64 have a scale in float32."""
    shape = simulate.shape_of(shallow(2), QLORA, torch.bfloat16)
    assert dequantised(shape, four_bit=True) == 896 * 4864 * 2 + 896 * 4864 // 64 * 4
    assert dequantised(shape, four_bit=False) == 0


def test_attempts_to_fit_a_card():
    """Each needs no more than the one before. The card decides which fit, and minibatches still have equal sizes."""
    changes = {"load_in_4bit": False, "micro_batch_tokens": None, "num_generations": 6, "num_minibatches": 16}
    config = replace(QLORA, **changes)
    attempts = fit_card(1.7, shallow(4), config, prompt_length=200)
    assert attempts[0].config == config
    assert all(after.memory.peak <= before.memory.peak for before, after in pairwise(attempts))
    assert [attempt.fits for attempt in attempts] == [attempt.memory.peak <= 1.7 * GIB for attempt in attempts]
    assert not attempts[0].fits
    assert attempts[-1].fits
    assert len({str(attempt.config) for attempt in attempts}) == len(attempts)
    assert (attempts[-1].config.num_generations, attempts[-1].config.num_minibatches) == (3, 8)


def test_only_a_card_has_memory_that_is_assumed():
    assert predict(QLORA, SMALL, prompt_length=200, device="cpu").assumed == 0
    assert predict(QLORA, SMALL, prompt_length=200).assumed > 0.5 * GIB


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nobody/nothing", "hf download nobody/nothing config.json"),
        ("{empty}", "no config.json"),
        ("{gguf}", r"try \S+model-q4\.gguf"),
    ],
)
def test_an_unknown_model_is_one_line(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "gguf"):
        (tmp_path / folder).mkdir()
    (tmp_path / "gguf" / "model-q4.gguf").touch()
    with pytest.raises(UserError, match=words) as caught:
        model_config(name.format(empty=tmp_path / "empty", gguf=tmp_path / "gguf"))
    assert "\n" not in str(caught.value)
    assert not math.isnan(predict(TrainConfig(), model_config("embedded"), prompt_length=8).peak)


@pytest.mark.parametrize("gpu", [0, -4, math.nan])
def test_a_card_without_memory_is_one_line(gpu):
    with pytest.raises(UserError, match="more than 0") as caught:
        fit_card(gpu, SMALL, QLORA, prompt_length=200)
    assert "\n" not in str(caught.value)


def test_the_bars_are_as_long_as_the_prediction():
    memory = predict(QLORA, SMALL, prompt_length=200)
    (axis,) = plots.memory_bars({"small": memory}, cards={"small": 12}).axes
    length = sum(patch.get_width() for patch in axis.patches)
    assert length == pytest.approx((memory.rollout + memory.update + 2 * memory.assumed) / GIB)
    assert "12 GB" in " ".join(text.get_text() for text in axis.texts)


def test_the_command_prints_totals_and_attempts(capsys, tmp_path, monkeypatch):
    """Bad input is one line."""
    monkeypatch.chdir(tmp_path)
    parse(["memory", "--model", "Qwen/Qwen2.5-0.5B-Instruct", "--gpu", "4", "--prompt-length", "200"])()
    out = capsys.readouterr().out
    memory = predict(replace(USUAL, model="Qwen/Qwen2.5-0.5B-Instruct"), SMALL, prompt_length=200)
    assert f"{memory.peak / GIB:.1f} GiB" in out
    assert all(attempt in out for attempt in ("as asked", "one response at a time", "half the generations", "yes"))
    for words, objection in (("--gpu 0", "more than 0"), ("--lora-r 0", "4-bit"), ("--optim x", "optim")):
        with pytest.raises(UserError, match=objection) as caught:
            parse(["memory", *words.split()])()
        assert "\n" not in str(caught.value)


def test_the_size_of_a_batch_of_responses_and_of_prompts():
    """A rollout has 64 responses to 8 prompts. In an evaluation each response has its own prompt. Both have batches."""
    config = replace(QLORA, eval_problems=20)
    assert rollout_batch(config) == (64, 20)
    assert rollout_batch(replace(config, eval_problems=1)) == (64, 8)
    assert rollout_batch(replace(config, eval_problems=100)) == (100, 100)
    assert rollout_batch(replace(config, rollout_batch_size=16)) == (16, 16)
    assert rollout_batch(replace(config, rollout_batch_size=16, eval_problems=1)) == (16, 2)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_by_hand(tied):
    """With a vocabulary of 10 and a width of 8, the output layer's gradient has 80 numbers. Chunks add a second one."""
    shape = simulate.shape_of(
        AutoConfig.for_model("llama", vocab_size=10, hidden_size=8, intermediate_size=4, num_hidden_layers=1,
                             num_attention_heads=2, tie_word_embeddings=tied), TrainConfig(), torch.float32
    )  # fmt: skip
    total, own = 4 * sum(p.numel() for p in shape.parameters()), 4 * 80
    assert gradients(shape, first=True, chunked=False) == {
        "loss": 0, "output": own, "last layer": own, "first layer": total, "step": total + 2 * own * tied
    }  # fmt: skip
    assert gradients(shape, first=False, chunked=True) == {
        "loss": total + own, "output": total + 2 * own, "last layer": total + own * tied,
        "first layer": total + own * tied, "step": total + own + 2 * own * tied,
    }  # fmt: skip


def test_a_config_that_no_model_can_be_built_from_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(EMBEDDED, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_dropout": None}))
    for words in (["memory"], ["train", "--dry-run"]):
        with pytest.raises(UserError, match=r"model': no model can be built from its config.json: TypeError"):
            parse([*words, "--model", str(tmp_path / "model")])()


def test_a_dry_run_counts_the_tokens_of_the_files_own_prompts(tmp_path, monkeypatch, capsys):
    """Without a card it plans for the CPU, in 4 bit, too."""
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "{i}+2*3=", "answer": 0}}\n' for i in range(10, 80)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["train", "--task", "jsonl", "--data", tmp_path / "p.jsonl", "--load-in-4bit", "--lora-r", 4, "--dry-run"]
    parse(list(map(str, words)))()
    out = " ".join(capsys.readouterr().out.split())
    assert "on this CPU, besides Python and its libraries, predicted for prompts of 7 tokens (the longest" in out
