"""Our rows are verl's policy losses: its registry has them, with its aggregation and its configuration."""

import math
import subprocess
import sys
import warnings

import pytest
import torch

pytest.importorskip("verl", reason="needs verl: pip install 'minicpgd[verl]'")

from omegaconf import OmegaConf
from parity.cases import B, T, agree, distance, loss_and_gradient, make, ours
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig, PolicyLossConfig

from minicpgd import ALGORITHMS, TrainConfig, UserError
from minicpgd.integrations import verl as plugin

HORIZON = 20
MODES = ("seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm", "seq-mean-token-sum", "token-sum")
ACTOR = "actor_rollout_ref.actor"


def actor(row="cpgd", **changes):
    settings = {"loss_agg_mode": plugin.AGG_MODES[ALGORITHMS[row].aggregation], "loss_scale_factor": HORIZON}
    settings["clip_ratio_high"] = ALGORITHMS[row].epsilon_high or 0.2
    return ActorConfig(strategy="fsdp", rollout_n=B, ppo_micro_batch_size_per_gpu=B, **(settings | changes))


def call(row, settings, case, rows=slice(None), **changes):
    """Return verl's call of a policy loss: (loss, metrics), as a function of the log-probabilities (B, T)."""
    arguments = {
        "old_log_prob": case.old_logp[rows],
        "advantages": (case.advantages[:, None] * case.mask)[rows],
        "response_mask": case.mask.bool()[rows],
        "loss_agg_mode": settings.get("loss_agg_mode"),
        "config": settings,
        "rollout_is_weights": None,
    }
    return lambda logp: get_policy_loss_fn(f"minicpgd_{row}")(**(arguments | changes), log_prob=logp[rows])


def through_verl(row, config, case, **changes):
    """Return loss and gradient of a row, called as verl does it."""
    config.get("global_batch_info")["loss_scale_factor"] = HORIZON
    function = call(row, config, case, **changes)
    return loss_and_gradient(lambda logp: function(logp)[0], case.logp)


