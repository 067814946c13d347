"""Checkpoints: a killed run continues as if nothing had happened.

A checkpoint is one safetensors file, `step-000020.safetensors`. It holds the trained weights (with LoRA, the adapter
alone), the optimizer's moments, and a header with the loop's own values. It needs no random state, since (seed, step)
decides every draw of a step.

In: a model, an optimizer, a step. Out: a file that appears as a whole or not at all. Its digest shows whether the disk
changed it later. Loading a checkpoint never runs code that is
stored in it, as loading a pickle could.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minicpgd.errors import UserError, is_out_of_memory, one_line, short_repr
from minicpgd.files import parse_json, write_atomically

KEEP = 2
EXTRA = {"drift_coef"}  # The header has these values besides the step.


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step`; `extra` holds the small values that the loop carries from step to step."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    extra: dict[str, float]


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, float]
) -> Path:
    """Write the state after `step`, without frozen parameters, and remove all but the two newest checkpoints."""
    tensors = {f"model.{name}": p.contiguous() for name, p in model.named_parameters() if p.requires_grad}
    for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
        tensors |= _moments(i, optimizer.state.get(parameter, {}))
    header = {"step": step, "extra": extra}
    metadata = {"minicpgd": json.dumps(header | {"digest": _digest(tensors, header)})}
    path = folder / _name(step)
    folder.mkdir(exist_ok=True)
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    for old in _newest_first(folder)[KEEP:]:
        old.unlink()
    return path


def load_checkpoint(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is not damaged, or None. `warn` gets a line for each damaged one that is newer."""
    for path in _newest_first(folder):
        try:
            with safe_open(path, "pt") as file:
                header = parse_json(file.metadata()["minicpgd"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if not isinstance(header, dict) or header.pop("digest") != _digest(tensors, header):
                raise ValueError("its content does not match its digest")
            step, extra = header["step"], header["extra"]
            if path.name != _name(step):
                raise ValueError(f"it says that it is of step {short_repr(step)}")
            has_names = isinstance(extra, dict) and extra.keys() == EXTRA
            if not has_names or not all(type(v) in (int, float) and abs(v) < math.inf for v in extra.values()):
                raise ValueError(f"its extra values are {short_repr(extra)}")
            return Checkpoint(path, step, tensors, extra)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            if is_out_of_memory(error):
                raise
            warn(one_line(f"{path}: damaged ({error}); it is not used"))
    return None


def remove_newer(folder: Path, checkpoint: Checkpoint | None) -> None:
    """Remove all checkpoints after `checkpoint`: they are damaged, and must not count among the two newest."""
    for path in _newest_first(folder):
        if checkpoint and path == checkpoint.path:
            return
        path.unlink()


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Copy weights and moments back into a model and its optimizer.

    Raises:
        UserError: the checkpoint is not of this model and this optimizer; nothing was changed.
    """
    _check_fits(checkpoint, model, optimizer)
    restore_weights(checkpoint, model)
    state: dict[int, dict[str, Any]] = {}
    for key, value in checkpoint.tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".")
            is_int = value.dtype == torch.int64 and value.dim() == 0  # bitsandbytes counts its steps with an int.
            state.setdefault(int(i), {})[name] = value.item() if is_int else value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def restore_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Copy the trained weights back into a model that was loaded with the run's settings."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(checkpoint.tensors[f"model.{name}"])


def _check_fits(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Check that the tensors are exactly those that `save_checkpoint` would write for this model and optimizer."""
    found = {name: _kind(tensor) for name, tensor in checkpoint.tensors.items()}
    wanted = {f"model.{name}": _kind(p) for name, p in model.named_parameters() if p.requires_grad}
    for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
        if any(name.startswith(f"optimizer.{i}.") for name in found):  # A parameter without gradients has no moments.
            wanted |= {name: _kind(value) for name, value in _moments(i, _first_moments(parameter, optimizer)).items()}
    for name in sorted(found | wanted):
        kind, wanted_kind = found.get(name, "none"), wanted.get(name, "none")
        if kind != wanted_kind:
            problem = f"not of this model and this optimizer: {name} is {kind}, not {wanted_kind}"
            raise UserError(f"{checkpoint.path}: {problem}; remove the file to go on from the one before")


def _first_moments(parameter: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Make one step with a new optimizer of this class, on zeros in the parameter's shape; return its state."""
    probe = nn.Parameter(torch.zeros_like(parameter))
    probe.grad = torch.zeros_like(probe)
    fresh = type(optimizer)([probe])  # type: ignore[call-arg]  # mypy knows only the base class, which needs defaults
    fresh.step()
    return fresh.state[probe]


def _moments(i: int, moments: dict[str, Any]) -> dict[str, Tensor]:
    """The moments of parameter i, by their names in the file."""
    # A qmap is bitsandbytes' code book. All parameters share it, and safetensors refuses shared tensors.
    return {f"optimizer.{i}.{n}": v.clone() if n.startswith("qmap") else torch.as_tensor(v) for n, v in moments.items()}


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}".removeprefix("torch.")


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
