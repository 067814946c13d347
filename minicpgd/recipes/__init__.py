"""Settings in files: recipes for a real model on a real card, and the config.json of a run.

In: the path of a config.json; or the name of a recipe, or the path of a YAML file of your own. Out: a config; or a
`Recipe`, which has one. Each recipe of ours is a small YAML file in this folder. Each line under `train` is a flag of
`minicpgd train`, and a flag on the command line overrides it. `expect` has the memory that the run will need, and how
that is known. You may add a file.
"""

import contextlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from minicpgd.config import TrainConfig
from minicpgd.errors import ConfigError, did_you_mean, short_repr
from minicpgd.files import parse_json

__all__ = ["FOLDER", "KNOWN", "Recipe", "load_config", "load_recipe", "save_config"]
FOLDER = Path(__file__).parent
KNOWN = sorted(path.stem for path in FOLDER.glob("*gb.yaml"))


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is there twice. yaml.SafeLoader would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: list[Any] = []
        for key, _ in node.value:
            if key.value in keys:
                raise ValueError(f"line {key.start_mark.line + 1}: {short_repr(key.value)} is there twice")
            keys.append(key.value)
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class Recipe:
    """Settings, and the memory that they are expected to need; None if the file does not say."""

    config: TrainConfig
    card_gib: float | None = None
    peak_gib: float | None = None
    basis: str | None = None


def load_recipe(name: str) -> Recipe:
    """Read a recipe of this folder, by its name, or a YAML file, by its path.

    Raises:
        ConfigError: there is none, or its content is wrong; the line names file and field.
    """
    path = FOLDER / f"{name}.yaml" if name in KNOWN else Path(name)
    if not os.path.isfile(path):
        hint = f"{did_you_mean(name[:99], KNOWN)}choose from {', '.join(KNOWN)}, or give a YAML file's path"
        raise ConfigError(f"recipe = {name!r}: {hint}")
    try:
        content = _UniqueKeys(path.read_bytes()).get_single_data()
    except Exception as error:  # PyYAML raises its own kinds, and others for 2001-99-99 or !!int "".
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    _check_names(path, content)
    train, expect = content["train"], content.get("expect", {})
    for key, hint in get_type_hints(TrainConfig).items():
        if float in (hint, *get_args(hint)) and isinstance(train.get(key), str):  # YAML reads 1e-5 as text.
            with contextlib.suppress(ValueError):
                train[key] = float(train[key])
    for key in {"card_gib", "peak_gib"} & set(expect):
        if type(expect[key]) not in (int, float) or not 0 < expect[key] < 10**6:
            raise ConfigError(f"{path}: expect: {key} = {short_repr(expect[key])}: a number of GiB expected")
    try:
        return Recipe(TrainConfig(**train), **expect)
    except ConfigError as error:
        raise ConfigError(f"{path}: train: {error}") from error


def _check_names(path: Path, content: Any) -> None:
    if not isinstance(content, dict) or not isinstance(content.get("train"), dict):
        raise ConfigError(f"{path}: a recipe has a section `train:` with settings indented below it")
    for section, values in content.items():
        kind = {"train": TrainConfig, "expect": Recipe}.get(section)
        name = short_repr(section).strip("'")
        if kind is None or not isinstance(values, dict):
            raise ConfigError(f"{path}: {name}: sections are `train:` and `expect:`, with settings indented below")
        known = {field.name for field in fields(kind)} - {"config"}
        for key in set(values) - known:
            setting = short_repr(key).strip("'")
            hint = f"; {did_you_mean(setting, known)}".rstrip("; ")
            raise ConfigError(f"{path}: {name}: {setting}: no such setting{hint}")


def load_config(path: Path) -> TrainConfig:
    """Read config.json.

    Raises:
        ConfigError: the file is not JSON, or a field is unknown or wrong. The line names file and field.
    """
    try:
        values = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable config: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: unknown fields: no JSON object")
    if "architectures" in values:
        commands = "`minicpgd evaluate` and `minicpgd sample`"
        raise ConfigError(f"{path}: a model's config, not a run's; {commands} take models")
    if unknown := set(values) - {field.name for field in fields(TrainConfig)}:
        raise ConfigError(f"{path}: unknown fields: {', '.join(sorted(unknown))}")
    try:
        return TrainConfig(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def save_config(path: Path, config: TrainConfig) -> None:
    """Write config.json."""
    path.write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
