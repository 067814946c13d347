"""Every setting of a run, in one dataclass; each field is a flag of `minicpgd train`.

`TrainConfig` inherits five groups of settings, and passes for each of them. Fields that TRL has mostly have TRL's name.

In: values from Python, the command line, a file. Out: a frozen dataclass, or one line that names the wrong field.
"""

import math
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from minicpgd.errors import ConfigError, Range, check_choice, check_fields, short_repr

if TYPE_CHECKING:
    from minicpgd.algorithms import Algorithm, LossSettings

MAX_TOKENS = 10**9  # A rollout of more tokens takes months, and tens of gigabytes before its first update.
TEMPERATURES = Range(1e-6, 1e30)  # Logits that are divided by less overflow.
SEEDS = Range(0, 2**63 - 1)
Count = Annotated[int, Range(1, 10**9)]
OptionalCount = Annotated[int | None, Range(1, 10**9)]
Weight = Annotated[float, Range(0, 1e30)]  # The largest float32 is near 3e38.
Positive = Annotated[float, Range(0, 1e30, above=True)]


class Settings:
    """A frozen dataclass whose fields are checked when it is made."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class ObjectiveSettings(Settings):
    """What is maximised: a row of the table, and its numbers."""

    algorithm: str = "cpgd"
    """cpgd, grpo, rloo, reinforce_pp, or another row of the table in minicpgd/algorithms/table.py."""
    epsilon: Annotated[float, Range(0, 1, above=True, below=True)] = 0.2
    """Ratios are clipped below at 1 - epsilon."""
    epsilon_high: Annotated[float | None, Range(0, 1e30, above=True)] = None
    """Ratios are clipped above at 1 + epsilon_high. None: the algorithm's own, else epsilon."""
    clip_growth: Annotated[float, Range(0, 1e30)] = 1.0
    """The factor on epsilon and epsilon_high at a response's last token. It is 1 at the first, and linear between."""
    drift_coef: Annotated[float | Literal["max_advantage", "adaptive"], Range(0, 1e30)] = 0.01
    """CPGD's alpha. max_advantage: the largest |advantage| of each rollout; adaptive: follows target_kl."""
    drift_clip: Positive = 2.0
    """CPGD's c: the drift's gradient never exceeds it."""
    target_kl: Annotated[float | None, Range(0, 1e30, above=True)] = 0.003
    """End the passes over a rollout once a minibatch's KL exceeds this (nats per token). None: never."""
    beta: Weight = 0.0
    """Weight of the KL to the model that training started from."""
    advantage_weight: Literal["equal", "std", "clip_filter"] | None = None
    """The weight of a prompt in the advantages. None: the algorithm's own."""
    aggregation: Literal["sequence_mean", "group_token_mean", "token_mean", "constant"] | None = None
    """How tokens and responses share one mean. None: the algorithm's own."""
    importance_level: Literal["token", "sequence", "sequence_mean"] | None = None
    """Ratios are taken per token, per sequence, or per sequence_mean (geometric). None: the algorithm's own."""
    group_reward_min: float | None = None
    """Leave groups with a smaller mean reward out of the loss. None: keep them."""
    group_reward_max: float | None = None
    """Leave groups with a larger mean reward out of the loss. None: keep them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon * self.clip_growth >= 1:
            raise ConfigError(f"clip_growth = {self.clip_growth}: times epsilon = {self.epsilon} it has to be below 1")
        if self.drift_coef == "adaptive" and self.target_kl is None:
            raise ConfigError("drift_coef = adaptive: it needs target_kl, the KL that it aims at; 0.003 is usual")
        # The default row has drift. It is asked first, because `row` needs torch, which takes seconds to import.
        default = ObjectiveSettings
        if self.algorithm == default.algorithm or self.row.drift or self.drift_coef == default.drift_coef:
            return
        from minicpgd.algorithms import ALGORITHMS

        drifts = ", ".join(row.name for row in ALGORITHMS.values() if row.drift)
        raise ConfigError(f"drift_coef = {self.drift_coef}: {self.algorithm} has no drift; these have one: {drifts}")

    @property
    def row(self) -> "Algorithm":
        """The row of the table, with the columns that these settings change.

        Raises:
            ConfigError: there is no such row.
        """
        from minicpgd.algorithms import ALGORITHMS

        check_choice("algorithm", self.algorithm, ALGORITHMS)
        return ALGORITHMS[self.algorithm].override(self.advantage_weight, self.aggregation, self.importance_level)

    @property
    def largest_kl(self) -> float:
        """The KL of a minibatch at which the passes over a rollout end, in nats per token."""
        return math.inf if self.target_kl is None or self.drift_coef == "adaptive" else self.target_kl

    def loss_settings(self, drift_coef: float) -> "LossSettings":
        """The numbers of the loss, with the `drift_coef` of one rollout."""
        from minicpgd.algorithms import LossSettings

        return LossSettings(self.epsilon, self.epsilon_high, drift_coef, self.drift_clip, self.beta, self.clip_growth)


@dataclass(frozen=True)
class TaskSettings(Settings):
    """Which problems are solved, and how a response is rewarded."""

    task: str = "chain_arithmetic"
    """Where problems come from: chain_arithmetic, gsm8k, reasoning_gym, or jsonl: any file of `prompt` and `answer`."""
    data: str | None = None
    """A file (.jsonl, .json, .parquet), a folder with train and test files, or reasoning_gym's task, as chain_sum."""
    instruction: str | None = None
    """Added below each problem. None: the task's own."""
    reward: str | None = None
    """The reward of a response: exact, math, last_number, number_in_text, format, your own module:function with TRL's
    signature, or a weighted sum, as 'math + 0.2*format'. None: the task's own."""


