"""Would the tests notice? Break the core in every small way there is, one at a time, and run its tests.

    make mutants                                          # all of it, an hour on one core
    python benchmarks/mutants.py --files rollout          # one file, and its line of benchmarks/results/mutants.csv
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
from typing import Literal

import pandas as pd
import pytest
import tyro
from mutations import ROOT, Mutant, mutants_of

COPY = ROOT / "mutants"
COLUMNS = ("file", "mutants", "killed", "equivalent", "survived")
EXPLAINED = ROOT / "tests" / "equivalent_mutants.toml"
TESTS = {  # the quick ones first: one that fails ends the turn
    "divergence": "test_divergence.py",
    "advantages": "test_advantages.py",
    "surrogates": "test_gradients.py",
    "algorithms": "test_readme_and_results.py::test_the_readme_has_every_row_of_the_table test_advantages.py "
    "test_gradients.py",
    "logprobs": "test_policy_and_rollout.py -k 'not chunks_keep'",  # in a process of its own
    "rollout": "test_qlora.py::test_micro_batches_fit_and_change_no_gradient "
    "test_qlora.py::test_responses_generated_in_parts test_policy_and_rollout.py test_experience.py -k 'not chunk'",
    "checkpoint": "test_resume.py::test_a_checkpoint_gives_back_what_it_was_given "
    "test_resume.py::test_a_checkpoint_whose_file_was_written_again_is_whole_only_if_it_says_the_same "
    "test_resume.py::test_a_file_is_on_the_disk_before_it_has_its_name test_any_damage.py test_resume.py "
    "-k 'given or written_again or on_the_disk or header or no_file or million or no_other or both_shapes "
    "or something_else_goes or not_stay or memory_cannot or two_checkpoints or flip or all_that_a_step'",
}


def _tests(arguments: str) -> int:
    """In a process of its own: run some tests of the copy without a word; the exit code says how they ended."""
    with open(os.devnull, "w") as silence:
        os.dup2(silence.fileno(), 1)
        os.dup2(silence.fileno(), 2)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.chdir(COPY)
    sys.path.insert(0, str(COPY))
    named = [f"tests/{word}" if word.startswith("test_") else word for word in shlex.split(arguments)]
    # all that makes a failure readable goes; it would be half of the time
    quick = ["-x", "--tb=no", "--assert=plain", "-p", "no:logging", "-p", "no:cacheprovider"]
    code = pytest.main([*named, *quick, "--basetemp", str(COPY / "basetemp")])
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


def survivors(mutants: Sequence[Mutant], tests: str) -> Iterator[Mutant]:
    """Run the tests of one file on each of its mutants."""
    path = COPY / "minicpgd" / f"{mutants[0].file}.py"
    source = path.read_text()
    for _ in range(2):  # the first time all is imported; what is loaded then is loaded here, and never again
        failed, seconds = fails(tests, 600)
        if failed:
            raise SystemExit(f"without any change these fail: {tests}")
        for name in (COPY / "loaded.txt").read_text().splitlines():
            with suppress(Exception):
                importlib.import_module(name)
    path.write_text("raise ImportError")
    if not fails(tests, 600)[0]:
        raise SystemExit(f"these do not look at {path}: {tests}")
    gc.freeze()  # what was loaded is not searched for garbage at the end of every process
    try:
        for i, mutant in enumerate(mutants, 1):
            path.write_text(mutant.code)
            os.utime(path, (i, i))  # two mutants of one second and one length would share their bytecode
            if not fails(tests, 30 + 3 * seconds)[0]:
                yield mutant
            print(f"\r{mutant.file}: {i} of {len(mutants)}", end="", file=sys.stderr, flush=True)
    finally:
        path.write_text(source)
        print(file=sys.stderr)


def explanations() -> dict[tuple[str, str, str, str], str]:
    """From (file, function, the lines as they were, as they became) to why no test can tell the two apart."""
    listed = tomllib.loads(EXPLAINED.read_text()).get("mutant", [])
    return {
        (entry["file"], entry["function"], entry["was"], becomes): f"{entry['kind']}: {entry['why']}"
        for entry in listed
        for becomes in entry["becomes"]
    }


def main(files: tuple[Literal[*TESTS], ...] = tuple(TESTS), function: str = "") -> int:
    """Break, test, explain, and count. With `function`, only what its name contains."""
    shutil.rmtree(COPY, ignore_errors=True)
    unwanted = shutil.ignore_patterns(".*", "mutants", "runs", "build", "_site", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, COPY, ignore=unwanted)
    explained, used = explanations(), set()
    rows, makers = [], Counter()
    for file in files:
        mutants = [mutant for mutant in mutants_of(file) if function in mutant.function]
        makers.update((file, mutant.maker) for mutant in mutants)
        equivalent = survived = 0
        for mutant in survivors(mutants, TESTS[file]):
            if mutant.key in explained:
                equivalent += 1
                used.add(mutant.key)
            else:
                survived += 1
                print(f"\n{file}.{mutant.function} survives ({mutant.maker})", flush=True)
                print(f"  - {mutant.was}\n  + {mutant.becomes}", flush=True)
        counts = [len(mutants), len(mutants) - equivalent - survived, equivalent, survived]
        rows.append(dict(zip(COLUMNS, [f"{file}.py", *counts], strict=True)))
        if not function:
            _save(pd.DataFrame(rows))  # now, so that whoever stops it keeps the files that are done
    if not function:
        for key in explained.keys() - used:
            if key[0] in files:
                print("stale, no such mutant survives: {}.{}\n  - {}\n  + {}".format(*key))
    table = pd.DataFrame(rows)
    for maker in ("mutmut", "elsewhere", "ours"):
        table[f"of {maker}"] = [makers[file, maker] for file in files]
    table.loc[len(table)] = ["in all", *table.iloc[:, 1:].sum()]
    print(table.to_string(index=False))
    return int(table["survived"].iloc[-1] > 0)


def _save(table: pd.DataFrame) -> None:
    """Replace the rows of these files."""
    path = ROOT / "benchmarks" / "results" / "mutants.csv"
    before = pd.read_csv(path) if path.exists() else table
    kept = before[~before["file"].isin(table["file"])]
    order = [f"{file}.py" for file in TESTS]
    pd.concat([kept, table]).set_index("file").reindex(order).dropna().astype(int).to_csv(path)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
