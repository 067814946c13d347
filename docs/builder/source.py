r"""Annotated source: a module goes in, pairs of prose and code come out.

The prose is what the module says about itself: its docstring, those of its functions, classes, methods and fields, and
the comments that stand on lines of their own before a definition. The code is all the rest. Nothing is left out.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SECTION = re.compile(r"^(Args|Returns|Raises|Yields):\n((?:(?: {4}.*)?\n?)+)", re.MULTILINE)
ENTRY = re.compile(r"^(\*{0,2}[\w`., *]+?): (.*(?:\n(?: {4,}.*|\s*$))*)", re.MULTILINE)


@dataclass
class Part:
    """A stretch of a module: what is said about it (Markdown), what it is, and the name it defines, if one."""

    prose: str
    code: str
    name: str = ""
    inside: str = ""  # the class that it belongs to
    also: list[str] = field(default_factory=list)  # further names, of which nothing is said

    @property
    def full_name(self) -> str:
        """`Learner.step`; empty where nothing is defined."""
        return f"{self.inside}.{self.name}" if self.inside else self.name

    @property
    def defines(self) -> bool:
        """Is it a function or a class?"""
        return bool(self.name and re.search(rf"^\s*(def|class) {self.name}\b", self.code, flags=re.MULTILINE))

    @property
    def imports(self) -> bool:
        """Is it nothing but imports?"""
        lines = self.code.splitlines()
        return bool(self.code.strip()) and not self.name and all(re.match(r"from\b|import\b|[ )]|$", x) for x in lines)


def module_name(path: Path, package: Path) -> str:
    """`plots.runs` for minicpgd/plots/runs.py, `plots` for its __init__.py, and "" for the package's own."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def parts_of(source: str) -> list[Part]:
    """A module, cut up; the first part is its own docstring."""
    tree, lines = ast.parse(source), source.splitlines()
    parts = [Part(ast.get_docstring(tree) or "", "")]
    first = 1 if ast.get_docstring(tree) is not None else 0
    end = tree.body[0].end_lineno if first and tree.body else 0
    for node in tree.body[first:]:
        for part in _cut(node, lines, end or 0):
            if _goes_with(part, parts):
                parts[-1].code += f"\n{part.code}"
                parts[-1].also += [part.full_name] if part.name else []
            else:
                parts.append(part)
        end = node.end_lineno
    return parts


def _goes_with(part: Part, before: list[Part]) -> bool:
    """Statements of which nothing is said stand together; a class's fields with its head."""
    last = before[-1]
    silent = not part.prose and not part.defines
    if part.inside:
        return silent and part.inside in (last.inside, last.name) and "def " not in last.code
    return silent and len(before) > 1 and not last.prose and not last.inside and part.imports == last.imports


def _cut(node: ast.stmt, lines: list[str], after: int, inside: str = "") -> Iterator[Part]:
    """One statement of a module or class; `after` is the last line of what stands before it."""
    start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    above = lines[after : start - 1]
    comments = [line.strip() for line in above if line.strip().startswith("#") and not line.strip().startswith("# fmt")]
    said = "\n".join(comment.removeprefix("#").removeprefix(" ") for comment in comments)
    apart = bool(above) and not above[-1].strip()
    if comments and apart:  # a remark on all that follows, and not on this statement
        yield Part(said, "", "", inside)
        said, comments = "", []
    blank = [""] if apart else []
    if not isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield Part(said, "\n".join([*blank, *lines[start - 1 : node.end_lineno]]), _assigned(node), inside)
        return
    docstring, first = ast.get_docstring(node) or "", node.body[0]
    body = node.body[1:] if docstring else node.body
    prose = f"{said}\n\n{docstring}".strip()
    head = lines[start - 1 : first.lineno - 1]
    if isinstance(node, ast.FunctionDef):
        rest = lines[(first.end_lineno or 0) if docstring else first.lineno - 1 : node.end_lineno]
        yield Part(prose, "\n".join(_trim(head, rest)), node.name, inside)
        return
    yield Part(prose, "\n".join(head), node.name, inside)
    end = first.end_lineno if docstring else first.lineno - 1
    i = 0
    while i < len(body):
        said_after = _is_text(body[i + 1]) if i + 1 < len(body) else False
        for part in _cut(body[i], lines, end or 0, node.name):
            if said_after:
                part.prose = ast.literal_eval(body[i + 1].value)  # type: ignore[attr-defined]
            yield part
        i += 1 + said_after
        end = body[i - 1].end_lineno


def _trim(head: list[str], rest: list[str]) -> list[str]:
    while rest and not rest[0].strip():
        rest = rest[1:]
    return head + rest


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _assigned(node: ast.stmt) -> str:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return next((target.id for target in targets if isinstance(target, ast.Name)), "")


def docstring_to_markdown(text: str) -> str:
    """The sections Args, Returns and Raises as definition lists, which Markdown has not."""

    def section(found: re.Match[str]) -> str:
        body = re.sub(r"^ {4}", "", found[2], flags=re.MULTILINE).strip("\n")
        if found[1] in ("Args", "Raises"):
            entries = [f"- `{entry[1]}`: {' '.join(entry[2].split())}" for entry in ENTRY.finditer(body)]
            body = "\n".join(entries) or body
        return f"\n**{found[1]}**\n\n{body}\n\n"

    return SECTION.sub(section, text + "\n")


def definitions(parts: list[Part]) -> Iterator[str]:
    """The names that a module defines: `train`, `Learner`, `Learner.step`."""
    for part in parts:
        yield from [part.full_name, *part.also] if part.name else part.also


def imported(source: str, package: str = "minicpgd") -> Iterator[tuple[str, str, str]]:
    """What a module imports from the package: the name here, the module, and the name there ("" for a module)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package:
            origin = node.module.removeprefix(package).removeprefix(".")
            for alias in node.names:
                yield alias.asname or alias.name, origin, alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == package:
                    yield alias.asname or package, "", ""