def test_importing_verl_registers_all_rows():
    """This needs a new process, because this one has imported the plugin by name."""
    code = (
        "import verl; from verl.trainer.ppo import core_algos as c; "
        "print(*c.POLICY_LOSS_REGISTRY); print(*c.ADV_ESTIMATOR_REGISTRY)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=3600)
    for registry in done.stdout.splitlines()[-2:]:
        assert {f"minicpgd_{row}" for row in ALGORITHMS} <= set(registry.split())


@pytest.mark.parametrize("reach", ["far", "inside"])
@pytest.mark.parametrize("row", ALGORITHMS)
def test_losses_agree_with_ours(row, reach):
    case, mode = make(1, reach), f"minicpgd_{row}"
    strong = {"policy_loss": plugin.CPGDLossConfig(loss_mode=mode, drift_coef=1.0)} if ALGORITHMS[row].drift else {}
    assert agree(through_verl(row, actor(row, **strong), case), ours(row, case, max_completion_length=HORIZON))


@pytest.mark.parametrize("seed", range(3))
def test_cpgd_by_hand(seed):
    """The derivative is A where a token is not clipped, minus alpha min(r - 1, c) everywhere, per token."""
    case, alpha, bound = make(seed), 3.75, 2.0
    ratio = (case.logp - case.old_logp).exp()
    A = case.advantages[:, None]
    clipped = ((A > 0) & (ratio > 1.2)) | ((A < 0) & (ratio < 0.8))
    derivative = torch.where(clipped, 0.0, A) - alpha * (ratio - 1).clamp(max=bound)
    by_hand = -derivative * case.mask / case.mask.sum(dim=1, keepdim=True) / B
    config = actor(policy_loss=plugin.CPGDLossConfig(drift_coef=alpha, drift_clip=bound))
    assert distance(through_verl("cpgd", config, case)[1], by_hand) <= 1e-6


def test_a_loss_without_a_gradient():
    case = make(0)
    with torch.no_grad():
        loss, _ = call("cpgd", actor(), case)(case.logp)
    assert distance(loss, ours("cpgd", case, drift_coef=TrainConfig().drift_coef)[0]) <= 1e-6


@pytest.mark.parametrize("kind", ["dataclass", "DictConfig", "dict"])
def test_any_configuration_can_have_our_fields(kind):
    case = make(2)
    fields = {"drift_coef": 3.75, "drift_clip": 1.0, "importance_level": "sequence_mean"}
    if kind == "dataclass":
        config = actor(policy_loss=plugin.CPGDLossConfig(**fields))
    else:
        config = {
            "clip_ratio": 0.3,
            "clip_ratio_low": None,
            "clip_ratio_high": None,
            "loss_agg_mode": "seq-mean-token-mean",
            "global_batch_info": {},
            "policy_loss": {"loss_mode": "minicpgd_cpgd", **fields},
        }
        config = OmegaConf.create(config) if kind == "DictConfig" else config
    epsilon = 0.2 if kind == "dataclass" else 0.3
    assert agree(through_verl("cpgd", config, case), ours("cpgd", case, epsilon=epsilon, **fields))
    defaults = actor(policy_loss=PolicyLossConfig())
    assert not agree(through_verl("cpgd", defaults, case), through_verl("cpgd", config, case))


def test_the_drift_coefficient_is_that_of_train_config_by_default():
    case = make(2)
    assert agree(
        through_verl("cpgd", actor(policy_loss=PolicyLossConfig()), case),
        ours("cpgd", case, drift_coef=TrainConfig().drift_coef),
    )


def test_the_clip_bounds_are_those_of_verls_configuration():
    case = make(0)
    config = actor("dapo", clip_ratio_low=0.1, clip_ratio_high=0.2)
    assert agree(through_verl("dapo", config, case), ours("dapo", case, epsilon=0.1, epsilon_high=0.2))


@pytest.mark.parametrize(
    ("row", "changes", "flag"),
    [
        ("dapo", {"clip_ratio_high": 0.2}, f"{ACTOR}.clip_ratio_high=0.28"),
        ("cpgd", {"loss_agg_mode": "token-mean"}, f"{ACTOR}.loss_agg_mode=seq-mean-token-mean"),
        ("reinforce_pp", {"loss_agg_mode": "token-sum"}, f"{ACTOR}.loss_agg_mode=token-mean"),
        ("dr_grpo", {"loss_scale_factor": None}, f"{ACTOR}.loss_scale_factor="),
    ],
)
def test_one_line_warns_if_verl_and_the_row_disagree(row, changes, flag):
    plugin._warn_once.cache_clear()
    function = call(row, actor(row, **changes), make(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            function(make(0).logp)
    (line,) = [str(warning.message) for warning in caught]
    assert flag in line
    assert "\n" not in line


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("row", ["cpgd", "gspo", "dr_grpo"])
def test_micro_batches_and_ranks_change_nothing(row, mode):
    """There are two ranks of two micro-batches each. FSDP adds on a rank, and averages over ranks."""
    case = make(0)
    settings = {"batch_num_tokens": case.mask.sum().item(), "global_batch_size": B, "loss_scale_factor": HORIZON}
    whole, split = actor(row, loss_agg_mode=mode), actor(row, loss_agg_mode=mode)
    split.global_batch_info.update(settings, dp_size=2)
    parts = [call(row, split, case, rows=slice(start, start + 2)) for start in range(0, B, 2)]
    together = loss_and_gradient(lambda logp: sum(part(logp)[0] for part in parts) / 2, case.logp)
    assert agree(together, through_verl(row, whole, case))


def test_rollout_weights_multiply_surrogate_and_drift():
    case = make(0)
    weights = torch.linspace(0.2, 2.0, T).expand(B, T)
    config = actor(policy_loss=plugin.CPGDLossConfig(drift_coef=0.7))
    plain, weighted = through_verl("cpgd", config, case), through_verl("cpgd", config, case, rollout_is_weights=weights)
    assert distance(weighted[1], plain[1] * weights) < 1e-6
    assert not agree(plain, weighted)


def test_metrics_have_the_same_names_without_a_token():
    """verl averages lists of metrics over ranks. A rank with a shorter list would stop the run."""
    case, config = make(0), actor()
    config.global_batch_info.update(batch_num_tokens=10, global_batch_size=B)
    _, full = call("cpgd", config, case)(case.logp)
    loss, empty = call("cpgd", config, case, response_mask=torch.zeros(B, T, dtype=torch.bool))(case.logp)
    assert loss == 0
    assert full.keys() == empty.keys()
    assert set(empty.values()) == {0.0}
    d = case.log_ratio
    positive, negative = (((case.advantages * s)[:, None] > 0).expand(B, T)[case.mask.bool()] for s in (1, -1))
    clipped = (positive & (d > math.log(1.2))) | (negative & (d < math.log(0.8)))
    assert full["actor/pg_clipfrac"] == pytest.approx(clipped.float().mean().item())
    assert full["actor/ppo_kl"] == pytest.approx(-d.mean().item())
    assert full["actor/kl_old"] == pytest.approx((d.exp() - 1 - d).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"drift_coef": "max_advantage"}, "(G-1)/sqrt(G): 2.475 for rollout.n=8, 3.75 for 16"),
        ({"drift_coef": -1}, "policy_loss.drift_coef = -1: it has to be a number that is at least 0"),
        ({"drift_coef": "much"}, "policy_loss.drift_coef = 'much': it has to be a number"),
        ({"drift_clip": 0}, "policy_loss.drift_clip = 0: it has to be a number above 0"),
        ({"drift_clip": math.nan}, "policy_loss.drift_clip = nan: it has to be a number above 0"),
        ({"importance_level": "tokens"}, "policy_loss.importance_level = 'tokens': did you mean 'token'?"),
        ({"loss_mode": "vanilla"}, "policy_loss.loss_mode = 'vanilla': only our losses read it"),
        ({"loss_mode": "minicpgd_cgpd"}, "did you mean 'minicpgd_cpgd'?"),
        ({"loss_mode": "minicpgd_grpo", "drift_coef": 2.0}, "drift_coef = 2.0: only these have a drift: minicpgd_cpgd"),
    ],
)
def test_wrong_fields_are_one_line(fields, line):
    with pytest.raises(UserError) as caught:
        plugin.CPGDLossConfig(**fields)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_numbers_in_the_line_about_max_advantage_are_right():
    for group, largest in ((8, 2.475), (16, 3.75)):
        rewards = torch.tensor([[1.0] + [0.0] * (group - 1)])
        assert ALGORITHMS["cpgd"].advantages(rewards, rewards).max().item() == pytest.approx(largest, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"config": None}, "got no config"),
        ({"config": actor(clip_ratio_low=1.5)}, "clip_ratio_low = 1.5, clip_ratio_high = 0.2"),
        ({"config": {"clip_ratio_low": 0.2}}, "clip_ratio_low = 0.2, clip_ratio_high = None"),
        ({"advantages": torch.arange(B * T, dtype=torch.float32).view(B, T)}, "advantages differ within a response"),
    ],
)
def test_calls_that_cannot_be_computed_are_one_line(changes, line):
    case = make(0)
    with pytest.raises(UserError, match="^[^\n]+$") as caught:
        call("cpgd", actor(), case, **changes)(case.logp)
    assert line in str(caught.value)
