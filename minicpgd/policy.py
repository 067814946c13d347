"""The policy: a causal language model, its tokenizer, and how text gets in and out of them.

`load_policy` takes the embedded model, a local folder or a hub name. Everything else in the package sees token ids.
"""

import copy
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from huggingface_hub.utils import logging as hub_logging
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from minicpgd.errors import UserError

EMBEDDED = Path(str(files("minicpgd") / "embedded"))


def quiet() -> None:
    """Keep transformers and the hub's client from drawing bars and telling of retries; for programs with their own."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()


@dataclass
class Policy:
    """A model and its tokenizer; `reference` is a frozen copy of the model as it was loaded, where one is needed."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    reference: PreTrainedModel | None = None

    @property
    def device(self) -> torch.device:
        """Where the model's tensors are."""
        return self.model.device

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
        """N prompts to left-padded ids and mask, each (N, P)."""
        rows = self.tokenizer(list(prompts), add_special_tokens=True)["input_ids"]
        longest = max(map(len, rows))
        ids = torch.tensor([[self.pad_id] * (longest - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return ids, mask

    def decode(self, completion_ids: Tensor, lengths: Tensor) -> list[str]:
        """(B, T) ids and (B,) lengths to text, special tokens left out."""
        rows = [row[:n] for row, n in zip(completion_ids.tolist(), lengths.tolist(), strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Write a folder that transformers, and `load_policy`, can load; it appears once all of it is there."""
        making = folder.with_name(f".{folder.name}.tmp")
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
) -> Policy:
    """Load a policy for training, on the GPU where there is one, with float32 weights.

    Args:
        name: "embedded" (no download), a folder with config, weights and tokenizer, or a name on the model hub.
        with_reference: keep a frozen copy, for `beta`.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        disable_dropout: without it, two passes over the same tokens differ, and so does the ratio from 1.

    Raises:
        UserError: the folder has no config or no weights, or the name is neither a folder nor to be had from the hub.
    """
    source = str(EMBEDDED) if name == "embedded" else name
    folder = Path(source)
    if not folder.exists() and folder.parent != Path() and folder.parent.is_dir():
        raise UserError(f"model = {name!r}: there is no such folder")  # before a hub is asked, and asked again
    if folder.is_dir():
        for pattern, what in (("config.json", "config"), ("*.safetensors", "weights"), ("tokenizer*", "tokenizer")):
            if not list(folder.glob(pattern)):
                raise UserError(f"model = {name!r}: the folder has no {what}; {pattern} is needed")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except Exception as error:  # transformers raises its own kinds, safetensors another
        first_line = next(iter(str(error).strip().splitlines()), "").strip()
        raise UserError(
            f"model = {name!r}: cannot be loaded as 'embedded', a local folder or a hub name: {first_line}"
        ) from error
    nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    if disable_dropout:
        _disable_dropout(model)
    reference = copy.deepcopy(model).requires_grad_(False).eval() if with_reference else None
    if gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return Policy(model, tokenizer, reference)


def _disable_dropout(model: nn.Module) -> None:
    """Both kinds: modules, and the numbers that attention layers copied from the config when they were made."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
