"""Where a model lies: the embedded model, a folder, a GGUF file or a name on the hub; and why one cannot be loaded.

In: a model's name as the user gives it. Out: what transformers loads, or one line that says what is wrong. A GGUF file
is converted once, into a folder beside it with the same name; its weights are dequantised.
"""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from minicpgd.errors import MissingPackageError, UserError, describe_error
from minicpgd.models.lora import adapter_config

EMBEDDED = Path(__file__).parent / "embedded"
NO_CODE = {"trust_remote_code": False}  # With None, transformers would ask on the terminal about a model's own code.


def resolve_model(name: str) -> str:
    """The folder of the embedded model for "embedded", and of a GGUF file; every other name as it is.

    Raises:
        UserError: the GGUF file cannot be converted, or the package gguf is missing.
    """
    if is_gguf(name):
        return str(convert_gguf(Path(name)))
    return str(EMBEDDED) if name == "embedded" else name


def is_gguf(name: str) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return name.endswith(".gguf") and Path(name).is_file()


def gguf_folder(file: Path) -> Path:
    """Where a GGUF file's model goes, as `model.Q4_1/` for `model.Q4_1.gguf`."""
    return file.with_suffix("")


def convert_gguf(file: Path) -> Path:
    """Write the model of a GGUF file as a folder with float32 weights, unless it is there already, and return it.

    Raises:
        UserError: transformers cannot read the file, its folder cannot be written, or the package gguf is missing.
    """
    folder, size = gguf_folder(file), file.stat().st_size
    origin = folder / "gguf.json"
    if origin.is_file() and json.loads(origin.read_text()) == {"file": file.name, "bytes": size}:
        return folder
    if folder.exists() and not origin.is_file():
        raise UserError(f"model = {str(file)!r}: it is converted into {folder}/, which exists; rename one of them")
    config = gguf_config(file)
    source: dict[str, Any] = {"gguf_file": file.name, **NO_CODE}
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
        read = AutoModelForCausalLM.from_pretrained(file.parent, config=config, dtype=torch.float32, **source)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # Only this one can be saved.
        model.load_state_dict(read.state_dict())
        model.generation_config = read.generation_config
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    except OSError:
        raise
    except Exception as error:  # transformers and gguf raise many kinds.
        raise UserError(f"model = {str(file)!r}: cannot be converted: {describe_error(error)}") from error
    (temporary / origin.name).write_text(json.dumps({"file": file.name, "bytes": size}))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return folder


def gguf_config(file: Path) -> Any:
    """The architecture of a GGUF file.

    Raises:
        UserError: transformers cannot read it, or the package gguf is missing.
    """
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        install = "pip install 'minicpgd[gguf]'"
        raise MissingPackageError(f"model = {str(file)!r}: a GGUF file needs gguf and accelerate: {install}") from error
    try:
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name, **NO_CODE)
    except Exception as error:
        reason = describe_error(error)
        raise UserError(f"model = {str(file)!r}: not a GGUF file that transformers reads: {reason}") from error


def check_model_folder(source: str, name: str) -> None:
    """Check the folder `source`, which the user calls `name`, before transformers does: its messages are long.

    Raises:
        UserError: the folder does not exist, or has no config, weights or tokenizer.
    """
    folder = Path(source)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = str(adapter_config(source).get("base_model_name_or_path", "BASE"))
        command = shlex.join(["minicpgd", "train", "--model", base, "--adapter", name])
        raise UserError(f"model = {name!r}: it is an adapter; `{command}` starts from it")
    if not folder.exists() and folder.parent != Path() and folder.parent.is_dir():
        raise UserError(f"model = {name!r}: there is no such folder")  # Do not ask a hub for a mistyped path.
    for pattern, content in (("config.json", "config"), ("*.safetensors", "weights"), ("tokenizer*", "tokenizer")):
        if folder.is_dir() and not list(folder.glob(pattern)):
            raise UserError(f"model = {name!r}: the folder has no {content}; {pattern} is needed")


def why_not(name: str, attn_implementation: str, error: Exception) -> str:
    """One line that says why a model could not be loaded."""
    first_line = next(iter(str(error).strip().splitlines()), "").strip()
    if attn_implementation != "auto" and "attention" in first_line.lower():
        return f"attn_implementation = {attn_implementation!r}: {first_line} auto chooses one that is installed"
    if "custom code" in first_line:
        return f"model = {name!r}: it needs Python code of its own, which is never run here; choose another model"
    if Path(resolve_model(name)).is_dir():
        return f"model = {name!r}: cannot be loaded: {first_line}"
    reason = "neither a local folder nor in this machine's cache, and the hub does not answer or does not have it"
    download = f"`hf download {name} --local-dir {Path(name).name}`, then `--model {Path(name).name}`"
    return f"model = {name!r}: {reason}. With a network: {download} ({first_line})"
