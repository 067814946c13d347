"""The command line: what the user typed becomes a call of a command.

What the user can put right is told in one line, with exit code 2.
"""

import contextlib
import functools
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from minicpgd import commands, inspecting, planning
from minicpgd.config import TrainConfig, load_config
from minicpgd.errors import UserError, is_out_of_memory, one_line
from minicpgd.memory import PROMPT_LENGTH
from minicpgd.policy import quiet
from minicpgd.recipes import KNOWN, load_recipe

_RECIPE = f"""    recipe: settings for a real model on a real card: {", ".join(KNOWN)}, or a YAML file of your own.
            Other flags win over it.
"""
_DRY_RUN = """        dry_run: say what would be done and needed, and do nothing.
"""


def parse(argv: list[str]) -> Callable[[], None]:
    """Let tyro read the command line; what it has to object to becomes one line.

    Raises:
        UserError: that line.
    """
    stored = planning.USUAL if argv[:1] == ["memory"] else TrainConfig()
    resumed, recipe = _value(argv, "--resume"), _value(argv, "--recipe")
    if resumed and recipe:
        raise UserError("--resume and --recipe: a run that goes on has its settings already; leave the recipe out")
    if resumed:  # what is not given then comes from the run itself
        if not (Path(resumed) / "config.json").is_file():
            raise UserError(f"cannot resume {resumed}: there is no config.json in it")
        stored = load_config(Path(resumed) / "config.json")
    elif recipe:
        stored = load_recipe(recipe).config

    def train_command(
        config: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes] = stored,
        resume: Path | None = None,
        recipe: str | None = None,
        dry_run: tyro.conf.FlagCreatePairsOff[bool] = False,
    ) -> None:
        if dry_run:
            planning.dry_run(config, load_recipe(recipe) if recipe else None)
        else:
            commands.train(config, resume)

    def memory_command(
        config: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes] = stored,
        recipe: str | None = None,
        gpu: float | None = None,
        prompt_length: int = PROMPT_LENGTH,
    ) -> None:
        planning.memory(config, gpu, prompt_length)

    train_command.__doc__ = (commands.train.__doc__ or "") + _RECIPE + _DRY_RUN
    memory_command.__doc__ = (planning.memory.__doc__ or "") + _RECIPE
    known: dict[str, Callable[..., None]] = {"demo": commands.demo, "train": train_command, "memory": memory_command}
    known |= {c.__name__: c for c in (inspecting.evaluate, inspecting.sample, inspecting.export, inspecting.plot)}
    known |= {c.__name__: c for c in (commands.study, commands.pretrain)}
    objection = io.StringIO()
    try:
        with contextlib.redirect_stderr(objection):
            return tyro.extras.subcommand_cli_from_dict(
                {name: _later(command) for name, command in known.items()},
                prog="minicpgd",
                description="Learn, watch and run CPGD (arXiv 2505.12504) beside its baselines.",
                args=argv,
            )
    except SystemExit as leaving:
        text = re.sub(r"─{5,} (?!│)", "", re.split(r"│ ─{5,}", objection.getvalue())[0].partition("\n")[2])
        words = " ".join(re.sub("[╭╮╰╯│─]", " ", text).split())
        if leaving.code and words:
            command = argv[0] if argv and argv[0] in known else ""
            raise UserError(f"{words} (see minicpgd {command} --help)".replace("  ", " ")) from None
        raise


def _value(argv: list[str], flag: str) -> str | None:
    """What follows a flag of `train` or `memory`, if it is there: from it the defaults of all others come."""
    command, *words = argv or [""]
    for word, following in zip(words, [*words[1:], None], strict=False):
        name, equals, value = word.partition("=")
        if command in ("train", "memory") and name == flag:
            return value if equals else following
    return None


def _later(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """The same command, with the same flags and help, that waits to be called once more."""

    @functools.wraps(command)
    def parsed(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(command, *args, **kwargs)

    return parsed


def main() -> None:
    """Run the command that was typed; leaves by SystemExit where something went wrong."""
    quiet()
    sys.path.insert(0, "")  # as `python -m` has it: a reward function may lie in the folder one is in
    try:
        parse(sys.argv[1:])()
    except UserError as error:
        _leave(str(error))
    except BrokenPipeError:  # whoever read us has gone, as in `minicpgd ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else leaving, too, would write there
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:  # a disk, a permission: it names the file
        _leave(str(error))
    except (RuntimeError, MemoryError) as error:  # torch tells of a full memory in either
        if not is_out_of_memory(error):
            raise
        _leave(
            "the memory is full; checkpoints are kept. Less is needed with --gradient-checkpointing, "
            "--micro-batch-tokens 2048, --rollout-batch-size 16; `minicpgd memory` says what a run takes "
            f"({str(error)[:120] or type(error).__name__})"
        )
    except KeyboardInterrupt:
        _leave("stopped. What is finished is kept; a study goes on with the same command", code=130)


def _leave(line: str, code: int = 2) -> NoReturn:
    print(one_line(f"minicpgd: {line}"), file=sys.stderr)
    sys.exit(code)
