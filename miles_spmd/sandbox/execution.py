"""One execution: a process of bubblewrap from its start until nothing of it is left."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import msgspec

from miles_spmd.sandbox.bubblewrap import Python, command
from miles_spmd.sandbox.filter import seccomp_filter
from miles_spmd.sandbox.limits import Limits

_CHUNK = 2**16  # bytes that are read or written at once
_SIGNALLED = 128  # plus the number of the signal, as in a shell


class SandboxError(RuntimeError):
    """A sandbox that cannot be made on this machine. The message gives the cause and the remedy."""


class Problem(enum.Enum):
    """Why an execution has ended."""

    OK = "ok"
    """The program returned with status 0."""
    ERROR = "error"
    """It ended with another status, such as 1 for an exception."""
    TIME = "time"
    """It reached ``Limits.seconds`` or ``Limits.cpu_seconds`` and was killed."""
    MEMORY = "memory"
    """It ended with a MemoryError, as the last line of its standard error says: the program could also have written
    that line itself."""
    OUTPUT = "output"
    """It wrote more than ``Limits.output_bytes`` and was killed."""
    KILLED = "killed"
    """It was ended by a signal: a crash, its own signal, or the kernel when memory of the host was short."""


class Outcome(msgspec.Struct, frozen=True):
    """What an execution has left. Bytes that are not UTF-8 are replaced in the texts."""

    stdout: str
    stderr: str
    status: int | None
    """The exit status, 128 plus the number of a signal that ended the program; None: the sandbox killed it."""
    problem: Problem
    seconds: float
    """Wall time, with the start of the sandbox."""


class Execution:
    """One program in a sandbox of its own; ``run`` blocks until it has ended, ``kill`` ends it from another thread."""

    def __init__(self, limits: Limits, python: Python, has_proc: bool) -> None:
        self._limits, self._python, self._has_proc = limits, python, has_proc
        self._process: subprocess.Popen[bytes] | None = None
        self._cancelled = False

    def kill(self) -> None:
        self._cancelled = True
        if self._process is not None:
            self._process.kill()

    def run(self, files: Mapping[str, bytes], stdin: bytes, arguments: Sequence[str]) -> Outcome:
        """Run ``main.py`` of the ``files``. Raises SandboxError if the sandbox cannot be made."""
        begin = time.monotonic()
        status_end, status = os.pipe()
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, status_end)
            given = contextlib.ExitStack()  # what bwrap inherits is closed here once it runs
            with given:
                given.callback(os.close, status)
                numbers = {name: _filled(given, content) for name, content in files.items()}
                seccomp = _filled(given, seccomp_filter())
                line = command(
                    self._limits,
                    self._python,
                    numbers,
                    arguments,
                    has_proc=self._has_proc,
                    seccomp=seccomp,
                    status=status,
                )
                process = self._process = _start(line, [status, seccomp, *numbers.values()])
            stack.enter_context(process)
            stack.callback(process.kill)
            if self._cancelled:
                process.kill()
            streams = _Streams(process, status_end, stdin, self._limits.output_bytes)
            killed = streams.exchange(begin + self._limits.seconds)
            process.kill()  # with its last process goes whatever the program has left running
            process.wait()
        stdout, stderr = (bytes(one).decode(errors="replace") for one in (streams.stdout, streams.stderr))
        code = _exit_code(bytes(streams.report))
        if code is None and killed is None and not self._cancelled:
            raise SandboxError(" ".join(stderr.split()) or f"bwrap ended with status {process.returncode}")
        problem = killed or (Problem.KILLED if code is None else _meaning(code, stderr))
        return Outcome(stdout, stderr, None if killed else code, problem, time.monotonic() - begin)


class _Streams:
    """The pipes of a process, served at the same time."""

    def __init__(self, process: subprocess.Popen[bytes], status: int, stdin: bytes, limit: int) -> None:
        self._process, self._limit, self._stdin = process, limit, memoryview(stdin)
        self.stdout, self.stderr, self.report = bytearray(), bytearray(), bytearray()
        self._input, stdout, stderr = (pipe for pipe in (process.stdin, process.stdout, process.stderr) if pipe)
        self._buffers = {stdout.fileno(): self.stdout, stderr.fileno(): self.stderr, status: self.report}
        os.set_blocking(self._input.fileno(), False)

    def exchange(self, end: float) -> Problem | None:
        """Write the input and read everything, until all has been closed. Kill the process, and return why, if it goes
        on after ``end`` (of time.monotonic) or writes too much."""
        why: Problem | None = None
        with selectors.DefaultSelector() as selector:
            for number in self._buffers:
                selector.register(number, selectors.EVENT_READ)
            selector.register(self._input, selectors.EVENT_WRITE)
            while selector.get_map():
                for key, _ in selector.select(None if why else max(0.0, end - time.monotonic())):
                    done = self._write() if key.fileobj is self._input else self._read(key.fd)
                    if done:
                        selector.unregister(key.fileobj)
                    if done and key.fileobj is self._input:
                        self._input.close()
                if why is None and (why := self._reached(end)):
                    self._process.kill()
        for buffer in (self.stdout, self.stderr):
            del buffer[self._limit :]
        return why

    def _reached(self, end: float) -> Problem | None:
        if max(len(self.stdout), len(self.stderr)) > self._limit:
            return Problem.OUTPUT
        return Problem.TIME if time.monotonic() >= end else None

    def _read(self, number: int) -> bool:
        chunk = os.read(number, _CHUNK)
        buffer = self._buffers[number]
        if len(buffer) <= self._limit or buffer is self.report:
            buffer += chunk
        return not chunk

    def _write(self) -> bool:
        if not self._stdin:
            return True
        try:
            self._stdin = self._stdin[os.write(self._input.fileno(), self._stdin[:_CHUNK]) :]
        except BrokenPipeError:  # the program has ended, or does not read
            return True
        return not self._stdin


def checked_name(name: str) -> str:
    """Return the name of a file for the working directory. Raises ValueError for one that could lie elsewhere."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise ValueError(f"files: {name!r} must be a relative path without '..'")
    if str(path) == "main.py":
        raise ValueError("files: 'main.py' is the program itself; choose another name")
    return str(path)


def _filled(stack: contextlib.ExitStack, content: bytes) -> int:
    """Return a descriptor of a file in memory, which the stack closes."""
    number = os.memfd_create("sandbox")
    stack.callback(os.close, number)
    with open(number, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(number, 0, os.SEEK_SET)
    return number


def _start(line: list[str], inherited: list[int]) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe, env={}, cwd="/", pass_fds=inherited)
    except OSError as error:
        raise SandboxError(f"{line[0]} cannot be started: {error}") from error


def _exit_code(report: bytes) -> int | None:
    """Return the status that bwrap reports, which it does only of a program that it has started."""
    for line in report.splitlines():
        code: int | None = json.loads(line).get("exit-code")
        if code is not None:
            return code
    return None


def _meaning(code: int, stderr: str) -> Problem:
    if code == 0:
        return Problem.OK
    if code == _SIGNALLED + signal.SIGXCPU:
        return Problem.TIME
    if stderr.rstrip().rpartition("\n")[2].startswith("MemoryError"):
        return Problem.MEMORY
    return Problem.KILLED if code > _SIGNALLED else Problem.ERROR
