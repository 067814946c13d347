"""What only a card can show, in one call of less than eight minutes on an H200.

    python benchmarks/on_a_card.py           # needs a GPU; writes benchmarks/results/on_a_card.json
    python benchmarks/on_a_card.py --tiny    # a dry run of the same code on a CPU; its numbers mean nothing

The parts, in this order: the card; the ratios at the first update in bfloat16, which should be 1; memory and speed of
4-bit training at three sizes of Qwen2.5 with random weights (`qlora.py` measures them), beside what is predicted and
beside the limit that reading the weights sets; TRL at the smallest size; the tests that need a GPU. Each part runs in a
process of its own, with a limit on its time. A part that fails leaves its error in the file, and the others go on. The
file is written after every part.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent))
from qlora import PROMPT, make_config, measure_ours, measure_trl, odd_length
from step import now

from minicpgd.algorithms import token_metrics
from minicpgd.files import versions, write_atomically
from minicpgd.memory.architectures import model_config
from minicpgd.memory.predict import predict
from minicpgd.models.policy import quiet
from minicpgd.training.step import Learner, seed_step

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "on_a_card.json"
SIZES = ("0.5b", "1.5b", "7b")
LIMITS = {"card": 60, "ratios": 90, "tests": 150, "trl": 90} | dict.fromkeys(SIZES, 110) | {"tiny": 110}  # seconds
Part = Callable[[str, int], dict[str, Any]]


def card(size: str, length: int) -> dict[str, Any]:
    """The name and the memory of the card, and how many bytes a second it copies."""
    quiet()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.empty(2**30 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = min(_seconds(lambda: target.copy_(source)) for _ in range(8))
    found: dict[str, Any] = {"device": device, "bytes_per_second": 2 * source.numel() / seconds}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"name": properties.name, "memory_gib": properties.total_memory / 2**30, "cuda": torch.version.cuda}
    return found | {"versions": versions()}


def _seconds(function: Callable[[], object]) -> float:
    started = now()
    function()
    return now() - started


def ratios(size: str, length: int) -> dict[str, Any]:
    """The ratios at the first update of a rollout, which no update has moved, and the class of the optimizer."""
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        config = replace(make_config(size, Path(folder)), max_completion_length=length)
        learner = replace(Learner.from_config(config), reward=odd_length)
        experience = learner.collect(seed_step(0, 1, learner.policy.device))
        rows = torch.arange(len(experience.problems) // config.num_minibatches, device=learner.policy.device)
        found = token_metrics(learner.update(experience, rows).outputs)
        kept = {name: found[name] for name in ("ratio_min", "ratio_p01", "ratio_p99", "ratio_max", "kl_old")}
        return kept | {"dtype": learner.policy.dtype_in_words, "optimizer": type(learner.optimizer).__name__}


def qlora(size: str, length: int) -> dict[str, Any]:
    """Memory and speed of one size, what is predicted, and the tokens a second that reading memory would allow."""
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        config = replace(make_config(size, Path(folder)), max_completion_length=length)
        architecture = model_config(config.model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        memory = predict(config, architecture, prompt_length=PROMPT, device=device)
        found = _last(measure_ours, config)
        # To add one token to each response, the 4-bit weights and all keys and values so far are read once. On average
        # half of the largest number of keys and values is there.
        bytes_read = memory.moments["token"]["weights"] + memory.moments["token"]["KV cache"] / 2
        responses = config.rollout_batch_size or config.num_responses
        return found | {
            "predicted_gib": max(memory.rollout, memory.update) / 2**30,
            "bytes_read_per_token": bytes_read / responses,
        }


def trl(size: str, length: int) -> dict[str, Any]:
    """The same training by TRL's GRPOTrainer."""
    with tempfile.TemporaryDirectory() as folder:
        return _last(measure_trl, replace(make_config(size, Path(folder)), max_completion_length=length))


def _last(measure: Callable[[Any, Connection], None], config: Any) -> dict[str, Any]:
    """Call a measurement of qlora.py here, and return the last thing that it sends."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    measure(config, sender)
    sender.close()
    sent = []
    try:
        while True:
            sent.append(receiver.recv())
    except EOFError:
        return sent[-1]


def tests(size: str, length: int) -> dict[str, Any]:
    """The tests that need a GPU: how many passed, failed or were skipped, and the end of the output."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {"exit_code": done.returncode, "output": done.stdout[-1500:]}


def _call(part: Part, size: str, length: int, connection: Connection) -> None:
    try:
        connection.send(part(size, length))
    except BaseException as error:  # The file has the error in place of the numbers.
        connection.send({"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-3000:]})


def run_part(part: Part, name: str, size: str, length: int) -> dict[str, Any]:
    """Run a part in its own process, and return what it found, or its error. After its limit it is stopped."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(part, size, length, sender))
    started = time.perf_counter()
    process.start()
    sender.close()
    found: dict[str, Any] = {"error": f"nothing after {LIMITS[name]} s"}
    try:
        if receiver.poll(LIMITS[name]):
            found = receiver.recv()
    except EOFError:
        found = {"error": "the process ended without a result"}
    if process.is_alive():
        process.join(2)
        process.kill()
    process.join()
    return found | {"wall_seconds": round(time.perf_counter() - started, 1)}


def main(tiny: bool = False, out: Path | None = None) -> None:
    """Run all parts, and write the file.

    Args:
        tiny: a tiny model and short responses, for a dry run on a CPU.
        out: the file; by default benchmarks/results/on_a_card.json, and nothing for a dry run.
    """
    if not tiny and not torch.cuda.is_available():
        sys.exit("on_a_card: this machine has no GPU; --tiny makes a dry run")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    target, length = out or (None if tiny else RESULTS), 8 if tiny else 512
    sizes = ("tiny",) if tiny else SIZES
    parts: list[tuple[str, Part, str]] = [("card", card, sizes[0]), ("ratios", ratios, sizes[0])]
    parts += [(size, qlora, size) for size in sizes] + [("trl", trl, sizes[0]), ("tests", tests, sizes[0])]
    report: dict[str, Any] = {"command": "python benchmarks/on_a_card.py" + " --tiny" * tiny}
    for name, part, size in parts:
        report[name] = run_part(part, name, size, length)
        if "bytes_read_per_token" in report[name] and "bytes_per_second" in report["card"]:
            limit = report["card"]["bytes_per_second"] / report[name]["bytes_read_per_token"]
            report[name]["share_of_bandwidth_limit"] = report[name]["tokens_per_second"] / limit
        told = {key: value for key, value in report[name].items() if key not in ("traceback", "output", "versions")}
        print(name, json.dumps(told), flush=True)
        if target is not None:
            text = json.dumps(report, indent=2) + "\n"
            write_atomically(target, lambda path, text=text: path.write_text(text))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
