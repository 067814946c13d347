"""A reward function written for TRL's GRPOTrainer runs here unchanged, and the other way round.

The table CASES has reward functions. TRL's own GRPOTrainer and `call_reward` run each of them on the same responses.
"""

import asyncio
import functools
import importlib
import math
import sys
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from minicpgd.errors import UserError
from minicpgd.models import EMBEDDED
from minicpgd.tasks.reward_call import response_text
from minicpgd.tasks.rewards import (
    RewardContext,
    TrainerState,
    answer_text,
    call_reward,
    exact,
    exact_answer,
    load_reward,
    mathematical,
    one_box,
)

pytest.importorskip("trl", reason="needs the extra trl: pip install -e '.[trl]'")
pytestmark = pytest.mark.filterwarnings("error:coroutine")  # No coroutine may be left without an await.

TEXTS = [r"\boxed{1}", "3 - 1 = #2", r"So \boxed{0.5}.", ""]
IDS = [[5, 6, 7], [8], [], [9, 10]]
AS_TEXT = [{"prompt": f"{i}?", "answer": answer, "level": i} for i, answer in enumerate(["1", "2", "1/2", "4"])]
AS_MESSAGES = [
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{i}?"}], "answer": answer,
     "level": i, "completion": "TRL does not pass this column."}
    for i, answer in enumerate([1, 2.0, 0.5, True])
]  # fmt: skip


# The table -----------------------------------------------------------------------------------------------------------


def lengths(completions, **_):
    return [len(str(completion)) for completion in completions]


async def in_a_coroutine(prompts, completions, **_):
    await asyncio.sleep(0)
    return [len(str(prompt)) for prompt in prompts]


async def with_tasks(completions, **_):
    async def judge(completion):
        await asyncio.sleep(0.001)
        return None if len(completion) == 1 else 0.25

    return await asyncio.gather(*map(judge, completions))


class Judge:
    """An object that can be called, and waits."""

    async def __call__(self, completion_ids, **_):
        return [len(ids) for ids in completion_ids]


class Scale:
    """An object that can be called."""

    def __call__(self, level, *, factor=2.0, **_):
        return [factor * number for number in level]


def with_the_contract(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns):
    assert sorted(columns) == ["answer", "level"]
    assert isinstance(trainer_state, transformers.TrainerState)
    log_metric("level", sum(columns["level"]) / 4)
    log_metric(name="level", value=torch.tensor(3.0))
    log_metric("ids", len(completion_ids))
    log_extra("length", [len(ids) for ids in completion_ids])
    log_extra(column="answer", values=columns["answer"])
    return [trainer_state.global_step + len(ids) for ids in completion_ids]


def of_messages(prompts, completions, **_):
    """The example of TRL's page, which reads messages."""
    if isinstance(prompts[0], str):
        return [len(text) for text in completions]
    assert [[message["role"] for message in completion] for completion in completions] == [["assistant"]] * 4
    assert {prompt[-1]["role"] for prompt in prompts} == {"user"}
    return [
        len(completion[0]["content"]) + len(prompt) for prompt, completion in zip(prompts, completions, strict=True)
    ]


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return [ids[0] if ids else function(*args, **kwargs) for ids in kwargs["completion_ids"]]

    return wrapper


@decorated
def without_ids(completions, **_):
    return 0.5


def returns(value):
    return lambda **_: value


def yields(completions, **_):
    yield from (0.5 * len(completion) for completion in completions)


def sum_of(text, **functions):
    """`load_reward`, for a sum with functions of a module that is made here."""
    sys.modules["made_here"] = SimpleNamespace(**functions)
    try:
        return load_reward(text)
    finally:
        del sys.modules["made_here"]


