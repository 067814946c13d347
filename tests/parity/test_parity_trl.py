"""Our losses and advantages against TRL's own: same tensors in, same loss and gradient out.

TRL's losses live in its trainers, so real ones are asked: `_compute_loss`, with log-probabilities of ours in place of a
model's, and the whole of `_generate_and_score_completions`, with rewards of ours, for the advantages.
"""

from functools import cache

import pytest
import torch
from cases import SEEDS, agree, distance, loss_and_gradient, make, ours, rewards_of
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer

from minicpgd import ALGORITHMS
from minicpgd.divergence import k3
from minicpgd.policy import EMBEDDED

trl = pytest.importorskip("trl", reason="needs the extra trl: pip install -e '.[trl]'")

PROMPTS, GROUP = 4, 6


@cache
def trainer_of(kind: str = "GRPO", **settings):
    """A trainer of TRL's, on the embedded model; `trainer.rewards` is what its reward function will say next."""
    config = {
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "output_dir": "unused",
        "save_strategy": "no",
        "per_device_train_batch_size": PROMPTS * GROUP,
        "num_generations": GROUP,
        "max_completion_length": 8,
        "disable_tqdm": True,
    }

    def reward(completions, **_):
        return trainer.rewards

    trainer = getattr(trl, f"{kind}Trainer")(
        model=str(EMBEDDED),
        reward_funcs=reward,
        args=getattr(trl, f"{kind}Config")(**(config | settings)),
        train_dataset=Dataset.from_list([{"prompt": f"{digit}+1="} for digit in range(PROMPTS)]),
        processing_class=AutoTokenizer.from_pretrained(EMBEDDED),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def theirs(case, ref_logp=None, tokens_of_rollout=None, **settings):
    """Loss and gradient of TRL's trainer with these settings, on a case's tensors."""
    trainer = trainer_of(**settings)
    some = torch.ones(len(case.mask), 1, dtype=torch.long)
    inputs = {
        "prompt_ids": some,
        "prompt_mask": some,
        "completion_ids": torch.ones_like(case.mask, dtype=torch.long),
        "completion_mask": case.mask.long(),
        "advantages": case.advantages,
        "old_per_token_logps": case.old_logp,
        "old_logps": (case.old_logp * case.mask).sum(dim=1),
        "ref_per_token_logps": ref_logp,
        "num_items_in_batch": case.mask.sum() if tokens_of_rollout is None else tokens_of_rollout,
    }

    def loss_of(logp: Tensor) -> Tensor:
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logp, torch.zeros_like(logp), None)
        try:
            return trainer._compute_loss(trainer.model, inputs)
        finally:
            del trainer._get_per_token_logps_and_entropies

    return loss_and_gradient(loss_of, case.logp)


