"""Programs for tests, each in a process of its own, which can be killed and limited like any other.

Importing torch takes seconds. So a server imports everything once, and each process is forked from it, while it has one
thread and has computed nothing. A process that must begin with a new interpreter is none of these.
"""

import contextlib
import itertools
import multiprocessing
import os
import resource
import sys

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["minicpgd.cli.main", "minicpgd.cli.train", "minicpgd.experiments", "minicpgd.training"]
    + ["transformers.models.llama.modeling_llama", "transformers.generation.utils"]
)
SECONDS = 1800  # A process that needs more hangs, on the slowest machine too.
NUMBERS = itertools.count()


class Program:
    """A function that was called in a new process, with methods of `subprocess.Popen`. Its output goes to two files."""

    def __init__(self, folder, function, *arguments):
        number = next(NUMBERS)
        self.out, self.err = (folder / f"program-{number}.{name}" for name in ("out", "err"))
        self.process = CONTEXT.Process(target=_call, args=(self.out, self.err, function, arguments))
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self):
        self.process.join(SECONDS)
        assert self.poll() is not None, f"{SECONDS} seconds have passed"
        return self.poll()

    def communicate(self):
        """Wait for the end, and return all that the process has written to stdout and stderr."""
        self.wait()
        return self.out.read_text(), self.err.read_text()


def _call(out, err, function, arguments):
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    function(*arguments)


def minicpgd(words, modules=None, largest_file=None):
    """Run `minicpgd`. Python finds modules in the folder `modules`, too. `largest_file` limits the bytes of a file."""
    from minicpgd.__main__ import main

    if modules is not None:
        sys.path.insert(0, str(modules))
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = ["minicpgd", *map(str, words)]
    main()
