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
# A row decides about the loss alone, which is the same code in both precisions. The last one has the KL in the reward.
IN_FOUR_BIT = ("cpgd", "grpo", "dapo", "gspo", "reinforce_pp")
RUNS = [(name, "full precision") for name in ALGORITHMS] + [(name, "4-bit") for name in IN_FOUR_BIT]
SHORT = {"max_steps": 1, "num_iterations": 2, "logging_steps": 1, "eval_problems": 2, "max_completion_length": 16}
FILES = ("metrics.jsonl", "samples.jsonl", "passes.jsonl")


def train_all(folder):
    """Make all runs. Return the files of {(row, precision): run}, and the hash of a string in this process."""
    quiet()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    files = {}
    for name, precision in RUNS:
        chosen = {"algorithm": name, "output_dir": str(folder / f"{name} {precision}")}
        run = train(TrainConfig(**(SMALL | SHORT | PRECISIONS[precision] | chosen)))
        files[name, precision] = {file: (run / file).read_bytes() for file in FILES}
    return files, hash("minicpgd")


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """The files from this process and from a new one, in which strings have other hashes."""
    folder, ours = tmp_path_factory.mktemp("twice"), os.environ.get("PYTHONHASHSEED")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", "2" if ours == "1" else "1")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            second, other_hash = pool.submit(train_all, folder / "new").result()
    first, this_hash = train_all(folder / "this")
    assert this_hash != other_hash
    return first, second


@pytest.mark.parametrize(("name", "precision"), RUNS)
def test_a_run_repeats_itself_to_the_byte(name, precision, twice):
    first, second = (files[name, precision] for files in twice)
    assert first == second
    assert first["metrics.jsonl"].count(b"\n") == 2
