"""Inside TRL two processes learn, one process agrees with them, every row has our loss, and bad settings are errors."""

import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import loss_of
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback

from minicpgd import ALGORITHMS
from minicpgd.algorithms import adaptive_drift_coef
from minicpgd.config import ObjectiveSettings
from minicpgd.errors import ConfigError, UserError
from minicpgd.models import EMBEDDED

pytest.importorskip("trl", reason="needs the extra trl: pip install -e '.[trl]'")
from trl import GRPOConfig  # noqa: E402 (after the check that TRL is there)

from minicpgd.integrations.trl_config import NOT_OURS  # noqa: E402

ours = importlib.import_module("minicpgd.integrations.trl")

SCRIPT = Path(__file__).parent / "ranks.py"
PROMPTS, GROUP = 2, 4
CPU = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}


def run(*command):
    """Run a Python program. If it fails, the message is the end of its stderr."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return the folder of two processes, and of one that replayed their responses."""
    folder = tmp_path_factory.mktemp("ranks")
    run(SCRIPT, folder)
    return folder


def logged(folder, name, world):
    return [line for line in json.loads((folder / f"{name}-log-{world}.json").read_text()) if "loss" in line]


def test_two_processes_learn(ranks):
    rewards = [line["reward"] for line in logged(ranks, "cpgd", 2) if "reward" in line]
    assert rewards[0] < 0.5
    assert sum(rewards[-2:]) / 2 >= 0.8


@pytest.mark.parametrize("name", ["cpgd", "dapo"])
def test_two_processes_end_with_one_policy(ranks, name):
    first, second = (torch.load(ranks / f"{name}-parameters-{rank}-of-2.pt") for rank in (0, 1))
    start = AutoModelForCausalLM.from_pretrained(EMBEDDED).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in start)
    assert not any(torch.equal(first[key], start[key]) for key in start)


@pytest.mark.parametrize("name", ["cpgd", "dapo"])
def test_one_process_with_the_same_batch_has_the_same_losses(ranks, name):
    two, one = logged(ranks, name, 2), logged(ranks, name, 1)
    assert len(two) >= len(one) > 3
    for key in ("loss", "grad_norm"):
        wanted = [line[key] for line in two[: len(one)]]
        assert [line[key] for line in one] == pytest.approx(wanted, abs=1e-4, rel=1e-4)
    assert len({round(line["loss"], 4) for line in two}) > 3  # The losses differ from each other.


@pytest.fixture
def make(tmp_path):
    """Return a function that makes a trainer on the embedded model, with given rewards."""
    from datasets import Dataset

    def trainer_of(model=str(EMBEDDED), rewards=None, **settings):
        def reward(completions, **_):
            return [float(len(c) % 3) for c in completions] if rewards is None else rewards[: len(completions)]

        common = {"per_device_train_batch_size": PROMPTS * GROUP, "num_generations": GROUP, "max_completion_length": 12}
        common |= {"target_kl": None}  # A stop would skip steps that tests count.
        return ours.CPGDTrainer(
            model=model,
            reward_funcs=reward,
            args=ours.CPGDConfig(output_dir=str(tmp_path / "trl"), logging_steps=1, **(CPU | common | settings)),
            train_dataset=Dataset.from_list([{"prompt": f"{digit}+1="} for digit in range(8)]),
            processing_class=AutoTokenizer.from_pretrained(EMBEDDED),
        )

    return trainer_of


