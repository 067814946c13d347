"""Would the tests notice? Break the core in every small way there is, one at a time, and run its tests.

    make mutants                                          # all of it, half an hour on one core
    python benchmarks/mutants.py --files rollout          # one file; benchmarks/results/mutants.csv stays as it is
    python benchmarks/mutants.py --files algorithms --function clip_bounds

In: the files of `TESTS`, the tests named there for each, and tests/equivalent_mutants.toml, which explains the mutants
that no test can see. Out: each survivor as a pair of lines, a table, benchmarks/results/mutants.csv (file, mutants,
killed, equivalent, survived), and exit code 1 where a survivor is not explained. A mutant is killed when a test fails,
when the package cannot be imported, or when the tests do not end. It is equivalent when it survives and is explained.

The mutants come from three makers:

- mutmut: its operators, where its own runner would look, in undecorated functions;
- elsewhere: the same operators where that runner does not look: decorated functions, fields of classes, constants,
  tables;
- ours: numbers halved (1 becomes 0), statements, method calls and decorators left out, and each field of each row of
  the table of algorithms replaced by every other value of its column.

Annotations and docstrings are left alone, as mutmut does, and so are type aliases. Only the operators are mutmut's: its
runner switches mutants on inside one import, which cannot work for what is decided during that import. Here each mutant
is written into a copy of the repository in mutants/, and a process forked from one that has torch loaded imports it.
"""

import difflib
import gc
import importlib
import multiprocessing
import os
import shlex
import shutil
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import libcst as cst
import libcst.matchers as m
import pandas as pd
import pytest
import tyro
from libcst.metadata import MetadataWrapper
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "mutants"
COLUMNS = ("file", "mutants", "killed", "equivalent", "survived")
EXPLAINED = ROOT / "tests" / "equivalent_mutants.toml"
SCORING = (
    "test_policy_and_rollout.py --deselect tests/test_policy_and_rollout.py::test_chunks_keep_the_logits_from_existing"
)
TESTS = {
    "divergence": "test_divergence.py",
    "advantages": "test_advantages.py",
    "surrogates": "test_gradients.py",
    "algorithms": "test_gradients.py test_advantages.py "
    "test_readme_and_results.py::test_the_readme_has_every_row_of_the_table",
    "logprobs": SCORING,
    "rollout": f"{SCORING} -k 'not chunked'",
    "checkpoint": "test_resume.py -k 'not (kill_9 or signal or full_disk)'",
}
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


def _tests(arguments: str) -> int:
    """In a process of its own: run some tests of the copy without a word; the exit code says how they ended."""
    with open(os.devnull, "w") as silence:
        os.dup2(silence.fileno(), 1)
        os.dup2(silence.fileno(), 2)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.chdir(COPY)
    sys.path.insert(0, str(COPY))
    named = [f"tests/{word}" if word.startswith("test_") else word for word in shlex.split(arguments)]
    code = pytest.main([*named, "-x", "--tb=no", "-p", "no:cacheprovider", "--basetemp", str(COPY / "basetemp")])
    loaded = [name for name in sys.modules if name.split(".")[0] not in ("minicpgd", "conftest", "__main__")]
    (COPY / "loaded.txt").write_text("\n".join(name for name in loaded if not name.startswith("test_")))
    sys.exit(int(code))


def fails(arguments: str, limit: float) -> tuple[bool, float]:
    """Whether the tests fail, or do not end within the limit; and the seconds it took."""
    process = multiprocessing.get_context("fork").Process(target=_tests, args=(arguments,))
    started = time.perf_counter()
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
    if process.exitcode == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise RuntimeError(f"no test is selected by {arguments}")
    return process.exitcode != 0, time.perf_counter() - started


def survivors(mutants: Sequence[Mutant], tests: str) -> list[Mutant]:
    """Run the tests of one file on each of its mutants."""
    path, alive = COPY / "minicpgd" / f"{mutants[0].file}.py", []
    source = path.read_text()
    for _ in range(2):  # the first time all is imported; what is loaded then is loaded here, and never again
        failed, seconds = fails(tests, 600)
        if failed:
            raise SystemExit(f"without any change these fail: {tests}")
        for name in (COPY / "loaded.txt").read_text().splitlines():
            with suppress(Exception):
                importlib.import_module(name)
    gc.freeze()  # what was loaded is not searched for garbage at the end of every process
    try:
        for i, mutant in enumerate(mutants, 1):
            path.write_text(mutant.code)
            os.utime(path, (i, i))  # two mutants of one second and one length would share their bytecode
            if not fails(tests, 30 + 3 * seconds)[0]:
                alive.append(mutant)
            print(f"\r{mutant.file}: {i} of {len(mutants)}, {len(alive)} alive", end="", file=sys.stderr, flush=True)
    finally:
        path.write_text(source)
        print(file=sys.stderr)
    return alive


def explanations() -> dict[tuple[str, str, str, str], str]:
    """From (file, function, the lines as they were, as they became) to why no test can tell the two apart."""
    listed = tomllib.loads(EXPLAINED.read_text()).get("mutant", [])
    return {
        (entry["file"], entry["function"], entry["was"], becomes): f"{entry['kind']}: {entry['why']}"
        for entry in listed
        for becomes in entry["becomes"]
    }


def main(files: tuple[str, ...] = tuple(TESTS), function: str = "") -> int:
    """Break, test, explain, and count. With `function`, only what its name contains."""
    shutil.rmtree(COPY, ignore_errors=True)
    unwanted = shutil.ignore_patterns(".*", "mutants", "runs", "build", "_site", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, COPY, ignore=unwanted)
    explained, used = explanations(), set()
    rows, makers, unexplained = [], Counter(), 0
    for file in files:
        mutants = [mutant for mutant in mutants_of(file) if function in mutant.function]
        alive = survivors(mutants, TESTS[file])
        silent = [mutant for mutant in alive if _key(mutant) not in explained]
        used |= {_key(mutant) for mutant in alive}
        for mutant in silent:
            print(f"{file}.{mutant.function or 'the module'} survives ({mutant.maker})")
            print(f"  - {mutant.was}\n  + {mutant.becomes}")
        makers.update((file, mutant.maker) for mutant in mutants)
        counts = [len(mutants), len(mutants) - len(alive), len(alive) - len(silent), len(silent)]
        rows.append(dict(zip(COLUMNS, [f"{file}.py", *counts], strict=True)))
        unexplained += len(silent)
    if not function:
        for key in explained.keys() - used:
            if key[0] in files:
                print("stale, no such mutant survives: {}.{}\n  - {}\n  + {}".format(*key))
    table = pd.DataFrame(rows)
    if set(files) == set(TESTS) and not function:
        table.to_csv(ROOT / "benchmarks" / "results" / "mutants.csv", index=False)
    for maker in ("mutmut", "elsewhere", "ours"):
        table[f"of {maker}"] = [makers[file, maker] for file in files]
    table.loc[len(table)] = ["in all", *table.iloc[:, 1:].sum()]
    print(table.to_string(index=False))
    return 1 if unexplained else 0


def _key(mutant: Mutant) -> tuple[str, str, str, str]:
    return mutant.file, mutant.function, mutant.was, mutant.becomes


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
