"""Commands for a run or a model: `evaluate`, `sample`, `export`, `plot`."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from rich.text import Text
from tyro.conf import OmitArgPrefixes, Positional

from minicpgd.cli.flags import Flag
from minicpgd.cli.progress import console, say_conversion
from minicpgd.config import TEMPERATURES, ModelSettings, SamplingSettings, TaskSettings, TrainConfig
from minicpgd.errors import Range, UserError
from minicpgd.recipes import load_config

Base = Literal["full", "dequantised"]


@dataclass(frozen=True)
class _Answers:  # A docstring would be a heading in the help of both commands.
    task: str | None = None
    """By default the run's; jsonl with --data; else chain_arithmetic."""
    data: str | None = None
    """A local file or folder of problems; by default the run's."""
    reward: str | None = None
    """Also measure this reward; by default the run's own, if it has one."""
    max_completion_length: int | None = None
    """Tokens a response may have; by default the run's, else 64."""
    load_in_4bit: Flag = False
    """Load a model, which is not a run, in 4 bit."""
    seed: int = 0
    """Chooses problems and samples."""

    def model(self, run_or_model: str) -> str | ModelSettings:
        """The model with its settings; or the run, which has its own."""
        from minicpgd.training.evaluation import is_run
        from minicpgd.training.run_folder import is_finished

        if not is_run(run_or_model):
            say_conversion(run_or_model)
            return ModelSettings(run_or_model, load_in_4bit=self.load_in_4bit)
        if self.load_in_4bit:
            raise UserError(f"load_in_4bit: {run_or_model} is a run, which stores its own setting; leave it out")
        if not is_finished(Path(run_or_model)):
            console.print(f"{run_or_model} has not finished; its newest checkpoint answers")
        return run_or_model

    def problems(self, run_or_model: str) -> TaskSettings:
        """The run's task, with the fields that these flags change."""
        from minicpgd.training.evaluation import is_run

        of_run = load_config(Path(run_or_model, "config.json")) if is_run(run_or_model) else TrainConfig()
        name = self.task or ("jsonl" if self.data and of_run.task == TaskSettings.task else of_run.task)
        settings = of_run.group(TaskSettings) if name == of_run.task else TaskSettings(name)
        return replace(settings, data=self.data or settings.data, reward=self.reward or settings.reward)


Answers = Annotated[_Answers, OmitArgPrefixes]


def evaluate(
    run_or_model: Positional[str] = "embedded", /, answers: Answers = _Answers(),  # noqa: B008 (frozen)
    num_problems: int = 256, num_samples: int = 8,
) -> None:  # fmt: skip
    """Measure a run or a model on held-out problems: greedy and sampled accuracy, pass@k, response length.

    Args:
        run_or_model: a run's folder, "embedded", a model folder, a GGUF file, or a hub name.
        num_problems: how many held-out problems.
        num_samples: sampled responses per problem.
    """
    from minicpgd.training.evaluation import evaluate as measure

    wanted = answers.problems(run_or_model)
    result = measure(
        answers.model(run_or_model), task=wanted, num_problems=num_problems,
        num_samples=num_samples, max_completion_length=answers.max_completion_length, seed=answers.seed,
    )  # fmt: skip
    console.print(f"problems           {wanted.task}{f' {wanted.data}' if wanted.data else ''}")
    for name, value in result.items():
        note = f"   {wanted.reward}, greedy" if name == "reward" else ""
        console.print(f"{name:<18} {value:8.3f}{note}")


