"""What memory.py predicts, against published sizes, formulas done by hand, and what the allocator handed out."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import load_script
from transformers import AutoConfig

from minicpgd import TrainConfig, UserError, memory, planning, plots, rehearsal
from minicpgd.architectures import known_architectures, model_config
from minicpgd.cli import parse
from minicpgd.ladder import fits
from minicpgd.memory import GIB, kv_cache, predict
from minicpgd.policy import EMBEDDED

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


def deep(layers):
    """Qwen2.5-0.5B with fewer layers."""
    return AutoConfig.for_model(**(known_architectures()["Qwen/Qwen2.5-0.5B-Instruct"] | {"num_hidden_layers": layers}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_known_architectures_have_the_published_sizes(name):
    assert set(known_architectures()) == set(PUBLISHED)
    shape = rehearsal.shape_of(model_config(name), TrainConfig(), torch.bfloat16)
    assert sum(p.numel() for p in shape.parameters()) == PUBLISHED[name]
    assert memory.weights(shape, four_bit=False) == 2 * PUBLISHED[name]


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
def test_predicted_is_measured(case, models):
    """Real rollouts and updates of random models; what always stays to the byte, both phases within 7 %."""
    shorter = {"max_completion_length": 12} if "micro-batches" not in case else {}
    shorter |= {"num_prompts": 4} if case == "sliding windows" else {}
    _, pairs = benchmark.compare(case, models, **shorter)
    for part in ("weights", "reference", "adapter", "optimizer"):
        said, was = pairs.pop(part)
        assert said == was, part
    for phase, (said, was) in pairs.items():
        assert said == pytest.approx(was, rel=0.07), phase


def test_the_committed_table_is_within_15_percent_and_complete():
    table = pd.read_csv(ROOT / "benchmarks" / "results" / "memory.csv")
    assert list(table["case"].unique()) == list(benchmark.CASES)
    plain = table[table["note"].isna()]
    assert (plain["error"].abs() < 0.15).all()
    assert len(plain[plain["part"] == "update"]) >= 12
    assert plain["worst_moment"].nunique() >= 6


def test_optimizer_in_eight_bit():
    """By hand: a byte each, four for 256 of them; small tensors stay in 32 bit. And as bitsandbytes makes it."""
    bnb = pytest.importorskip("bitsandbytes")
    shape = torch.nn.Linear(100, 100)
    assert memory.optimizer(shape, eight_bit=True) == 2 * (10_000 + 4 * 40) + 2 * 4 * 100
    assert memory.optimizer(shape, eight_bit=False) == 2 * 4 * 10_100 + 2 * 4
    adam = bnb.optim.AdamW8bit(shape.parameters())
    shape(torch.ones(1, 100)).sum().backward()
    adam.step()
    made = sum(t.nbytes for s in adam.state.values() for k, t in s.items() if torch.is_tensor(t) and "qmap" not in k)
    assert memory.optimizer(shape, eight_bit=True) == made


def test_kv_cache_by_hand():
    """Qwen2.5-0.5B: 24 layers, 2 heads of 64, keys and values, bfloat16; Gemma's windows hold 512 tokens."""
    assert kv_cache(SMALL, 64, 712, 2) == 2 * 64 * 712 * 24 * 2 * 64 * 2
    gemma = model_config("google/gemma-3-1b-it")
    assert kv_cache(gemma, 1, 1000, 2) == 2 * 256 * 2 * (22 * 512 + 4 * 1000)
    kept = rehearsal.token(SMALL, TrainConfig(), torch.bfloat16, 4, 100).kept
    assert kept == kv_cache(SMALL, 4, 100, 2)


def test_what_checkpointing_keeps_by_hand():
    """With it, a layer keeps its input alone: batch x length x width numbers."""
    kept = {}
    for layers in (3, 4):
        architecture = deep(layers)
        config = replace(QLORA, gradient_checkpointing=True)
        kept[layers] = rehearsal.update(architecture, config, torch.bfloat16, 4, 100).kept
    assert kept[4] - kept[3] == 4 * 100 * 896 * 2


