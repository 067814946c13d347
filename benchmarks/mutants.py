"""Do the tests notice a small error in the core? The script makes every small change to a file and runs its tests.

    make mutants                                            # all files, about an hour on one core
    python benchmarks/mutants.py --files models/sampling    # one file, and its row of benchmarks/results/mutants.csv
    python benchmarks/mutants.py --files algorithms/loss --function clip_bounds

A mutant is a copy of a file with one change. The script makes the mutants of each file of `TESTS`, one at a time, and
runs the tests that `TESTS` names for the file. A mutant is killed if a test fails, if the package cannot be imported,
or if the tests do not end. It is equivalent if it survives and tests/equivalent_mutants.toml explains why no test can
notice it. The script prints every other survivor as a pair of lines, and its exit code is then 1. It writes
benchmarks/results/mutants.csv (file, mutants, killed, equivalent, survived).

The changes come from two sets of operators:

- mutmut's operators, also where mutmut's own runner does not apply them: in decorated functions, fields of classes,
  constants and tables;
- our operators: halve a number (1 becomes 0), remove a statement, a method call or a function's decorators, and replace
  each field of each row of the table of algorithms by every other value of its column.

No operator changes annotations, docstrings or type aliases. The runner is our own, because mutmut's runner selects a
mutant after the import, and so cannot test code that runs during the import. Our runner writes each mutant into a copy
of the repository in mutants/. A process forked from one that has loaded torch then imports the mutant.
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
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import libcst as cst
import libcst.matchers as m
import pandas as pd
import pytest
import tyro
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "mutants"
RESULTS = ROOT / "benchmarks" / "results" / "mutants.csv"
EXPLANATIONS = ROOT / "tests" / "equivalent_mutants.toml"
MODULES = {"functools", "hashlib", "json", "math", "nn", "os", "torch"}
TABLE_TESTS = "test_readme_and_results.py::test_the_page_of_algorithms_has_every_row_of_the_table test_advantages.py"
TESTS = {  # The quick tests come first, because the first failure ends the tests of a mutant.
    "algorithms/divergence": "test_divergence.py",
    "algorithms/advantages": "test_remedies.py::test_groups_whose_mean_reward_lies_outside_are_left_out "
    "test_advantages.py",
    "algorithms/surrogates": "test_structure.py::test_the_choices_of_a_setting_are_the_keys_of_its_table "
    "test_gradients.py",
    "algorithms/aggregation": "test_remedies.py::test_all_tokens_of_a_prompts_responses_share_one_mean "
    "test_gradients.py",
    "algorithms/loss": "test_remedies.py::test_a_line_warns_where_runs_decayed "
    "test_remedies.py::test_each_response_may_have_its_own_drift_coefficient "
    "test_remedies.py::test_the_adaptive_coefficient_is_doubled_or_halved "
    "test_remedies.py::test_the_mean_kl_is_the_metric_kl_old "
    "test_remedies.py::test_the_clip_bounds_loosen_along_a_response "
    "test_remedies.py::test_tokens_before_a_response_have_finite_bounds "
    "test_remedies.py::test_all_tokens_of_a_prompts_responses_share_one_mean "
    "test_advantages.py::test_complete_rewards_take_the_formula_of_the_row "
    "test_remedies.py::test_a_token_is_clipped_at_its_own_bound "
    f"test_remedies.py::test_a_loss_takes_an_advantage_for_each_token {TABLE_TESTS} test_gradients.py",
    "algorithms/table": f"{TABLE_TESTS} test_gradients.py",
    "models/logprobs": "test_other_models.py::test_scores_and_gradients_are_those_of_the_models_own_logits "
    "test_other_models.py::test_the_number_of_positions "
    "test_other_models.py::test_scoring_restores_a_forward_that_another_library_put_on_the_decoder "
    "test_policy_and_sampling.py "
    "test_other_models.py::test_what_is_scored_is_what_was_sampled -k 'not chunks_keep and not fresh_interpreter'",
    "models/sampling": "test_qlora.py::test_micro_batches_fit_and_change_no_gradient "
    "test_qlora.py::test_responses_generated_in_parts test_policy_and_sampling.py test_step.py "
    "test_other_models.py::test_a_scorer_that_disagrees_with_the_sampler_is_refused "
    "test_other_models.py::test_the_check_samples_four_short_responses_to_each_prompt "
    "test_other_models.py::test_the_check_passes_a_full_memory_on_and_names_every_other_error "
    "test_other_models.py::test_the_gap_is_the_largest_in_float32_and_the_mean_in_half_precision "
    "test_other_models.py::test_a_gap_may_be_as_large_as_the_limit "
    "test_other_models.py::test_nothing_follows_the_end_of_a_response "
    "test_other_models.py::test_a_model_that_cannot_be_sampled_is_refused_before_its_folder_is_made "
    "test_other_models.py::test_generate_takes_settings_by_name_and_refuses_one_that_does_not_exist "
    "test_other_models.py::test_prompt_and_response_have_to_fit_among_the_models_positions "
    "-k 'not chunk and not fresh_interpreter'",
    "training/checkpoint": "test_resume.py::test_a_checkpoint_gives_back_what_it_was_given "
    "test_resume.py::test_a_checkpoint_whose_file_was_written_again_is_whole_only_if_it_says_the_same "
    "test_resume.py::test_a_file_is_on_the_disk_before_it_has_its_name test_any_damage.py test_resume.py "
    "-k 'given or written_again or on_the_disk or header or no_file or million or no_other or both_shapes "
    "or something_else_goes or not_stay or memory_cannot or two_checkpoints or flip or all_that_a_step'",
}


@dataclass(frozen=True)
class Mutant:
    """One change: the function, the changed lines before and after, and the whole file with the change."""

    file: str
    function: str
    was: str
    becomes: str
    code: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """The name of the mutant in the explanations. Line numbers would change with every edit."""
        return self.file, self.function, self.was, self.becomes


def halve(node: cst.BaseNumber) -> Iterator[cst.CSTNode]:
    """Halve a number. mutmut adds 1, which hardly changes a test of 1e-8 or of `dim=0`."""
    if value := node.evaluated_value:
        yield node.with_changes(value=repr(value // 2 if isinstance(value, int) else value / 2))


def remove_statement(node: cst.Expr) -> Iterator[cst.CSTNode]:
    """Replace `model.eval()` by `pass`."""
    if isinstance(node.value, cst.Call):
        yield cst.Pass()


def remove_method(node: cst.Call) -> Iterator[cst.CSTNode]:
    """Replace `d.detach()` by `d`."""
    if isinstance(node.func, cst.Attribute):
        owner = node.func.value
        if not (isinstance(owner, cst.Name) and owner.value in MODULES):
            yield owner


def remove_decorators(node: cst.FunctionDef) -> Iterator[cst.CSTNode]:
    """Remove `@torch.no_grad()`."""
    if node.decorators:
        yield node.with_changes(decorators=[])


OPERATORS = [
    *mutation_operators,
    (cst.BaseNumber, halve),
    (cst.Expr, remove_statement),
    (cst.Call, remove_method),
    (cst.FunctionDef, remove_decorators),
]
UNCHANGED = m.OneOf(
    m.Annotation(),
    # a type alias: `Pair = tuple[Tensor, Tensor]`
    m.Assign(value=m.Subscript(value=m.Name("Callable") | m.Name("tuple"))),
    m.Call(func=m.OneOf(m.Name("len"), m.Name("isinstance"))),
)


class ChangeFinder(cst.CSTVisitor):
    """Collects the changes to a file as triples: a node, its replacement, and the function around it."""

    def __init__(self) -> None:
        self.changes: list[tuple[cst.CSTNode, cst.CSTNode, str]] = []
        self.scope: list[str] = []

    def on_visit(self, node: cst.CSTNode) -> bool:  # noqa: D102
        if m.matches(node, UNCHANGED):
            return False
        function = ".".join(self.scope)
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self.scope.append(node.name.value)
        for kind, operator in OPERATORS:
            if isinstance(node, kind):
                self.changes += [(node, new, function) for new in operator(node)]
        return True

    def on_leave(self, node: cst.CSTNode) -> None:  # noqa: D102
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self.scope.pop()


def change_rows(rows: Sequence[cst.Call]) -> Iterator[tuple[cst.Call, cst.Call]]:
    """Replace each field of each row of the table by another row's field, except for names and descriptions."""
    code = cst.Module([]).code_for_node
    columns: dict[int | str, dict[str, cst.Arg]] = defaultdict(dict)
    for row in rows:
        for i, field in enumerate(row.args):
            columns[field.keyword.value if field.keyword else i][code(field.value)] = field
    for row in rows:
        positions = {field.keyword.value if field.keyword else i: i for i, field in enumerate(row.args)}
        for column, fields in columns.items():
            for value, field in fields.items() if column not in (0, 1, 7) else ():  # name, label and description
                if column not in positions:  # The row has the default value.
                    last = row.args[-1].with_changes(comma=cst.Comma())
                    yield row, row.with_changes(args=[*row.args[:-1], last, field])
                elif value != code(row.args[positions[column]].value):
                    args = list(row.args)
                    args[positions[column]] = args[positions[column]].with_changes(value=field.value)
                    yield row, row.with_changes(args=args)