def sample(
    run_or_model: Positional[str] = "embedded", /, answers: Answers = _Answers(),  # noqa: B008 (frozen)
    num_problems: int = 12, temperature: float = 1.0,
) -> None:  # fmt: skip
    """Show held-out problems with a sampled response each, right ones green and wrong ones red.

    Args:
        run_or_model: a run's folder, "embedded", a model folder, a GGUF file, or a hub name.
        num_problems: how many.
        temperature: of the sampling; 0 takes the likeliest token each time.
    """
    Range(0, TEMPERATURES.most).check("temperature", temperature)
    from minicpgd.tasks import load_task
    from minicpgd.tasks.rewards import RewardContext, call_reward, load_reward
    from minicpgd.training import open_policy, respond

    policy, config = open_policy(answers.model(run_or_model))
    wanted, seed = answers.problems(run_or_model), answers.seed
    task, reward = load_task(wanted), load_reward(wanted.reward) if wanted.reward is not None else None
    length, batch_size = answers.max_completion_length, config.rollout_batch_size
    length = config.max_completion_length if length is None else length
    settings = SamplingSettings(length, temperature or 1.0, rollout_batch_size=batch_size)
    rollout, right = respond(policy, task, num_problems, settings, greedy=temperature == 0, seed=seed)
    problems = task.held_out(num_problems, seed)
    context = RewardContext(rollout.token_ids())
    rewards = call_reward(reward, problems, rollout.completions, context=context) if reward is not None else []
    for i, (problem, text, ok) in enumerate(zip(problems, rollout.completions, right[:, 0], strict=True)):
        mark, colour = ("right", "green") if ok else ("wrong", "red")
        mark = f"{mark}  reward {rewards[i]:.2f}" if reward is not None else mark
        prompt = problem["prompt"]
        last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        last += "\n" * policy.uses_chat_template
        console.print(Text.assemble((mark, colour), f"  {last}", (text, colour)))
    console.print(f"{int(right.sum())} of {len(right)} right")


def export(
    run: Positional[Path], /, folder: Path | None = None, base: Base = "dequantised", num_problems: int = 64
) -> None:
    """Merge a run's adapter into its model, in full precision, and say how far the result is from the run.

    Args:
        run: a run with an adapter.
        folder: where the model goes; by default the run's folder, under exported.
        base: the weights to add to. dequantised: those the run saw, rounded to 4 bit and written out in full; the
            result answers as the run did. full: those published, for which the adapter was not made.
        num_problems: held-out problems that both answer.
    """
    from minicpgd.cli.model_card import write_card
    from minicpgd.training.export import export as merge

    exported = folder or run / "exported"
    result = merge(run, exported, base=base, num_problems=num_problems)
    write_card(exported, run, result)
    rows = {
        "same answers": f"{result.same_answers:.1%}   of {result.num_problems} held-out problems, greedily",
        "accuracy": f"{result.accuracy_trained:.3f} → {result.accuracy_exported:.3f}",
        "log-probabilities": f"{result.mean_difference:.2g}   nats from the run's, mean over the answers' tokens",
        "rounding": f"{result.rounding:.2g}   nats at most, by adding the adapter into the weights",
    }
    for name, value in rows.items():
        console.print(f"{name:<18} {value}")
    console.print(f"\nmodel   {exported}/\ncard    {exported / 'README.md'}")


def plot(
    runs: Positional[list[Path]] = [], /, all: Flag = False,  # noqa: B006 (never changed)
    results: Path = Path("results"), out: Path | None = None,
) -> None:  # fmt: skip
    """Draw the curves of one or more runs, or every published figure from the committed logs.

    Args:
        runs: folders of runs, up to seven.
        all: every figure of README.md and docs/, from the committed logs.
        results: where the committed logs are.
        out: where the figures go; by default a folder in figures/ with the runs' names; for all, docs/figures/.
    """
    from minicpgd.plots.published import save_figures, save_published

    if not all and not 1 <= len(runs) <= 7:
        raise UserError(f"plot: {len(runs)} runs given; 1 to 7 can be told apart in one figure")
    names = "+".join("-".join(run.parts).strip("/") for run in runs)[:100]
    digest = hashlib.sha256(" ".join(map(str, runs)).encode()).hexdigest()[:6]  # Two lists of runs may share a name.
    folder = out or Path("docs/figures" if all else f"figures/{names}-{digest}")
    paths = save_published(results, folder) if all else save_figures(folder, runs)
    for path in paths:
        console.print(f"figure  {path}")