@dataclass(frozen=True)
class ModelSettings(Settings):
    """Which model is loaded, and what of it is trained."""

    model: str = "embedded"
    """The embedded model, a local folder, a GGUF file (with the extra gguf), or a name on the model hub."""
    load_in_4bit: bool = False
    """QLoRA: keep the model's frozen weights in 4-bit (NF4, double quantisation). Needs lora_r and the extra qlora."""
    lora_r: Annotated[int, Range(0, 10**4)] = 0
    """Rank of the LoRA adapter that is trained in place of the weights, for example 16. 0: train all weights."""
    lora_alpha: Count = 32
    """The adapter's output is scaled by lora_alpha / lora_r."""
    lora_target_modules: str = "all-linear"
    """Which layers get an adapter: all-linear, or names with commas between them, as q_proj,v_proj."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype of frozen weights and of the arithmetic. auto: float32 without adapter or GPU, else the card's."""
    attn_implementation: str = "auto"
    """How transformers computes attention: sdpa, flash_attention_2, eager. auto: sdpa where the model supports it."""
    gradient_checkpointing: bool = False
    """Recompute activations instead of keeping them: less memory, more time."""
    disable_dropout: bool = True
    """Dropout makes the ratio differ from 1 before the first update."""
    adapter: str | None = None
    """Start from this saved LoRA adapter of the model, in place of a new one. Its rank and layers are kept."""
    chat_template: bool = True
    """Put prompts into the tokenizer's chat template, if it has one. Not for base models."""
    system_prompt: str | None = None
    """A system message before each prompt that has none. It needs a chat template."""
    chat_date: str | None = None
    """The date that a chat template may print, as 2026-01-31. None: the day on which the run starts."""
    seed: Annotated[int, SEEDS] = 0
    """Decides every random draw of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            datetime.fromisoformat("2026-01-31" if self.chat_date is None else self.chat_date)
        except ValueError as error:
            raise ConfigError(f"chat_date = {self.chat_date!r}: a date is needed, as 2026-01-31") from error

    @property
    def trains_adapter(self) -> bool:
        """Whether an adapter is trained in place of the weights."""
        return bool(self.lora_r or self.adapter)


@dataclass(frozen=True)
class SamplingSettings(Settings):
    """How responses are sampled."""

    max_completion_length: Count = 64
    """Tokens a response may have; longer ones are truncated."""
    temperature: Annotated[float, TEMPERATURES] = 1.0
    """Divides the logits, in sampling and in scoring."""
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Sample from the likeliest tokens that hold this probability. Below 1 sampling is off-policy."""
    top_k: Annotated[int, Range(0, 10**9)] = 0
    """Sample from this many of the likeliest tokens. 0: from all. With a limit sampling is off-policy."""
    rollout_batch_size: OptionalCount = None
    """Responses generated at once, also in evaluations, to save memory. None: all."""

    def without_limits(self) -> "SamplingSettings":
        """The same without `top_p` and `top_k`: sample from all tokens."""
        return SamplingSettings(
            self.max_completion_length, self.temperature, rollout_batch_size=self.rollout_batch_size
        )


