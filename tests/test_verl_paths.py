"""Flags lead to the right gradient, and shuffled rewards to the right advantages, through verl's own functions.

hydra's files, the checks, the dataclass, the worker's loss function and the trainers' `compute_advantage` are verl's.
Only the cluster is missing: Ray, the engines and the sampler need GPUs.
"""

import re
import shlex
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("verl", reason="needs verl: pip install 'minicpgd[verl]'")

import verl
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from parity.cases import B, T, agree, loss_and_gradient, make, ours
from verl import DataProto
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils import tensordict_utils
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.workers.utils.losses import ppo_loss

from minicpgd import UserError

HORIZON = 20
ACTOR = "actor_rollout_ref.actor"


def composed(row, *overrides):
    """Return verl's configuration for a row, as a user would set it."""
    return checked(
        f"algorithm.adv_estimator=minicpgd_{row}",
        f"{ACTOR}.policy_loss.loss_mode=minicpgd_{row}",
        f"{ACTOR}.policy_loss._target_=minicpgd.integrations.verl.CPGDLossConfig",
        f"{ACTOR}.ppo_micro_batch_size_per_gpu=4",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
        f"actor_rollout_ref.rollout.n={B}",
        *overrides,
    )


def checked(*words):
    """Return verl's configuration as in `python -m verl.trainer.main_ppo`, after verl's own checks."""
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer/config"), version_base=None):
        config = compose("ppo_trainer", list(words))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # verl warns that there is no critic.
        validate_config(config, need_reference_policy(config), need_critic(config))
    return config


def jagged(rows):
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def workers_loss(config, case, logp, rows=range(B), prompt=3, **global_batch):
    """Call `ppo_loss` as verl's engine does: without padding, and with a token's score one place before the token."""
    lengths = case.mask.sum(dim=1).int().tolist()
    uneven = {
        "prompts": torch.zeros(B, prompt),
        "responses": torch.zeros(B, T),
        "response_mask": case.mask,
        "old_log_probs": case.old_logp,
        "advantages": case.advantages[:, None] * case.mask,
    }
    tensors = {k: jagged(v[i, : prompt if k == "prompts" else lengths[i]] for i in rows) for k, v in uneven.items()}
    data = tensordict_utils.get_tensordict(tensors, non_tensor_dict={"dp_size": 1, **global_batch})
    before, after = torch.zeros(prompt - 1), torch.zeros(1)
    scores = jagged(torch.cat([before, logp[i, : lengths[i]], after]) for i in rows)
    return ppo_loss(config, {"log_probs": scores}, data)


@pytest.mark.parametrize(
    ("row", "overrides", "settings"),
    [
        (
            "cpgd",
            [f"+{ACTOR}.policy_loss.drift_coef=3.75", f"{ACTOR}.loss_agg_mode=seq-mean-token-mean"],
            {"drift_coef": 3.75},
        ),
        ("dapo", [f"{ACTOR}.clip_ratio_high=0.28"], {}),
        (
            "dr_grpo",
            [f"{ACTOR}.loss_agg_mode=seq-mean-token-sum-norm", f"{ACTOR}.loss_scale_factor={HORIZON}"],
            {"max_completion_length": HORIZON},
        ),
    ],
)
def test_flags_on_the_command_line_give_the_gradient_of_the_row(row, overrides, settings):
    case = make(0)
    config = omega_conf_to_dataclass(composed(row, *overrides).actor_rollout_ref.actor)
    known = {"batch_num_tokens": int(case.mask.sum()), "global_batch_size": B}
    whole = loss_and_gradient(lambda logp: workers_loss(config, case, logp, **known)[0], case.logp)
    assert agree(whole, ours(row, case, **settings))
    halves = [range(0, B, 2), range(1, B, 2)]
    two_ranks = loss_and_gradient(
        lambda logp: sum(workers_loss(config, case, logp, rows, **{**known, "dp_size": 2})[0] for rows in halves) / 2,
        case.logp,
    )
    assert agree(two_ranks, ours(row, case, **settings))
    metrics = workers_loss(config, case, case.logp, **known)[1]
    assert {"actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl", "actor/kl_old"} <= metrics.keys()


def test_a_wrong_flag_stops_the_driver():
    with pytest.raises(Exception, match="3.75 for 16") as caught:
        composed("cpgd", f"+{ACTOR}.policy_loss.drift_coef=max_advantage")
    assert isinstance(caught.value.__cause__, UserError)


