"""A run whose folder was damaged ends as it would have ended, from an older checkpoint if necessary, or is one line."""

import json
import shutil
from hashlib import sha256

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from strategies import content, damaged, many, result_or_line, values

from minicpgd import TrainConfig, evaluate, load_run, train
from minicpgd.plots.published import save_figures
from minicpgd.recipes import load_config
from minicpgd.training import Callbacks, Learner, load_timings, open_policy
from minicpgd.training.checkpoint import _digest, load_checkpoint, restore, save_checkpoint
from minicpgd.training.run_folder import LOGS, RunFolder

NEWEST = "checkpoints/step-000003.safetensors"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of 4 steps that was stopped after step 3."""
    config = TrainConfig(
        output_dir=str(tmp_path_factory.mktemp("damage") / "run"), num_prompts=2, num_generations=2, num_minibatches=2,
        max_steps=4, max_completion_length=8, eval_problems=2, save_steps=1, logging_steps=1,
    )  # fmt: skip
    steps = []  # `should_stop` is called before `on_step`.
    callbacks = Callbacks(on_step=lambda step, *_: steps.append(step), should_stop=lambda: len(steps) == 3)
    return train(config, callbacks=callbacks)


@pytest.fixture(scope="module")
def uninterrupted(stopped):
    """The files of the same run when it has continued to its end."""
    folder = copied(stopped)
    assert resumed(folder) == []
    return digests(folder)


def copied(folder):
    copy = folder.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    return copy


def digests(folder):
    """The digests of all files, except those that depend on the clock or name the folder."""
    names = [
        "metrics.jsonl",
        "samples.jsonl",
        "passes.jsonl",
        "model/model.safetensors",
        "checkpoints/step-000004.safetensors",
    ]
    return [sha256((folder / name).read_bytes()).hexdigest() if (folder / name).exists() else None for name in names]


def resumed(folder):
    """Resume a run in this process. Return its warnings, or the line of the error that refused it."""
    warnings = []
    config = load_config(folder / "config.json")
    config = TrainConfig(**(vars(config) | {"output_dir": str(folder)}))
    result = result_or_line(train, config, resume=True, callbacks=Callbacks(on_warning=warnings.append))
    assert all(line.isprintable() for line in warnings)
    return result if isinstance(result, str) else warnings


def rewrite(path, change):
    """Give a checkpoint other tensors or another header, with the digest that belongs to them."""
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
def test_a_checkpoint_with_any_damage_is_passed_over(stopped, data):
    folder, warnings = copied(stopped), []
    path = folder / NEWEST
    path.write_bytes(data.draw(content) if data.draw(st.booleans()) else damaged(data, path.read_bytes()))
    checkpoint = load_checkpoint(folder / "checkpoints", warnings.append)
    if warnings:
        assert len(warnings) == 1
        assert warnings[0].startswith(f"{path}: damaged (")
        assert warnings[0].isprintable()
        assert checkpoint.step == 2
    else:  # Some changes, such as one of a space, change nothing.
        newest = load_checkpoint(stopped / "checkpoints", pytest.fail)
        torch.testing.assert_close(checkpoint.tensors, newest.tensors, rtol=0, atol=0)
        assert (checkpoint.step, checkpoint.extra) == (newest.step, newest.extra)


@pytest.mark.parametrize("content", [b"", b"nonsense", bytes(9), b"\x02" + bytes(7) + b"{}"])
def test_a_run_with_a_damaged_checkpoint_ends_as_it_would_have(stopped, uninterrupted, content):
    folder = copied(stopped)
    (folder / NEWEST).write_bytes(content)
    assert len(resumed(folder)) == 1
    assert digests(folder) == uninterrupted


HEADERS = {
    "null": lambda h, t: "null",
    "list": lambda h, t: [],
    "number": lambda h, t: "3",
    "no JSON": lambda h, t: "{",
    "brackets": lambda h, t: "[" * 9999,
    "step is text": lambda h, t: h | {"step": "3"},
    "step is a fraction": lambda h, t: h | {"step": 3.5},
    "step is true": lambda h, t: h | {"step": True},
    "another step": lambda h, t: h | {"step": 1},
    "step before 0": lambda h, t: h | {"step": -1},
    "no step": lambda h, t: {"extra": h["extra"]},
    "no extra": lambda h, t: {"step": 3},
    "extra is empty": lambda h, t: h | {"extra": {}},
    "extra is a list": lambda h, t: h | {"extra": [1]},
    "extra is text": lambda h, t: h | {"extra": {"drift_coef": "1"}},
    "extra is NaN": lambda h, t: h | {"extra": {"drift_coef": float("nan")}},
    "extra is infinite": lambda h, t: h | {"extra": {"drift_coef": float("inf")}},
    "more extra": lambda h, t: h | {"extra": h["extra"] | {"x": 1}},
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_wrong_header_is_passed_over_though_its_digest_is_right(stopped, name):
    folder, warnings = copied(stopped), []
    rewrite(folder / NEWEST, HEADERS[name])
    assert load_checkpoint(folder / "checkpoints", warnings.append).step == 2
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{folder / NEWEST}: damaged (")
    reasons = {"another step": "of step 1)", "extra is a list": "extra values are [1])"}
    assert reasons.get(name, "") in warnings[0]


def rename(tensors, old, new):
    tensors[new] = tensors.pop(old)


TENSORS = {
    "none at all": lambda t, name: t.clear(),
    "one is missing": lambda t, name: t.pop(name),
    "one too many": lambda t, name: t.update({"model.more": torch.ones(1)}),
    "moments of a parameter that does not exist": lambda t, name: rename(t, name, "optimizer.999.exp_avg"),
    "moments of a parameter without a number": lambda t, name: t.update({"optimizer.x.exp_avg": torch.ones(1)}),
    "an empty name of a moment": lambda t, name: t.update({"optimizer.": torch.ones(1)}),
    "a moment that does not exist": lambda t, name: t.update({"optimizer.0.more": torch.ones(1)}),
    "a name with a dot": lambda t, name: t.update({"optimizer.0.exp_avg.more": torch.ones(1)}),
    "no name": lambda t, name: t.update({"": torch.ones(1)}),
    "another shape": lambda t, name: t.update({name: torch.ones(3, 2)}),
    "as many numbers, in another shape": lambda t, name: t.update({name: t[name][None]}),
    "another dtype": lambda t, name: t.update({name: t[name].double()}),
    "integers": lambda t, name: t.update({name: t[name].long()}),
    "an empty tensor": lambda t, name: t.update({name: torch.ones(0)}),
}


@pytest.fixture(scope="module")
def learner(stopped):
    return Learner.from_config(load_config(stopped / "config.json"))


@many(80)
@given(kind=st.sampled_from(sorted(TENSORS)), data=st.data())
def test_a_checkpoint_of_something_else_goes_into_no_model(stopped, learner, kind, data):
    """Its digest is right, because anybody can compute one."""
    folder, model = copied(stopped), learner.policy.model
    name = data.draw(st.sampled_from(sorted(load_checkpoint(folder / "checkpoints", pytest.fail).tensors)))
    rewrite(folder / NEWEST, lambda header, tensors: (TENSORS[kind](tensors, name), header)[1])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    line = result_or_line(restore, load_checkpoint(folder / "checkpoints", pytest.fail), model, learner.optimizer)
    assert f"{folder / NEWEST}: not of this model and this optimizer: " in line
    torch.testing.assert_close(dict(model.named_parameters()), before, rtol=0, atol=0)
    assert not learner.optimizer.state


@pytest.mark.parametrize("kind", ["one is missing", "another shape"])
def test_a_run_with_a_checkpoint_of_something_else_loses_nothing(stopped, uninterrupted, kind):
    folder = copied(stopped)
    rewrite(folder / NEWEST, lambda header, tensors: (TENSORS[kind](tensors, "optimizer.3.exp_avg"), header)[1])
    before = digests(folder)
    assert "optimizer.3.exp_avg" in resumed(folder)
    assert digests(folder) == before
    (folder / NEWEST).unlink()  # The line advises this.
    assert resumed(folder) == []
    assert digests(folder) == uninterrupted


def test_a_tensor_that_does_not_fit_is_named_with_both_shapes(tmp_path):
    """The number of a layer is not the number of a parameter. A parameter without a gradient has no moments."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3))
    save_checkpoint(tmp_path, 1, model, torch.optim.AdamW(model.parameters()), {"drift_coef": 1.0})
    checkpoint = load_checkpoint(tmp_path, pytest.fail)
    restore(checkpoint, model, torch.optim.AdamW(model.parameters()))
    for layer, words in (
        (torch.nn.Linear(2, 4, dtype=torch.float64), "model.0.bias is float32 (3,), not float64 (4,);"),
        (torch.nn.Linear(2, 3, bias=False), "model.0.bias is float32 (3,), not none;"),
    ):
        other = torch.nn.Sequential(layer)
        assert words in result_or_line(restore, checkpoint, other, torch.optim.AdamW(other.parameters()))