@dataclass(frozen=True)
class LoopSettings(Settings):
    """The training loop: how many rollouts, how many updates on each, the optimizer, and what is logged."""

    output_dir: str = "runs/{algorithm}-seed{seed}"
    """The run's folder, which must not exist yet; {algorithm} and {seed} are filled in."""
    max_steps: Count = 60
    """Rollouts in all. A step is one rollout and the K updates on it."""
    num_prompts: Count = 16
    """N: different prompts per rollout."""
    num_generations: Count = 16
    """G: sampled responses per prompt."""
    num_minibatches: Count = 4
    """Parts of a rollout; each makes one update per pass."""
    num_iterations: Count = 1
    """Passes over a rollout. K = num_iterations * num_minibatches is the number of updates on a rollout."""
    weigh_passes: bool = False
    """From the second pass on, multiply each token's advantage by its clipped ratio at the start of the pass."""
    micro_batch_size: OptionalCount = None
    """Responses per forward pass, to save memory. None: a whole minibatch. Gradients are the same."""
    micro_batch_tokens: OptionalCount = None
    """Tokens per forward pass, with padding and prompts; responses are sorted by length first. None: no limit."""
    chunk_size: OptionalCount = None
    """Tokens whose logits exist at once. None: as many as take 64 MiB, which for a small vocabulary is all."""
    optim: Literal["auto", "adamw", "paged_adamw_8bit"] = "auto"
    """The optimizer. auto: paged_adamw_8bit with an adapter on a GPU, else adamw."""
    learning_rate: Positive = 1e-4
    """AdamW's learning rate, the largest of the run."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls after the warm-up: not at all, or to 0 at the end of the run."""
    warmup_steps: Annotated[int, Range(0, 10**9)] = 0
    """Rollouts over which the learning rate rises linearly from 0."""
    adam_beta1: Annotated[float, Range(0, 1, below=True)] = 0.9
    """How much of the mean gradient stays at each update. 0: no momentum."""
    adam_beta2: Annotated[float, Range(0, 1, below=True)] = 0.999
    """How much of the mean squared gradient stays at each update."""
    adam_epsilon: Positive = 1e-8
    """Added to the root of the mean squared gradient, which divides the step."""
    weight_decay: Weight = 0.0
    """The share of each weight that an update removes, times the learning rate."""
    reset_optimizer: bool = False
    """Forget the optimizer's moments at each rollout."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    mask_truncated_completions: bool = False
    """Leave truncated responses out of the loss."""
    eval_steps: Count = 10
    """Greedy accuracy on the held-out set every this many steps, and before the first and after the last."""
    eval_problems: Count = 256
    """Size of the held-out set."""
    save_steps: Count = 10
    """A checkpoint every this many steps, and after the last; two are kept."""
    logging_steps: Count = 10
    """Write sampled responses to samples.jsonl, and each pass to passes.jsonl, every this many steps and at step 1."""


@dataclass(frozen=True)
class TrainConfig(LoopSettings, SamplingSettings, ModelSettings, TaskSettings, ObjectiveSettings):
    """One training run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("model", "data", "adapter", "output_dir"):
            parts = (getattr(self, name) or "").encode().split(b"/")
            if max(map(len, parts)) > 200 or sum(map(len, parts)) > 2000:
                raise ConfigError(f"{name} = {short_repr(getattr(self, name))}: it is longer than file names can be")
        if self.num_generations < 2 and (self.row.needs_groups or self.num_prompts < 2):
            reason = f"{self.algorithm} compares the responses to one prompt with each other, so it needs at least 2"
            raise ConfigError(f"num_generations = {self.num_generations}: {reason}")
        sizes = {"num_prompts * num_generations": self.num_responses, "eval_problems": self.eval_problems}
        for name, responses in sizes.items():
            if (tokens := responses * self.max_completion_length) > MAX_TOKENS:
                raise ConfigError(f"{name} * max_completion_length = {tokens}: at most {MAX_TOKENS} tokens fit")
        if self.num_responses % self.num_minibatches:
            rule = f"it has to divide num_prompts * num_generations = {self.num_responses}"
            raise ConfigError(f"num_minibatches = {self.num_minibatches}: {rule}")
        if self.adapter and self.beta:
            raise ConfigError("beta: with adapter, the reference would be the model without it; leave one of them out")
        if self.system_prompt and not self.chat_template:
            raise ConfigError("system_prompt: it needs the chat template, which --no-chat-template switches off")
        if self.load_in_4bit and not self.trains_adapter:
            raise ConfigError("lora_r = 0: 4-bit weights cannot be trained, but an adapter can; 16 is usual")
        if self.dtype not in ("auto", "float32") and not self.trains_adapter:
            raise ConfigError(f"dtype = {self.dtype}: without an adapter (lora_r) the weights are trained, in float32")

    @classmethod
    def from_groups(cls, *groups: Settings) -> "TrainConfig":
        """A config from the groups that it inherits; a group that is not given has its defaults."""
        return cls(**{name: value for group in groups for name, value in vars(group).items()})

    def group(self, kind: type[Any]) -> Any:
        """One of the groups that it inherits, on its own."""
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})

    @property
    def folder(self) -> Path:
        """`output_dir`, with its placeholders filled in."""
        return Path(self.output_dir.replace("{algorithm}", self.algorithm).replace("{seed}", str(self.seed)))

    @property
    def weights_folder(self) -> str:
        """The folder of the trained weights inside the run's: `adapter` with LoRA, else `model`."""
        return "adapter" if self.trains_adapter else "model"

    @property
    def num_responses(self) -> int:
        """B = N * G, per rollout."""
        return self.num_prompts * self.num_generations

    @property
    def updates_per_rollout(self) -> int:
        """K."""
        return self.num_iterations * self.num_minibatches