def test_lora_keeps_its_inputs_in_float32():
    """An adapter on one matrix keeps a float32 copy of what goes into it, and r numbers a token; no more."""
    kept = {}
    for names in ("up_proj", "up_proj,gate_proj"):
        config = replace(QLORA, lora_target_modules=names)
        four, three = (rehearsal.update(deep(n), config, torch.bfloat16, 2, 50).kept for n in (4, 3))
        kept[names] = four - three
    assert kept["up_proj,gate_proj"] - kept["up_proj"] == 2 * 50 * (896 + 16) * 4


def test_logits_by_hand():
    assert memory.logits_scored(110, SMALL, 2) == 110 * 151_936 * 22
    assert memory.logits_scored(110, SMALL, 4) == 110 * 151_936 * 24
    said = predict(replace(QLORA, chunk_size=64), SMALL, prompt_length=200)
    assert said.moments["loss"]["logits"] == 64 * 151_936 * 22
    assert said.moments["draw"]["logits"] == 64 * 151_936 * 20


def test_each_setting_spares_what_it_says():
    shallow = deep(4)
    asked = predict(QLORA, shallow, prompt_length=200)
    assert asked.peak == asked.total(asked.worst) + asked.assumed
    assert max(asked.rollout, asked.update) == asked.total(asked.worst)
    for change, moment, component in (
        ({"gradient_checkpointing": True}, "last layer", "activations"),
        ({"micro_batch_tokens": 712}, "last layer", "activations"),
        ({"lora_r": 4}, "step", "gradients"),
        ({"chunk_size": 16}, "loss", "logits"),
        ({"num_generations": 4}, "token", "KV cache"),
    ):
        spared = predict(replace(QLORA, **change), shallow, prompt_length=200)
        assert spared.moments[moment][component] < 0.7 * asked.moments[moment][component], change
    full = predict(replace(QLORA, load_in_4bit=False), shallow, prompt_length=200)
    matrices = 4 * (2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864)  # numbers: q and o, k and v, the MLP's three
    spared = full.moments["step"]["weights"] - asked.moments["step"]["weights"]
    assert spared == pytest.approx(matrices * (2 - (4 + 8 / 64 + 32 / 64 / 256) / 8), rel=1e-3)
    assert full.moments["step"]["dequantised"] == 0
    whole = predict(TrainConfig(beta=0.1), shallow, prompt_length=200)
    assert whole.moments["step"]["reference"] == whole.moments["step"]["weights"]
    assert predict(replace(QLORA, beta=0.1), shallow, prompt_length=200).moments["step"]["reference"] == 0


def test_the_ladder():
    """Each rung needs no more than the one above; what fits depends on the card; minibatches still come out even."""
    changes = {"load_in_4bit": False, "micro_batch_tokens": None, "num_generations": 6, "num_minibatches": 16}
    asked = replace(QLORA, **changes)
    rungs = fits(1.7, deep(4), asked, prompt_length=200)
    assert rungs[0].config == asked
    assert all(below.memory.peak <= above.memory.peak for above, below in zip(rungs, rungs[1:], strict=False))
    assert [rung.fits for rung in rungs] == [rung.memory.peak <= 1.7 * GIB for rung in rungs]
    assert not rungs[0].fits
    assert rungs[-1].fits
    assert len({str(rung.config) for rung in rungs}) == len(rungs)
    assert (rungs[-1].config.num_generations, rungs[-1].config.num_minibatches) == (3, 8)


def test_what_is_assumed_is_apart():
    assert predict(QLORA, SMALL, prompt_length=200, device="cpu").assumed == 0
    assert predict(QLORA, SMALL, prompt_length=200).assumed > 0.5 * GIB


