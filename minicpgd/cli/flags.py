"""The five groups of settings as flags of a command, in a section of its help each."""

from typing import Annotated

from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes

from minicpgd.config import LoopSettings, ModelSettings, ObjectiveSettings, SamplingSettings, TaskSettings

Objective = Annotated[ObjectiveSettings, OmitArgPrefixes]
Task = Annotated[TaskSettings, OmitArgPrefixes]
Model = Annotated[ModelSettings, OmitArgPrefixes]
Sampling = Annotated[SamplingSettings, OmitArgPrefixes]
Loop = Annotated[LoopSettings, OmitArgPrefixes]
Flag = FlagCreatePairsOff[bool]
