"""The same seed gives the same run, byte for byte: here, and in another process."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from conftest import SMALL

from minicpgd import ALGORITHMS, TrainConfig, train
from minicpgd.policy import quiet

PRECISIONS = {"full precision": {}, "4-bit": {"load_in_4bit": True, "lora_r": 8, "beta": 0.05}}
SHORT = {"max_steps": 1, "num_iterations": 2, "logging_steps": 1, "eval_problems": 2, "max_completion_length": 16}
FILES = ("metrics.jsonl", "samples.jsonl", "passes.jsonl")


def made(folder):
    """Every row in both precisions: the files of {row, precision: run}."""
    quiet()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    found = {}
    for name in ALGORITHMS:
        for precision, changes in PRECISIONS.items():
            asked = {"algorithm": name, "output_dir": str(folder / f"{name} {precision}")}
            run = train(TrainConfig(**(SMALL | SHORT | changes | asked)))
            found[name, precision] = {file: (run / file).read_bytes() for file in FILES}
    return found


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """In two new processes, with other hashes of strings."""
    folder, found = tmp_path_factory.mktemp("twice"), []
    for seed in ("1", "2"):
        os.environ["PYTHONHASHSEED"] = seed
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found.append(pool.submit(made, folder / seed))
    del os.environ["PYTHONHASHSEED"]
    return [future.result() for future in found]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_repeats_itself_to_the_byte(name, precision, twice):
    first, again = (found[name, precision] for found in twice)
    assert first == again
    assert first["metrics.jsonl"].count(b"\n") == 2