def changed_lines(source: str, code: str) -> tuple[str, str]:
    """Return the changed lines before and after the change, each joined to one line."""
    old, new = source.splitlines(), code.splitlines()
    changes = [c for c in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes() if c[0] != "equal"]
    first, last = changes[0], changes[-1]
    was, becomes = old[first[1] : last[2]], new[first[3] : last[4]]
    return tuple(" ".join(line.strip() for line in lines) for lines in (was, becomes))


def mutants_of(file: str) -> list[Mutant]:
    """Make all mutants of one file of the package, and omit duplicates."""
    source = (ROOT / "minicpgd" / f"{file}.py").read_text()
    module, finder = cst.parse_module(source), ChangeFinder()
    module.visit(finder)
    if file == "algorithms/table":
        rows = m.findall(module, m.Call(func=m.Name("Algorithm")))
        finder.changes += [(row, new, "") for row, new in change_rows(rows)]
    mutants: dict[str, Mutant] = {}
    for old, new, function in finder.changes:
        code = module.deep_replace(old, new).code
        if code not in mutants and code != source:
            mutants[code] = Mutant(file, function, *changed_lines(source, code), code)
    return list(mutants.values())


def run_tests(arguments: str) -> None:
    """Run some tests of the copy silently in this process, and exit with pytest's exit code."""
    with open(os.devnull, "w") as silence:
        os.dup2(silence.fileno(), 1)
        os.dup2(silence.fileno(), 2)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.chdir(COPY)
    sys.path.insert(0, str(COPY))
    words = [f"tests/{word}" if word.startswith("test_") else word for word in shlex.split(arguments)]
    # Readable failures would take half of the time.
    options = ["-x", "--tb=no", "--assert=plain", "-p", "no:logging", "-p", "no:cacheprovider"]
    code = pytest.main([*words, *options, "--basetemp", str(COPY / "basetemp")])
    loaded = [name for name in sys.modules if name.split(".")[0] not in ("minicpgd", "conftest", "__main__")]
    (COPY / "loaded.txt").write_text("\n".join(name for name in loaded if not name.startswith("test_")))
    sys.exit(int(code))


