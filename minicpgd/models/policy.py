"""The policy: a causal language model and its tokenizer.

In: the embedded model, a local folder or a hub name; in full precision, or in 4 bit with an adapter. Out: a `Policy`,
which turns text into token ids. Everything else in the package sees token ids.
"""

import copy
import logging as python_logging
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from minicpgd.config import ModelSettings
from minicpgd.errors import UserError, describe_error, short_repr
from minicpgd.models.logprobs import num_positions, without_padding
from minicpgd.models.lora import (
    add_adapter,
    check_4bit_widths,
    disable_cpu_repacking,
    is_stored_in_4bit,
    load_adapter,
    nf4,
    set_4bit_dtype,
)
from minicpgd.models.precision import checkpoint_layers, choose_dtype, disable_dropout
from minicpgd.models.source import NO_CODE, check_model_folder, resolve_model, why_not
from minicpgd.tasks.data_files import Prompt

_DATE = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(["'])(.*?)\1\s*\)""")  # A template asks for today.


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
    settings: ModelSettings = ModelSettings()
    frozen_copy: PreTrainedModel | None = None  # This is the model as it was loaded, if `reference` needs it.
    dtype_in_words: str = "float32"  # This names the dtype of the arithmetic, and the reason for it.

    @property
    def name(self) -> str:
        """The model as the settings name it, for messages."""
        return f"model = {self.settings.model!r}"

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
        both = (self.model.generation_config.eos_token_id, self.tokenizer.eos_token_id)
        ids = [i for eos in both for i in ([eos] if isinstance(eos, int) else eos or [])]
        return torch.tensor(list(dict.fromkeys(ids)), dtype=torch.long, device=self.device)

    @property
    def pad_id(self) -> int:
        """The id at padding. No mask is made from it, so it may be the same id as EOS."""
        pad = self.tokenizer.pad_token_id
        return int(self.eos_ids[0]) if pad is None else pad

    def encode(self, prompts: Sequence[Prompt], max_completion_length: int = 0) -> tuple[Tensor, Tensor]:
        """N prompts to left-padded ids and mask, each (N, P). A chat template adds its own special tokens.

        Args:
            prompts: texts, or conversations as lists of messages. The template turns both into one text.
            max_completion_length: tokens that have to fit behind each prompt.

        Raises:
            UserError: the template fails or is missing, a prompt gives no tokens, or the model has too few positions.
        """
        templated = self.uses_chat_template
        texts = [self._as_chat(prompt) for prompt in prompts] if templated else list(map(self._as_text, prompts))
        rows = self.tokenizer(texts, add_special_tokens=not templated)["input_ids"]
        if not all(rows):
            raise UserError(f"prompt = {short_repr(prompts[rows.index([])])}: it gives no tokens")
        longest, positions = max(map(len, rows)), num_positions(self.model)
        if longest + max_completion_length > positions:
            prompt = short_repr(prompts[max(range(len(rows)), key=lambda i: len(rows[i]))])
            reason = f"its {longest} tokens and max_completion_length = {max_completion_length} exceed the"
            raise UserError(f"prompt = {prompt}: {reason} {positions} positions of {self.name}")
        ids = torch.tensor([[self.pad_id] * (longest - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return ids, mask

    @property
    def uses_chat_template(self) -> bool:
        """Whether prompts become conversations."""
        return self.settings.chat_template and bool(self.tokenizer.chat_template)

    @property
    def prints_date(self) -> bool:
        """Whether the chat template prints the date."""
        return self.settings.chat_template and bool(_DATE.search(str(self.tokenizer.chat_template)))

    def _as_text(self, prompt: Prompt) -> str:
        if self.settings.system_prompt is not None or not isinstance(prompt, str):
            what = "a system_prompt" if isinstance(prompt, str) else f"the conversation {short_repr(prompt)}"
            why = "the tokenizer has none" if self.settings.chat_template else "--no-chat-template switches it off"
            raise UserError(f"{self.name}: {what} needs a chat template, and {why}")
        return prompt

    def _as_chat(self, prompt: Prompt) -> str:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.settings.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.settings.system_prompt}, *messages]
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
        try:
            if self.settings.chat_date is not None:
                day = datetime.fromisoformat(self.settings.chat_date)
                template = self.tokenizer.get_chat_template()
                options["chat_template"] = _DATE.sub(lambda call: repr(day.strftime(call[2])), template)
            return str(self.tokenizer.apply_chat_template(messages, **options))
        except Exception as error:  # A template is a program of the model's, in a sandbox.
            reason = describe_error(error)
            raise UserError(f"the model's chat template: {reason}; --no-chat-template switches it off") from error

    def tokens(self, completion_ids: Tensor, lengths: Tensor) -> list[list[str]]:
        """(B, T) ids and (B,) lengths to B lists of tokens as text, with special tokens."""
        rows = without_padding(completion_ids, lengths)
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
        model: "embedded" (no download), a folder with config, weights and tokenizer, a GGUF file, or a name on the
            model hub; or the settings of one, such as a `TrainConfig`.
        with_reference: also keep what `Policy.reference` yields; without an adapter that is a frozen copy.
        adapter: a folder with a saved adapter, to use on the model in place of a new one. It is frozen.

    Raises:
        UserError: the model or its adapter cannot be loaded, or an extra package is missing.
    """
    settings = model if isinstance(model, ModelSettings) else ModelSettings(model=model)
    source = resolve_model(settings.model)
    check_model_folder(source, settings.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frozen = settings.trains_adapter or adapter is not None
    dtype, reason = choose_dtype(settings.dtype, adapter=frozen, device=device)
    loading = {"quantization_config": nf4(dtype), "device_map": {"": device}} if settings.load_in_4bit else {}
    try:
        config = AutoConfig.from_pretrained(source, **NO_CODE)
        stored_in_4bit = is_stored_in_4bit(config, settings, adapter)
        loading |= {"config": config, "dtype": dtype}
        tokenizer, network = _from_safetensors(source, settings.attn_implementation, **loading)
        if stored_in_4bit:
            network = set_4bit_dtype(network, dtype) if settings.load_in_4bit else network.dequantize(dtype)
    except UserError:
        raise
    except Exception as error:  # transformers and safetensors raise many kinds.
        raise UserError(why_not(settings.model, settings.attn_implementation, error)) from error
    _check_vocabulary(settings.model, tokenizer, network)
    disable_cpu_repacking(network)
    check_4bit_widths(network)
    if not settings.load_in_4bit:
        nn.Module.to(network, device)
    if settings.disable_dropout:
        disable_dropout(network)
    frozen_copy = copy.deepcopy(network).requires_grad_(False).eval() if with_reference and not frozen else None
    if settings.gradient_checkpointing:
        checkpoint_layers(network)
    if adapter:
        network = load_adapter(network, str(adapter))
    elif settings.trains_adapter:
        network = add_adapter(network, settings)
    dtype_in_words = f"{str(dtype).removeprefix('torch.')}: {reason}"
    return Policy(network, tokenizer, settings, frozen_copy, dtype_in_words)


@_no_progress_bars()
def _from_safetensors(source: str, attn_implementation: str, **loading: Any) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(source, **NO_CODE)
    if attn_implementation != "auto":
        loading["attn_implementation"] = attn_implementation
    elif getattr(loading["config"], "attn_logit_softcapping", None):
        loading["attn_implementation"] = "eager"  # Gemma 2 caps its attention scores, and sdpa would leave that out.
    options = loading | NO_CODE | {"use_safetensors": True, "output_loading_info": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, **options)
    model, info = loaded
    if missing := info["missing_keys"]:  # transformers has drawn these weights at random.
        raise ValueError(f"its weights have no {min(missing)}")
    return tokenizer, model


def _check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Check that every token has an embedding, and that a response can end."""
    largest, rows = max(tokenizer.get_vocab().values()), len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        advice = "remove the token, or resize the embedding with resize_token_embeddings and save the model"
        reason = f"its embedding has {rows} rows, and its token {token!r} has the id {largest}"
        raise UserError(f"model = {name!r}: {reason}; {advice}")
    if not len(Policy(model, tokenizer).eos_ids):
        reason = "neither its tokenizer nor its generation config names an end-of-sequence token"
        raise UserError(f"model = {name!r}: {reason}; add eos_token_id to generation_config.json")
