r"""Annotated source: a module goes in, and pairs of prose and code come out.

The prose consists of the docstrings (of the module, its functions, classes, methods and fields) and of the comments
that stand on lines of their own before a definition. The code is all the rest. Nothing is left out.
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
    """A piece of a module: its prose (Markdown), its code, and the name that it defines, if it defines one."""

    prose: str
    code: str
    name: str = ""
    inside: str = ""
    """The class that it belongs to."""
    also: list[str] = field(default_factory=list)
    """Further names, which have no prose."""

    @property
    def full_name(self) -> str:
        """`Learner.step`; empty if the part defines nothing."""
        return f"{self.inside}.{self.name}" if self.inside else self.name

    @property
    def defines(self) -> bool:
        """Is it a function or a class?"""
        return bool(self.name and re.search(rf"^\s*(def|class) {self.name}\b", self.code, flags=re.MULTILINE))

    @property
    def imports(self) -> bool:
        """Does it consist of imports only?"""
        lines = self.code.splitlines()
        return bool(self.code.strip()) and not self.name and all(re.match(r"from\b|import\b|[ )]|$", x) for x in lines)


def module_name(path: Path, package: Path) -> str:
    """`plots.runs` for minicpgd/plots/runs.py, `plots` for its __init__.py, and "" for minicpgd/__init__.py."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def parts_of(source: str) -> list[Part]:
    """Cut a module into parts, the first of which is its own docstring."""
    tree, lines = ast.parse(source), source.splitlines()
    parts = [Part(ast.get_docstring(tree) or "", "")]
    first = 1 if ast.get_docstring(tree) is not None else 0
    end = tree.body[0].end_lineno if first and tree.body else 0
    for node in tree.body[first:]:
        for part in _cut(node, lines, end or 0):
            if _continues(part, parts):
                parts[-1].code += f"\n{part.code}"
                parts[-1].also += [part.full_name] if part.name else []
            else:
                parts.append(part)
        end = node.end_lineno
    return parts


def _continues(part: Part, before: list[Part]) -> bool:
    """Should the part join the last one? Statements without prose do; a class's first fields join its head."""
    last = before[-1]
    has_no_prose = not part.prose and not part.defines
    if part.inside:
        is_head = last.name == part.inside and not last.inside
        return has_no_prose and (is_head or (last.inside == part.inside and not last.prose and not last.defines))
    return has_no_prose and len(before) > 1 and not last.prose and not last.inside and part.imports == last.imports


def _cut(node: ast.stmt, lines: list[str], after: int, inside: str = "") -> Iterator[Part]:
    """One statement of a module or class; `after` is the last line of the statement before it."""
    start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    above = lines[after : start - 1]
    comments = [line.strip() for line in above if line.strip().startswith("#") and not line.strip().startswith("# fmt")]
    remark = "\n".join(comment.removeprefix("#").removeprefix(" ") for comment in comments)
    is_apart = bool(above) and not above[-1].strip()
    if comments and is_apart:  # The remark is about all statements that follow, not about this one alone.
        yield Part(remark, "", "", inside)
        remark, comments = "", []
    blank = [""] if is_apart else []
    if not isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield Part(remark, "\n".join([*blank, *lines[start - 1 : node.end_lineno]]), _assigned(node), inside)
        return
    docstring, first = ast.get_docstring(node) or "", node.body[0]
    body = node.body[1:] if docstring else node.body
    prose = f"{remark}\n\n{docstring}".strip()
    head = lines[start - 1 : first.lineno - 1]
    if isinstance(node, ast.FunctionDef):
        rest = lines[(first.end_lineno or 0) if docstring else first.lineno - 1 : node.end_lineno]
        yield Part(prose, "\n".join(_trim(head, rest)), node.name, inside)
        return
    yield Part(prose, "\n".join(head), node.name, inside)
    end = first.end_lineno if docstring else first.lineno - 1
    i = 0
    while i < len(body):
        has_docstring = _is_text(body[i + 1]) if i + 1 < len(body) else False
        for part in _cut(body[i], lines, end or 0, node.name):
            if has_docstring:
                part.prose = ast.literal_eval(body[i + 1].value)  # type: ignore[attr-defined]
            yield part
        i += 1 + has_docstring
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
    """Turn the sections Args, Returns and Raises into lists."""

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
    """What a module imports from the package: its name here, the module, and its name there ("" for a module)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package:
            origin = node.module.removeprefix(package).removeprefix(".")
            for alias in node.names:
                yield alias.asname or alias.name, origin, alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == package:
                    yield alias.asname or package, "", ""