NONES = [None, 1.0, None, 0.0]
CASES = {
    "numbers": lengths,
    "coroutine": in_a_coroutine,
    "tasks, None for some": with_tasks,
    "object that waits": Judge(),
    "object": Scale(),
    "partial": functools.partial(Scale(), factor=0.1),
    "partial that waits": functools.partial(in_a_coroutine, weight=3),
    "partial of an object that waits": functools.partial(Judge()),
    "whole contract": with_the_contract,
    "messages": of_messages,
    "decorated": without_ids,
    "generator": yields,
    "None for some": returns(NONES),
    "None for all": returns([None] * 4),
    "booleans": returns([True, False, True, True]),
    "tuple": returns((1, 2, 3, 4)),
    "numpy booleans": returns(np.array([True, False, True, True])),
    "list of numpy booleans": returns([np.bool_(True), None, np.bool_(False), 1]),
    "numpy integers": returns(np.arange(4)),
    "numpy float16": returns(np.array([0.1, 0.2, 0.3, 65504], dtype=np.float16)),
    "numpy objects": returns(np.array([1, None, 0.5, True], dtype=object)),
    "tensor": returns(torch.tensor([0.1, 0.2, 0.3, 1e15])),
    "tensor with a gradient": returns(torch.tensor([0.1, 0.2, 0.3, 0.4], requires_grad=True)),
    "bfloat16": returns(torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.bfloat16)),
    "boolean tensor": returns(torch.tensor([True, False, False, True])),
    "list of tensors": returns([torch.tensor(0.1), torch.tensor([2]), None, torch.tensor([[True]])]),
    "fractions": returns([Fraction(1, 3), Decimal("0.1"), 10**14, -0.0]),
    "exact": exact,
    "math": mathematical,
    "format": one_box,
    "chain_arithmetic": exact_answer,
    "math + 0.2*format": load_reward("math + 0.2*format"),
    "sum with None": sum_of("0.5*made_here:a + made_here:b", a=returns(NONES), b=returns([None, None, 2, 3])),
    "sum that waits": sum_of("format + -0.1*made_here:a + made_here:b", a=in_a_coroutine, b=with_tasks),
    "sum with the contract": sum_of("exact + made_here:a", a=with_the_contract),
}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """TRL's own trainer on the embedded model. Its loop for coroutines runs."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    settings = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 4}
    cpu = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no"}
    made = GRPOTrainer(
        model=str(EMBEDDED),
        reward_funcs=in_a_coroutine,
        args=GRPOConfig(output_dir=str(tmp_path_factory.mktemp("trl")), **settings, **cpu),
        train_dataset=Dataset.from_list(AS_TEXT),
        processing_class=transformers.AutoTokenizer.from_pretrained(EMBEDDED),
    )
    made.state.global_step = 7
    return made


def in_trl(trainer, function, rows):
    """Return TRL's rewards, (4,) with NaN for None, and what the function logged."""
    trainer.reward_funcs, trainer.reward_processing_classes, trainer.reward_func_names = [function], [None], ["mine"]
    trainer._pending_metrics.clear()
    trainer._pending_extra_logs.clear()
    prompts = [row["prompt"] for row in rows]
    completions = TEXTS
    if not isinstance(prompts[0], str):
        completions = [[{"role": "assistant", "content": text}] for text in TEXTS]
    rewards = trainer._calculate_rewards(rows, prompts, completions, IDS)
    return rewards[:, 0], dict(trainer._pending_metrics), dict(trainer._pending_extra_logs)


@pytest.mark.parametrize("rows", [AS_TEXT, AS_MESSAGES], ids=["text", "messages"])
@pytest.mark.parametrize("name", CASES)
def test_a_reward_is_the_same_in_trl_and_here(trainer, name, rows):
    theirs, metrics, extra = in_trl(trainer, CASES[name], rows)
    context = RewardContext(completion_ids=IDS, trainer_state=trainer.state)
    ours = torch.tensor(call_reward(CASES[name], rows, TEXTS, context=context))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert context.metrics == {key: [float(value) for value in values] for key, values in metrics.items()}
    assert context.extra == extra


def test_the_cases_differ():
    """Otherwise the comparison would say little."""
    assert len(CASES) >= 25
    context = RewardContext(completion_ids=IDS, trainer_state=transformers.TrainerState(global_step=7))
    results = [str(call_reward(function, AS_TEXT, TEXTS, context=context)) for function in CASES.values()]
    assert len(set(results)) > 20


