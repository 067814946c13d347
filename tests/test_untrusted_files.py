"""Untrusted files run no code: no pickles, no Python of a model, and no commands of YAML or of a chat template."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from strategies import poison, result_or_line
from torch import ones

import minicpgd
from minicpgd import TrainConfig, evaluate, train
from minicpgd.memory import model_config
from minicpgd.models import EMBEDDED, load_policy


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """The file that untrusted code would create. A question on the terminal fails the test."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked on the terminal"))
    return tmp_path / "marker"


@pytest.fixture
def model(tmp_path, marker):
    """A folder with the embedded model."""
    return Path(shutil.copytree(EMBEDDED, tmp_path / "model", ignore=shutil.ignore_patterns("*.py", "__pycache__")))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


PICKLES = ["pytorch_model.bin", "adapter_model.bin", "training_args.bin", "model.pt", "optimizer.pt", "tokenizer.bin"]


def test_the_pickles_of_a_folder_are_not_loaded(model, marker):
    poison(model, marker, *PICKLES)
    load_policy(str(model))
    (model / "model.safetensors").rename(model / "other.safetensors")  # The folder still has a file of weights.
    assert result_or_line(load_policy, str(model)).startswith(f"model = '{model}': cannot be loaded")
    (model / "other.safetensors").unlink()
    assert "*.safetensors is needed" in result_or_line(load_policy, str(model))
    assert not marker.exists()


def test_the_pickles_of_a_model_from_the_hub_are_not_loaded(model, marker, tmp_path, monkeypatch):
    """A model in the hub's cache is loaded if it has safetensors. With pickles alone it is refused."""
    cached = tmp_path / "hub" / "models--some--body" / "snapshots" / "0123"
    (tmp_path / "hub" / "models--some--body" / "refs").mkdir(parents=True)
    (tmp_path / "hub" / "models--some--body" / "refs" / "main").write_text("0123")
    cached.parent.mkdir()
    model.rename(cached)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    poison(cached, marker, *PICKLES)
    assert load_policy("some/body").model.num_parameters() == 107_968
    (cached / "model.safetensors").unlink()
    assert result_or_line(load_policy, "some/body").startswith("model = 'some/body': ")
    assert not marker.exists()


def test_a_model_without_all_of_its_weights_is_refused(model):
    """transformers would draw missing weights at random, and say so only in a log that is switched off."""
    weights = load_file(model / "model.safetensors")
    name = sorted(weights)[0]
    for changed, word in (
        ({}, "its weights have no "),
        ({name: weights[name][:1]}, ""),
        ({"x" + name: weights[name]}, "its weights have no "),
    ):
        save_file(
            {n: w for n, w in weights.items() if n != name} | changed, model / "model.safetensors", {"format": "pt"}
        )
        line = result_or_line(load_policy, str(model))
        assert line.startswith(f"model = '{model}': cannot be loaded: ")
        assert word in line


@pytest.fixture
def with_adapter(model, tmp_path):
    return train(
        TrainConfig(
            output_dir=str(tmp_path / "run"), model=str(model), lora_r=2, num_prompts=2, num_generations=2, max_steps=1,
            num_minibatches=2, max_completion_length=4, eval_problems=2,
        )
    )  # fmt: skip


def test_an_adapter_that_is_a_pickle_or_names_a_module_is_refused(with_adapter, marker, tmp_path, monkeypatch):
    """PEFT imports the module that `megatron_core` names. A run's folder can contain such a module."""
    adapter = with_adapter / "adapter"
    assert evaluate(with_adapter, num_problems=2, num_samples=1)["pass@1"] <= 1
    (with_adapter / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    edit(adapter / "adapter_config.json", megatron_config={"x": 1}, megatron_core="run.evil")
    assert "its config is not LoRA's alone" in result_or_line(evaluate, with_adapter)
    edit(adapter / "adapter_config.json", megatron_config=None)
    poison(adapter, marker, *PICKLES)
    (adapter / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors is needed" in result_or_line(evaluate, with_adapter)
    save_file({"x": ones(1)}, adapter / "adapter_model.safetensors")
    assert "Found missing adapter keys" in result_or_line(evaluate, with_adapter)
    for text in ("{", "[]", "{}", '{"peft_type": "LORA", "r": "x"}', '{"peft_type": "PROMPT_TUNING"}'):
        (adapter / "adapter_config.json").write_text(text)
        assert result_or_line(evaluate, with_adapter).startswith(f"{adapter}: not an adapter for this model: ")
    assert not marker.exists()


AUTO_MAP = {name: f"theirs.{name}" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoModel")}


@pytest.mark.parametrize("model_type", ["llama", "theirs"])
def test_the_python_of_a_model_is_not_run(model, marker, model_type):
    """If transformers knows the kind of model, it uses its own code. Otherwise the model is refused in one line."""
    (model / "theirs.py").write_text(f"open({str(marker)!r}, 'w')")
    edit(model / "config.json", auto_map=AUTO_MAP, model_type=model_type, architectures=["Theirs"])
    edit(
        model / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["theirs.Slow", "theirs.Fast"]},
        tokenizer_class="Theirs",
    )
    for load in (load_policy, model_config):
        result = result_or_line(load, str(model))
        assert not isinstance(result, str) or result.startswith(f"model = '{model}': ")
    assert not marker.exists()


TEMPLATES = {
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "SecurityError",
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}": "SecurityError",
    "{{ messages.append(1) }}": "SecurityError",
    "{% include '/etc/passwd' %}": "TypeError",
    "{{": "TemplateSyntaxError",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ raise_exception('no\nluck') }}": "no luck",
    "": "",
    "{% if 0 %}x{% endif %}": "it gives no tokens",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_runs_in_a_sandbox(policy, marker, template):
    """The sandbox cannot stop a template that never ends."""
    policy.tokenizer.chat_template = template.replace("MARKER", str(marker))
    assert TEMPLATES[template] in str(result_or_line(policy.encode, ["1+1="]))
    assert not marker.exists()


def test_nothing_in_the_package_reads_pickles_or_runs_text():
    """This test reads the source. The tests above are about what other libraries do."""
    paths = list(Path(minicpgd.__file__).parent.rglob("*.py"))
    assert len(paths) > 50
    for path in paths:
        for word in (
            "torch.load(",
            "pickle.load",
            "yaml.load(",
            "unsafe_load",
            " eval(",
            "exec(",
            "os.system",
            "shell=True",
        ):
            assert word not in path.read_text(), (path, word)
