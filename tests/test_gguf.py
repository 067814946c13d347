"""GGUF files: written here from a random model, and read as every other model is."""

import json

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from minicpgd import TrainConfig, UserError, train
from minicpgd.cli.plan import show_plan
from minicpgd.memory import model_config
from minicpgd.models import generate, load_policy
from minicpgd.models.source import convert_gguf, gguf_folder
from minicpgd.recipes import load_config

HEADS, KEYS, WIDTH = 4, 2, 32
TENSORS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def as_llama_cpp(name, weight):
    """The name and the array of a tensor in llama.cpp, which orders the rows of queries and keys in its own way."""
    layer = name.split(".")[2] if "layers" in name else None
    own = next(name_ for key, name_ in TENSORS.items() if f"{key}.weight" in name)
    if own in ("attn_q", "attn_k"):
        heads = HEADS if own == "attn_q" else KEYS
        weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    return f"blk.{layer}.{own}.weight" if layer else f"{own}.weight", np.ascontiguousarray(weight)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A GGUF file, and the model that it was written from: bytes as tokens, one end token, a chat template."""
    torch.manual_seed(0)
    tokens = [*bytes_to_unicode().values(), "00", "<|endoftext|>"]
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KEYS, vocab_size=len(tokens), bos_token_id=257, eos_token_id=257,
        max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    path = tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["0 0"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(257)
    writer.add_chat_template("{% for m in messages %}Q: {{ m['content'] }}\nA:{% endfor %}")
    for name, weight in model.state_dict().items():
        writer.add_tensor(*as_llama_cpp(name, weight.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def test_a_converted_model_computes_what_the_file_says(written):
    path, model = written
    folder = convert_gguf(path)
    assert folder == path.with_name("tiny.F32")
    ids = torch.arange(40).reshape(2, 20)
    ours = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(ours(ids).logits, model(ids).logits)
    policy = load_policy(str(path))
    assert policy.eos_ids.tolist() == [257]
    assert "".join(policy.tokens(*(policy.encode(["1+1="])[0], torch.tensor([10])))[0]) == "Q: 1+1=\nA:"


def test_a_file_is_converted_once_and_again_when_it_changed(written):
    path, _ = written
    stamp = (convert_gguf(path) / "model.safetensors").stat().st_mtime_ns
    assert (convert_gguf(path) / "model.safetensors").stat().st_mtime_ns == stamp
    origin = gguf_folder(path) / "gguf.json"
    origin.write_text(json.dumps({"file": path.name, "bytes": 1}))
    assert (convert_gguf(path) / "model.safetensors").stat().st_mtime_ns > stamp
    assert json.loads(origin.read_text())["bytes"] == path.stat().st_size


def test_a_run_names_the_folder_and_needs_the_file_no_more(written, tmp_path):
    path, _ = written
    moved = tmp_path / path.name
    moved.write_bytes(path.read_bytes())
    settings = {"num_prompts": 2, "num_generations": 2, "num_minibatches": 1, "eval_problems": 2}
    config = TrainConfig(
        model=str(moved), max_steps=1, max_completion_length=4, output_dir=str(tmp_path / "run"), **settings
    )
    train(config)
    moved.unlink()
    stored = load_config(tmp_path / "run" / "config.json")
    assert stored.model == str(tmp_path / "tiny.F32")
    train(TrainConfig(**{**vars(stored), "max_steps": 2}), resume=True)
    rollout = generate(load_policy(str(tmp_path / "run" / "model")), ["1+1="], 2, max_completion_length=4, greedy=True)
    assert rollout.completions[0] == rollout.completions[1]


def test_a_plan_reads_the_architecture_and_converts_nothing(written, tmp_path, monkeypatch, capsys):
    path, model = written
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    assert model_config(str(copy)).num_key_value_heads == model.config.num_key_value_heads
    monkeypatch.chdir(tmp_path)
    show_plan(TrainConfig(model=copy.name))
    printed = capsys.readouterr().out
    assert "training converts it into tiny.F32/" in " ".join(printed.split())
    assert [path.name for path in tmp_path.iterdir()] == [copy.name]


def test_what_cannot_be_converted_is_told_in_one_line(written, tmp_path):
    path, _ = written
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"broken\.gguf': not a GGUF file that transformers reads"):
        convert_gguf(broken)
    taken = tmp_path / "taken.gguf"
    taken.write_bytes(path.read_bytes())
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="which exists; rename one of them"):
        convert_gguf(taken)
    assert list((tmp_path / "taken").iterdir()) == []
