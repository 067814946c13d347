"""The table: every algorithm is one row.

The columns from `centre` to `drift` answer the questions in `loss.py`. `drift` is true or false, and the others hold
functions. A few rows set more: the `level` of the ratio, a value of their own for the upper clip bound (`epsilon_high`),
and whether the KL to a reference policy is penalised in the loss or in the reward (`reference_kl`). To try an idea of your own,
write its function beside the others and add a row.

In: the name of an algorithm. Out: its row, an `Algorithm`.
"""

from minicpgd.algorithms.advantages import (
    batch_whitened,
    equal,
    group_centred,
    group_centred_whitened,
    inverse_std,
    leave_one_out,
)
from minicpgd.algorithms.aggregation import constant, sequence_mean, token_mean
from minicpgd.algorithms.loss import Algorithm
from minicpgd.algorithms.surrogates import (
    capped_weight,
    log_ratio_clip,
    log_ratio_free,
    per_sequence_mean,
    ratio_clip,
    ratio_dual_clip,
    ratio_free,
)

# fmt: off
_ROWS = (
    #          name                     label                   centre                  weight       surrogate        aggregation    drift  what it shows
    Algorithm("cpgd",                   "CPGD",                 group_centred,          inverse_std, log_ratio_clip,  sequence_mean, True,  "clip the log-ratio, and penalise the drift"),
    # the baselines
    Algorithm("grpo",                   "GRPO",                 group_centred,          inverse_std, ratio_clip,      sequence_mean, False, "PPO's clip; the group is its own baseline"),
    Algorithm("rloo",                   "RLOO",                 leave_one_out,          equal,       ratio_clip,      sequence_mean, False, "the other responses are the baseline"),
    Algorithm("reinforce_pp",           "REINFORCE++",          batch_whitened,         equal,       ratio_clip,      token_mean,    False, "the batch is the baseline: no groups", reference_kl="reward"),
    Algorithm("reinforce_pp_baseline",  "REINFORCE++ baseline", group_centred_whitened, equal,       ratio_clip,      token_mean,    False, "subtract the group's mean, then whiten over the batch"),
    # CPGD taken apart
    Algorithm("pg",                     "CPGD without both",    group_centred,          inverse_std, log_ratio_free,  sequence_mean, False, "no ratio, no clip, no drift"),
    Algorithm("cpg",                    "CPGD without drift",   group_centred,          inverse_std, log_ratio_clip,  sequence_mean, False, "CPGD without the drift"),
    Algorithm("pgd",                    "CPGD without clip",    group_centred,          inverse_std, log_ratio_free,  sequence_mean, True,  "CPGD without the clip"),
    # GRPO taken apart
    Algorithm("grpo_unclipped",         "GRPO without clip",    group_centred,          inverse_std, ratio_free,      sequence_mean, False, "what the clip prevents"),
    Algorithm("grpo_dual_clip",         "GRPO, dual clip",      group_centred,          inverse_std, ratio_dual_clip, sequence_mean, False, "is the unbounded gradient of tokens with A < 0 the cause of the collapse?"),
    Algorithm("grpo_drift",             "GRPO + drift",         group_centred,          inverse_std, ratio_clip,      sequence_mean, True,  "does the log-ratio matter once there is a drift?"),
    # other baselines with the drift
    Algorithm("rloo_drift",             "RLOO + drift",         leave_one_out,          equal,       ratio_clip,      sequence_mean, True,  "does the drift help RLOO as much as GRPO?"),
    Algorithm("reinforce_pp_drift",     "REINFORCE++ + drift",  batch_whitened,         equal,       ratio_clip,      token_mean,    True,  "does the drift help REINFORCE++?", reference_kl="reward"),
    # the relatives
    Algorithm("dr_grpo",                "Dr. GRPO",             group_centred,          equal,       ratio_clip,      constant,      False, "divide by neither length nor deviation"),
    Algorithm("dapo",                   "DAPO",                 group_centred,          inverse_std, ratio_clip,      token_mean,    False, "clip higher; every token has the same weight", epsilon_high=0.28),
    Algorithm("gspo",                   "GSPO",                 group_centred,          inverse_std, ratio_clip,      sequence_mean, False, "one ratio for a whole response", level=per_sequence_mean),
    Algorithm("cispo",                  "CISPO",                group_centred,          inverse_std, capped_weight,   token_mean,    False, "cap the weight; clip no token's gradient to 0"),
)
# fmt: on
ALGORITHMS: dict[str, Algorithm] = {row.name: row for row in _ROWS}


def display_name(name: str) -> str:
    """The name that figures print; an algorithm that is not in the table keeps its own."""
    return ALGORITHMS[name].label if name in ALGORITHMS else name
