"""Checkpoints: a killed run goes on as if nothing had happened.

A checkpoint is one safetensors file, `step-000020.safetensors`: the weights that are trained (with LoRA, the adapter
alone), the optimizer's moments, and a header with what the loop needs to go on. There is no random state in it: every
draw of a step is decided by (seed, step) alone.

It is written to a temporary file, forced to disk and renamed, so that a file with the final name is a whole one; its
digest tells when the disk changed it later. Loading runs no code.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minicpgd.config import parse_json
from minicpgd.errors import UserError, is_out_of_memory, one_line, shown

KEEP = 2
EXTRA = {"drift_coef"}  # what a header carries beside the step
Kind = tuple[torch.dtype, tuple[int, ...]]


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
        tensors |= _moments(i, optimizer.state.get(parameter, {}))
    header = {"step": step, "extra": extra}
    header["digest"] = _digest(tensors, header)
    path = folder / _name(step)
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
                header = parse_json(file.metadata()["minicpgd"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if not isinstance(header, dict) or header.pop("digest") != _digest(tensors, header):
                raise ValueError("its content does not match its digest")
            step, extra = header["step"], header["extra"]
            if path.name != _name(step):
                raise ValueError(f"it says that it is of step {shown(step)}")
            if not isinstance(extra, dict) or extra.keys() != EXTRA or not all(map(_is_finite, extra.values())):
                raise ValueError(f"its extra values are {shown(extra)}")
            return Checkpoint(path, step, tensors, extra)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            if is_out_of_memory(error):
                raise
            warn(one_line(f"{path}: damaged ({error}); going back to the one before"))
    return None


def forget_newer(folder: Path, checkpoint: Checkpoint | None) -> None:
    """Remove those that were passed over, so that none of them takes the place of a whole one."""
    for path in _newest_first(folder):
        if checkpoint and path == checkpoint.path:
            return
        path.unlink()


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put weights and moments back where they came from.

    Raises:
        UserError: they did not come from this model and this optimizer; nothing was changed.
    """
    _check_fits(checkpoint, model, optimizer)
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


def _check_fits(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Each tensor is one that `save_checkpoint` would write for these, and none of theirs is missing.

    A parameter that has had no gradient yet has no moments.
    """
    found = {name: _kind(tensor) for name, tensor in checkpoint.tensors.items()}
    wanted = {f"model.{name}": _kind(p) for name, p in model.named_parameters() if p.requires_grad}
    for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
        if any(name.startswith(f"optimizer.{i}.") for name in found):
            wanted |= {name: _kind(value) for name, value in _moments(i, _first_moments(parameter, optimizer)).items()}
    for name in sorted(found | wanted):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{checkpoint.path}: not of this model and this optimizer: {name} is {_words(found.get(name))}, not "
                f"{_words(wanted.get(name))}; remove the file to go on from the one before"
            )


def _first_moments(parameter: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimizer of this class keeps of such a parameter, from a step of another one."""
    probe = nn.Parameter(torch.zeros_like(parameter))
    probe.grad = torch.zeros_like(probe)
    other = type(optimizer)([probe])  # type: ignore[call-arg]  # a base class has no defaults
    other.step()
    return other.state[probe]


def _moments(i: int, moments: dict[str, Any]) -> dict[str, Tensor]:
    """The moments of parameter i, by their names in the file."""
    # a qmap is bitsandbytes' code book: one tensor for all, which safetensors refuses
    return {f"optimizer.{i}.{n}": v.clone() if n.startswith("qmap") else torch.as_tensor(v) for n, v in moments.items()}


def _kind(tensor: Tensor) -> Kind:
    return tensor.dtype, tuple(tensor.shape)


def _words(kind: Kind | None) -> str:
    return f"{kind[0]} {kind[1]}".removeprefix("torch.") if kind else "none"


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


def _name(step: int) -> str:
    return f"step-{step:06d}.safetensors"


def _newest_first(folder: Path) -> list[Path]:
    files = [path for path in folder.glob("step-*.safetensors") if path.is_file()]
    return sorted(files, key=lambda path: (len(path.name), path.name), reverse=True)


def _digest(tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