def test_a_checkpoint_fits_no_other_optimizer(tmp_path):
    """Such as that of a run which began on a card, with moments in 8 bit, and continues without one."""
    model = torch.nn.Linear(2, 2)
    model(torch.ones(2)).sum().backward()
    (adam := torch.optim.AdamW(model.parameters())).step()
    save_checkpoint(tmp_path, 1, model, adam, {"drift_coef": 1.0})
    checkpoint = load_checkpoint(tmp_path, pytest.fail)
    restore(checkpoint, model, torch.optim.AdamW(model.parameters()))
    for other in (torch.optim.RMSprop, torch.optim.SGD, torch.optim.Adamax):
        assert "optimizer.0.exp_" in result_or_line(restore, checkpoint, model, other(model.parameters()))


def test_a_checkpoint_that_is_no_file_is_ignored_and_one_of_a_later_step_is_refused(stopped, uninterrupted):
    folder = copied(stopped)
    (folder / "checkpoints/step-000009.safetensors").mkdir()
    assert resumed(folder) == []
    assert digests(folder) == uninterrupted
    folder = copied(stopped)
    rewrite(folder / NEWEST, lambda header, tensors: header.update(step=9))
    (folder / NEWEST).rename(folder / "checkpoints/step-000009.safetensors")
    assert "step-000009.safetensors: it is after max_steps = 4; it belongs to another run" in resumed(folder)


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
def test_any_line_in_any_log_is_read_or_named(stopped, log, line, place):
    folder = copied(stopped)
    path = folder / f"{log}.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:place], line + b"\n", *lines[place:]]))
    before = logs(folder)
    for read in (load_run, load_timings, open_policy):
        result = result_or_line(read, folder)
        assert not isinstance(result, str) or str(path) in result or "has no checkpoint yet" in result
    result = result_or_line(RunFolder(folder, load_config(folder / "config.json")).truncate_after, 2)
    assert isinstance(result, list) or (str(path) in result and before == logs(folder))


@pytest.mark.parametrize("log", LOGS)
def test_a_run_with_a_broken_log_names_that_log(stopped, log):
    folder = copied(stopped)
    with (folder / f"{log}.jsonl").open("a") as file:
        file.write('{"reward": 1.0}\n')
    before = logs(folder)
    assert f"{log}.jsonl, line " in resumed(folder)
    assert logs(folder) == before


def logs(folder):
    return [(folder / f"{name}.jsonl").read_bytes() for name in LOGS]


def test_a_run_that_has_not_begun_cannot_be_drawn_yet(stopped, tmp_path):
    folder = copied(stopped)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    for text in ("", lines[0]):
        (folder / "metrics.jsonl").write_text(text)
        assert "metrics.jsonl has no 'clip_frac_neg'" in result_or_line(lambda: list(save_figures(tmp_path, [folder])))
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").symlink_to("/dev/zero")
    assert "not a file" in result_or_line(load_run, folder)
    assert "the folder has no weights" in result_or_line(evaluate, folder)
