"""Programs in processes of their own that do not load torch anew: a server has, and each of them is its fork.

A program imports binvit itself. All else is as in a new interpreter, except that variables of the environment that a
library reads while it is imported, such as the number of its threads, are those of the tests.
"""

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import types
import weakref
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch", "timm", "numba", "pandas", "scipy.special", "sklearn.datasets"])


class Program:
    """A program that runs: what tests need of `subprocess.Popen`.

    Args:
        code: the program.
        arguments: what it finds in `sys.argv`.
        environment: variables that it has besides those of the tests.
    """

    def __init__(self, code, *arguments, environment=None):
        folder = tempfile.mkdtemp(prefix="program-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._said = [Path(folder) / name for name in ("stdout", "stderr")]
        arguments = (code, ["-c", *map(str, arguments)], os.environ | (environment or {}), self._said)
        self._process = _SERVER.Process(target=_execute, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self._process.kill()

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("a program", timeout)
        return self.poll()

    def communicate(self, timeout=None):
        """Return what it has written, once it has ended."""
        self.wait(timeout)
        return tuple(path.read_text() if path.exists() else "" for path in self._said)


def run(code, *arguments):
    """Run a program to its end and return it as `subprocess.run` does."""
    program = Program(code, *arguments)
    return subprocess.CompletedProcess(code, program.wait(), *program.communicate())


def _execute(code, arguments, environment, said):
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    exec(compile(code, "<program>", "exec"), main.__dict__)
