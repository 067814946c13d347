"""A model's architecture, without its weights: layers, widths, heads, vocabulary.

In: a name. Out: the config that transformers would build the model from.
"""

from importlib.resources import files
from pathlib import Path

import yaml
from transformers import AutoConfig, PretrainedConfig

from minicpgd.errors import UserError, describe_error
from minicpgd.models.policy import NO_CODE, resolve_model


def model_config(name: str) -> PretrainedConfig:
    """A model's architecture: of a local folder, of a model known here, or from the hub's cache or the hub.

    Raises:
        UserError: none of these has it.
    """
    folder = Path(resolve_model(name))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            why = "GGUF files cannot be trained; " if list(folder.glob("*.gguf")) else ""
            raise UserError(f"model = {name!r}: {why}the folder has no config.json")
    elif name in (known := known_architectures()):
        return AutoConfig.for_model(**known[name])
    try:
        return AutoConfig.from_pretrained(folder if folder.is_dir() else name, **NO_CODE)
    except Exception as error:  # transformers raises its own kinds, and what a config of anybody's leads it to
        if folder.is_dir():
            raise UserError(f"model = {name!r}: its config.json cannot be used: {describe_error(error)}") from error
        raise UserError(
            f"model = {name!r}: no folder, not known here ({', '.join(known_architectures())}), and not to be had from "
            f"the hub. One file is enough: `hf download {name} config.json --local-dir {folder.name}`, then --model "
            f"{folder.name}"
        ) from error


def known_architectures() -> dict[str, dict]:
    """Hub names to what their config.json says, for the models that need no download."""
    return yaml.safe_load((files("minicpgd") / "memory" / "architectures.yaml").read_text())
