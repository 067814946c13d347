"""Read the command line and call a command; report a user's mistake in one line, with exit code 2."""

import contextlib
import functools
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import tyro

from minicpgd import __version__
from minicpgd.cli import inspect, plan, study, train
from minicpgd.cli.flags import GROUPS
from minicpgd.config import TrainConfig
from minicpgd.errors import UserError, is_out_of_memory, one_line
from minicpgd.recipes import load_config, load_recipe

_ON_RUNS = (inspect.evaluate, inspect.sample, inspect.export, inspect.plot)
_COMMANDS = (study.demo, train.train, plan.memory, *_ON_RUNS, study.study, study.pretrain)
COMMANDS: dict[str, Callable[..., None]] = {command.__name__: command for command in _COMMANDS}
ABOUT = "Learn, watch and run CPGD (arXiv 2505.12504) beside its baselines."
AFTER_CTRL_C = {"study": "; the same command continues the study", "demo": "; the same command begins a new demo"}


def parse(argv: list[str]) -> Callable[[], None]:
    """Read the words of a command line, and return the call that they ask for.

    Raises:
        UserError: tyro does not accept the words; its message becomes one line.
    """
    command = argv[0] if argv and argv[0] in COMMANDS else ""
    commands = dict(COMMANDS)
    if (stored := _stored_settings(argv)) is not None:
        groups = {name: stored.group(kind) for name, kind in GROUPS.items()}
        commands[command] = functools.partial(COMMANDS[command], **groups)
        commands[command].__doc__ = COMMANDS[command].__doc__
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            deferred = {name: _deferred(call) for name, call in commands.items()}
            return tyro.extras.subcommand_cli_from_dict(deferred, prog="minicpgd", description=ABOUT, args=argv)
    except SystemExit as leaving:
        if leaving.code and (line := _first_sentence(message.getvalue())):
            raise UserError(f"{line} (see minicpgd {command} --help)".replace("  ", " ")) from None
        raise


def _stored_settings(argv: list[str]) -> TrainConfig | None:
    """The settings that replace the defaults of a command: a run's, a recipe's, or those of `memory`."""
    if argv[:1] not in (["train"], ["memory"]):
        return None
    resumed, recipe = (_value_after(flag, argv) for flag in ("--resume", "--recipe"))
    if resumed and recipe:
        raise UserError("--resume and --recipe: a run that continues has its own settings; leave the recipe out")
    if resumed:
        if not (Path(resumed) / "config.json").is_file():
            raise UserError(f"cannot resume {resumed}: there is no config.json in it")
        return load_config(Path(resumed) / "config.json")
    if recipe:
        return load_recipe(recipe).config
    return plan.USUAL if argv[0] == "memory" else None


def _value_after(flag: str, argv: list[str]) -> str | None:
    """The value of a flag. It is read before all others, because it decides their defaults."""
    for word, following in zip(argv, [*argv[1:], None], strict=True):
        name, equals, value = word.partition("=")
        if name == flag:
            return value if equals else following
    return None


def _first_sentence(box: str) -> str:
    """The first paragraph of tyro's message without its frame, which may be of ASCII, and the flag that it suggests."""
    paragraphs = re.split(r"(?m)^[│ ]*[─-]{5,}[│ ]*$", box.partition("\n")[2])
    lines = (" ".join(re.sub("[╭╮╰╯│─]", " ", paragraph).split()) for paragraph in paragraphs)
    line = next(filter(None, lines), "")
    near = re.search(r"Perhaps you meant:[\s│]+(--[\w-]+)", box)
    return f"{line}; did you mean {near[1]}?" if near and line else line


def _deferred(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """The same command, with the same flags and help, which returns a call instead of making it."""

    @functools.wraps(command)
    def deferred(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(command, *args, **kwargs)

    return deferred


def main() -> None:
    """Run the command that the user typed. A mistake ends the program by SystemExit."""
    if sys.argv[1:] == ["--version"]:
        print(f"minicpgd {__version__}")
        return
    sys.path.insert(0, "")  # As with `python -m`, a reward function may be a file in the current folder.
    try:
        call = parse(sys.argv[1:])
        from minicpgd.models.policy import quiet  # This import takes seconds, and `--help` does not need it.

        signal.signal(signal.SIGINT, signal.default_int_handler)  # Until here nothing could be lost.
        quiet()
        call()
    except BrokenPipeError:  # The reader has gone, as in `minicpgd ... | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes its output once more.
        sys.exit(128 + signal.SIGPIPE)
    except (UserError, OSError) as error:  # The message of an OSError names the file.
        _leave(str(error))
    except (RuntimeError, MemoryError) as error:  # torch raises either error if the memory is full.
        if not is_out_of_memory(error):
            raise
        _leave(
            "the memory is full; checkpoints are kept. A run needs less with --gradient-checkpointing, "
            "--micro-batch-tokens 2048, --rollout-batch-size 16; `minicpgd memory` says how much "
            f"({str(error)[:120] or type(error).__name__})"
        )
    except KeyboardInterrupt:
        _leave(f"stopped. Finished work is kept{AFTER_CTRL_C.get(sys.argv[1], '')}", code=130)


def _leave(line: str, code: int = 2) -> NoReturn:
    print(one_line(f"minicpgd: {line}"), file=sys.stderr)
    sys.exit(code)