def first_batch(trainer):
    """Sample a rollout, and return its first micro-batch as the loss gets it."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return trainer._prepare_inputs([{"prompt": f"{digit}+1="} for digit in range(PROMPTS) for _ in range(GROUP)])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_loss_is_ours_for_every_row(make, name):
    trainer = make(algorithm=name, num_iterations=2, epsilon=0.1)
    inputs = first_batch(trainer)
    moved = torch.randn(inputs["completion_mask"].shape, generator=torch.Generator().manual_seed(0))
    inputs["old_per_token_logps"] = inputs["old_per_token_logps"] + 0.5 * moved
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.model.zero_grad()
    logp = trainer._scored[0].detach().requires_grad_()
    expected = loss_of(
        name,
        logp,
        inputs["old_per_token_logps"],
        inputs["advantages"],
        inputs["completion_mask"],
        epsilon=0.1,
        drift_coef=0.01,
        max_completion_length=12,
    )
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-6, abs=1e-7)
    expected.loss.backward()
    logp_of_model, _, _ = super(ours.CPGDTrainer, trainer)._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        inputs["completion_ids"].size(1),
    )
    logp_of_model.backward(logp.grad)
    for gradient, parameter in zip(gradients, trainer.model.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "setting",
    [
        {"importance_level": "sequence"},
        {"aggregation": "constant"},
        {"drift_clip": 0.05},
        {"drift_coef": 7.0},
        {"epsilon": 0.05},
        {"epsilon_high": 0.05},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_setting_has_the_same_effect_in_trl(make, setting):
    trainer = make(num_iterations=2, **setting)
    inputs = first_batch(trainer)
    moved = torch.randn(inputs["completion_mask"].shape, generator=torch.Generator().manual_seed(0))
    inputs["old_per_token_logps"] = inputs["old_per_token_logps"] + 0.5 * moved
    in_trl = trainer._compute_loss(trainer.model, inputs).item()
    tensors = trainer._scored[0], inputs["old_per_token_logps"], inputs["advantages"], inputs["completion_mask"]
    common = {"drift_coef": 0.01, "max_completion_length": 12}
    here, without = (loss_of("cpgd", *tensors, **(common | changes)).loss.item() for changes in (setting, {}))
    assert in_trl == pytest.approx(here, rel=1e-5)
    assert in_trl != pytest.approx(without, rel=1e-3)


@pytest.mark.parametrize("weight", [None, "equal", "std", "clip_filter"])
@pytest.mark.parametrize("name", ["cpgd", "rloo", "reinforce_pp", "reinforce_pp_baseline"])
def test_advantages_are_ours(make, name, weight):
    rewards = [0.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5]
    trainer = make(rewards=rewards, algorithm=name, advantage_weight=weight)
    batch = trainer._generate_and_score_completions(
        [{"prompt": f"{digit}+1="} for digit in range(PROMPTS) for _ in range(GROUP)]
    )
    lengths = batch["completion_mask"].sum(dim=1).view(PROMPTS, GROUP)
    grouped = torch.tensor(rewards).view(PROMPTS, GROUP)
    expected = ALGORITHMS[name].advantages(grouped, lengths, advantage_weight=weight).flatten()
    assert torch.allclose(batch["advantages"], expected)
    assert list(trainer._logs["advantages"]) == pytest.approx(expected.tolist())


def test_in_an_evaluation_the_table_of_completions_has_our_advantages_only(make):
    trainer = make(rewards=[0.0, 1.0, 1.0, 1.0], advantage_weight="equal")
    trainer.model.eval()
    trainer._generate_and_score_completions([{"prompt": "1+1="}] * GROUP)
    assert list(trainer._logs["advantages"]) == pytest.approx([-0.75, 0.25, 0.25, 0.25])


def test_a_response_without_any_reward_has_the_advantage_0_as_in_trl(make):
    rewards = [0.0, 1.0, None, 1.0, None, None, None, None]
    trainer = make(rewards=rewards, algorithm="grpo")
    rows = [{"prompt": f"{digit}+1="} for digit in range(PROMPTS) for _ in range(GROUP)]
    advantages = trainer._generate_and_score_completions(rows)["advantages"]
    theirs = super(ours.CPGDTrainer, trainer)._generate_and_score_completions(rows)["advantages"]
    assert advantages.tolist() == pytest.approx(theirs.tolist(), abs=1e-6)
    deviation = 3**-0.5  # of 0, 1 and 1
    expected = [-2 / 3 / (deviation + 1e-4), 1 / 3 / (deviation + 1e-4), 0, 1 / 3 / (deviation + 1e-4), 0, 0, 0, 0]
    assert advantages.tolist() == pytest.approx(expected)
    assert (advantages[[2, 4, 5, 6, 7]] == 0).all()


@pytest.mark.parametrize("reward", [float("inf"), -1e30])
def test_a_reward_that_cannot_be_trained_on_is_one_line(make, reward):
    trainer = make(rewards=[0.0, 1.0, None, 1.0, 0.0, reward, 1.0, 1.0])
    with pytest.raises(
        UserError, match=r"^reward function reward returned -?(inf|1e\+30|1\.0\d*e\+30) for '"
    ) as caught:
        first_batch(trainer)
    assert str(caught.value).endswith("a finite number is needed, of 1e+15 at most")


class Snapshots(TrainerCallback):
    """Keeps the weights and the state of the optimizer after each step."""

    def __init__(self):
        self.weights, self.states = [], []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **_):
        self.weights.append([parameter.detach().clone() for parameter in model.parameters()])
        tensors = [tensor for slots in optimizer.state.values() for tensor in slots.values()]
        self.states.append([tensor.clone() for tensor in tensors])


def equal(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_without_any_advantage_neither_weights_nor_moments_change(make, accumulated):
    """The first rollout has advantages. The second has none, and Adam would move on with its moments."""
    rollouts = []

    def reward(completions, **_):
        rollouts.append(len(completions))
        return [float(len(c) % 3) if len(rollouts) == 1 else 0.3 for c in completions]

    settings = {"per_device_train_batch_size": 8 // accumulated, "gradient_accumulation_steps": accumulated}
    trainer = make(num_iterations=2, max_steps=4, weight_decay=0.1, lr_scheduler_type="constant", **settings)
    trainer.reward_funcs, snapshots = [reward], Snapshots()
    trainer.add_callback(snapshots)
    trainer.train()
    weights, states = snapshots.weights, snapshots.states
    assert rollouts == [8, 8]
    assert not equal(weights[0], weights[1])
    assert not equal(states[0], states[1])
    assert equal(weights[1], weights[2])
    assert equal(weights[2], weights[3])
    assert states[3]
    assert equal(states[1], states[2])
    assert equal(states[2], states[3])
    assert [line["skipped_updates"] for line in trainer.state.log_history if "loss" in line] == [0, 0, 1, 1]


def test_a_run_whose_rewards_are_all_equal_ends_with_the_weights_that_it_began_with(make):
    trainer = make(rewards=[1.0] * 8, num_iterations=2, max_steps=4)
    trainer.args.logging_steps = 4
    start = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert equal(start, [parameter.detach() for parameter in trainer.model.parameters()])
    assert not trainer.optimizer.state
    assert [line["skipped_updates"] for line in trainer.state.log_history if "loss" in line] == [4]


def are_dropped(trainer, *micro_batches):
    """Say whether an optimizer step on these micro-batches has lost its gradients."""
    for inputs in micro_batches:
        trainer._compute_loss(trainer.model, inputs).backward()
    trainer.before_optimizer_step(torch.optim.SGD(trainer.model.parameters(), lr=0.1))
    gradients = [parameter.grad for parameter in trainer.model.parameters()]
    trainer.model.zero_grad()
    assert len({gradient is None for gradient in gradients}) == 1
    return gradients[0] is None


def test_a_step_is_skipped_only_if_there_is_nothing_to_learn(make, monkeypatch):
    trainer = make(num_iterations=2)
    learns = first_batch(trainer)
    idle = learns | {"advantages": torch.zeros(8)}
    assert not are_dropped(trainer, learns)
    assert not are_dropped(trainer, learns, idle)
    assert not are_dropped(trainer, idle, learns)
    assert are_dropped(trainer, idle, idle)
    masked = learns["completion_mask"] * (learns["advantages"] == 0).long()[:, None]
    assert are_dropped(trainer, learns | {"completion_mask": masked})  # The others have no token that counts.
    with monkeypatch.context() as patch:
        patch.setattr(trainer.accelerator, "reduce", lambda tensor, reduction="sum": tensor + 1)
        assert not are_dropped(trainer, idle)  # Another process learns.
    with monkeypatch.context() as patch:
        patch.setattr(trainer.accelerator, "scaler", object())
        assert not are_dropped(trainer, idle)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "is_deepspeed_enabled", True)
        assert not are_dropped(trainer, idle)
    assert are_dropped(trainer, idle)


@pytest.mark.parametrize(("name", "dropped"), [("cpgd", False), ("reinforce_pp", True)])
def test_a_kl_in_the_loss_has_something_to_learn_without_advantages(make, name, dropped):
    trainer = make(algorithm=name, beta=0.1, num_iterations=2)
    assert are_dropped(trainer, first_batch(trainer) | {"advantages": torch.zeros(8)}) is dropped


def test_no_step_is_made_on_a_rollout_after_its_kl_has_exceeded_the_bound(make):
    """The next rollout begins again. The KL of a step is measured before it, as in our own loop."""
    settings = {"num_iterations": 6, "learning_rate": 5e-3, "lr_scheduler_type": "constant", "weight_decay": 0.1}
    free = make(max_steps=6, **settings)
    free.train()
    kls = [line["kl_old"] for line in free.state.log_history if "loss" in line]
    first = next(i for i, kl in enumerate(kls) if kl > kls[1])
    assert 1 < first < 5

    stopped, snapshots = make(max_steps=12, target_kl=kls[1] * 1.0001, **settings), Snapshots()
    stopped.add_callback(snapshots)
    stopped.train()
    log = [line for line in stopped.state.log_history if "loss" in line]
    assert [line["updates"] for line in log[:7]] == [1] * first + [0] * (6 - first) + [1]
    assert {line["skipped_updates"] for line in log} == {0}
    assert [line["kl_old"] for line in log[: first + 1]] == pytest.approx(kls[: first + 1])
    for later in range(first, 6):
        assert equal(snapshots.weights[first - 1], snapshots.weights[later])
        assert equal(snapshots.states[first - 1], snapshots.states[later])
    assert not equal(snapshots.weights[5], snapshots.weights[6])


@pytest.mark.parametrize("times", [0.5, 1, 2])
def test_the_adaptive_coefficient_follows_the_last_pass_over_each_rollout(make, times):
    """A rollout whose rewards are all equal changes nothing."""
    settings = {"num_iterations": 2, "max_steps": 6, "learning_rate": 1e-3}
    free = make(**settings)
    free.train()
    kl = next(line["kl_old"] for line in free.state.log_history if line.get("kl_old"))
    trainer = make(drift_coef="adaptive", target_kl=kl * times, **settings)
    trainer.train()
    log = [line for line in trainer.state.log_history if "loss" in line]
    wanted = [1.0]
    for last in (1, 3):
        follows = adaptive_drift_coef(wanted[-1], log[last]["kl_old"], kl * times)
        wanted.append(follows if log[last]["updates"] else wanted[-1])
    assert wanted[1] == {0.5: 2, 1: 1, 2: 0.5}[times]
    assert [line["drift_coef"] for line in log] == [wanted[i // 2] for i in range(6)]


def test_groups_outside_the_range_are_left_out(make):
    rewards = [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    trainer = make(rewards=rewards, group_reward_max=0.9, num_iterations=2)
    rows = [{"prompt": f"{digit}+1="} for digit in range(PROMPTS) for _ in range(GROUP)]
    batch = trainer._generate_and_score_completions(rows)
    assert batch["completion_mask"].any(dim=1).tolist() == [False] * 4 + [True] * 4


def test_clip_bounds_may_loosen_along_a_response(make):
    trainer = make(clip_growth=3.0, num_iterations=2)
    batch = first_batch(trainer)
    batch |= {"advantages": torch.ones(8), "old_per_token_logps": batch["old_per_token_logps"] - math.log(1.5)}
    trainer._compute_loss(trainer.model, batch)
    mask = batch["completion_mask"].bool()
    wanted = loss_of("cpgd", trainer._scored[0], batch["old_per_token_logps"], torch.ones(8), mask, clip_growth=3.0,
                     drift_coef=trainer.drift_coef)  # fmt: skip
    assert 0 < wanted.metrics["clip_frac_pos"] < 1
    assert trainer._metrics["train"]["clip_frac_pos"][-1] == pytest.approx(wanted.metrics["clip_frac_pos"])


@pytest.mark.parametrize("reset", [True, False])
def test_the_moments_may_start_afresh_at_each_rollout(make, reset):
    trainer, counts = make(num_iterations=2, max_steps=4, reset_optimizer=reset), []

    class CountSteps(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **_):
            counts.append({int(slots["step"]) for slots in optimizer.state.values()})

    trainer.add_callback(CountSteps())
    trainer.train()
    assert counts == [{1}, {2}, {1}, {2}] if reset else [{1}, {2}, {3}, {4}]


def test_a_truncated_response_keeps_its_length_in_a_mean_over_tokens(make):
    rewards = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    trainer = make(rewards=rewards, algorithm="reinforce_pp", max_completion_length=3, mask_truncated_completions=True)
    rows = [{"prompt": f"{digit}+1="} for digit in range(PROMPTS) for _ in range(GROUP)]
    batch = trainer._generate_and_score_completions(rows)
    assert not batch["completion_mask"].sum(dim=1).all()  # Some responses were truncated.
    shape = (PROMPTS, GROUP)  # Every response has 3 tokens: "#6" and its end, or the first 3 of a longer one.
    expected = ALGORITHMS["reinforce_pp"].advantages(torch.tensor(rewards).view(shape), torch.full(shape, 3))
    assert torch.allclose(batch["advantages"], expected.flatten())


def test_the_defaults_of_the_objective_are_those_of_our_loop(tmp_path):
    config = ours.CPGDConfig(output_dir=str(tmp_path), **CPU)
    assert config.objective() == ObjectiveSettings()


def test_max_advantage_continues_from_a_checkpoint_with_the_last_coefficient(make):
    settings = {"drift_coef": "max_advantage", "num_iterations": 2}
    settings |= {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    first = make(**settings)
    first.train()
    assert first.drift_coef != 1
    second = make(rewards=[1.0] * 8, **(settings | {"max_steps": 4}))  # From here on there are no advantages.
    second.train(resume_from_checkpoint=True)
    assert second.drift_coef == first.drift_coef


def test_the_batch_has_the_log_probabilities_of_the_sampler_if_the_loss_needs_them(make):
    assert "old_per_token_logps" in first_batch(make(num_iterations=2))
    assert "old_per_token_logps" in first_batch(make(per_device_train_batch_size=4, steps_per_generation=2))
    once = make()  # With one update the policy is the sampler, and the loss has its gradient.
    inputs = first_batch(once)
    assert "old_per_token_logps" not in inputs
    loss = once._compute_loss(once.model, inputs)
    loss.backward()
    first = [p.grad.clone() for p in once.model.parameters()]
    once.model.zero_grad()
    once._compute_loss(once.model, inputs | {"old_per_token_logps": once._scored[0].detach()}).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(first, once.model.parameters(), strict=True))
    assert any(gradient.any() for gradient in first)


@pytest.mark.parametrize("name", ["cpgd", "dapo", "dr_grpo"])
@pytest.mark.parametrize("steps", [1, 2])
def test_micro_batches_change_no_gradient(make, name, steps):
    """Four micro-batches, in one optimizer step or in two, have the gradient of all the step's responses at once."""
    together = 4 // steps
    settings = {"steps_per_generation": 4, "gradient_accumulation_steps": together, "per_device_train_batch_size": 2}
    trainer = make(algorithm=name, max_completion_length=40, **settings)
    parts = [first_batch(trainer)]
    for trainer._step in range(1, 4):
        parts.append(trainer._prepare_inputs(None))
    for first in range(0, 4, together):
        step = parts[first : first + together]
        for part in step:
            trainer._compute_loss(trainer.model, part).backward()
        gradients = [p.grad.clone() for p in trainer.model.parameters()]
        trainer.model.zero_grad()
        whole = {
            key: torch.cat([p[key] for p in step]) for key in parts[0] if key not in ("share", "num_items_in_batch")
        }
        whole |= {"share": 1.0, "num_items_in_batch": parts[0]["num_items_in_batch"]}
        trainer._compute_loss(trainer.model, whole).backward()
        assert any(gradient.any() for gradient in gradients)
        for gradient, parameter in zip(gradients, trainer.model.parameters(), strict=True):
            assert torch.allclose(gradient, parameter.grad, rtol=1e-3, atol=1e-6)
        trainer.model.zero_grad()


