"""The policy: a causal language model and its tokenizer.

In: the embedded model, a local folder or a hub name; in full precision, or in 4 bit with an adapter. Out: a `Policy`,
which turns text into token ids. Everything else in the package sees token ids.
"""

import copy
import logging as python_logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from minicpgd.config import ModelSettings
from minicpgd.errors import UserError, describe_error, short_repr
from minicpgd.models.lora import add_adapter, check_4bit_widths, disable_cpu_repacking, load_adapter, nf4
from minicpgd.models.precision import checkpoint_layers, choose_dtype

EMBEDDED = Path(__file__).parent / "embedded"
NO_CODE = {"trust_remote_code": False}  # With None, transformers would ask on the terminal about a model's own code.


def quiet() -> None:
    """Switch off the progress bars and warnings of transformers and the hub's client, for programs with their own."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    python_logging.getLogger("bitsandbytes").setLevel(python_logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # They address TRL, not a user.


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            logging.enable_progress_bar()


@dataclass
class Policy:
    """A model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    frozen_copy: PreTrainedModel | None = None  # This is the model as it was loaded, if `reference` needs it.
    chat_template: bool = True
    dtype_in_words: str = "float32"  # This names the dtype of the arithmetic, and the reason for it.

    @property
    def device(self) -> torch.device:
        """The device of the model's tensors."""
        return self.model.device

    @property
    def peft(self) -> Any:
        """The model, typed as PEFT's, if an adapter is trained in place of the weights; else None."""
        return self.model if hasattr(self.model, "peft_config") else None

    @contextmanager
    def reference(self) -> Iterator[PreTrainedModel]:
        """The model that training started from. With an adapter it costs no memory: the adapter is switched off.

        Raises:
            ValueError: the policy was loaded without a reference.
        """
        if self.peft:
            with self.peft.disable_adapter():
                yield self.model
        elif self.frozen_copy is not None:
            yield self.frozen_copy
        else:
            raise ValueError("this policy was loaded without a reference")

    @property
    def eos_ids(self) -> Tensor:
        """(E,), every token id that ends a response: some models have two."""
        eos = self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        return torch.tensor([eos] if isinstance(eos, int) else eos, device=self.device)

    @property
    def pad_id(self) -> int:
        """The id at padding. No mask is made from it, so it may be the same id as EOS."""
        pad = self.tokenizer.pad_token_id
        return int(self.eos_ids[0]) if pad is None else pad

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """N prompts to left-padded ids and mask, each (N, P). A chat template adds its own special tokens.

        Raises:
            UserError: the template fails, or a prompt gives no tokens.
        """
        templated = self.chat_template and bool(self.tokenizer.chat_template)
        texts = [self._as_chat(prompt) for prompt in prompts] if templated else list(prompts)
        rows = self.tokenizer(texts, add_special_tokens=not templated)["input_ids"]
        if not all(rows):
            raise UserError(f"prompt = {short_repr(prompts[rows.index([])])}: it gives no tokens")
        longest = max(map(len, rows))
        ids = torch.tensor([[self.pad_id] * (longest - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return ids, mask

    def _as_chat(self, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # A template is a program of the model's, in a sandbox.
            reason = describe_error(error)
            raise UserError(f"the model's chat template: {reason}; --no-chat-template switches it off") from error

    def tokens(self, completion_ids: Tensor, lengths: Tensor) -> list[list[str]]:
        """(B, T) ids and (B,) lengths to B lists of tokens as text, with special tokens."""
        rows = [row[:n] for row, n in zip(completion_ids.tolist(), lengths.tolist(), strict=True)]
        return [[str(self.tokenizer.decode([token])) for token in row] for row in rows]

    @_no_progress_bars()
    def save(self, folder: Path) -> None:
        """Write a folder that transformers can load, or PEFT if it is an adapter. The whole folder appears at once."""
        temporary = folder.with_name(f".{folder.name}.tmp")
        options: dict[str, Any] = {"save_embedding_layers": False} if self.peft else {}  # Else PEFT asks the hub.
        self.model.save_pretrained(temporary, **options)
        (temporary / "README.md").unlink(missing_ok=True)  # PEFT writes an empty form.
        self.tokenizer.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)


def load_policy(
    model: str | ModelSettings = "embedded", *, with_reference: bool = False, adapter: str | Path | None = None
) -> Policy:
    """Load a policy, on the GPU where there is one.

    Args:
        model: "embedded" (no download), a folder with config, weights and tokenizer, or a name on the model hub; or the
            settings of one, such as a `TrainConfig`.
        with_reference: also keep what `Policy.reference` yields; without an adapter that is a frozen copy.
        adapter: a folder with a saved adapter, to use on the model in place of a new one. It is frozen.

    Raises:
        UserError: the model or its adapter cannot be loaded, or an extra package is missing.
    """
    settings = model if isinstance(model, ModelSettings) else ModelSettings(model=model)
    source = resolve_model(settings.model)
    check_model_folder(source, settings.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frozen = bool(settings.lora_r or adapter)
    dtype, reason = choose_dtype(settings.dtype, adapter=frozen, device=device)
    loading = {"quantization_config": nf4(dtype), "device_map": {"": device}} if settings.load_in_4bit else {}
    try:
        tokenizer, network = _from_safetensors(source, settings.attn_implementation, dtype=dtype, **loading)
    except Exception as error:  # transformers and safetensors raise many kinds.
        raise UserError(_why_not(settings.model, settings.attn_implementation, error)) from error
    disable_cpu_repacking(network)
    check_4bit_widths(network)
    if not settings.load_in_4bit:
        nn.Module.to(network, device)
    if settings.disable_dropout:
        _disable_dropout(network)
    frozen_copy = copy.deepcopy(network).requires_grad_(False).eval() if with_reference and not frozen else None
    if settings.gradient_checkpointing:
        checkpoint_layers(network)
    if adapter:
        network = load_adapter(network, str(adapter))
    elif settings.lora_r:
        network = add_adapter(network, settings)
    dtype_in_words = f"{str(dtype).removeprefix('torch.')}: {reason}"
    return Policy(network, tokenizer, frozen_copy, settings.chat_template, dtype_in_words)


@_no_progress_bars()
def _from_safetensors(source: str, attn_implementation: str, **loading: Any) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(source, **NO_CODE)
    if attn_implementation != "auto":
        loading["attn_implementation"] = attn_implementation
    elif getattr(AutoConfig.from_pretrained(source, **NO_CODE), "attn_logit_softcapping", None):
        loading["attn_implementation"] = "eager"  # Gemma 2 caps its attention scores, and sdpa would leave that out.
    options = loading | NO_CODE | {"use_safetensors": True, "output_loading_info": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, **options)
    model, info = loaded
    if missing := info["missing_keys"]:  # transformers has drawn these weights at random.
        raise ValueError(f"its weights have no {min(missing)}")
    return tokenizer, model


def resolve_model(name: str) -> str:
    """The folder of the embedded model for "embedded"; every other name as it is."""
    return str(EMBEDDED) if name == "embedded" else name


def check_model_folder(source: str, name: str) -> None:
    """Check the folder `source`, which the user calls `name`, before transformers does: its messages are long.

    Raises:
        UserError: the folder does not exist, or has no config, weights or tokenizer.
    """
    folder = Path(source)
    if not folder.exists() and folder.parent != Path() and folder.parent.is_dir():
        raise UserError(f"model = {name!r}: there is no such folder")  # Do not ask a hub for a mistyped path.
    for pattern, content in (("config.json", "config"), ("*.safetensors", "weights"), ("tokenizer*", "tokenizer")):
        if folder.is_dir() and not list(folder.glob(pattern)):
            raise UserError(f"model = {name!r}: the folder has no {content}; {pattern} is needed")


def _why_not(name: str, attn_implementation: str, error: Exception) -> str:
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


def _disable_dropout(model: nn.Module) -> None:
    """Disable both kinds: dropout modules, and the numbers that attention layers copied from the config."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