def tests_fail(arguments: str, limit: float) -> tuple[bool, float]:
    """Return whether the tests fail or do not end within `limit` seconds, and the seconds that they took."""
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(arguments,))
    started = time.perf_counter()
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
    if process.exitcode == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise RuntimeError(f"{arguments} selects no test")
    return process.exitcode != 0, time.perf_counter() - started


def survivors(mutants: Sequence[Mutant], tests: str) -> Iterator[Mutant]:
    """Run the tests of one file on each of its mutants, and yield those that survive."""
    path = COPY / "minicpgd" / f"{mutants[0].file}.py"
    source = path.read_text()
    for _ in range(2):  # After the first run this process loads the same libraries, so that no later run must.
        failed, seconds = tests_fail(tests, 600)
        if failed:
            raise SystemExit(f"These tests fail without any change: {tests}")
        for name in (COPY / "loaded.txt").read_text().splitlines():
            with suppress(Exception):
                importlib.import_module(name)
    path.write_text("raise ImportError")
    if not tests_fail(tests, 600)[0]:
        raise SystemExit(f"These tests do not import {path}: {tests}")
    gc.freeze()  # The garbage collector of a forked process then skips the loaded libraries.
    try:
        for i, mutant in enumerate(mutants, 1):
            path.write_text(mutant.code)
            os.utime(path, (i, i))  # Python would reuse the bytecode of a file with the same time and length.
            if not tests_fail(tests, 30 + 3 * seconds)[0]:
                yield mutant
            print(f"\r{mutant.file}: {i} of {len(mutants)}", end="", file=sys.stderr, flush=True)
    finally:
        path.write_text(source)
        print(file=sys.stderr)


def load_explained() -> set[tuple[str, str, str, str]]:
    """Return the keys of the mutants that the list explains."""
    entries = tomllib.loads(EXPLANATIONS.read_text()).get("mutant", [])
    return {(e["file"], e["function"], e["was"], becomes) for e in entries for becomes in e["becomes"]}


def save(table: pd.DataFrame) -> None:
    """Replace the rows of these files in the committed table."""
    before = pd.read_csv(RESULTS) if RESULTS.exists() else table
    rows = pd.concat([before[~before["file"].isin(table["file"])], table]).set_index("file")
    rows.reindex([f"{file}.py" for file in TESTS]).dropna().astype(int).to_csv(RESULTS)


def main(files: tuple[Literal[*TESTS], ...] = tuple(TESTS), function: str = "") -> int:
    """Make the mutants, test them, and count.

    Args:
        files: the files to change.
        function: change only the functions whose names contain this, and do not write the table.
    """
    shutil.rmtree(COPY, ignore_errors=True)
    ignored = shutil.ignore_patterns(".*", "mutants", "runs", "build", "_site", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, COPY, ignore=ignored)
    explained, used, rows = load_explained(), set(), []
    for file in files:
        mutants = [mutant for mutant in mutants_of(file) if function in mutant.function]
        equivalent = survived = 0
        for mutant in survivors(mutants, TESTS[file]):
            if mutant.key in explained:
                equivalent += 1
                used.add(mutant.key)
            else:
                survived += 1
                print(f"\n{file}.{mutant.function} survives\n  - {mutant.was}\n  + {mutant.becomes}", flush=True)
        rows.append((f"{file}.py", len(mutants), len(mutants) - equivalent - survived, equivalent, survived))
        table = pd.DataFrame(rows, columns=["file", "mutants", "killed", "equivalent", "survived"])
        if not function:
            save(table)  # The table keeps the finished files if the user stops the script.
            for _, *key in (key for key in explained - used if key[0] == file):
                print("no such mutant survives, so its explanation is stale: {}\n  - {}\n  + {}".format(*key))
    table.loc[len(table)] = ["all", *table.iloc[:, 1:].sum()]
    print(table.to_string(index=False))
    return int(table["survived"].iloc[-1] > 0)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
