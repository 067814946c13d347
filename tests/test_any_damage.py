"""Whatever became of a run's folder: it ends as it would have, from an older checkpoint if need be, or is one line."""

import json
import shutil
from hashlib import sha256

import pytest
import torch
from anything import content, damaged, many, told, values
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from minicpgd import TrainConfig, evaluate, load_run, train
from minicpgd.checkpoint import _digest, load_checkpoint, restore, save_checkpoint
from minicpgd.config import load_config
from minicpgd.evaluation import open_policy
from minicpgd.figures import save_figures
from minicpgd.learner import Learner
from minicpgd.runlog import LOGS, RunLog, load_timings
from minicpgd.trainer import Listener

NEWEST = "checkpoints/step-000003.safetensors"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of 4 steps, stopped after 3."""
    config = TrainConfig(
        output_dir=str(tmp_path_factory.mktemp("damage") / "run"), num_prompts=2, num_generations=2, num_minibatches=2,
        max_steps=4, max_completion_length=8, eval_problems=2, save_steps=1, logging_steps=1,
    )  # fmt: skip
    seen = []
    return train(config, listener=Listener(step=lambda *_: seen.append(1), stop=lambda: len(seen) == 3))


@pytest.fixture(scope="module")
def whole(stopped):
    """What is in its folder when it has gone on to the end."""
    folder = copied(stopped)
    assert goes_on(folder) == []
    return everything(folder)


def copied(folder):
    copy = folder.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    return copy


def everything(folder):
    """All files but those that depend on the clock or name the folder."""
    names = [
        "metrics.jsonl",
        "samples.jsonl",
        "passes.jsonl",
        "model/model.safetensors",
        "checkpoints/step-000004.safetensors",
    ]
    return [sha256((folder / name).read_bytes()).hexdigest() if (folder / name).exists() else None for name in names]


def goes_on(folder):
    """Resume a run in the same process; the warnings, or the line in which it was refused."""
    warnings = []
    config = load_config(folder / "config.json")
    config = TrainConfig(**(vars(config) | {"output_dir": str(folder)}))
    refused = told(train, config, resume=True, listener=Listener(warn=warnings.append))
    assert all(line.isprintable() for line in warnings)
    return refused if isinstance(refused, str) else warnings


def rewritten(path, change):
    """A checkpoint with other tensors or another header, and the digest that belongs to them."""
    with safe_open(path, "pt") as file:
        header, tensors = json.loads(file.metadata()["minicpgd"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header.pop("digest")
    changed = change(header, tensors)
    header = header if changed is None else changed
    if isinstance(header, dict):
        header["digest"] = _digest(tensors, header)
    save_file(tensors, path, metadata={"minicpgd": header if isinstance(header, str) else json.dumps(header)})


@many(100)
@given(data=st.data())
def test_any_damage_to_a_checkpoint_is_passed_over(stopped, data):
    folder, warnings = copied(stopped), []
    path = folder / NEWEST
    path.write_bytes(data.draw(content) if data.draw(st.booleans()) else damaged(data, path.read_bytes()))
    checkpoint = load_checkpoint(folder / "checkpoints", warnings.append)
    if warnings:
        assert len(warnings) == 1
        assert warnings[0].startswith(f"{path}: damaged (")
        assert warnings[0].isprintable()
        assert checkpoint.step == 2
    else:  # a space, say, changed nothing
        newest = load_checkpoint(stopped / "checkpoints", pytest.fail)
        torch.testing.assert_close(checkpoint.tensors, newest.tensors, rtol=0, atol=0)
        assert (checkpoint.step, checkpoint.extra) == (newest.step, newest.extra)


@pytest.mark.parametrize("content", [b"", b"nonsense", bytes(9), b"\x02" + bytes(7) + b"{}"])
def test_a_run_with_a_damaged_checkpoint_ends_as_it_would_have(stopped, whole, content):
    folder = copied(stopped)
    (folder / NEWEST).write_bytes(content)
    assert len(goes_on(folder)) == 1
    assert everything(folder) == whole


HEADERS = {
    "null": lambda h, t: "null",
    "list": lambda h, t: [],
    "number": lambda h, t: "3",
    "no JSON": lambda h, t: "{",
    "brackets": lambda h, t: "[" * 9999,
    "step is text": lambda h, t: h | {"step": "3"},
    "step is half": lambda h, t: h | {"step": 3.5},
    "step is true": lambda h, t: h | {"step": True},
    "another step": lambda h, t: h | {"step": 1},
    "step before 0": lambda h, t: h | {"step": -1},
    "no step": lambda h, t: {"extra": h["extra"]},
    "no extra": lambda h, t: {"step": 3},
    "extra is empty": lambda h, t: h | {"extra": {}},
    "extra is a list": lambda h, t: h | {"extra": [1]},
    "extra is text": lambda h, t: h | {"extra": {"drift_coef": "1"}},
    "extra is NaN": lambda h, t: h | {"extra": {"drift_coef": float("nan")}},
    "extra is endless": lambda h, t: h | {"extra": {"drift_coef": float("inf")}},
    "more extra": lambda h, t: h | {"extra": h["extra"] | {"x": 1}},
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_is_none_is_passed_over_though_its_digest_is_right(stopped, name):
    folder, warnings = copied(stopped), []
    rewritten(folder / NEWEST, HEADERS[name])
    assert load_checkpoint(folder / "checkpoints", warnings.append).step == 2
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{folder / NEWEST}: damaged (")
    known = {"another step": "of step 1)", "extra is a list": "extra values are [1])"}
    assert known.get(name, "") in warnings[0]


def rename(tensors, old, new):
    tensors[new] = tensors.pop(old)


TENSORS = {
    "none at all": lambda t, name: t.clear(),
    "one is missing": lambda t, name: t.pop(name),
    "one too many": lambda t, name: t.update({"model.more": torch.ones(1)}),
    "one of a parameter that is none": lambda t, name: rename(t, name, "optimizer.999.exp_avg"),
    "one of no parameter": lambda t, name: t.update({"optimizer.x.exp_avg": torch.ones(1)}),
    "one of nothing": lambda t, name: t.update({"optimizer.": torch.ones(1)}),
    "a moment that is none": lambda t, name: t.update({"optimizer.0.more": torch.ones(1)}),
    "a name with a dot": lambda t, name: t.update({"optimizer.0.exp_avg.more": torch.ones(1)}),
    "no name": lambda t, name: t.update({"": torch.ones(1)}),
    "another shape": lambda t, name: t.update({name: torch.ones(3, 2)}),
    "as many, in another shape": lambda t, name: t.update({name: t[name][None]}),
    "another dtype": lambda t, name: t.update({name: t[name].double()}),
    "whole numbers": lambda t, name: t.update({name: t[name].long()}),
    "nothing in it": lambda t, name: t.update({name: torch.ones(0)}),
}


@pytest.fixture(scope="module")
def learner(stopped):
    return Learner.from_config(load_config(stopped / "config.json"))


@many(80)
@given(kind=st.sampled_from(sorted(TENSORS)), data=st.data())
def test_a_checkpoint_of_something_else_goes_nowhere(stopped, learner, kind, data):
    """Its digest is right: anybody can make one."""
    folder, model = copied(stopped), learner.policy.model
    name = data.draw(st.sampled_from(sorted(load_checkpoint(folder / "checkpoints", pytest.fail).tensors)))
    rewritten(folder / NEWEST, lambda header, tensors: (TENSORS[kind](tensors, name), header)[1])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    refused = told(restore, load_checkpoint(folder / "checkpoints", pytest.fail), model, learner.optimizer)
    assert f"{folder / NEWEST}: not of this model and this optimizer: " in refused
    torch.testing.assert_close(dict(model.named_parameters()), before, rtol=0, atol=0)
    assert not learner.optimizer.state


@pytest.mark.parametrize("kind", ["one is missing", "another shape"])
def test_a_run_with_a_checkpoint_of_something_else_loses_nothing(stopped, whole, kind):
    folder = copied(stopped)
    rewritten(folder / NEWEST, lambda header, tensors: (TENSORS[kind](tensors, "optimizer.3.exp_avg"), header)[1])
    before = everything(folder)
    assert "optimizer.3.exp_avg" in goes_on(folder)
    assert everything(folder) == before
    (folder / NEWEST).unlink()  # as the line says
    assert goes_on(folder) == []
    assert everything(folder) == whole


def test_what_does_not_fit_is_named_with_both_shapes(tmp_path):
    """A layer's number in a name is none of the optimizer's; a parameter without a gradient has no moments."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3))
    save_checkpoint(tmp_path, 1, model, torch.optim.AdamW(model.parameters()), {"drift_coef": 1.0})
    checkpoint = load_checkpoint(tmp_path, pytest.fail)
    restore(checkpoint, model, torch.optim.AdamW(model.parameters()))
    for other, words in (
        (torch.nn.Linear(2, 4, dtype=torch.float64), "model.0.bias is float32 (3,), not float64 (4,);"),
        (torch.nn.Linear(2, 3, bias=False), "model.0.bias is float32 (3,), not none;"),
    ):
        other = torch.nn.Sequential(other)
        assert words in told(restore, checkpoint, other, torch.optim.AdamW(other.parameters()))


