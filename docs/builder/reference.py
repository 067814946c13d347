"""The generated parts of three pages: the table of algorithms, the reference of the command line, and equal answers.

In: the package itself, so that these pages cannot contradict it. Out: Markdown between two HTML comments in
docs/algorithms.md, docs/commands.md and docs/rewards.md. `python docs/build.py` writes it, and tests/test_site.py and
tests/test_answers.py check that the committed pages are current.
"""

import contextlib
import inspect
import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from answer_tables import reward_tables

from minicpgd import ALGORITHMS
from minicpgd.algorithms import Algorithm
from minicpgd.cli.main import COMMANDS, parse

DOCS = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!--generated: (\w+)-->).*?(<!--/-->)", re.DOTALL)

BASELINES = {
    "group_centred": "group",
    "leave_one_out": "leave one out",
    "batch_whitened": "batch, whitened",
    "group_centred_whitened": "group, then whitened",
}
WEIGHTS = {"equal": "", "inverse_std": ", / std"}
OBJECTIVES = {
    "log_ratio_free": "d·A",
    "log_ratio_clip": "d·A, clipped",
    "ratio_free": "r·A",
    "ratio_clip": "r·A, clipped",
    "ratio_dual_clip": "r·A, clipped twice",
    "capped_weight": "min(r, 1+ε)·A·log π",
}
LEVELS = {"per_token": "r", "per_sequence": "∏r", "per_sequence_mean": "s"}
AVERAGES = {"sequence_mean": "per response", "token_mean": "all tokens alike", "constant": "/ longest allowed"}
PAPERS = {
    "cpgd": "2505.12504",
    "grpo": "2402.03300",
    "rloo": "2402.14740",
    "reinforce_pp": "2501.03262",
    "reinforce_pp_baseline": "2501.03262",
    "pg": "2505.12504",
    "cpg": "2505.12504",
    "pgd": "2505.12504",
    "grpo_unclipped": "1707.06347",
    "grpo_dual_clip": "1912.09729",
    "grpo_drift": "2505.12504",
    "dr_grpo": "2503.20783",
    "dapo": "2503.14476",
    "gspo": "2507.18071",
    "cispo": "2506.13585",
}
"""The paper of a row on arXiv; a row without one is an experiment of this package."""


