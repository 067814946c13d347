"""Everything a run can be told, in one dataclass; each field is a flag of `minicpgd train`.

Names are TRL's where TRL has the field, so what is learned here holds there. A config is checked when it is made: one
that exists can be run.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

from minicpgd.advantages import WEIGHTS
from minicpgd.algorithms import AGGREGATIONS, ALGORITHMS, LEVELS
from minicpgd.errors import ConfigError, did_you_mean, shown

DTYPES = ("auto", "float32", "bfloat16", "float16")
OPTIMIZERS = ("auto", "adamw", "paged_adamw_8bit")
TEMPERATURES = (1e-6, 1e30)  # logits divided by less are no numbers any more
MOST_TOKENS = 10**9  # of a rollout; that is months, and tens of gigabytes before the first of them


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    algorithm: str = "cpgd"
    """cpgd, grpo, rloo, reinforce_pp, or another row of the table in README.md."""
    model: str = "embedded"
    """The embedded model, a local folder, or a name on the model hub."""
    load_in_4bit: bool = False
    """QLoRA: keep the model's frozen weights in 4-bit (NF4, double quantisation). Needs lora_r and the extra qlora."""
    lora_r: int = 0
    """Rank of the LoRA adapter that is trained in place of the weights, 16 say. 0: no adapter, all weights are."""
    lora_alpha: int = 32
    """The adapter's output is scaled by lora_alpha / lora_r."""
    lora_target_modules: str = "all-linear"
    """Which layers get an adapter: all-linear, or names with commas between them, as q_proj,v_proj."""
    dtype: str = "auto"
    """float32, bfloat16 or float16, of frozen weights and arithmetic; what is trained is float32 always. auto: float32
    without an adapter or a GPU, else what the card has."""
    attn_implementation: str = "auto"
    """How transformers computes attention: sdpa, flash_attention_2, eager. auto: sdpa where the model has it."""
    optim: str = "auto"
    """adamw or paged_adamw_8bit. auto: the second with an adapter on a GPU, else the first."""

    task: str = "chain_arithmetic"
    """Where problems come from: chain_arithmetic, gsm8k, or jsonl, which is any file with `prompt` and `answer`."""
    data: str | None = None
    """A local file (.jsonl, .parquet), or a folder with train and test files. None: gsm8k comes from the hub."""
    instruction: str | None = None
    """Added below each problem. None: the task's own."""
    chat_template: bool = True
    """Put prompts into the tokenizer's chat template, if it has one. Not for base models."""
    reward: str | None = None
    """What a response is worth: exact, math, format, your own module:function with TRL's signature, or a sum by weight,
    as 'math + 0.2*format'. None: the task's own."""
    output_dir: str = "runs/{algorithm}-seed{seed}"
    """The run's folder, which must not exist yet; {algorithm} and {seed} are filled in."""
    seed: int = 0
    """Decides every random draw of the run."""

    max_steps: int = 60
    """Rollouts in all. A step is one rollout and the K updates made on it."""
    num_prompts: int = 16
    """N: different prompts per rollout."""
    num_generations: int = 16
    """G: sampled responses per prompt."""
    max_completion_length: int = 64
    """Tokens a response may have; longer ones are cut."""
    temperature: float = 1.0
    """Divides the logits, when sampling and when scoring alike."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that hold this probability. Below 1 sampling is off-policy."""
    top_k: int = 0
    """Sample from this many of the likeliest tokens. 0: from all. A cut makes sampling off-policy."""
    rollout_batch_size: int | None = None
    """Responses generated at once, also at evaluations, to save memory. None: all."""

    num_minibatches: int = 4
    """Parts a rollout is cut into; each makes one update per pass."""
    num_iterations: int = 1
    """Passes over a rollout. K = num_iterations * num_minibatches is how hard a rollout is used."""
    learning_rate: float = 1e-4
    """Of AdamW (0.9, 0.999), constant, no weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    micro_batch_size: int | None = None
    """Responses per forward pass, to save memory. None: a whole minibatch. Gradients are the same."""
    micro_batch_tokens: int | None = None
    """Tokens per forward pass, padding and prompts included; responses are sorted by length first. None: no limit."""

    epsilon: float = 0.2
    """Ratios are clipped below at 1 - epsilon."""
    epsilon_high: float | None = None
    """Ratios are clipped above at 1 + epsilon_high. None: the algorithm's own, else epsilon."""
    drift_coef: float | Literal["auto"] = "auto"
    """CPGD's alpha, the weight of the policy drift; auto: each rollout's largest |advantage| (our rule)."""
    drift_clip: float = 2.0
    """CPGD's c: the drift's gradient never exceeds it."""
    beta: float = 0.0
    """Weight of the KL to the model that training started from."""
    advantage_weight: str | None = None
    """One of equal, std, clip_filter. None: the algorithm's own."""
    aggregation: str | None = None
    """One of sequence_mean, token_mean, constant. None: the algorithm's own."""
    importance_level: str | None = None
    """Ratios are taken per token, per sequence, or per sequence_mean (geometric). None: the algorithm's own."""
    mask_truncated_completions: bool = False
    """Leave out of the loss those responses that ran into max_completion_length."""

    disable_dropout: bool = True
    """Dropout makes the ratio differ from 1 before the first update."""
    gradient_checkpointing: bool = False
    """Recompute activations instead of keeping them: less memory, more time."""
    chunk_size: int | None = None
    """Tokens whose logits exist at once. None: as many as make 64 MiB, which for a small vocabulary is all."""

    eval_steps: int = 10
    """Greedy accuracy on the held-out set every this many steps, and before the first and after the last."""
    eval_problems: int = 256
    """Size of the held-out set."""
    save_steps: int = 10
    """A checkpoint every this many steps, and after the last; two are kept."""
    logging_steps: int = 10
    """Sampled responses go to samples.jsonl, and each pass to passes.jsonl, every this many steps, and at step 1."""

    def __post_init__(self) -> None:
        self._check_types()
        self._check_names()
        self._check_numbers()
        self._check_together()

    @property
    def folder(self) -> Path:
        """`output_dir`, filled in."""
        return Path(self.output_dir.replace("{algorithm}", self.algorithm).replace("{seed}", str(self.seed)))

    @property
    def trained_as(self) -> str:
        """What the run's folder calls the result: `adapter`, or `model` where all weights are trained."""
        return "adapter" if self.lora_r else "model"

    @property
    def num_responses(self) -> int:
        """B = N * G, per rollout."""
        return self.num_prompts * self.num_generations

    @property
    def updates_per_rollout(self) -> int:
        """K."""
        return self.num_iterations * self.num_minibatches

    def _check_types(self) -> None:
        """A config from Python or JSON has no parser to refuse "16" or 16.5 for an int."""
        for field in fields(self):
            value, kinds = getattr(self, field.name), get_args(field.type) or (field.type,)
            wanted = kinds[0]
            ok = type(value) is wanted or (wanted is float and type(value) is int)
            if isinstance(value, float) and not math.isfinite(value):
                ok = False
            if not (ok or (value is None and NoneType in kinds) or (value == "auto" and field.name == "drift_coef")):
                raise ConfigError(f"{field.name} = {shown(value)}: {wanted.__name__} expected")
            if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
                raise ConfigError(f"{field.name} = {shown(value)}: it holds what no text and no file name can")

    def _check_names(self) -> None:
        choices: dict[str, Iterable[str]] = {
            "algorithm": ALGORITHMS,
            "advantage_weight": WEIGHTS,
            "aggregation": AGGREGATIONS,
            "importance_level": LEVELS,
            "dtype": DTYPES,
            "optim": OPTIMIZERS,
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                near = did_you_mean(value[:99], known)
                raise ConfigError(f"{name} = {shown(value)}: {near}choose from {', '.join(known)}")

        for name in ("model", "data", "output_dir"):
            parts = (getattr(self, name) or "").encode().split(b"/")
            if max(map(len, parts)) > 200 or sum(map(len, parts)) > 2000:
                raise ConfigError(f"{name} = {shown(getattr(self, name))}: longer than names of files can be")

    def _check_numbers(self) -> None:
        at_least_one = (
            "max_steps num_prompts num_generations max_completion_length num_minibatches num_iterations lora_alpha "
            "rollout_batch_size micro_batch_size micro_batch_tokens chunk_size eval_steps eval_problems save_steps "
            "logging_steps"
        )
        ranges: dict[str, tuple[float, float]] = dict.fromkeys(at_least_one.split(), (1, 10**9))
        ranges |= {"seed": (0, 2**63 - 1), "top_k": (0, 10**9), "lora_r": (0, 10**4), "temperature": TEMPERATURES}
        ranges |= dict.fromkeys(("beta", "drift_coef"), (0, 1e30))  # float32 ends at 3e38
        for name, (least, most) in ranges.items():
            if (value := getattr(self, name)) is not None and value != "auto":
                check_range(name, value, least, most)
        rules = [
            (name, lambda v: 0 < v <= 1e30, "more than 0, and at most 1e30")
            for name in ("learning_rate", "max_grad_norm", "epsilon_high", "drift_clip")
        ]
        rules += [
            ("epsilon", lambda v: 0 < v < 1, "between 0 and 1, both excluded: ratios are clipped at 1 - epsilon"),
            ("top_p", lambda v: 0 < v <= 1, "more than 0 and at most 1"),
        ]
        for name, holds, wanted in rules:
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ConfigError(f"{name} = {shown(value)}: it has to be {wanted}")

    def _check_together(self) -> None:
        algorithm = ALGORITHMS[self.algorithm]
        if self.num_generations < 2 and (algorithm.advantage.__name__ != "batch_whitened" or self.num_prompts < 2):
            raise ConfigError(
                f"num_generations = {self.num_generations}: {self.algorithm} compares the responses to one prompt "
                "with each other, so it needs at least 2"
            )
        for what in ("num_responses", "eval_problems"):
            if (tokens := getattr(self, what) * self.max_completion_length) > MOST_TOKENS:
                name = {"num_responses": "num_prompts * num_generations"}.get(what, what)
                raise ConfigError(
                    f"{name} * max_completion_length = {tokens}: at most {MOST_TOKENS} tokens can be held"
                )
        if self.num_responses % self.num_minibatches:
            raise ConfigError(
                f"num_minibatches = {self.num_minibatches}: does not divide num_prompts * num_generations = "
                f"{self.num_responses}"
            )
        if self.load_in_4bit and not self.lora_r:
            raise ConfigError("lora_r = 0: 4-bit weights cannot be trained, an adapter on them can; 16 is usual")
        if self.dtype not in ("auto", "float32") and not self.lora_r:
            raise ConfigError(f"dtype = {self.dtype}: without an adapter (lora_r) the weights are trained, in float32")
        if self.drift_coef != "auto" and not algorithm.drift:
            raise ConfigError(
                f"drift_coef = {self.drift_coef}: {self.algorithm} has no drift; those with one are "
                + ", ".join(name for name, row in ALGORITHMS.items() if row.drift)
            )

    def save(self, path: Path) -> None:
        """Write config.json."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


def check_range(name: str, value: float, least: float, most: float) -> None:
    """See that a number lies where it has to.

    Raises:
        ConfigError: it does not, or is NaN.
    """
    if not least <= value <= most:
        wanted = f"at most {most:g}" if value > most else f"at least {least:g}"
        raise ConfigError(f"{name} = {shown(value)}: it has to be {wanted}")


def parse_json(text: str | bytes) -> Any:
    """Read JSON, in which no object has a key twice; json.loads would keep the last of them and say nothing.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise ValueError("thousands of brackets inside each other") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(max(names, key=names.count))} is there twice")
    return made


def load_config(path: Path) -> TrainConfig:
    """Read config.json.

    Raises:
        ConfigError: not JSON, or a field that is unknown or wrong; the line names file and field.
    """
    try:
        values = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable config: {error}") from error
    if isinstance(values, dict) and "architectures" in values:
        raise ConfigError(f"{path}: a model's, not a run's; `minicpgd evaluate` and `minicpgd sample` take models")
    known = {field.name for field in fields(TrainConfig)}
    if not isinstance(values, dict) or not set(values) <= known:
        unknown = ", ".join(sorted(set(values) - known)) if isinstance(values, dict) else "no JSON object"
        raise ConfigError(f"{path}: unknown fields: {unknown}")
    try:
        return TrainConfig(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
