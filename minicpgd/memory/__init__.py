"""Memory: which settings fit on which card, predicted from a model's config without its weights.

In: settings and an architecture. Out: bytes by moment and component. `simulate.py` runs the real code on tensors
without numbers, `predict.py` adds the formulas, and `fit.py` changes settings until they fit.
"""

from minicpgd.memory.architectures import known_architectures, model_config
from minicpgd.memory.fit import Attempt, fit_card
from minicpgd.memory.predict import GIB, PROMPT_LENGTH, Memory, predict, predict_recipe

__all__ = [
    "GIB", "PROMPT_LENGTH", "Attempt", "Memory", "fit_card", "known_architectures", "model_config", "predict",
    "predict_recipe",
]  # fmt: skip