def test_a_step_that_includes_the_next_rollout_assumes_equal_lengths(make):
    trainer = make(
        algorithm="dapo", per_device_train_batch_size=4, steps_per_generation=2, gradient_accumulation_steps=4
    )
    inputs = first_batch(trainer)
    tokens = [batch["completion_mask"].sum().item() for batch in trainer._buffered_inputs]
    assert inputs["share"].item() == pytest.approx(tokens[0] / (2 * sum(tokens)))


def test_the_short_step_at_the_end_of_an_epoch_takes_a_whole_mean(make):
    trainer = make(
        algorithm="dapo", per_device_train_batch_size=4, steps_per_generation=2, gradient_accumulation_steps=4
    )
    first_batch(trainer)
    tokens = [batch["completion_mask"].sum().item() for batch in trainer._buffered_inputs]
    trainer._step, trainer.current_gradient_accumulation_steps = 1, 2  # transformers sets these there.
    assert trainer._prepare_inputs(None)["share"].item() == pytest.approx(tokens[1] / sum(tokens))


@pytest.mark.parametrize("width", [1, None], ids=["a response's", "a token's"])
def test_weights_of_another_sampler_multiply_every_token(make, width):
    trainer = make(num_iterations=2)
    inputs = first_batch(trainer)
    plain = trainer._compute_loss(trainer.model, inputs | {"old_per_token_logps": inputs["old_per_token_logps"] - 0.1})
    ratio = torch.full_like(inputs["old_per_token_logps"], 0.5)[:, :width]
    halved = inputs | {"old_per_token_logps": inputs["old_per_token_logps"] - 0.1, "importance_sampling_ratio": ratio}
    assert trainer._compute_loss(trainer.model, halved).item() == pytest.approx(plain.item() / 2, rel=1e-5)
    assert plain.item() != 0