def test_a_checkpoint_goes_into_no_other_optimizer(tmp_path):
    """As of a run that began on a card, with moments in 8 bit, and goes on without one."""
    model = torch.nn.Linear(2, 2)
    model(torch.ones(2)).sum().backward()
    (adam := torch.optim.AdamW(model.parameters())).step()
    save_checkpoint(tmp_path, 1, model, adam, {"drift_coef": 1.0})
    checkpoint = load_checkpoint(tmp_path, pytest.fail)
    restore(checkpoint, model, torch.optim.AdamW(model.parameters()))
    for other in (torch.optim.RMSprop, torch.optim.SGD, torch.optim.Adamax):
        assert "optimizer.0.exp_" in told(restore, checkpoint, model, other(model.parameters()))


def test_a_checkpoint_that_is_no_file_and_one_of_a_later_step(stopped, whole):
    folder = copied(stopped)
    (folder / "checkpoints/step-000009.safetensors").mkdir()
    assert goes_on(folder) == []
    assert everything(folder) == whole
    folder = copied(stopped)
    rewritten(folder / NEWEST, lambda header, tensors: header.update(step=9))
    (folder / NEWEST).rename(folder / "checkpoints/step-000009.safetensors")
    assert "step-000009.safetensors: of a step after max_steps = 4" in goes_on(folder)


