"""Every public name has a docstring with shapes, units, errors and source. The docstrings are the documentation."""

import ast
import importlib
import inspect
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minicpgd"
PATHS = sorted(PACKAGE.rglob("*.py"))
SHAPE = re.compile(r"\([A-Za-z.]+(?: [*+] \w+)?,[\w +*.,()]*\)|scalar|any shape|same shape")
UNITS = {
    "nats": r"log_?probs?|logp|log_ratio|entropy|logits",
    "tokens": r"lengths?$|_length$|tokens$",
    "bytes": r"_bytes$",
}
SOURCE = re.compile(r"arXiv|\b\d{4}\.\d{5}\b|Schulman|equation|[Oo]urs|1951|Wilson|bootstrap")
FORMULAS = (*sorted((PACKAGE / "algorithms").glob("*.py")), PACKAGE / "training/evaluation.py",
            PACKAGE / "experiments/statistics.py")  # fmt: skip
# `--help` prints the docstrings of these modules, and cli/main.py reports every error of a command in one line.
COMMANDS = [PACKAGE / "cli" / f"{name}.py" for name in ("train", "study", "inspect", "plan")]


def name_of(path):
    return str(path.relative_to(PACKAGE))


def public(path):
    """Yield name, node, and the docstrings around it, for every public function, class and method."""
    tree = ast.parse(path.read_text())
    module = ast.get_docstring(tree) or ""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node, module
            if isinstance(node, ast.ClassDef):
                around = f"{ast.get_docstring(node) or ''}\n{module}"
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                        yield f"{node.name}.{method.name}", method, around


def arguments(node):
    return [a for a in [*node.args.args, *node.args.kwonlyargs] if a.annotation]


def escaping(node):
    """Yield the names of the errors that a function raises itself and does not catch."""
    pending = [(statement, False) for statement in node.body]
    while pending:
        here, caught = pending.pop()
        if isinstance(here, ast.FunctionDef | ast.ClassDef):
            continue
        if isinstance(here, ast.Raise) and here.exc is not None and not caught:
            raised = here.exc.func if isinstance(here.exc, ast.Call) else here.exc
            if isinstance(raised, ast.Name) and raised.id[0].isupper():
                yield raised.id
        tried = here.body if isinstance(here, ast.Try) else []
        pending += [(child, caught or child in tried) for child in ast.iter_child_nodes(here)]


def test_the_modules_with_formulas_and_with_commands_exist():
    assert all(path.is_file() for path in (*FORMULAS, *COMMANDS))
    assert len(FORMULAS) == 9


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_every_public_name_has_a_docstring(path):
    assert ast.get_docstring(ast.parse(path.read_text())), "the module has none"
    assert [name for name, node, _ in public(path) if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_tensors_have_shapes(path):
    """The shape stands in the function's own docstring, or once for all at the top of its class or module."""
    missing = []
    for name, node, around in public(path):
        if isinstance(node, ast.FunctionDef):
            signature = " ".join(ast.unparse(a.annotation) for a in arguments(node))
            signature += ast.unparse(node.returns) if node.returns else ""
            if "Tensor" in signature and not SHAPE.search(f"{ast.get_docstring(node)}\n{around}"):
                missing.append(name)
    assert missing == []


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_quantities_have_units(path):
    missing = []
    for name, node, around in public(path):
        if isinstance(node, ast.FunctionDef):
            text = f"{ast.get_docstring(node)}\n{around}"
            for unit, quantity in UNITS.items():
                numbers = [a.arg for a in arguments(node) if re.search(r"Tensor|int|float", ast.unparse(a.annotation))]
                if any(re.search(quantity, argument) for argument in numbers) and unit not in text:
                    missing.append(f"{name}: {unit}")
    assert missing == []


@pytest.mark.parametrize("path", [path for path in PATHS if path not in COMMANDS], ids=name_of)
def test_docstrings_name_the_errors_that_a_function_raises(path):
    errors = importlib.import_module("minicpgd.errors")
    missing = []
    for name, node, _ in public(path):
        if isinstance(node, ast.FunctionDef):
            for raised in escaping(node):
                kinds = [kind.__name__ for kind in inspect.getmro(getattr(errors, raised, ValueError))]
                if not any(re.search(rf"\b{kind}:", ast.get_docstring(node) or "") for kind in {raised, *kinds[:-3]}):
                    missing.append(f"{name}: {raised}")
    assert missing == []


@pytest.mark.parametrize("path", FORMULAS, ids=name_of)
def test_formulas_have_a_source(path):
    """The function's own docstring names it, or a line at the top of the module does that names the function."""
    missing = []
    for name, node, around in public(path):
        own = ast.get_docstring(node) or ""
        if isinstance(node, ast.FunctionDef) and "$" in own and not SOURCE.search(own):
            lines = [line for line in around.splitlines() if f"`{name}`" in line]
            if not any(SOURCE.search(line) for line in lines):
                missing.append(name)
    assert missing == []


def test_docstrings_with_a_backslash_are_raw():
    """Otherwise Python reads `\\frac` as a form feed and `rac`."""
    found = []
    folders = ("minicpgd", "notebooks", "docs", "tests", "benchmarks")
    for path in [path for folder in folders for path in (ROOT / folder).rglob("*.py")]:
        docstrings = set()
        for node in ast.walk(ast.parse(path.read_text())):
            body = getattr(node, "body", None)
            for statement in body if isinstance(body, list) else []:
                if isinstance(statement, ast.Expr) and isinstance(getattr(statement.value, "value", None), str):
                    docstrings.add((statement.lineno, statement.col_offset))
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.start in docstrings and token.type == tokenize.STRING:
                is_raw = token.string.lower().startswith("r")
                if not is_raw and "\\" in token.string.replace("\\\\", ""):
                    found.append(f"{path.relative_to(ROOT)}:{token.start[0]}")
    assert found == []
