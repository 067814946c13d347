"""A model's architecture: layers, widths, heads and vocabulary, without weights.

In: a model's name. Out: the config from which transformers builds the model. You may add models to
`architectures.yaml`, and they then need no download.
"""

from importlib.resources import files
from pathlib import Path

import yaml
from transformers import AutoConfig, PretrainedConfig

from minicpgd.errors import UserError, describe_error
from minicpgd.models.source import NO_CODE, gguf_config, is_gguf, resolve_model


def model_config(name: str) -> PretrainedConfig:
    """The architecture of a local folder, of a GGUF file, of a model in `architectures.yaml`, or of a model on the hub.

    Raises:
        UserError: none of these has it.
    """
    if is_gguf(name):
        return gguf_config(Path(name))
    folder = Path(resolve_model(name))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            files = [str(path) for path in folder.glob("*.gguf")]
            raise UserError(f"model = {name!r}: the folder has no config.json{f'; try {files[0]}' if files else ''}")
    elif name in (known := known_architectures()):
        return AutoConfig.for_model(**known[name])
    try:
        return AutoConfig.from_pretrained(folder if folder.is_dir() else name, **NO_CODE)
    except Exception as error:  # transformers and the config's own values raise many kinds.
        if folder.is_dir():
            raise UserError(f"model = {name!r}: its config.json cannot be used: {describe_error(error)}") from error
        download = f"`hf download {name} config.json --local-dir {folder.name}`, then --model {folder.name}"
        reason = f"no folder, not known here ({', '.join(known)}), and not to be had from the hub"
        raise UserError(f"model = {name!r}: {reason}. One file is enough: {download}") from error


def known_architectures() -> dict[str, dict]:
    """The content of config.json by hub name, for the models that need no download."""
    return yaml.safe_load((files("minicpgd") / "memory" / "architectures.yaml").read_text())