def test_a_flag_sets_the_weight_of_advantages():
    data = rollout(torch.tensor([1.0, 0, 0]), list("aaa"))
    config = composed("cpgd", "+algorithm.advantage_weight=equal").algorithm
    assert estimate(data, **config).tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    assert estimate(data, **composed("cpgd").algorithm).tolist() == pytest.approx([1.1545, -0.5772, -0.5772], rel=1e-3)


def rollout(rewards, uids, lengths=None):
    """Return a batch in which the first and the last token of each response have half of its reward each."""
    lengths = torch.full((len(uids),), 4) if lengths is None else lengths
    mask = (torch.arange(T) < lengths[:, None]).long()
    spread = torch.zeros(len(uids), T)
    spread[:, 0] += rewards / 2
    spread[torch.arange(len(uids)), lengths - 1] += rewards / 2
    tensors = {"token_level_rewards": spread, "response_mask": mask}
    return DataProto.from_dict(tensors, non_tensors={"uid": np.array(uids, dtype=object)})


def estimate(data, row="cpgd", **config):
    out = compute_advantage(data, adv_estimator=f"minicpgd_{row}", config=OmegaConf.create(config))
    assert torch.equal(out.batch["advantages"], out.batch["returns"])
    mask = out.batch["response_mask"]
    assert torch.equal(out.batch["advantages"], out.batch["advantages"][:, :1] * mask)
    return out.batch["advantages"][:, 0]


def test_the_responses_of_a_group_may_stand_anywhere():
    rewards = torch.tensor([1.0, 0, 3, 1, 0, 2, 0, 2, 5])
    uids = ["b", "a", "c", "b", "a", "c", "b", "a", "c"]
    by_hand, centred = torch.empty(9), torch.empty(9)
    for name in "abc":
        rows = [i for i, uid in enumerate(uids) if uid == name]
        group = rewards[rows].numpy()
        centred[rows] = torch.tensor(group - group.mean())
        by_hand[rows] = torch.tensor((group - group.mean()) / (group.std(ddof=1) + 1e-4))
    data = rollout(rewards, uids)
    assert estimate(data).tolist() == pytest.approx(by_hand.tolist(), abs=1e-6)
    assert estimate(data, advantage_weight="equal").tolist() == pytest.approx(centred.tolist(), abs=1e-6)
    assert estimate(data, "rloo").tolist() == pytest.approx((centred * 3 / 2).tolist(), abs=1e-6)


def test_whitening_counts_tokens():
    """A response counts as often as it has tokens, in any group. numpy's weighted variance agrees."""
    rewards, lengths = torch.tensor([1.0, 0, 3, 1]), torch.tensor([1, 12, 5, 2])
    mean = np.average(rewards, weights=lengths)
    deviation = np.average((rewards - mean) ** 2, weights=lengths) ** 0.5
    for uids in ("abab", "abcd"):
        advantages = estimate(rollout(rewards, list(uids), lengths), "reinforce_pp")
        assert advantages.tolist() == pytest.approx(((rewards - mean) / deviation).tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("row", "uids", "config", "line"),
    [
        ("cpgd", "aab", {}, "minicpgd_cpgd: groups of 1 to 2 responses to a prompt"),
        ("cpgd", "abc", {}, "actor_rollout_ref.rollout.n has to be above 1"),
        ("reinforce_pp", "abc", {"advantage_weight": "std"}, "actor_rollout_ref.rollout.n has to be above 1"),
        ("cpgd", "aaa", {"advantage_weight": "sdt"}, "algorithm.advantage_weight = 'sdt': did you mean 'std'?"),
    ],
)
def test_groups_that_cannot_be_compared_are_one_line(row, uids, config, line):
    with pytest.raises(UserError, match="^[^\n]+$") as caught:
        estimate(rollout(torch.tensor([1.0, 0, 1]), list(uids)), row, **config)
    assert line in str(caught.value)


def test_a_rollout_without_uids_is_one_line():
    with pytest.raises(UserError, match="got no uid"):
        get_adv_estimator_fn("minicpgd_cpgd")(token_level_rewards=torch.ones(2, 2), response_mask=torch.ones(2, 2))


def test_the_command_of_the_page_is_a_valid_configuration():
    page = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
    words = re.search(r"^python -m verl\.trainer\.main_ppo (.*?)\n```", page, re.DOTALL | re.MULTILINE)[1]
    config = checked(*shlex.split(words.replace("\\\n", " ")))
    assert config.algorithm.adv_estimator == "minicpgd_cpgd"
    loss = omega_conf_to_dataclass(config.actor_rollout_ref.actor).policy_loss
    assert (type(loss).__name__, loss.loss_mode, loss.drift_coef) == ("CPGDLossConfig", "minicpgd_cpgd", 0.01)