def test_after_a_million_steps_the_newest_is_still_the_newest(tmp_path):
    model = torch.nn.Linear(1, 1)
    for step in (999_998, 999_999, 1_000_000):
        save_checkpoint(tmp_path, step, model, torch.optim.AdamW(model.parameters()), {"drift_coef": 1.0})
    assert load_checkpoint(tmp_path, pytest.fail).step == 1_000_000
    assert len(list(tmp_path.iterdir())) == 2


LINES = [
    b"{}",
    b'{"step": "1"}',
    b'{"step": null}',
    b'{"step": 1.5}',
    b'{"step": true}',
    b'{"step": -1}',
    b'{"step": 1, "step": 2}',
    b"[1]",
    b"",
    b'{"step": 1, "reward": "high"}',
    b'{"step": 1, "reward": null}',
    b'{"step": 1, "reward": [1]}',
    b"[" * 9999,
    b"1" * 5000,
]


@many(75)
@given(
    log=st.sampled_from(LOGS),
    line=st.sampled_from(LINES) | content | values.map(lambda value: json.dumps({"step": value}).encode()),
    place=st.integers(0, 3),
)
def test_any_line_in_any_log_is_borne_or_named(stopped, log, line, place):
    folder = copied(stopped)
    path = folder / f"{log}.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:place], line + b"\n", *lines[place:]]))
    before = logs(folder)
    for read in (load_run, load_timings, open_policy):
        refused = told(read, folder)
        assert not isinstance(refused, str) or str(path) in refused or "has not finished" in refused
    refused = told(RunLog(folder, load_config(folder / "config.json")).keep_until, 2)
    assert isinstance(refused, list) or (str(path) in refused and before == logs(folder))


@pytest.mark.parametrize("log", LOGS)
def test_a_run_with_a_log_that_is_none_says_which(stopped, log):
    folder = copied(stopped)
    with (folder / f"{log}.jsonl").open("a") as file:
        file.write('{"reward": 1.0}\n')
    before = logs(folder)
    assert f"{log}.jsonl, line " in goes_on(folder)
    assert logs(folder) == before


def logs(folder):
    return [(folder / f"{name}.jsonl").read_bytes() for name in LOGS]


def test_a_run_that_has_not_begun_cannot_be_drawn_yet(stopped, tmp_path):
    folder = copied(stopped)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    for text in ("", lines[0]):
        (folder / "metrics.jsonl").write_text(text)
        assert "metrics.jsonl has no 'clip_frac_neg'" in told(lambda: list(save_figures(tmp_path, [folder])))
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").symlink_to("/dev/zero")
    assert "not a file" in told(load_run, folder)
    assert "the folder has no weights" in told(evaluate, folder)
