"""The five groups of settings as flags of a command, in a section of its help each; and a config as flags."""

from dataclasses import fields
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes

from minicpgd.config import (
    LoopSettings,
    ModelSettings,
    ObjectiveSettings,
    SamplingSettings,
    Settings,
    TaskSettings,
    TrainConfig,
)

Objective = Annotated[ObjectiveSettings, OmitArgPrefixes]
Task = Annotated[TaskSettings, OmitArgPrefixes]
Model = Annotated[ModelSettings, OmitArgPrefixes]
Sampling = Annotated[SamplingSettings, OmitArgPrefixes]
Loop = Annotated[LoopSettings, OmitArgPrefixes]
Flag = FlagCreatePairsOff[bool]
GROUPS: dict[str, type[Settings]] = {
    "objective": ObjectiveSettings, "task": TaskSettings, "model": ModelSettings, "sampling": SamplingSettings,
    "loop": LoopSettings,
}  # fmt: skip


def changed_flags(config: TrainConfig, default: TrainConfig) -> list[str]:
    """The words of a command line that turn `default` into `config`."""
    words = []
    for name in [field.name for field in fields(config) if getattr(config, field.name) != getattr(default, field.name)]:
        value, flag = getattr(config, name), name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words
