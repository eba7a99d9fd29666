"""A process in which functions of a user are called, with limits of time and memory, from both sides of the pipe to it.
Imports no torch unless those functions do.

They run with the user's rights: the process is not a sandbox. It keeps accidents away from the run (time, memory, a
crash, an exit), and secrets of the environment from code that does not need them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import psutil

LOAD_TIMEOUT = 120.0  # seconds in which the modules of a user's functions must be imported
_LOOK_EVERY = 1.0  # seconds between looks at whether a silent process is alive
_BEGUN = "begun"  # what a process sends when it has read a call
_ATTEMPTS = 3  # processes that may be found ended before one reads the call
_PR_SET_PDEATHSIG = 1
_SECRET = re.compile(
    r"(^|_)(TOKENS?|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|PASS|CREDENTIALS?|API_?KEYS?|KEYS?|AUTH|COOKIES?|PAT|DSN)(_|$)"
)
_LOGIN = re.compile(r"://[^/\s]*:[^/\s]*@")  # a URL with a password

Load = Callable[..., tuple[Callable[..., Any], Any]]
"""What a process begins with: it imports a user's functions and returns what is called with the arguments of each
:meth:`LimitedProcess.call`, and what :meth:`LimitedProcess.loaded` returns.

Both are sent through a pipe, and so is every Exception that either of the two raises."""


class ProcessEndedError(Exception):
    """A process that has ended, by an exit, a crash or a signal, while it had something to do."""


class NotLoadedError(Exception):
    """A process in which ``load`` has ended the process, or did not return in time."""


class LimitedProcess:
    """The caller's side, used by one thread at a time. A process that has ended is replaced in the next call.

    It dies with the thread that has started it. ``load`` is a module-level function, called with ``arguments``. From
    then on the address space may grow by ``memory_gib``; more raises MemoryError. ``environment`` names the variables
    with secrets that it may see. What it prints goes to ``log``.
    """

    def __init__(
        self,
        load: Load,
        arguments: Sequence[Any],
        *,
        memory_gib: float,
        environment: Sequence[str] = (),
        log: Path | None = None,
    ) -> None:
        self._load, self._setup = load, (tuple(arguments), memory_gib)
        self._environment, self._log = environment, log
        self._killed, self._lock = False, threading.Lock()
        self._start()

    def _start(self) -> None:
        self._pipe, theirs = Pipe()
        module, name = self._load.__module__, self._load.__name__
        code = (
            f"from miles_spmd.processes.limited import serve; from {module} import {name}; "
            f"serve({name}, {theirs.fileno()}, {os.getpid()})"
        )
        with contextlib.ExitStack() as stack:
            output = None if self._log is None else stack.enter_context(self._log.open("ab"))
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=without_secrets(os.environ, self._environment),
            )
        theirs.close()
        self._pipe.send(self._setup)
        self._loaded: tuple[Any] | None = None

    def loaded(self) -> Any:
        """Wait until ``load`` has returned, and return its second result. Raises what it raised, and NotLoadedError."""
        if self._loaded is None:
            try:
                self._loaded = (self._exchange(LOAD_TIMEOUT),)
            except (TimeoutError, ProcessEndedError) as error:
                problem = f"was not imported within {LOAD_TIMEOUT:g} s, or its import ended the process ({error})"
                raise NotLoadedError(f"{problem}; import its module by itself") from error
        return self._loaded[0]

    def call(self, timeout: float, *arguments: Any) -> Any:
        """Call what ``load`` returned, and return what it returns or raise what it raises.

        A process that ends before it has read the call was idle, and the call goes to another one. Raises TimeoutError
        where the call takes longer than ``timeout`` seconds, ProcessEndedError, CancelledError after :meth:`kill`, and
        what :meth:`loaded` raises.
        """
        attempts = 0
        while True:
            attempts += 1
            with self._lock:
                if self._process.poll() is not None and not self._killed:
                    self._start()
            self.loaded()
            try:
                return self._exchange(timeout, arguments)
            except ProcessEndedError:
                if self._begun or attempts == _ATTEMPTS:
                    raise

    def _exchange(self, timeout: float, *messages: Any) -> Any:
        """Send, and return or raise the reply. A process that neither reads nor replies in time is killed."""
        self._begun = False
        end = time.monotonic() + timeout
        timer = threading.Timer(timeout, self._end)
        timer.start()
        try:
            for message in messages:
                self._pipe.send(message)
            while (reply := self._receive()) == _BEGUN:
                self._begun = True
        except (EOFError, OSError):
            late, status = time.monotonic() >= end, self._process.wait()
            if self._killed:
                raise CancelledError from None
            raise TimeoutError(f"after {timeout:g} s") if late else ProcessEndedError(_meaning(status)) from None
        finally:
            timer.cancel()
            if time.monotonic() >= end:  # the timer may be killing it: the next call must not take it for alive
                self._end()
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _receive(self) -> Any:
        while not self._pipe.poll(_LOOK_EVERY):
            if self._process.poll() is not None and not self._pipe.poll():
                raise EOFError  # and another process holds the pipe open
        return self._pipe.recv()

    def _end(self) -> None:
        """Kill the process, and what the user's functions have started in it."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()
        self._process.kill()
        self._process.wait()

    def kill(self) -> None:
        """End the process for good."""
        with self._lock:
            self._killed = True
        self._end()


def without_secrets(environment: Mapping[str, str], allowed: Sequence[str] = ()) -> dict[str, str]:
    """Return the variables whose name and value do not look like a secret, and those that are ``allowed``."""
    return {
        name: value
        for name, value in environment.items()
        if name in allowed or not (_SECRET.search(name.upper()) or _LOGIN.search(value))
    }


def _meaning(status: int) -> str:
    return f"exit code {status}" + (f", killed by {signal.Signals(-status).name}" if status < 0 else "")


# --- inside the process ----------------------------------------------------------------------------------------------


def serve(load: Load, descriptor: int, parent: int) -> None:
    """Load the user's functions, set this process's limits, and make the calls that come through the pipe."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed parent leaves no process behind
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGUSR1):  # which may reach all processes of a run, to stop it with care
        signal.signal(number, lambda *_: None)  # and which programs that a function starts do not ignore
    sys.path.insert(0, os.getcwd())  # as `python -m` does; a console script does not
    pipe = Connection(descriptor)
    os.set_inheritable(descriptor, False)  # a program or fork of the user's would keep the pipe open
    os.register_at_fork(after_in_child=pipe.close)
    with contextlib.suppress(EOFError):
        arguments, memory_gib = pipe.recv()
        try:
            call, loaded = load(*arguments)
        except Exception as error:
            pipe.send(error)
            return
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limit = min(used + int(memory_gib * 2**30), sys.maxsize)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        pipe.send(loaded)
        while True:
            try:
                arguments = pipe.recv()
                pipe.send(_BEGUN)
                pipe.send(call(*arguments))
            except EOFError:
                raise
            except Exception as error:
                pipe.send(error)
