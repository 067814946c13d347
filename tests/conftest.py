"""What tests share: no network, a skip for what needs a GPU, the embedded policy, and small runs."""

import importlib.util
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # small batches gain nothing from more, and busy machines lose much

import pytest
import torch

from minicpgd import TrainConfig
from minicpgd.policy import load_policy, quiet

quiet()

SMALL = {
    "num_prompts": 2,
    "num_generations": 4,
    "max_steps": 3,
    "max_completion_length": 48,
    "eval_problems": 8,
    "num_minibatches": 2,
}


def load_script(path):
    """A script that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    sys.path.remove(str(path.parent))
    return module


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; there is none here"))


@pytest.fixture
def policy():
    return load_policy("embedded")


@pytest.fixture
def small(tmp_path):
    """A function that makes the config of a run of seconds, in a folder of its own."""

    def make(name="run", **changes):
        return TrainConfig(output_dir=str(tmp_path / name), **(SMALL | changes))

    return make