LOSSES = {
    # our row, our settings; TRL's settings
    "grpo": ("grpo", {}, {"loss_type": "grpo"}),
    "grpo, wider above": ("grpo", {"epsilon_high": 0.28}, {"loss_type": "grpo", "epsilon_high": 0.28}),
    "grpo_dual_clip": ("grpo_dual_clip", {}, {"loss_type": "grpo", "delta": 3.0}),
    "dapo": ("dapo", {}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dr_grpo": ("dr_grpo", {"max_completion_length": 20}, {"loss_type": "dr_grpo", "max_completion_length": 20}),
    "gspo": ("gspo", {}, {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    "cispo": ("cispo", {}, {"loss_type": "cispo", "epsilon_high": 1.2}),
    "rloo, per token": ("rloo", {}, {"loss_type": "grpo"}),
    "rloo, per response": ("rloo", {"importance_level": "sequence"}, {"kind": "RLOO"}),
    "reinforce_pp": ("reinforce_pp", {}, {"loss_type": "bnpo"}),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("reach", ["far", "inside"])
@pytest.mark.parametrize("which", LOSSES)
def test_a_loss_and_its_gradient_are_trls(which, reach, seed):
    name, our_settings, their_settings = LOSSES[which]
    case = make(seed, reach)
    # a ratio of whole responses reaches e^28, and float32 knows an exponent of 28 to two millionths
    tolerance = 1e-5 if (which, reach) == ("rloo, per response", "far") else 1e-6
    assert agree(ours(name, case, **our_settings), theirs(case, **their_settings), tolerance)


def reference(case, seed):
    """(B, T) log-probabilities of a third policy."""
    noise = torch.randn(case.logp.shape, generator=torch.Generator().manual_seed(seed))
    return (case.logp + 0.7 * noise).clamp(max=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_kl_to_a_reference_is_trls_without_its_correction(seed):
    case = make(seed)
    ref_logp = reference(case, seed)
    settings = {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False}
    assert agree(ours("grpo", case, beta=0.3, ref_logp=ref_logp), theirs(case, ref_logp, **settings))


@pytest.mark.parametrize("seed", SEEDS)
def test_trl_multiplies_the_kl_by_the_ratio_unless_told_otherwise(seed):
    case = make(seed, "inside")
    ref_logp = reference(case, seed)

    def with_ratio(logp: Tensor) -> Tensor:
        row, ratio = ALGORITHMS["grpo"], (logp - case.old_logp).exp()
        kl = (ratio * k3(ref_logp - logp) * row.token_weights(case.mask)).sum()
        return row.loss(logp, case.old_logp, case.advantages, case.mask).loss + 0.3 * kl

    trls = theirs(case, ref_logp, loss_type="grpo", beta=0.3)
    assert agree(loss_and_gradient(with_ratio, case.logp), trls)
    assert not agree(ours("grpo", case, beta=0.3, ref_logp=ref_logp), trls, tolerance=1e-2)


def test_trls_cispo_caps_the_weight_at_epsilon_high_itself_not_at_1_plus_it():
    case = make(0)
    trls = theirs(case, loss_type="cispo", epsilon_high=0.28)
    assert not agree(ours("cispo", case, epsilon_high=0.28), trls, tolerance=0.1)
    assert agree(ours("cispo", case, epsilon_high=0.28 - 1), trls)


def test_what_trl_does_unless_told_otherwise():
    case = make(0)
    assert agree(ours("grpo", case, aggregation="token_mean"), theirs(case))  # "GRPO", with DAPO's mean over tokens
    assert agree(ours("cispo", case, epsilon_high=0.2 - 1), theirs(case, loss_type="cispo"))  # no weight above 0.2


@pytest.mark.parametrize(("name", "epsilon_high"), [("dapo", 0.28), ("cispo", 1.2)])
def test_trl_divides_by_the_tokens_of_the_rollout_where_we_divide_by_those_of_the_step(name, epsilon_high):
    """With two steps on a rollout, one with fewer tokens weighs less in TRL; here each step is a mean of its own."""
    case = make(0)
    settings = {"loss_type": name, "epsilon_high": epsilon_high, "steps_per_generation": 2}
    trls = theirs(case, tokens_of_rollout=2.5 * case.mask.sum(), **settings)  # this step has 40 % of the tokens
    loss, gradient = ours(name, case)
    assert agree((0.8 * loss, 0.8 * gradient), trls)


def advantages_of(rewards: Tensor, **settings) -> Tensor:
    """What TRL makes of rewards (N, G), through its whole rollout."""
    trainer = trainer_of(**settings)
    trainer.rewards = rewards.flatten().tolist()
    rows = [{"prompt": f"{digit}+1="} for digit in range(PROMPTS) for _ in range(GROUP)]
    return trainer._generate_and_score_completions(rows)["advantages"].view(PROMPTS, GROUP)


ADVANTAGES = {
    "grpo": {"scale_rewards": "group"},
    "dapo": {"scale_rewards": "group"},
    "dr_grpo": {"scale_rewards": "none"},
    "rloo": {"kind": "RLOO"},
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["binary", "graded"])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_are_trls(name, kind, seed):
    rewards, _, uids = rewards_of(kind, seed, PROMPTS, GROUP)
    rewards = rewards[torch.as_tensor(uids.argsort(kind="stable"))].view(PROMPTS, GROUP)
    here = ALGORITHMS[name].advantages(rewards, torch.ones(PROMPTS, GROUP))
    assert distance(here, advantages_of(rewards, **ADVANTAGES[name])) < 1e-6


def test_equal_rewards_leave_a_rest_in_trl_and_none_here():
    rewards = torch.full((PROMPTS, GROUP), 0.9)  # whose mean of six rounds
    assert not ALGORITHMS["grpo"].advantages(rewards, torch.ones(PROMPTS, GROUP)).any()
    assert 0 < advantages_of(rewards, scale_rewards="group").abs().max() < 1e-3