def test_the_loss_does_not_read_the_answers_of_tools(make):
    trainer = make(num_iterations=2, algorithm="dapo")
    inputs = first_batch(trainer)
    tool_mask = (torch.arange(inputs["completion_mask"].size(1)) != 1).long().expand_as(inputs["completion_mask"])
    moved = inputs["old_per_token_logps"].clone()
    moved[:, 1] += 5  # The loss must not read these values.
    losses = [
        trainer._compute_loss(trainer.model, inputs | {"tool_mask": tool_mask, "old_per_token_logps": old}).item()
        for old in (inputs["old_per_token_logps"], moved)
    ]
    assert losses[0] == losses[1]
    assert trainer._compute_loss(trainer.model, inputs | {"old_per_token_logps": moved}).item() != losses[0]


def test_the_kl_to_the_reference_is_in_the_loss_or_in_the_reward_as_the_row_says(make):
    in_loss, in_reward = (make(algorithm=name, beta=0.5, num_iterations=2) for name in ("cpgd", "reinforce_pp"))
    for trainer in (in_loss, in_reward):
        with torch.no_grad():
            for parameter in trainer.ref_model.parameters():
                parameter.mul_(0.9)
    inputs = first_batch(in_reward)
    penalty = ((inputs["old_per_token_logps"] - inputs["ref_per_token_logps"]) * inputs["completion_mask"]).sum(dim=1)
    lengths = inputs["completion_mask"].sum(dim=1)
    texts = in_reward.processing_class.batch_decode(inputs["completion_ids"], skip_special_tokens=True)
    rewards = torch.tensor([float(len(text) % 3) for text in texts]) - 0.5 * penalty
    shape = (PROMPTS, GROUP)  # This row has no groups, so the order does not matter.
    expected = ALGORITHMS["reinforce_pp"].advantages(rewards.view(shape), lengths.view(shape)).flatten()
    assert torch.allclose(inputs["advantages"], expected, atol=1e-4)
    inputs = first_batch(in_loss)
    with_reference = in_loss._compute_loss(in_loss.model, inputs).item()
    in_loss.beta = 0.0
    assert with_reference > in_loss._compute_loss(in_loss.model, inputs).item()


