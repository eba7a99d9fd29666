"""The tool ``python``: a program of the policy, in the sandbox."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from miles_spmd.environments.execution import ToolUnavailableError
from miles_spmd.sandbox.sandbox import Limits, Outcome, Problem, Sandbox, SandboxError

_LONGEST_STDERR = 2000  # characters, from its end
_CUT = "[... cut]"


def python_tool(
    *,
    seconds: float = 10.0,
    memory_mib: int = 1024,
    processes: int = 16,
    packages: bool = False,
    programs: int = 8,
    tool_timeout: float = 30.0,
    max_result_chars: int = 16_384,
) -> Callable[[str], Awaitable[str]]:
    """Return the tool. ``seconds``: wall time and CPU time of a program; ``memory_mib``: address space of each of its
    at most ``processes`` processes and threads. ``packages``: it may import what the run can import. ``programs``:
    number that run at the same time in an environment process; others wait, which counts towards ``tool_timeout``.
    Output is cut so that what went wrong fits into ``max_result_chars`` behind it.

    Raises ValueError for limits that cannot be used and for a machine without a sandbox.
    """
    if seconds >= tool_timeout:
        raise ValueError(f"python: seconds = {seconds:g} is not less than tool_timeout = {tool_timeout:g}")
    if programs < 1:
        raise ValueError(f"python: programs = {programs} is less than 1")
    limits = Limits(
        seconds=seconds, cpu_seconds=max(1, round(seconds)), memory_mib=memory_mib, processes=processes
    )  # fmt: skip
    try:
        sandbox = Sandbox(limits, packages=packages)
    except SandboxError as error:
        raise ValueError(f"the tool 'python' requires the sandbox: {error}") from error
    slots = asyncio.Semaphore(programs)

    async def python(code: str) -> str:
        """Run a Python 3 program in a new process, without network, and return what it prints.

        Args:
            code: The whole program. Nothing is kept from earlier programs.
        """
        async with slots:
            try:
                outcome = await sandbox.run_async(code)
            except SandboxError as error:
                raise ToolUnavailableError(f"the tool 'python' cannot make a sandbox: {error}") from error
        return _described(outcome, limits, max_result_chars)

    return python


def _described(outcome: Outcome, limits: Limits, longest: int) -> str:
    """Return the output of a program, and what went wrong behind it, in about ``longest`` characters."""
    match outcome.problem:
        case Problem.OK:
            return outcome.stdout or "[The program printed nothing.]"
        case Problem.TIME:
            problem = f"[The program was stopped after {limits.seconds:g} s.]"
        case Problem.MEMORY:
            problem = f"[The program ran out of memory: {limits.memory_mib} MiB.]"
        case Problem.OUTPUT:
            problem = f"[The program was stopped because it wrote more than {limits.output_bytes:,} bytes.]"
        case _:
            problem = f"[The program ended with status {outcome.status}.]"
    end = "\n".join(filter(None, [outcome.stderr.rstrip()[-_LONGEST_STDERR:], problem]))
    stdout, room = outcome.stdout.rstrip(), max(0, longest - len(end) - len(_CUT) - 2)
    if len(stdout) > room:
        stdout = f"{stdout[:room]}\n{_CUT}"
    return f"{stdout}\n{end}" if stdout else end
