"""Runs Python programs that nobody has read, such as those that a language model writes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

from miles_spmd.sandbox.bubblewrap import exposes, missing, python
from miles_spmd.sandbox.execution import Execution, Outcome, Problem, SandboxError, checked_name
from miles_spmd.sandbox.limits import Limits

__all__ = ["Limits", "Outcome", "Problem", "Sandbox", "SandboxError", "problem"]

_FORBIDDEN = (
    "allow user namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone=1 or "
    "kernel.apparmor_restrict_unprivileged_userns=0; for a container, its seccomp profile); docs/sandbox.md"
)
_DEFAULTS = Limits()
_FORKS = b"""
import os, time
count = 1
try:
    while count < 10:
        if os.fork() == 0:
            time.sleep(60)
        count += 1
except OSError:
    pass
print(count)
"""


class Sandbox:
    """Starts each program in a new sandbox of bubblewrap: namespaces of its own, no network, no file of the host but
    /usr and the interpreter, and ``limits`` (docs/sandbox.md).

    ``packages``: also the packages that this process can import, read-only. Executions are independent of each other,
    and one object may run any number at the same time.
    """

    def __init__(self, limits: Limits = _DEFAULTS, *, packages: bool = False) -> None:
        """Raises SandboxError if this machine cannot make a sandbox."""
        self._limits, self._python = limits, python(packages)
        if (found := problem() or exposes(self._python)) is not None:
            raise SandboxError(found)
        self._has_proc = _probe().has_proc

    def run(
        self,
        code: str,
        stdin: str | bytes = "",
        files: Mapping[str, str | bytes] | None = None,
        arguments: Sequence[str] = (),
    ) -> Outcome:
        """Run ``code`` as ``main.py`` and return what it has left, whatever it does.

        ``files``: further files of the working directory, by their relative path. ``arguments``: those of sys.argv.
        Raises ValueError for a path that is absolute or contains ``..``, SandboxError if no sandbox can be made now.
        """
        return Execution(self._limits, self._python, self._has_proc).run(*_inputs(code, stdin, files, arguments))

    async def run_async(
        self,
        code: str,
        stdin: str | bytes = "",
        files: Mapping[str, str | bytes] | None = None,
        arguments: Sequence[str] = (),
    ) -> Outcome:
        """As :meth:`run`, in a thread of the event loop's default executor, whose size limits how many run at the same
        time. A task that is cancelled kills the program."""
        execution = Execution(self._limits, self._python, self._has_proc)
        try:
            return await asyncio.to_thread(execution.run, *_inputs(code, stdin, files, arguments))
        except asyncio.CancelledError:
            execution.kill()
            raise


def problem() -> str | None:
    """Return why this machine cannot make a sandbox, and the remedy; None if it can. Tries it once in a process."""
    return _probe().problem


class _Probe(NamedTuple):
    problem: str | None
    has_proc: bool = True


@cache
def _probe() -> _Probe:
    if (lack := missing()) is not None:
        return _Probe(lack)
    try:
        return _Probe(_tried(has_proc=True))
    except SandboxError as error:
        # a container in which parts of /proc are covered may not mount another one
        if "/proc" not in str(error):
            return _Probe(f"{error}: {_FORBIDDEN}")
    try:
        return _Probe(_tried(has_proc=False), has_proc=False)
    except SandboxError as error:
        return _Probe(f"{error}: {_FORBIDDEN}")


def _tried(*, has_proc: bool) -> str | None:
    """Start as many processes as may be, and return what does not work. Raises SandboxError."""
    limits = Limits(processes=4)
    outcome = Execution(limits, python(packages=False), has_proc).run({"main.py": _FORKS}, b"", [])
    if outcome.stdout == f"{limits.processes}\n":
        return None
    if outcome.problem is Problem.OK:
        return "the kernel does not limit the processes of root in this user namespace: start the run as another user"
    return f"Python does not run in the sandbox ({outcome.problem.value}): {' '.join(outcome.stderr.split())[-500:]}"


def _inputs(
    code: str, stdin: str | bytes, files: Mapping[str, str | bytes] | None, arguments: Sequence[str]
) -> tuple[dict[str, bytes], bytes, list[str]]:
    contents = {checked_name(name): _bytes(content) for name, content in (files or {}).items()}
    return {"main.py": _bytes(code), **contents}, _bytes(stdin), list(arguments)


def _bytes(text: str | bytes) -> bytes:
    # a model may have written half of a surrogate pair; Python then reports a program that is not UTF-8
    return text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