def test_experts_are_balanced_as_trl_balances_them(make, tmp_path):
    torch.manual_seed(0)
    shape = Qwen3MoeConfig(
        vocab_size=20, hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
        router_aux_loss_coef=0.1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    Qwen3MoeForCausalLM(shape).save_pretrained(tmp_path / "moe")
    trainer = make(model=str(tmp_path / "moe"), rewards=[1.0] * 8, router_aux_loss_coef=0.1, num_iterations=2)
    loss = trainer._compute_loss(trainer.model, first_batch(trainer))
    # With equal rewards the loss has no other part.
    assert loss.item() == pytest.approx(0.1 * trainer._scored[2].item(), rel=1e-4)
    assert loss.item() > 0
    assert not are_dropped(trainer, first_batch(trainer))


def test_a_run_logs_trls_metrics_and_ours_and_can_evaluate(make):
    trainer = make(num_iterations=2, max_steps=2)
    trainer.train()
    names = {name for line in trainer.state.log_history for name in line}
    assert {"reward", "entropy", "clip_ratio/region_mean", "completions/mean_length"} <= names
    assert {"kl_old", "ratio_min", "ratio_max", "clip_frac_pos", "clip_frac_neg", "drift_coef"} <= names
    first, second = (line for line in trainer.state.log_history if "kl_old" in line)
    assert first["ratio_min"] == pytest.approx(1, abs=1e-5)
    assert first["kl_old"] == pytest.approx(0, abs=1e-9)
    assert second["ratio_min"] < 1 < second["ratio_max"]
    assert second["kl_old"] > 0
    assert first["skipped_updates"] == second["skipped_updates"] == 0
    assert not any(t.requires_grad for t in trainer._scored if t is not None)  # The graphs of a step are freed.
    assert "eval_reward" in trainer.evaluate(trainer.train_dataset)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"algorithm": "gpro"}, "algorithm = 'gpro': did you mean 'grpo'"),
        ({"drift_coef": "most"}, "drift_coef = 'most': float or max_advantage or adaptive expected"),
        ({"drift_coef": "2.5", "algorithm": "grpo"}, "drift_coef = 2.5: grpo has no drift"),
        ({"epsilon": 2.0}, "epsilon = 2.0: it has to be less than 1"),
        ({"aggregation": "mean"}, "aggregation = 'mean': did you mean"),
        ({"aggregation": "group_token_mean"}, "aggregation = group_token_mean: TRL shuffles responses"),
        ({"drift_coef": "adaptive", "target_kl": None}, "drift_coef = adaptive: it needs target_kl"),
        ({"loss_type": "grpo"}, "loss_type: only TRL's own losses read it; here it is algorithm and aggregation"),
        ({"scale_rewards": "none"}, "scale_rewards: .* advantage_weight"),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile: only TRL's"),
    ],
)
def test_settings_that_our_losses_do_not_read_are_refused(tmp_path, settings, line):
    with pytest.raises(ConfigError, match=line):
        ours.CPGDConfig(output_dir=str(tmp_path), **CPU, **settings)


