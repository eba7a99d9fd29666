"""Python programs in processes that are forked from one that has imported torch, Megatron and SGLang already
(tests/preloaded.py): they start in a tenth of a second, where a new interpreter computes for five.

A program has its own session, as a launcher does, and the ranks that torchrun starts in it are forked in their turn:
they are children of torchrun, each in its own session, as they always are. What differs from a start by a user is that
nothing is imported, so a few tests still start whole interpreters.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess, _children  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).parents[1]
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["tests.preloaded"])


class Program:
    """The methods of ``subprocess.Popen`` that tests and torchrun call, for a process of multiprocessing."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        process.start()
        # Whoever starts another one reads the status of all these, in whatever thread, and it can be read only once.
        _children.discard(process)
        assert process.pid is not None
        self.pid = process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for the signal that ended it, or None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status. Raises subprocess.TimeoutExpired after ``timeout`` seconds."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return self.returncode

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


class Launcher(Program):
    """The launcher of a cell. In place of the variable of the environment by which the supervisor finds the processes
    of a cell, and which a forked process does not show."""

    def kill(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for rank in psutil.Process(self.pid).children():
                rank.kill()
        super().kill()


def start(
    arguments: Sequence[object],
    folder: Path,
    environment: Mapping[str, str],
    stdout: Path,
    stderr: Path,
    cpus: Collection[int] = (),
    file_kib: int = 0,
) -> Program:
    """Start ``python ARGUMENTS`` in ``folder``, on ``cpus`` alone if there are any, with files of at most ``file_kib``
    KiB if that is not 0. ``arguments`` are ``-m MODULE ...`` or ``FILE ...``."""
    args = list(map(str, arguments)), folder, dict(environment), stdout, stderr, cpus, file_kib
    return Program(server.Process(target=_run, args=args, name=str(arguments[:2])))


def run(
    *arguments: object, folder: Path, timeout: float = 200, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS`` in ``folder`` to its end, with the text of both streams. It can import tests."""
    stdout, stderr = folder / "stdout.txt", folder / "stderr.txt"
    variables = os.environ | {"PYTHONPATH": str(REPOSITORY)} | dict(environment or {})
    program = start(arguments, folder, variables, stdout, stderr)
    try:
        status = program.wait(timeout)
    finally:
        program.kill()
    return subprocess.CompletedProcess(list(map(str, arguments)), status, stdout.read_text(), stderr.read_text())


def fork_launcher(command: Sequence[str], environment: Mapping[str, str]) -> Program:
    """In the supervisor of cells, in place of a new interpreter for a launcher: ``command`` is ``python ARGUMENTS``.

    The supervisor runs the lighthouse, whose threads a fork of it would not have, while it had their locks: such a rank
    crashes in torchft, or waits for ever. So the launcher comes from where the supervisor comes from.
    """
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]  # it would start one of its own
    streams = (Path(os.readlink(f"/proc/self/fd/{number}")) for number in (1, 2))
    args = list(command[1:]), Path.cwd(), dict(environment), *streams, (), 0, os.O_APPEND
    return Launcher(server.Process(target=_run, args=args))


def fork_rank(handler: Any, command: Sequence[str], environment: Mapping[str, str]) -> Program:
    """In torchrun, in place of a new interpreter for a rank: ``command`` is ``python -u ARGUMENTS``."""
    arguments = [argument for argument in command[1:] if argument != "-u"]
    process = multiprocessing.get_context("fork").Process(target=_become, args=(arguments, dict(environment)))
    return Program(process)


def _run(
    arguments: list[str],
    folder: Path,
    environment: dict[str, str],
    stdout: Path,
    stderr: Path,
    cpus: Collection[int],
    file_kib: int,
    how: int = os.O_TRUNC,
) -> None:
    os.chdir(folder)
    if file_kib:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_kib * 1024, file_kib * 1024))
    if cpus:
        os.sched_setaffinity(0, cpus)
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | how)
        os.dup2(opened, descriptor)
        os.close(opened)
    _become(arguments, environment)


def _become(arguments: list[str], environment: dict[str, str]) -> None:
    """What the interpreter does with ``arguments``, in a session of this process's own."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT):  # the launcher's handlers
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [os.getcwd(), *filter(None, environment.get("PYTHONPATH", "").split(":"))]
    sys.modules.pop("sitecustomize", None)  # that of the process that this one was forked from
    if importlib.util.find_spec("sitecustomize"):
        importlib.import_module("sitecustomize")
    if arguments[0] == "-m":
        sys.argv = arguments[1:]  # runpy puts the file's name in the place of the module's
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
