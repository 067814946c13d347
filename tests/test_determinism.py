"""The same seed gives the same run, byte for byte, also in another process."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from conftest import SMALL

from minicpgd import ALGORITHMS, TrainConfig, train
from minicpgd.models.policy import quiet

PRECISIONS = {"full precision": {}, "4-bit": {"load_in_4bit": True, "lora_r": 8, "beta": 0.05}}
SHORT = {"max_steps": 1, "num_iterations": 2, "logging_steps": 1, "eval_problems": 2, "max_completion_length": 16}
FILES = ("metrics.jsonl", "samples.jsonl", "passes.jsonl")


def train_all(folder):
    """Train every row in both precisions, and return the files of {(row, precision): run}."""
    quiet()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    files = {}
    for name in ALGORITHMS:
        for precision, changes in PRECISIONS.items():
            chosen = {"algorithm": name, "output_dir": str(folder / f"{name} {precision}")}
            run = train(TrainConfig(**(SMALL | SHORT | changes | chosen)))
            files[name, precision] = {file: (run / file).read_bytes() for file in FILES}
    return files


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """The files from two new processes, in which strings have different hashes."""
    folder, futures = tmp_path_factory.mktemp("twice"), []
    for seed in ("1", "2"):
        os.environ["PYTHONHASHSEED"] = seed
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures.append(pool.submit(train_all, folder / seed))
    del os.environ["PYTHONHASHSEED"]
    return [future.result() for future in futures]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_repeats_itself_to_the_byte(name, precision, twice):
    first, second = (files[name, precision] for files in twice)
    assert first == second
    assert first["metrics.jsonl"].count(b"\n") == 2
