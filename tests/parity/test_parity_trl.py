"""Our losses and advantages agree with TRL's own: the same tensors give the same loss and gradient.

TRL's losses are methods of its trainers, so the tests use real trainers. `_compute_loss` gets our log-probabilities in
place of a model's. The advantages come from the whole of `_generate_and_score_completions`, with our rewards.
"""

from functools import cache

import pytest
import torch
from cases import SEEDS, agree, distance, loss_and_gradient, make, ours, rewards_of
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer

from minicpgd import ALGORITHMS
from minicpgd.algorithms.divergence import k3
from minicpgd.models import EMBEDDED

trl = pytest.importorskip("trl", reason="needs the extra trl: pip install -e '.[trl]'")

PROMPTS, GROUP = 4, 6


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    """A trainer creates its folder in the current one."""
    monkeypatch.chdir(tmp_path)


@cache
def trainer_of(kind: str = "GRPO", **settings):
    """Return a trainer of TRL's, on the embedded model. Its reward function returns `trainer.rewards`."""
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
    """Return loss and gradient of TRL's trainer with these settings, on a case's tensors."""
    trainer = trainer_of(**settings)
    ones = torch.ones(len(case.mask), 1, dtype=torch.long)
    inputs = {
        "prompt_ids": ones,
        "prompt_mask": ones,
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
def test_a_loss_and_its_gradient_agree_with_trl(which, reach, seed):
    name, our_settings, their_settings = LOSSES[which]
    case = make(seed, reach)
    # The ratio of a whole response can be e^28, and in float32 an exponent of 28 has an error of two millionths.
    tolerance = 1e-5 if (which, reach) == ("rloo, per response", "far") else 1e-6
    assert agree(ours(name, case, **our_settings), theirs(case, **their_settings), tolerance)


def reference(case, seed):
    """Return the log-probabilities (B, T) of a third policy."""
    noise = torch.randn(case.logp.shape, generator=torch.Generator().manual_seed(seed))
    return (case.logp + 0.7 * noise).clamp(max=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_kl_to_a_reference_agrees_with_trl_without_its_correction(seed):
    case = make(seed)
    ref_logp = reference(case, seed)
    settings = {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False}
    assert agree(ours("grpo", case, beta=0.3, ref_logp=ref_logp), theirs(case, ref_logp, **settings))


@pytest.mark.parametrize("seed", SEEDS)
def test_trl_multiplies_the_kl_by_the_ratio_by_default(seed):
    case = make(seed, "inside")
    ref_logp = reference(case, seed)

    def with_ratio(logp: Tensor) -> Tensor:
        row, ratio = ALGORITHMS["grpo"], (logp - case.old_logp).exp()
        kl = (ratio * k3(ref_logp - logp) * row.token_weights(case.mask)).sum()
        return row.loss(logp, case.old_logp, case.advantages, case.mask).loss + 0.3 * kl

    trls = theirs(case, ref_logp, loss_type="grpo", beta=0.3)
    assert agree(loss_and_gradient(with_ratio, case.logp), trls)
    assert not agree(ours("grpo", case, beta=0.3, ref_logp=ref_logp), trls, tolerance=1e-2)


def test_the_weight_of_trls_cispo_is_at_most_epsilon_high_and_ours_1_plus_epsilon_high():
    case = make(0)
    trls = theirs(case, loss_type="cispo", epsilon_high=0.28)
    assert not agree(ours("cispo", case, epsilon_high=0.28), trls, tolerance=0.1)
    assert agree(ours("cispo", case, epsilon_high=0.28 - 1), trls)


def test_the_defaults_of_trl():
    """TRL's "GRPO" has DAPO's mean over tokens, and no weight of its CISPO is above 0.2."""
    case = make(0)
    assert agree(ours("grpo", case, aggregation="token_mean"), theirs(case))
    assert agree(ours("cispo", case, epsilon_high=0.2 - 1), theirs(case, loss_type="cispo"))


@pytest.mark.parametrize(("name", "epsilon_high"), [("dapo", 0.28), ("cispo", 1.2)])
def test_trl_divides_by_the_tokens_of_the_rollout_and_we_divide_by_those_of_the_step(name, epsilon_high):
    """With two steps on a rollout, the step with fewer tokens has a smaller loss in TRL. Here each step is a mean."""
    case = make(0)
    settings = {"loss_type": name, "epsilon_high": epsilon_high, "steps_per_generation": 2}
    trls = theirs(case, tokens_of_rollout=2.5 * case.mask.sum(), **settings)  # This step has 40 % of the tokens.
    loss, gradient = ours(name, case)
    assert agree((0.8 * loss, 0.8 * gradient), trls)


def advantages_of(rewards: Tensor, **settings) -> Tensor:
    """Return the advantages (N, G) that TRL computes from rewards (N, G), in its whole rollout."""
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
def test_advantages_agree_with_trl(name, kind, seed):
    rewards, _, uids = rewards_of(kind, seed, PROMPTS, GROUP)
    rewards = rewards[torch.as_tensor(uids.argsort(kind="stable"))].view(PROMPTS, GROUP)
    our_advantages = ALGORITHMS[name].advantages(rewards, torch.ones(PROMPTS, GROUP))
    assert distance(our_advantages, advantages_of(rewards, **ADVANTAGES[name])) < 1e-6


def test_equal_rewards_give_small_advantages_in_trl_and_zero_here():
    rewards = torch.full((PROMPTS, GROUP), 0.9)  # The mean of six of them has a rounding error.
    assert not ALGORITHMS["grpo"].advantages(rewards, torch.ones(PROMPTS, GROUP)).any()
    assert 0 < advantages_of(rewards, scale_rewards="group").abs().max() < 1e-3