def test_the_refused_fields_are_fields_of_trl():
    assert set(NOT_OURS) <= {field.name for field in fields(GRPOConfig)}


def test_a_kl_in_the_reward_needs_the_log_probabilities_of_the_sampler(make):
    trainer = make(algorithm="reinforce_pp", beta=0.1)
    with pytest.raises(ConfigError, match=r"beta = 0.1: reinforce_pp has it in the reward"):
        first_batch(trainer)


def test_a_config_of_trls_is_refused(make, tmp_path):
    trainer = make()
    with pytest.raises(ConfigError, match="args is a GRPOConfig: CPGDTrainer takes a CPGDConfig"):
        ours.CPGDTrainer(
            model=str(EMBEDDED),
            reward_funcs=trainer.reward_funcs,
            args=GRPOConfig(output_dir=str(tmp_path), num_generations=4, per_device_train_batch_size=8, **CPU),
            train_dataset=trainer.train_dataset,
            processing_class=trainer.processing_class,
        )


@pytest.mark.parametrize("name", ["trl", "verl"])
def test_a_missing_extra_is_one_line(monkeypatch, name):
    for module in (name, "verl.trainer.ppo.core_algos"):  # With None Python behaves as if it were not installed.
        monkeypatch.setitem(sys.modules, module, None)
    for ours_too in (name, f"{name}_config"):
        monkeypatch.delitem(sys.modules, f"minicpgd.integrations.{ours_too}", raising=False)
    with pytest.raises(UserError, match=rf"^[^\n]*pip install 'minicpgd\[{name}\]'[^\n]*$"):
        importlib.import_module(f"minicpgd.integrations.{name}")