def algorithm_table() -> str:
    """One row of Markdown for each algorithm."""
    columns = ["row", "label, paper", "advantage", "objective", "averaging", "drift", "what it shows"]
    rows = [columns, ["---"] * len(columns), *map(_algorithm_row, ALGORITHMS.values())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _algorithm_row(row: Algorithm) -> list[str]:
    paper = PAPERS.get(row.name)
    return [
        f"`{row.name}`",
        f"{row.label}, " + (f"[{paper}](https://arxiv.org/abs/{paper})" if paper else "ours"),
        _word(BASELINES, row.centre) + _word(WEIGHTS, row.weight),
        _objective(row),
        _word(AVERAGES, row.aggregation),
        "yes" if row.drift else "",
        row.shows,
    ]


def _objective(row: Algorithm) -> str:
    objective = _word(OBJECTIVES, row.surrogate)
    if row.epsilon_high is not None:
        objective = objective.replace("clipped", f"clipped above at {1 + row.epsilon_high:g}")
    return objective.replace("r·A", f"{_word(LEVELS, row.level)}·A")


def _word(words: dict[str, str], function: Callable) -> str:
    """The table's word for a function; a new function without a word keeps its name."""
    return words.get(function.__name__, f"`{function.__name__}`")


@dataclass
class Option:
    """One flag or argument of a command, as the help describes it."""

    name: str
    """`--seed`; for an argument without a flag, the name of the parameter, as `RUN`."""
    kind: str
    """INT, PATH, a choice of words; empty for a switch."""
    default: str
    meaning: str
    group: str = ""
    """The title and the description of its group of settings, with a line between them."""

    def markdown(self) -> str:
        """A point of a list, with the meaning on a line of its own."""
        names = " or ".join(f"`{name}`" for name in self.name.split(", "))
        kind = f"{': ' if self.kind.startswith('`') else ' '}{self.kind}" if self.kind else ""
        default = {"True": "on", "False": "off"}.get(self.default, f"`{self.default}`") if self.default else ""
        return f"- {names}{kind}{f' (default: {default})' if default else ''}\\\n  {self.meaning}"


@dataclass
class Command:
    """One command, as its help describes it."""

    name: str
    purpose: str
    options: list[Option]

    @property
    def title(self) -> str:
        """The words that a user types."""
        return f"minicpgd {self.name}"

    @property
    def link(self) -> str:
        """A link to the section of this command."""
        return f"[`{self.title}`](#{self.title.replace(' ', '-')})"


def command_reference() -> str:
    """A list of all commands, then a section for each: its purpose, its arguments and its flags."""
    commands = [parse_help(name, help_text(name)) for name in COMMANDS]
    train = next(command for command in commands if command.name == "train")
    contents = "\n".join(f"- {command.link}: {command.purpose}" for command in commands)
    return "\n\n".join([contents, *(_section(command, train) for command in commands)])


def _section(command: Command, train: Command) -> str:
    """The section of a command. Another command than `train` does not repeat the settings that it shares with it."""
    settings = {option.name: option for option in train.options if option.group}
    shared = [o for o in command.options if o.name in settings and o.group == settings[o.name].group]
    lines = [f"## `{command.title}`", command.purpose]
    if shared and command is not train:
        text = f"It also takes the settings of {train.link}, from `{shared[0].name}` to `{shared[-1].name}`."
        changed = [option for option in shared if option.default != settings[option.name].default]
        defaults = (f"{option.name.partition(',')[0]} {option.default}".replace(" True", "") for option in changed)
        lines.append(f"{text} Its defaults for a real model are `{' '.join(defaults)}`.")
    groups: dict[str, list[str]] = {}
    for option in command.options:
        if command is train or option not in shared:
            groups.setdefault(option.group, []).append(option.markdown())
    for group, points in groups.items():
        lines += ([f"### {group}"] if group else []) + ["\n".join(points)]
    return "\n\n".join(lines)


def help_text(*words: str) -> str:
    """What `minicpgd WORDS --help` prints. Into a text in memory tyro draws no boxes, and at this width one column."""
    printed, terminal = io.StringIO(), mock.patch.dict(os.environ, {"COLUMNS": "100"})
    with terminal, contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        parse([*words, "--help"])
    return printed.getvalue()


def parse_help(name: str, text: str) -> Command:
    """Read the help of a command: its purpose, then groups of options, each of which begins after two spaces."""
    text = re.sub(r"^ *-* *$", "", text, flags=re.MULTILINE)
    purpose, *groups = re.split(r"^ (?=\S)", text.partition("\n\n")[2], flags=re.MULTILINE)
    options = []
    for group in groups:
        title, *entries = re.split(r"^  (?=-|\[|\{|[A-Z]{2,})", group, flags=re.MULTILINE)
        title, _, description = (" ".join(piece.split()) for piece in title.partition("\n"))
        title = title.removesuffix("options").strip().capitalize()
        heading = f"{title}\n\n{description}" if description else ""
        options += [_option(entry, heading) for entry in entries if not entry.startswith("-h, --help")]
    parameters = inspect.signature(COMMANDS[name]).parameters if name in COMMANDS else {}
    arguments = [option for option in options if not option.name]
    for option, parameter in zip(arguments, parameters, strict=False):
        option.name = parameter.upper()
    return Command(name, " ".join(purpose.split()), options)


def _option(entry: str, group: str) -> Option:
    """Split "--seed INT  meaning (default: 0)"; after a long flag, the meaning begins on the next line."""
    head, *rest = re.split(r"  +|\n +", entry, maxsplit=1)
    text = " ".join(" ".join(rest).split())
    meaning, default = re.fullmatch(r"(.*?)(?: ?\((?:default: (.*)|required)\))?", text).groups()  # type: ignore[union-attr]
    names = ", ".join(re.findall(r"--[\w-]+", head))
    return Option(names, _kind(head), (default or "").strip("'"), meaning, group)


def _kind(head: str) -> str:
    """What the user writes: "--x FLOAT|{None,auto}" becomes "FLOAT or `auto`"."""
    values = re.sub(r"--[\w-]+,? ?", "", head)
    values = re.sub(r"\[+(\w+) \[.*", r"\1 ...", values).strip("[]").split("|")
    kinds = [value for value in values if value and value[0] != "{"]
    words = [word for value in values if value[:1] == "{" for word in value.strip("{}").split(",")]
    kinds += [f"`{word}`" for word in words if word != "None"]
    return " or ".join(filter(None, [", ".join(kinds[:-1]), *kinds[-1:]]))


PARTS: dict[str, Callable[[], str]] = {
    "algorithms": algorithm_table,
    "commands": command_reference,
    "rewards": reward_tables,
}


def filled(page: str) -> str:
    """The page with its generated parts written again."""
    return MARKED.sub(lambda mark: f"{mark[1]}\n\n{PARTS[mark[2]]()}\n\n{mark[3]}", page)


def write_reference() -> None:
    """Write the generated parts of the pages again."""
    for name in PARTS:
        path = DOCS / f"{name}.md"
        path.write_text(filled(path.read_text()))