@pytest.mark.parametrize(
    ("function", "as_text", "as_messages"),
    [(exact, [1, 1, 0, 0], [1, 1, 1, 0]), (mathematical, [1, 1, 1, 0], [1, 1, 1, 0]), (one_box, [1, 0, 1, 0], None),
     (exact_answer, [0, 1, 0, 0], None), (load_reward("math + 0.5*format"), [1.5, 1, 1.5, 0], None)],
)  # fmt: skip
def test_our_rewards_in_trl_have_these_values(trainer, function, as_text, as_messages):
    assert in_trl(trainer, function, AS_TEXT)[0].tolist() == as_text
    assert in_trl(trainer, function, AS_MESSAGES)[0].tolist() == (as_messages or as_text)


# Arguments -----------------------------------------------------------------------------------------------------------


def test_a_function_gets_only_what_it_takes():
    """TRL refuses these functions, because it always passes all arguments."""
    functions = (
        lambda completions: [len(c) for c in completions],
        lambda prompts, completions, answer: [len(c) for c in completions],
        lambda completions, *, level: [len(c) + 0 * n for c, n in zip(completions, level, strict=True)],
        functools.partial(lambda completions, plus: [len(c) + plus for c in completions], plus=0),
        sum_of("made_here:a + 0*format", a=lambda completions: map(len, completions)),
    )
    for function in functions:
        assert call_reward(function, AS_TEXT, TEXTS) == [9, 10, 15, 0]


def test_without_a_context_a_function_gets_an_untrained_state_and_no_ids():
    def mine(completion_ids, trainer_state, log_metric, log_extra, **_):
        log_metric("a", 1)
        log_extra("b", [1, 2, 3, 4])
        assert (trainer_state.global_step, trainer_state.max_steps, trainer_state.epoch) == (0, 0, 0)
        return [len(ids) for ids in completion_ids]

    assert call_reward(mine, AS_TEXT, TEXTS) == [0, 0, 0, 0]


def test_our_state_has_attributes_of_transformers_state():
    theirs = transformers.TrainerState()
    assert {name: getattr(theirs, name) for name in vars(TrainerState())} == vars(TrainerState())


@pytest.mark.parametrize(
    ("answer", "text"),
    [("3.0", "3.0"), (3, "3"), (3.0, "3"), (-0.0, "0"), (0.5, "0.5"), (True, "true"), (False, "false"),
     (10**30, "1" + "0" * 30), (np.int64(3), "3"), (np.float32(0.1), "0.1"), (Decimal("2.50"), "2.50"),
     (Decimal(2), "2"), (Fraction(1, 2), "1/2"), (-1.5, "-1.5"),
     (1e-7, "0.0000001"), (Decimal("1E2"), "100")],
)  # fmt: skip
def test_an_answer_may_be_a_number(answer, text):
    assert answer_text(answer) == text


@pytest.mark.parametrize("answer", [None, ["1"], math.nan, math.inf, {}])
def test_an_answer_that_is_no_number_is_one_line(answer):
    rows = [{"prompt": "a", "answer": answer}]
    with pytest.raises(UserError, match=r"exact raised TypeError: the answer .* is neither text nor a finite number$"):
        call_reward(exact, rows, ["#1"])


def test_the_text_of_messages_is_what_the_assistant_says():
    parts = [{"type": "text", "text": "b"}, {"type": "image", "image": None}, {"type": "text", "text": r"\boxed{2}"}]
    messages = [
        {"role": "assistant", "content": "a", "tool_calls": []},
        {"role": "tool", "content": r"\boxed{1}", "name": "add"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]},
        {"role": "assistant", "tool_calls": []},
        {"role": "assistant", "content": parts},
    ]
    assert response_text(messages) == r"ab\boxed{2}"
    assert response_text([]) == response_text("") == ""
    assert mathematical([[]], [messages], answer=[2]) == one_box([[]], [messages]) == [1.0]


# Coroutines ----------------------------------------------------------------------------------------------------------


