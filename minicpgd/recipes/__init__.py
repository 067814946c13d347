"""Recipes: settings for a real model on a real card, each a small YAML file beside this one.

`minicpgd train --recipe qwen2.5-0.5b-8gb` takes one; a file of your own goes by its path. Each line under `train` is a
flag of `minicpgd train`, and a flag on the command line wins over it. `expect` says what memory it is expected to take,
and on what basis.

In: a name or a path. Out: a `Recipe`.
"""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from minicpgd.config import TrainConfig
from minicpgd.errors import ConfigError, did_you_mean, short_repr

FOLDER = Path(__file__).parent
KNOWN = sorted(path.stem for path in FOLDER.glob("*gb.yaml"))


class _Once(yaml.SafeLoader):
    """Refuses a key that is there twice; YAML's own would keep the last of them and say nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: list[Any] = []
        for key, _ in node.value:
            if key.value in keys:
                raise ValueError(f"line {key.start_mark.line + 1}: {short_repr(key.value)} is there twice")
            keys.append(key.value)
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class Recipe:
    """Settings, and the memory they are expected to take; the expectation is None where the file has none."""

    config: TrainConfig
    card_gib: float | None = None
    peak_gib: float | None = None
    basis: str | None = None


def load_recipe(name: str) -> Recipe:
    """Read a recipe.

    Args:
        name: of one that ships, or the path of a YAML file.

    Raises:
        ConfigError: there is none, or it is not what a recipe should be; the line names file and field.
    """
    path = FOLDER / f"{name}.yaml" if name in KNOWN else Path(name)
    if not os.path.isfile(path):
        raise ConfigError(
            f"recipe = {name!r}: {did_you_mean(name[:99], KNOWN)}choose from {', '.join(KNOWN)}, or give a YAML file's path"
        )
    try:
        content = _Once(path.read_bytes()).get_single_data()
    except Exception as error:  # PyYAML's own kinds, and what it comes to with 2001-99-99 or !!int ""
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    train, expect = _sections(path, content)
    floats = {name for name, hint in get_type_hints(TrainConfig).items() if float in (hint, *get_args(hint))}
    for key in floats & set(train):
        train[key] = _number(train[key])
    for key in {"card_gib", "peak_gib"} & set(expect):
        if type(expect[key]) not in (int, float) or not 0 < expect[key] < 10**6:
            raise ConfigError(f"{path}: expect: {key} = {short_repr(expect[key])}: a number of GiB expected")
    try:
        return Recipe(TrainConfig(**train), **expect)
    except ConfigError as error:
        raise ConfigError(f"{path}: train: {error}") from error


def _sections(path: Path, content: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two of a recipe, their fields known."""
    if not isinstance(content, dict) or not isinstance(content.get("train"), dict):
        raise ConfigError(f"{path}: a recipe has a section `train:` with settings indented below it")
    sections = {"train": TrainConfig, "expect": Recipe}
    for section, values in content.items():
        if section not in sections or not isinstance(values, dict):
            raise ConfigError(
                f"{path}: {_word(section)}: sections are `train:` and `expect:`, with settings indented below"
            )
        known = {field.name for field in fields(sections[section])} - {"config"}
        for key in set(values) - known:
            near = did_you_mean(_word(key), known).rstrip()
            raise ConfigError(f"{path}: {section}: {_word(key)}: no such setting" + (f"; {near}" if near else ""))
    return content["train"], content.get("expect", {})


def _word(key: Any) -> str:
    return short_repr(key).strip("'")


def _number(value: Any) -> Any:
    """YAML reads 1e-5 as text: it wants 1.0e-5."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
