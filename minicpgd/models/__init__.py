"""Models: a causal language model as a policy, sampling from it, and scoring its tokens.

In: settings, prompts. Out: responses with their log-probabilities, (B, T) in nats. `logprobs.py` scores, `sampling.py`
samples, `source.py` finds a model, `policy.py` loads it, and `lora.py` adds a 4-bit adapter. `pretrain.py` makes the
embedded model.
"""

from minicpgd.models.logprobs import logp_and_entropy, token_logprobs
from minicpgd.models.policy import Policy, load_policy, quiet
from minicpgd.models.sampling import Rollout, generate
from minicpgd.models.source import EMBEDDED, resolve_model

__all__ = [
    "EMBEDDED", "Policy", "Rollout", "generate", "load_policy", "logp_and_entropy", "quiet", "resolve_model",
    "token_logprobs",
]  # fmt: skip