@pytest.mark.parametrize(
    ("name", "words"),
    [("nobody/nothing", "hf download nobody/nothing config.json"), ("{empty}", "no config.json"), ("{gguf}", "GGUF")],
)
def test_a_model_nobody_knows(name, words, tmp_path):
    for folder in ("empty", "gguf"):
        (tmp_path / folder).mkdir()
    (tmp_path / "gguf" / "model-q4.gguf").touch()
    with pytest.raises(UserError, match=words) as told:
        model_config(name.format(empty=tmp_path / "empty", gguf=tmp_path / "gguf"))
    assert "\n" not in str(told.value)
    assert not math.isnan(predict(TrainConfig(), model_config("embedded"), prompt_length=8).peak)


@pytest.mark.parametrize("gpu", [0, -4, math.nan])
def test_a_card_without_memory(gpu):
    with pytest.raises(UserError, match="more than 0"):
        fits(gpu, SMALL, QLORA, prompt_length=200)


def test_the_bars():
    predicted = {"small": predict(QLORA, SMALL, prompt_length=200)}
    figure = plots.memory_bars(predicted, cards={next(iter(predicted)): 12})
    (axis,) = figure.axes
    drawn = sum(patch.get_width() for patch in axis.patches)
    both = predicted["small"]
    assert drawn == pytest.approx((both.rollout + both.update + 2 * both.assumed) / GIB)
    assert "12 GB" in " ".join(text.get_text() for text in axis.texts)


def test_the_command(capsys):
    """The prediction's totals, and the ladder; bad input in one line."""
    parse(["memory", "--model", "Qwen/Qwen2.5-0.5B-Instruct", "--gpu", "4", "--prompt-length", "200"])()
    out = capsys.readouterr().out
    said = predict(replace(planning.USUAL, model="Qwen/Qwen2.5-0.5B-Instruct"), SMALL, prompt_length=200)
    assert f"{said.peak / GIB:.1f} GiB" in out
    assert all(rung in out for rung in ("as asked", "one response at a time", "half the generations", "yes"))
    for words, objection in (("--gpu 0", "more than 0"), ("--lora-r 0", "4-bit"), ("--optim x", "optim")):
        with pytest.raises(UserError, match=objection):
            parse(["memory", *words.split()])()


def test_what_is_generated_at_once():
    """64 responses to 8 prompts; an evaluation of 20 problems has a prompt for each; both in batches."""
    config = replace(QLORA, eval_problems=20)
    assert memory.rollout_batch(config) == (64, 20)
    assert memory.rollout_batch(replace(config, eval_problems=1)) == (64, 8)
    assert memory.rollout_batch(replace(config, eval_problems=100)) == (100, 100)
    assert memory.rollout_batch(replace(config, rollout_batch_size=16)) == (16, 16)
    assert memory.rollout_batch(replace(config, rollout_batch_size=16, eval_problems=1)) == (16, 2)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_by_hand(tied):
    """A vocabulary of 10 and a width of 8: the output layer's gradient is 80 numbers, of which chunks make a second."""
    shape = rehearsal.shape_of(
        AutoConfig.for_model("llama", vocab_size=10, hidden_size=8, intermediate_size=4, num_hidden_layers=1,
                             num_attention_heads=2, tie_word_embeddings=tied), TrainConfig(), torch.float32
    )  # fmt: skip
    total, own = 4 * sum(p.numel() for p in shape.parameters()), 4 * 80
    assert memory.gradients(shape, first=True, chunked=False) == {
        "loss": 0, "output": own, "last layer": own, "first layer": total, "step": total + 2 * own * tied
    }  # fmt: skip
    assert memory.gradients(shape, first=False, chunked=True) == {
        "loss": total + own, "output": total + 2 * own, "last layer": total + own * tied,
        "first layer": total + own * tied, "step": total + own + 2 * own * tied,
    }  # fmt: skip


def test_a_config_that_no_model_can_be_built_from_is_one_line(tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_dropout": None}))
    for words in (["memory"], ["train", "--dry-run"]):
        with pytest.raises(UserError, match=r"model': no model can be built from its config.json: TypeError"):
            parse([*words, "--model", str(tmp_path / "model")])()
