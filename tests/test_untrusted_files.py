"""Files of strangers run no code: not pickles, not a model's own Python, not what YAML or a chat template asks for."""

import json
import shutil
from pathlib import Path

import pytest
from anything import poison, told
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import ones

from minicpgd import TrainConfig, evaluate, train
from minicpgd.architectures import model_config
from minicpgd.policy import EMBEDDED, load_policy


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """The file that code of a stranger's would leave; and whoever is asked for leave on the terminal fails."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    return tmp_path / "ran"


@pytest.fixture
def model(tmp_path, ran):
    """A folder with the embedded model."""
    return Path(shutil.copytree(EMBEDDED, tmp_path / "model", ignore=shutil.ignore_patterns("*.py", "__pycache__")))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


PICKLES = ["pytorch_model.bin", "adapter_model.bin", "training_args.bin", "model.pt", "optimizer.pt", "tokenizer.bin"]


def test_a_folder_with_pickles(model, ran):
    poison(model, ran, *PICKLES)
    load_policy(str(model))
    (model / "model.safetensors").rename(model / "other.safetensors")  # so that there is one
    assert told(load_policy, str(model)).startswith(f"model = '{model}': cannot be loaded")
    (model / "other.safetensors").unlink()
    assert "*.safetensors is needed" in told(load_policy, str(model))
    assert not ran.exists()


def test_a_model_with_pickles_from_the_hub(model, ran, tmp_path, monkeypatch):
    """In the hub's cache: with weights in safetensors it is loaded, with a pickle alone it is not there."""
    cached = tmp_path / "hub" / "models--some--body" / "snapshots" / "0123"
    (tmp_path / "hub" / "models--some--body" / "refs").mkdir(parents=True)
    (tmp_path / "hub" / "models--some--body" / "refs" / "main").write_text("0123")
    model.rename(cached) if cached.parent.mkdir() is None else None
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    poison(cached, ran, *PICKLES)
    assert load_policy("some/body").model.num_parameters() == 107_968
    (cached / "model.safetensors").unlink()
    assert told(load_policy, "some/body").startswith("model = 'some/body': ")
    assert not ran.exists()


def test_a_model_with_weights_that_are_not_its_own(model):
    """transformers would draw what is missing at random, and say so in a log that is off."""
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
        line = told(load_policy, str(model))
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


def test_an_adapter_that_is_a_pickle_or_names_a_module(with_adapter, ran, tmp_path, monkeypatch):
    """PEFT imports the module that `megatron_core` names; a folder of a run can hold one."""
    adapter = with_adapter / "adapter"
    assert evaluate(with_adapter, num_problems=2, num_samples=1)["pass@1"] <= 1
    (with_adapter / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    edit(adapter / "adapter_config.json", megatron_config={"x": 1}, megatron_core="run.evil")
    assert "its config is not LoRA's alone" in told(evaluate, with_adapter)
    edit(adapter / "adapter_config.json", megatron_config=None)
    poison(adapter, ran, *PICKLES)
    (adapter / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors is needed" in told(evaluate, with_adapter)
    save_file({"x": ones(1)}, adapter / "adapter_model.safetensors")
    assert "Found missing adapter keys" in told(evaluate, with_adapter)
    for text in ("{", "[]", "{}", '{"peft_type": "LORA", "r": "x"}', '{"peft_type": "PROMPT_TUNING"}'):
        (adapter / "adapter_config.json").write_text(text)
        assert told(evaluate, with_adapter).startswith(f"{adapter}: not an adapter for this model: ")
    assert not ran.exists()


AUTO_MAP = {name: f"theirs.{name}" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoModel")}


@pytest.mark.parametrize("model_type", ["llama", "theirs"])
def test_a_model_that_brings_python_of_its_own(model, ran, model_type):
    """Where transformers knows the kind of model, its own code is used; else it is one line."""
    (model / "theirs.py").write_text(f"open({str(ran)!r}, 'w')")
    edit(model / "config.json", auto_map=AUTO_MAP, model_type=model_type, architectures=["Theirs"])
    edit(
        model / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["theirs.Slow", "theirs.Fast"]},
        tokenizer_class="Theirs",
    )
    for load in (load_policy, model_config):
        loaded = told(load, str(model))
        assert not isinstance(loaded, str) or loaded.startswith(f"model = '{model}': ")
    assert not ran.exists()


TEMPLATES = {
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "SecurityError",
    "{{ cycler.__init__.__globals__.os.system('touch RAN') }}": "SecurityError",
    "{{ messages.append(1) }}": "SecurityError",
    "{% include '/etc/passwd' %}": "TypeError",
    "{{": "TemplateSyntaxError",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ raise_exception('no\nluck') }}": "no luck",
    "": "",
    "{% if 0 %}x{% endif %}": "no tokens come of it",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_is_in_a_sandbox(policy, ran, template):
    """What it cannot be kept from is to go on for ever."""
    policy.tokenizer.chat_template = template.replace("RAN", str(ran))
    assert TEMPLATES[template] in str(told(policy.encode, ["1+1="]))
    assert not ran.exists()


def test_nothing_in_the_package_reads_pickles_or_runs_text():
    """A look at the words; the tests above are about what others do."""
    package = Path(EMBEDDED).parent
    for path in package.rglob("*.py"):
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
