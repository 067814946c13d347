"""Checkpoints: a killed run goes on as if nothing had happened.

A checkpoint is one safetensors file, `step-000020.safetensors`: the weights that are trained (with LoRA, the adapter
alone), the optimizer's moments, and a header with what the loop needs to go on. There is no random state in it: every
draw of a step is decided by (seed, step) alone.

It is written to a temporary file, forced to disk and renamed, so that a file with the final name is a whole one; its
digest tells when the disk changed it later. Loading runs no code.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step`; `extra` holds small values that the loop carries from step to step."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    extra: dict[str, float]


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, force it to disk, and rename it: all of it is there, or none."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the rename itself has to survive a power cut
        os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, float]
) -> Path:
    """Write the state after `step`, and remove all but the two newest. Frozen parameters are left out."""
    tensors = {f"model.{name}": p.contiguous() for name, p in model.named_parameters() if p.requires_grad}
    for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
        moments = optimizer.state.get(parameter, {})
        for name, value in moments.items():
            shared = name.startswith("qmap")  # bitsandbytes' code book: one tensor for all, which safetensors refuses
            tensors[f"optimizer.{i}.{name}"] = value.clone() if shared else torch.as_tensor(value)
    header = {"step": step, "extra": extra}
    header["digest"] = _digest(tensors, header)
    path = folder / f"step-{step:06d}.safetensors"
    folder.mkdir(exist_ok=True)
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={"minicpgd": json.dumps(header)}))
    for old in _newest_first(folder)[KEEP:]:
        old.unlink()
    return path


def load_checkpoint(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole; None where there is none. `warn` is told of each that was passed over."""
    for path in _newest_first(folder):
        try:
            with safe_open(path, "pt") as file:
                header = json.loads(file.metadata()["minicpgd"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if header.pop("digest") != _digest(tensors, header):
                raise ValueError("its content does not match its digest")
            return Checkpoint(path, header["step"], tensors, header["extra"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            warn(f"{path}: damaged ({error}); going back to the one before")
    return None


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put weights and moments back where they came from."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(checkpoint.tensors[f"model.{name}"])
    state: dict[int, dict[str, Any]] = {}
    for key, value in checkpoint.tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".")
            is_int = value.dtype == torch.int64 and value.dim() == 0  # bitsandbytes counts its steps so
            state.setdefault(int(i), {})[name] = value.item() if is_int else value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"), reverse=True)


def _digest(tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
