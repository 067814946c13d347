"""The package stays small and even, and its command line answers questions without importing torch."""

import ast
import importlib
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from minicpgd.algorithms import AGGREGATIONS, LEVELS, WEIGHTS
from minicpgd.config import TrainConfig

PACKAGE = Path(__file__).parent.parent / "minicpgd"
PATHS = sorted(PACKAGE.rglob("*.py"))
PACKAGES = sorted(path.parent for path in PACKAGE.rglob("*/__init__.py"))
WITHOUT_NAMES = {"cli", "integrations"}  # Programs and other libraries import the modules of these.
TABLES = {"advantage_weight": WEIGHTS, "aggregation": AGGREGATIONS, "importance_level": LEVELS}


def name_of(path):
    return str(path.relative_to(PACKAGE))


def count_lines(path):
    return path.read_text().count("\n")


def functions(path):
    """Yield name, node, and whether it is a method, for every function and method, nested ones included."""

    def visit(node, prefix, in_class):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield prefix + child.name, child, in_class
                yield from visit(child, f"{prefix}{child.name}.", False)
            elif isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}{child.name}.", True)
            else:
                yield from visit(child, prefix, in_class)

    yield from visit(ast.parse(path.read_text()), "", False)


def parameters(node, is_method):
    """Return the names of all parameters but `self` and `cls`."""
    a = node.args
    all_of_them = (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg)
    names = [parameter.arg for parameter in all_of_them if parameter]
    return names[1:] if is_method and names[:1] in (["self"], ["cls"]) else names


def test_the_package_has_at_most_10200_lines():
    assert sum(map(count_lines, PATHS)) <= 10200


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_a_file_has_at_most_300_lines(path):
    assert count_lines(path) <= 300


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_a_function_has_at_most_60_lines(path):
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node, _ in functions(path)}
    assert {name: lines for name, lines in lengths.items() if lines > 60} == {}


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_a_public_function_has_at_most_eight_parameters(path):
    public = [(name, node, m) for name, node, m in functions(path) if not any(p[0] == "_" for p in name.split("."))]
    assert {name: len(parameters(node, m)) for name, node, m in public if len(parameters(node, m)) > 8} == {}


def test_the_checks_of_functions_find_long_ones(tmp_path):
    """Without this, a mistake in `functions` would let everything pass."""
    body = "\n".join(["        x = 1"] * 60)
    text = f"class A:\n    def f(self, a, /, b, *c, d, **e):\n{body}\n\n\ndef g():\n    def h():\n        pass\n"
    (tmp_path / "module.py").write_text(text)
    found = list(functions(tmp_path / "module.py"))
    assert [(name, node.end_lineno - node.lineno + 1) for name, node, _ in found] == [("A.f", 61), ("g", 3), ("g.h", 2)]
    assert [parameters(node, m) for _, node, m in found] == [["a", "b", "c", "d", "e"], [], []]


def test_the_top_level_has_five_modules_and_at_most_ten_packages():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", "errors", "config", "files"}
    assert 5 < len([package for package in PACKAGES if package.parent == PACKAGE]) <= 10


def test_every_module_is_in_one_of_these_packages():
    assert {path.parent for path in PATHS} == {PACKAGE, *PACKAGES}


@pytest.mark.parametrize("package", PACKAGES, ids=name_of)
def test_a_package_has_at_most_ten_files(package):
    assert len(list(package.glob("*.py"))) <= 10


@pytest.mark.parametrize("package", PACKAGES, ids=name_of)
def test_a_package_says_what_goes_in_and_what_comes_out(package):
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text()))
    assert "In: " in docstring
    assert "Out: " in docstring


@pytest.mark.parametrize("package", PACKAGES, ids=name_of)
def test_a_package_lists_its_public_names_or_imports_nothing(package):
    tree = ast.parse((package / "__init__.py").read_text())
    if package.name in WITHOUT_NAMES:
        assert len(tree.body) == 1, "only the docstring is expected"
    else:
        module = importlib.import_module(".".join(package.relative_to(PACKAGE.parent).parts))
        assert module.__all__
        assert [name for name in module.__all__ if not hasattr(module, name)] == []
        assert len(set(module.__all__)) == len(module.__all__)


def literals(hint):
    """Return the choices of all Literals in a type hint."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    inner = get_args(hint)[:1] if get_origin(hint) is Annotated else get_args(hint)
    return [choice for part in inner for choice in literals(part)]


def test_the_choices_of_a_setting_are_the_keys_of_its_table():
    hints = get_type_hints(TrainConfig, include_extras=True)
    choices = {field.name: literals(hints[field.name]) for field in fields(TrainConfig)}
    for name, table in TABLES.items():
        assert sorted(choices.pop(name)) == sorted(table), name
    assert {name for name, values in choices.items() if values} == {"drift_coef", "dtype", "lr_scheduler_type", "optim"}
    assert choices["drift_coef"] == ["max_advantage", "adaptive"]
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in choices["dtype"] if name != "auto")


def has_name_of(node):
    """Whether an expression reads `f.__name__`, `f.__qualname__`, or the same through `getattr`."""
    names = ("__name__", "__qualname__")
    return any(
        (isinstance(n, ast.Attribute) and n.attr in names) or (isinstance(n, ast.Constant) and n.value in names)
        for n in ast.walk(node)
    )


def decisions_by_name(source):
    """Return the lines that compare the name of a function, match it, look it up, or call a method of it."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        parts = {
            ast.Compare: lambda n: [n.left, *n.comparators],
            ast.Match: lambda n: [n.subject],
            ast.Subscript: lambda n: [n.slice],
            ast.Call: lambda n: [n.func.value] if isinstance(n.func, ast.Attribute) else [],
        }.get(type(node), lambda n: [])(node)
        lines += [node.lineno] if any(map(has_name_of, parts)) else []
    return lines


@pytest.mark.parametrize(
    "line", ["f.__name__ == 'std'", "f.__name__ in names", "table[f.__name__]", "f.__name__.startswith('a')",
             "getattr(f, '__name__') == 'a'", "match f.__name__:\n    case 'a':\n        pass"],
)  # fmt: skip
def test_a_decision_by_a_functions_name_is_found(line):
    assert decisions_by_name(line) == [1]
    assert decisions_by_name("if __name__ == '__main__':\n    print(f'{f.__name__}')\n") == []


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_no_code_decides_by_a_functions_name(path):
    assert decisions_by_name(path.read_text()) == []


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ("--help", 0, "{demo,train,"),
        ("train --help", 0, "--learning-rate"),
        ("memory --help", 0, "--prompt-length"),
        ("study --help", 0, "--quick"),
        ("--version", 0, "minicpgd 0."),
        ("train --learning-rat 1e-3", 2, "did you mean --learning-rate?"),
        ("train --seed x", 2, "--seed"),
    ],
)
def test_an_answer_about_the_command_line_needs_no_torch(words, code, text):
    command = [sys.executable, "-X", "importtime", "-m", "minicpgd", *words.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines if line.startswith("import time:")}
    assert {"tyro", "rich", "argparse"} <= imported or words == "--version"
    assert "minicpgd" in imported
    assert not {"torch", "transformers"} & imported
    assert done.returncode == code
    assert text in done.stdout + "\n".join(line for line in lines if not line.startswith("import time:"))
