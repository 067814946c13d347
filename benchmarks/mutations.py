"""What can be broken in a file, one small change at a time: the mutants that benchmarks/mutants.py tests.

In: the name of a file of the package. Out: `Mutant`s, each with the whole text of the broken file. Who makes which is
told there.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import libcst as cst
import libcst.matchers as m
from libcst.metadata import MetadataWrapper
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).resolve().parent.parent
MODULES = {"functools", "hashlib", "json", "math", "nn", "os", "torch"}


@dataclass(frozen=True)
class Mutant:
    """One small change: where, what the changed lines were and became, and the whole file with it."""

    file: str
    function: str
    was: str
    becomes: str
    maker: str
    code: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What an explanation names it by: numbers would shift with every edit."""
        return self.file, self.function, self.was, self.becomes


def halved(node: cst.BaseNumber) -> Iterator[cst.CSTNode]:
    """The operator of mutmut adds one, which says little about 1e-8 and nothing about `dim=0`."""
    value = node.evaluated_value
    if value:
        yield node.with_changes(value=repr(value // 2 if isinstance(value, int) else value / 2))


def statement_left_out(node: cst.Expr) -> Iterator[cst.CSTNode]:
    """`model.eval()` becomes `pass`."""
    if isinstance(node.value, cst.Call):
        yield cst.Pass()


def method_left_out(node: cst.Call) -> Iterator[cst.CSTNode]:
    """`d.detach()` becomes `d`."""
    if isinstance(node.func, cst.Attribute):
        of = node.func.value
        if not (isinstance(of, cst.Name) and of.value in MODULES):
            yield of


def decorator_left_out(node: cst.FunctionDef) -> Iterator[cst.CSTNode]:
    """`@torch.no_grad()` goes."""
    if node.decorators:
        yield node.with_changes(decorators=[])


OURS = [
    (cst.BaseNumber, halved),
    (cst.Expr, statement_left_out),
    (cst.Call, method_left_out),
    (cst.FunctionDef, decorator_left_out),
]


class Places(cst.CSTVisitor):
    """All changes of a file: (node, its replacement, the function it is in, maker)."""

    def __init__(self) -> None:
        self.found: list[tuple[cst.CSTNode, cst.CSTNode, str, str]] = []
        self.scope: list[cst.FunctionDef | cst.ClassDef] = []

    def on_visit(self, node: cst.CSTNode) -> bool:  # noqa: D102
        if isinstance(node, cst.Annotation) or _is_alias(node) or _is_call_of(node, "len", "isinstance"):
            return False
        name = ".".join(scope.name.value for scope in self.scope)
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self.scope.append(node)
        functions = [scope for scope in self.scope if isinstance(scope, cst.FunctionDef)]
        theirs = "mutmut" if functions and not any(f.decorators for f in functions) else "elsewhere"
        for operators, maker in ((mutation_operators, theirs), (OURS, "ours")):
            for kind, operator in operators:
                if isinstance(node, kind):
                    self.found += [(node, new, name, maker) for new in operator(node)]
        return True

    def on_leave(self, node: cst.CSTNode) -> None:  # noqa: D102
        if self.scope and node is self.scope[-1]:
            self.scope.pop()


def _is_alias(node: cst.CSTNode) -> bool:
    """`Level = Callable[[Tensor, Tensor], Tensor]`: an annotation by another name."""
    value = node.value if isinstance(node, cst.Assign) else None
    return isinstance(value, cst.Subscript) and isinstance(value.value, cst.Name) and value.value.value == "Callable"


def _is_call_of(node: cst.CSTNode, *names: str) -> bool:
    return isinstance(node, cst.Call) and isinstance(node.func, cst.Name) and node.func.value in names


def fields_of_rows(rows: Sequence[cst.Call]) -> Iterator[tuple[cst.Call, cst.Call]]:
    """Each row of the table of algorithms, with one field as another row has it. Names and descriptions stay."""
    code = cst.Module([]).code_for_node
    columns: dict[object, dict[str, cst.Arg]] = {}
    for row in rows:
        for i, field in enumerate(row.args):
            column = field.keyword.value if field.keyword else i
            columns.setdefault(column, {})[code(field.value)] = field
    for row in rows:
        for i in range(1, 6):
            for value, other in columns[i].items():
                if value != code(row.args[i].value):
                    new = row.args[i].with_changes(value=other.value)
                    yield row, row.with_changes(args=[*row.args[:i], new, *row.args[i + 1 :]])
        for column in ("level", "epsilon_high", "reference_kl"):
            if not any(field.keyword and field.keyword.value == column for field in row.args):
                last = row.args[-1].with_changes(comma=cst.Comma())
                yield from ((row, row.with_changes(args=[*row.args[:-1], last, a])) for a in columns[column].values())


def mutants_of(file: str) -> list[Mutant]:
    """Every mutant of one file of the package, each text once."""
    source = (ROOT / "minicpgd" / f"{file}.py").read_text()
    wrapper = MetadataWrapper(cst.parse_module(source))
    places = Places()
    wrapper.visit(places)
    if file == "algorithms":
        rows = m.findall(wrapper.module, m.Call(func=m.Name("Algorithm")))
        places.found += [(row, new, "", "ours") for row, new in fields_of_rows(rows)]
    mutants: dict[str, Mutant] = {}
    for old, new, function, maker in places.found:
        code = wrapper.module.visit(Replacement(old, new)).code
        if code not in mutants and code != source:
            mutants[code] = Mutant(file, function, *_changed_lines(source, code), maker, code)
    return list(mutants.values())


class Replacement(cst.CSTTransformer):
    """One node by another: this one, not each that looks like it."""

    def __init__(self, old: cst.CSTNode, new: cst.CSTNode):
        self.old, self.new = old, new

    def on_leave(self, original_node: cst.CSTNode, updated_node: cst.CSTNode) -> cst.CSTNode:  # noqa: D102
        return self.new if original_node is self.old else updated_node


def _changed_lines(source: str, code: str) -> tuple[str, str]:
    """What the lines were, and what they became, each on one line."""
    old, new = source.splitlines(), code.splitlines()
    changes = [c for c in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes() if c[0] != "equal"]
    first, last = changes[0], changes[-1]
    was, becomes = old[first[1] : last[2]], new[first[3] : last[4]]
    return tuple(" ".join(line.strip() for line in lines) for lines in (was, becomes))