def test_a_coroutine_can_be_run_inside_an_event_loop_as_in_a_notebook():
    async def cell():
        return call_reward(in_a_coroutine, AS_TEXT, TEXTS)

    assert asyncio.run(cell()) == [2, 2, 2, 2]


def test_a_coroutine_may_call_another_reward():
    async def outer(completions, **_):
        return call_reward(with_tasks, AS_TEXT, completions)

    assert call_reward(outer, AS_TEXT, TEXTS) == [0.25] * 4


def test_a_semaphore_lasts_from_call_to_call():
    """A new event loop for each call would refuse it."""
    semaphore = asyncio.Semaphore(1)

    async def judge(completion):
        async with semaphore:
            await asyncio.sleep(0)
            return len(completion)

    async def limited(completions, **_):
        return await asyncio.gather(*map(judge, completions))

    assert [call_reward(limited, AS_TEXT, TEXTS) for _ in range(3)] == [[9, 10, 15, 0]] * 3


@pytest.mark.parametrize("error", [RuntimeError("no\nluck"), SystemExit(3), StopIteration(), asyncio.CancelledError()])
@pytest.mark.parametrize("in_a_task", [False, True])
def test_an_error_of_a_coroutine_is_one_line(error, in_a_task):
    async def fail():
        raise error

    async def mine(completions, **_):
        return await (asyncio.create_task(fail()) if in_a_task else fail())

    with pytest.raises(UserError, match=r"^reward function test_reward_contract:mine raised \w+") as caught:
        call_reward(mine, AS_TEXT, TEXTS)
    assert "\n" not in str(caught.value)
    assert call_reward(in_a_coroutine, AS_TEXT, TEXTS) == [2, 2, 2, 2]  # The loop still runs.


# None and numbers that cannot be trained on --------------------------------------------------------------------------


def test_a_sum_counts_the_parts_that_judge_a_response():
    reward = sum_of("made_here:a + 0.5*made_here:b", a=returns([None, 1, None, 2]), b=returns([4, None, None, 6]))
    assert reward(prompts=[], completions=TEXTS) == [2, 1, None, 5]
    assert str(call_reward(reward, AS_TEXT, TEXTS)) == "[2.0, 1.0, nan, 5.0]"


@pytest.mark.parametrize("reward", [math.nan, -math.inf, 1e16, np.nan, torch.tensor(math.inf), "1", 1j, 10**400])
@pytest.mark.parametrize("part", [False, True])
def test_only_none_means_that_a_function_does_not_judge(reward, part):
    async def mine(completions, **_):
        return [None, 1.0, reward, 0.0]

    function, name = mine, "test_reward_contract:mine"
    if part:
        function, name = sum_of("format + made_here:mine", mine=mine), "made_here:mine"
    for rows in (AS_TEXT, AS_MESSAGES):
        with pytest.raises(UserError, match=rf"^reward function {name} returned .* for '.*boxed.0\.5.*a finite number"):
            call_reward(function, rows, TEXTS)


# From the command line -----------------------------------------------------------------------------------------------


def test_a_run_in_trl_rewards_as_ours_does():
    launch = importlib.import_module("minicpgd.integrations.launch")

    async def mine(prompts, completions, level):
        return [None if n == 1 else len(c) + len(p) for p, c, n in zip(prompts, completions, level, strict=True)]

    completions = [[{"role": "assistant", "content": text}] for text in TEXTS]
    columns = {"level": [0, 1, 2, 3], "answer": "abcd", "log_metric": None}
    prompts = [[{"role": "user", "content": "ab"}]] * 4
    assert launch.accept_messages(mine)(prompts, completions, **columns) == [11, None, 17, 2]
    assert launch.accept_messages(mine, as_texts=False)(prompts, completions, **columns) == [2, None, 2, 2]
    with pytest.raises(UserError, match="raised TypeError"):
        launch.accept_messages(mine)(prompts, completions)
    task = SimpleNamespace(sample=lambda count, rng: AS_MESSAGES)
    assert launch.rows_of(task, 4, 0, chat=True) == AS_MESSAGES
    assert not launch.has_texts(AS_MESSAGES)
