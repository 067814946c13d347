"""What all tests share: no network, a skip for tests that need a GPU, the embedded policy, and small runs."""

import importlib.util
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # Small batches gain nothing from more threads, and busy machines lose much.

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minicpgd import ALGORITHMS, LossSettings, TrainConfig
from minicpgd.models.policy import load_policy, quiet

quiet()

SMALL = {
    "num_prompts": 2,
    "num_generations": 4,
    "max_steps": 3,
    "max_completion_length": 48,
    "eval_problems": 8,
    "num_minibatches": 2,
    "target_kl": None,  # The learning rates of some tests are large, and a stop would end their passes.
}


SLOW_FILES = [
    "notebooks", "memory", "study", "qlora", "readme_and_results", "cli_and_figures", "trl", "resume", "training",
    "other_models", "policy_and_sampling", "determinism",
]  # fmt: skip


def load_script(path):
    """Import a script that belongs to no package."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # A dataclass looks its module up there.
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    sys.path.remove(str(path.parent))
    return module


def loss_of(
    name, logp, old_logp, advantages, mask, *, ref_logp=None, token_weights=None, max_completion_length=None, **changes
):
    """Compute the loss of a row. A change names a column that `override` replaces, or a field of `LossSettings`."""
    columns = {"aggregation", "importance_level"} & changes.keys()
    row = ALGORITHMS[name].override(**{column: changes.pop(column) for column in columns})
    if token_weights is None and max_completion_length is not None:
        token_weights = row.token_weights(mask, max_completion_length)
    rest = {"ref_logp": ref_logp, "token_weights": token_weights}
    return row.loss(logp, old_logp, advantages, mask, LossSettings(**{"drift_coef": 1.0} | changes), **rest)


def pytest_collection_modifyitems(items):
    """Start with the slow files, so that no worker is left alone with one at the end (--no-loadscope-reorder)."""
    names = [f"test_{name}" for name in SLOW_FILES]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; there is none here"))


@pytest.fixture
def policy():
    return load_policy("embedded")


@pytest.fixture
def record_threads():
    """Return a function from a model to a list that grows: torch's number of threads at each forward pass.

    The test may set the number of threads; it is restored after the test.
    """

    def record(model):
        used = []

        def append_threads(decoder, _):
            if "forward" not in vars(decoder):  # Else the decoder is asked for its output once more.
                used.append(torch.get_num_threads())

        model.get_decoder().register_forward_pre_hook(append_threads)
        return used

    threads = torch.get_num_threads()
    yield record
    torch.set_num_threads(threads)


@pytest.fixture
def small(tmp_path):
    """Return a function that makes the config of a run of seconds, in a folder of its own."""

    def make(name="run", **changes):
        return TrainConfig(output_dir=str(tmp_path / name), **(SMALL | changes))

    return make


@pytest.fixture(scope="session")
def text_model(tmp_path_factory):
    """The folder of a tiny random model that reads any text, a byte at a time."""
    folder = tmp_path_factory.mktemp("text_model")
    vocabulary = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(vocabulary), eos_token_id=256)).save_pretrained(folder)
    return folder
