"""A process of ours in which a user's functions run: how it starts, what it sees, and how it ends. Imports no torch.

They run with the user's rights: the process is not a sandbox. It keeps accidents away from the run (memory, a crash, an
exit), and secrets of the environment from code that does not need them.
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
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import psutil

END_TIMEOUT = 5.0  # seconds that a process takes to end whose pipe is closed
_PR_SET_PDEATHSIG = 1
_SECRET = re.compile(
    r"(^|_)(TOKENS?|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|PASS|CREDENTIALS?|API_?KEYS?|KEYS?|AUTH|COOKIES?|PAT|DSN)(_|$)"
)
_LOGIN = re.compile(r"://[^/\s]*:[^/\s]*@")  # a URL with a password


class Child:
    """A process that calls the module-level function ``main`` with ``pipe``'s other end and ``setup``.

    It dies with the thread that starts it. ``environment`` names the variables with secrets that it may see. What it
    prints goes to ``log``. ``descriptors`` are of files that it inherits.
    """

    def __init__(
        self,
        main: Callable[..., None],
        setup: Sequence[Any],
        environment: Sequence[str] = (),
        log: Path | None = None,
        descriptors: Sequence[int] = (),
    ) -> None:
        self.pipe, theirs = Pipe()
        module, name = main.__module__, main.__name__
        code = (
            f"from miles_spmd.processes.child import enter; from {module} import {name}; "
            f"enter({name}, {theirs.fileno()}, {os.getpid()})"
        )
        with contextlib.ExitStack() as stack:
            output = None if log is None else stack.enter_context(log.open("ab"))
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno(), *descriptors],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=without_secrets(os.environ, environment),
                process_group=0,
            )
        theirs.close()
        self.pipe.send(tuple(setup))

    @property
    def lives(self) -> bool:
        if self._is_over(os.WNOHANG):
            self._reap()
        return self.process.returncode is None

    def kill(self) -> None:
        """End the process, and what the user's functions have started in it."""
        if not self.lives:
            return
        self.process.send_signal(signal.SIGSTOP)  # or it would go on when a program that it waits for is killed
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()
        self.process.kill()
        self._is_over()
        self._reap()

    def how_it_ended(self) -> str:
        """Wait for its end, which it is near, and return it in words."""
        deadline = time.monotonic() + END_TIMEOUT
        while self.lives:
            if time.monotonic() > deadline:
                return "it closed its pipe"
            time.sleep(0.01)
        status = self.process.returncode
        return f"exit code {status}" + (f", killed by {signal.Signals(-status).name}" if status < 0 else "")

    def _is_over(self, options: int = 0) -> bool:
        """Whether the process has ended; wait until it has, without ``os.WNOHANG``. It stays a zombie."""
        if self.process.returncode is not None:
            return True
        with contextlib.suppress(ChildProcessError):  # another thread has reaped it
            return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT | options) is not None
        return True

    def _reap(self) -> None:
        """Reap the process that has ended, and end what it has left behind in its process group: as long as it is a
        zombie, no other group has this number."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def without_secrets(environment: Mapping[str, str], allowed: Sequence[str] = ()) -> dict[str, str]:
    """Return the variables whose name and value do not look like a secret, and those that are ``allowed``."""
    return {
        name: value
        for name, value in environment.items()
        if name in allowed or not (_SECRET.search(name.upper()) or _LOGIN.search(value))
    }


# --- inside the process ----------------------------------------------------------------------------------------------


def enter(main: Callable[..., None], descriptor: int, parent: int) -> None:
    """Call ``main`` with the pipe of this file ``descriptor``, and with what comes through it first."""
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
        main(pipe, *pipe.recv())


def limit_memory(gib: float) -> None:
    """Let the address space of this process grow by ``gib`` from now on, unless the limit of the process that started
    it is lower; more raises MemoryError."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    _, inherited = resource.getrlimit(resource.RLIMIT_AS)
    limit = min(used + int(gib * 2**30), sys.maxsize if inherited == resource.RLIM_INFINITY else inherited)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
