"""The policy: a causal language model, its tokenizer, and how text gets in and out of them.

`load_policy` takes the embedded model, a local folder or a hub name, whole or in 4-bit with an adapter. Everything else
in the package sees token ids.
"""

import copy
import logging as python_logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from minicpgd.config import TrainConfig
from minicpgd.errors import UserError, said, shown
from minicpgd.qlora import add_adapter, check_widths, checkpoint_layers, choose_dtype, keep_as_loaded, load_adapter, nf4

EMBEDDED = Path(str(files("minicpgd") / "embedded"))
NO_CODE = {"trust_remote_code": False}  # of a model's own: with None, transformers would ask on the terminal


def quiet() -> None:
    """Keep transformers and the hub's client from drawing bars and telling of retries; for programs with their own."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    python_logging.getLogger("bitsandbytes").setLevel(python_logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # TRL's to heed, not a user's


@dataclass
class Policy:
    """A model and its tokenizer.

    `copied` is a frozen copy of the model as it was loaded, where one is needed; `arithmetic` says in words which dtype
    it computes in, and why.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    copied: PreTrainedModel | None = None
    chat_template: bool = True
    arithmetic: str = "float32"

    @property
    def device(self) -> torch.device:
        """Where the model's tensors are."""
        return self.model.device

    @property
    def peft(self) -> Any:
        """The model as PEFT's, where an adapter is trained in place of the weights; else None."""
        return self.model if hasattr(self.model, "peft_config") else None

    @contextmanager
    def reference(self) -> Iterator[PreTrainedModel]:
        """The model that training started from: with its adapter switched off, which costs no memory, or a copy.

        Raises:
            ValueError: neither; it was loaded without.
        """
        if self.peft:
            with self.peft.disable_adapter():
                yield self.model
        elif self.copied is not None:
            yield self.copied
        else:
            raise ValueError("this policy was loaded without a reference")

    @property
    def eos_ids(self) -> Tensor:
        """(E,), every token id that ends a response: some models have two."""
        eos = self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        return torch.tensor([eos] if isinstance(eos, int) else eos, device=self.device)

    @property
    def pad_id(self) -> int:
        """What fills the gaps; no mask is ever made from it, so it may be the same id as EOS."""
        pad = self.tokenizer.pad_token_id
        return int(self.eos_ids[0]) if pad is None else pad

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """N prompts to left-padded ids and mask, each (N, P); in the chat template, which brings its special tokens.

        Raises:
            UserError: the template cannot be filled in, or nothing comes out.
        """
        templated = self.chat_template and bool(self.tokenizer.chat_template)
        texts = [self._as_chat(prompt) for prompt in prompts] if templated else list(prompts)
        rows = self.tokenizer(texts, add_special_tokens=not templated)["input_ids"]
        if not all(rows):
            raise UserError(f"prompt = {shown(prompts[rows.index([])])}: no tokens come of it")
        longest = max(map(len, rows))
        ids = torch.tensor([[self.pad_id] * (longest - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return ids, mask

    def _as_chat(self, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program of the model's, in a sandbox
            raise UserError(f"the model's chat template: {said(error)}; --no-chat-template leaves it out") from error

    def decode(self, completion_ids: Tensor, lengths: Tensor) -> list[str]:
        """(B, T) ids and (B,) lengths to text, special tokens left out."""
        rows = [row[:n] for row, n in zip(completion_ids.tolist(), lengths.tolist(), strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def tokens(self, completion_ids: Tensor, lengths: Tensor) -> list[list[str]]:
        """(B, T) ids and (B,) lengths to B lists of tokens as text, special ones included."""
        rows = [row[:n] for row, n in zip(completion_ids.tolist(), lengths.tolist(), strict=True)]
        return [[str(self.tokenizer.decode([token])) for token in row] for row in rows]

    def save(self, folder: Path) -> None:
        """Write a folder that transformers, or PEFT where it is an adapter, can load; all of it appears at once."""
        making = folder.with_name(f".{folder.name}.tmp")
        if self.peft:
            self.model.save_pretrained(making, save_embedding_layers=False)  # else PEFT asks the hub about them
            (making / "README.md").unlink(missing_ok=True)  # a form, left blank
        else:
            self.model.save_pretrained(making)
        self.tokenizer.save_pretrained(making)
        shutil.rmtree(folder, ignore_errors=True)
        making.rename(folder)


def load_policy(
    name: str = "embedded",
    *,
    with_reference: bool = False,
    gradient_checkpointing: bool = False,
    disable_dropout: bool = True,
    load_in_4bit: bool = False,
    lora_r: int = 0,
    lora_alpha: int = 32,
    lora_target_modules: str = "all-linear",
    dtype: str = "auto",
    attn_implementation: str = "auto",
    chat_template: bool = True,
    seed: int = 0,
    adapter: str | Path | None = None,
) -> Policy:
    """Load a policy, on the GPU where there is one.

    Args:
        name: "embedded" (no download), a folder with config, weights and tokenizer, or a name on the model hub.
        with_reference: `beta` needs one: the model without its adapter, or, where there is none, a frozen copy.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        disable_dropout: without it, two passes over the same tokens differ, and so does the ratio from 1.
        load_in_4bit, lora_r, lora_alpha, lora_target_modules, dtype: see `qlora.py`; what is trained is float32.
        attn_implementation: "auto" for sdpa where the model has it, and where it computes the same as eager.
        chat_template: put prompts into the tokenizer's, if it has one.
        seed: decides the adapter's initial weights.
        adapter: a folder with a saved adapter, to go on the model in place of a new one; for use, not for training.

    Raises:
        UserError: the folder has no config or no weights, the name is neither a folder nor to be had from the hub, or
            an extra package is missing.
    """
    source = str(EMBEDDED) if name == "embedded" else name
    look_into(source, name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frozen = bool(lora_r or adapter)
    number, reason = choose_dtype(dtype, adapter=frozen, device=device)
    loading = {"quantization_config": nf4(number), "device_map": {"": device}} if load_in_4bit else {}
    try:
        tokenizer, model = _from_safetensors(source, attn_implementation, dtype=number, **loading)
    except Exception as error:  # transformers raises its own kinds, safetensors another
        raise UserError(_why_not(name, attn_implementation, error)) from error
    keep_as_loaded(model)
    check_widths(model)
    if not load_in_4bit:
        nn.Module.to(model, device)
    if disable_dropout:
        _disable_dropout(model)
    copied = copy.deepcopy(model).requires_grad_(False).eval() if with_reference and not frozen else None
    if gradient_checkpointing:
        checkpoint_layers(model)
    if adapter:
        model = load_adapter(model, str(adapter))
    elif lora_r:
        model = add_adapter(model, r=lora_r, alpha=lora_alpha, target_modules=lora_target_modules, seed=seed)
    return Policy(model, tokenizer, copied, chat_template, f"{str(number).removeprefix('torch.')}: {reason}")


def _from_safetensors(
    source: str, attn_implementation: str, **loading: Any
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    tokenizer = AutoTokenizer.from_pretrained(source, **NO_CODE)
    if attn_implementation != "auto":
        loading["attn_implementation"] = attn_implementation
    elif getattr(AutoConfig.from_pretrained(source, **NO_CODE), "attn_logit_softcapping", None):
        loading["attn_implementation"] = "eager"  # Gemma 2 squashes its scores, which sdpa leaves out
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, use_safetensors=True, output_loading_info=True, **NO_CODE, **loading
    )
    model, found = loaded
    if missing := found["missing_keys"]:  # transformers has drawn them at random
        raise ValueError(f"its weights have no {min(missing)}")
    return tokenizer, model


def policy_of(config: TrainConfig, adapter: Path | None = None) -> Policy:
    """The policy that a config names; to go on from a trained adapter, say which."""
    return load_policy(
        config.model,
        with_reference=config.beta > 0,
        gradient_checkpointing=config.gradient_checkpointing,
        disable_dropout=config.disable_dropout,
        load_in_4bit=config.load_in_4bit,
        lora_r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_target_modules=config.lora_target_modules,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        chat_template=config.chat_template,
        seed=config.seed,
        adapter=adapter,
    )


def look_into(source: str, name: str) -> None:
    """See what a folder lacks before transformers does, whose words for it are many.

    Args:
        source: a folder, or a name on the model hub.
        name: what the user called it.

    Raises:
        UserError: the folder is not there, or has no config, weights or tokenizer.
    """
    folder = Path(source)
    if not folder.exists() and folder.parent != Path() and folder.parent.is_dir():
        raise UserError(f"model = {name!r}: there is no such folder")  # before a hub is asked, and asked again
    if folder.is_dir():
        for pattern, what in (("config.json", "config"), ("*.safetensors", "weights"), ("tokenizer*", "tokenizer")):
            if not list(folder.glob(pattern)):
                raise UserError(f"model = {name!r}: the folder has no {what}; {pattern} is needed")


def _why_not(name: str, attn_implementation: str, error: Exception) -> str:
    """One line for what kept a model from being loaded."""
    first_line = next(iter(str(error).strip().splitlines()), "").strip()
    if attn_implementation != "auto" and "attention" in first_line.lower():
        return f"attn_implementation = {attn_implementation!r}: {first_line} With auto, one that is there is taken"
    if "custom code" in first_line:
        return f"model = {name!r}: it brings Python code of its own, which is never run here; another kind is needed"
    if Path(name).is_dir() or name == "embedded":
        return f"model = {name!r}: cannot be loaded: {first_line}"
    return (
        f"model = {name!r}: neither a local folder nor in this machine's cache, and the hub cannot be asked or does "
        f"not have it. With a network: `hf download {name} --local-dir {Path(name).name}`, then "
        f"`--model {Path(name).name}` ({first_line})"
    )


def _disable_dropout(model: nn.Module) -> None:
    """Both kinds: modules, and the numbers that attention layers copied from the config when they were made."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
