"""Tools and the execution of calls: whatever a call contains and a tool does, there is a text for the policy.

A plain function runs in a process of its own with limits (``processes/limited.py``), since it may hang, crash or use up
memory; an ``async def`` runs in the event loop, with a time limit. Neither is a sandbox: tools are the user's code with
the user's rights.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import msgspec

from miles_spmd.environments.arguments import Parameters
from miles_spmd.environments.calls import Call
from miles_spmd.environments.tool_schemas import Schema, SchemaError, tool_schema
from miles_spmd.plugins.plug_point import import_function
from miles_spmd.processes.limited import LimitedProcess, ProcessEndedError, serve_calls
from miles_spmd.types.printable import error_text, printable

Function = Callable[..., Any]
_ADDRESS = " at 0x"  # as objects without a text of their own are written, in each process differently
_LONGEST_ERROR = 500  # characters of what a user's code or a schema wrote into an error
_TIME_TO_END = 2.0  # seconds that a cancelled `async def` has to clean up; below the pool's GRACE


class ErrorKind(StrEnum):
    """Why a call has no result."""

    MALFORMED = "malformed"  # the call cannot be read
    UNKNOWN_TOOL = "unknown_tool"
    ARGUMENTS = "arguments"  # missing, unknown, or not as the schema has them
    RAISED = "raised"  # by the tool, an exit and a lack of memory included
    TIMEOUT = "timeout"
    DIED = "died"  # the process of the tool


class ToolUnavailableError(RuntimeError):
    """Raised by an ``async def`` for what the policy must not learn from, such as a service that is away: the episode
    fails, in place of the call."""


class Result(msgspec.Struct, frozen=True):
    """The text that the policy gets for a call; ``error`` is why it is not a result of the tool."""

    text: str
    error: ErrorKind | None = None


class Tool(NamedTuple):
    """A function, or its name as ``module:function``, and its schema where that does not come from the function."""

    function: str | Function
    schema: Schema | None = None


class _Loaded(NamedTuple):
    schema: Schema
    parameters: Parameters
    function: Function
    path: str | None  # of a plain function: how its process imports it

    @property
    def name(self) -> str:
        return self.schema["function"]["name"]


class Toolbox:
    """Tools with their schemas and limits. Use one for many conversations: each of its ``workers`` is a process that
    starts with the first call that it gets. A plain function hence keeps nothing in memory from one call to the next.
    """

    def __init__(
        self,
        tools: Sequence[str | Function | Tool],
        *,
        timeout: float = 30.0,
        memory_gib: float = 4.0,
        workers: int = 4,
        longest: int = 16_384,
    ) -> None:
        """``timeout``: seconds of one call. ``memory_gib``: GiB by which a process may grow. ``longest``: characters of
        a result. Processes see the variables of the environment that this one sees.

        Raises SchemaError, and PlugPointError where a function cannot be imported."""
        self._timeout, self._longest = timeout, longest
        loaded = [_load(tool if isinstance(tool, Tool) else Tool(tool)) for tool in tools]
        self._tools = {tool.name: tool for tool in loaded}
        if len(self._tools) < len(loaded):
            names = [tool.name for tool in loaded]
            raise SchemaError(f"two tools have the name {next(n for n in names if names.count(n) > 1)!r}; rename one")
        self.schemas: list[Schema] = [tool.schema for tool in loaded]
        self._paths = [tool.path for tool in loaded if tool.path is not None]
        self._start = partial(LimitedProcess, serve, (self._paths, memory_gib), environment=tuple(os.environ))
        self._threads = ThreadPoolExecutor(workers, "tool")  # each has a process, which dies with it
        self._of_thread, self._processes = threading.local(), list[LimitedProcess]()

    async def run(self, calls: Sequence[Call]) -> list[Result]:
        """Execute the calls of one message at the same time, and return their results in the order of the calls."""
        return await asyncio.gather(*map(self._run, calls))

    def close(self) -> None:
        """Kill what still runs."""
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)

    async def _run(self, call: Call) -> Result:
        if call.problem:
            text = f"the call cannot be read, and no tool was called: {printable(call.problem, _LONGEST_ERROR)}"
            return _error(ErrorKind.MALFORMED, f"{text}. Write calls as the instructions show them")
        tool = self._tools.get(call.name)
        if tool is None:
            unknown = f"the tool {printable(call.name, _LONGEST_ERROR)!r} does not exist"
            return _error(ErrorKind.UNKNOWN_TOOL, f"{unknown}. The tools are {', '.join(self._tools)}")
        if problem := tool.parameters.problem(call.arguments):
            return _error(ErrorKind.ARGUMENTS, problem)
        arguments = tool.parameters.converted(call.arguments)
        if tool.path is None:
            return await self._await(tool, arguments)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._call_in_process, tool, arguments)

    async def _await(self, tool: _Loaded, arguments: Mapping[str, Any]) -> Result:
        """Call an ``async def`` in a task of its own, so that one which goes on when it is cancelled does not hold up
        the conversation."""
        task = asyncio.create_task(self._call(tool, arguments))
        try:
            await asyncio.wait([task], timeout=self._timeout)
        except asyncio.CancelledError:  # the episode has to end, and with it the call
            await _end(task)
            raise
        if not task.done():
            await _end(task)
            return self._overdue(tool)
        return task.result()

    async def _call(self, tool: _Loaded, arguments: Mapping[str, Any]) -> Result:
        try:
            return Result(_to_text(await tool.function(**arguments), self._longest))
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return _raised(error)  # the tool's own
        except (ToolUnavailableError, GeneratorExit):
            raise
        except BaseException as error:  # an exit would end the event loop
            return _raised(error)

    def _call_in_process(self, tool: _Loaded, arguments: Mapping[str, Any]) -> Result:
        process = getattr(self._of_thread, "process", None)
        if process is None:
            process = self._of_thread.process = self._start()
            self._processes.append(process)
        try:
            return process.call(self._timeout, tool.path, arguments, self._longest)
        except TimeoutError:
            return self._overdue(tool)
        except ProcessEndedError as error:
            return _error(ErrorKind.DIED, f"{tool.name} ended its process ({error})")
        except MemoryError as error:
            process.kill()  # what a tool has leaked would be missing in every later call
            self._processes.remove(process)
            self._of_thread.process = None
            return _raised(error)

    def _overdue(self, tool: _Loaded) -> Result:
        return _error(ErrorKind.TIMEOUT, f"{tool.name} took longer than {self._timeout:g} s and was stopped")


async def _end(task: asyncio.Task[Result]) -> None:
    """Cancel a task, and wait until it has ended. A tool that catches this and goes on is closed where it waits; one
    that catches even that is dropped with the task. Raises CancelledError where the caller was cancelled."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):  # the caller's: no more time to clean up
        await asyncio.wait([task], timeout=_TIME_TO_END)
    if not task.done():
        task.get_coro().close()  # type: ignore[union-attr]
        task.cancel()  # its next step finds the coroutine closed
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task])
    if not task.cancelled():
        task.exception()  # has been seen, so that nobody reports it
    caller = asyncio.current_task()
    if caller is not None and caller.cancelling():
        raise asyncio.CancelledError


def serve(pipe: Connection, paths: Sequence[str], memory_gib: float) -> None:
    """Import plain functions, and call them as is ordered through the pipe. Runs inside the process."""
    serve_calls(pipe, partial(_import_all, paths), memory_gib)


def _import_all(paths: Sequence[str]) -> tuple[Callable[..., Result], None]:
    functions = {path: _import(path) for path in paths}

    def call(path: str, arguments: Mapping[str, Any], longest: int) -> Result:
        try:
            return Result(_to_text(functions[path](**arguments), longest))
        except MemoryError:
            raise
        except BaseException as error:
            return _raised(error)

    return call, None


def _load(tool: Tool) -> _Loaded:
    function = _import(tool.function) if isinstance(tool.function, str) else tool.function
    schema = tool_schema(function, tool.schema)
    parameters = Parameters(schema, from_hints=tool.schema is None)
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    path = None if is_async else tool.function if isinstance(tool.function, str) else _path(function)
    return _Loaded(schema, parameters, function, path)


def _import(path: str) -> Function:
    return import_function("the environment's functions", path, ())


def _path(function: Function) -> str:
    """Return how another process imports a plain function. Raises SchemaError."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "<none>")
    if "<" in name or module == "__main__" or hasattr(function, "__self__"):
        raise SchemaError(
            f"tool {getattr(function, '__name__', function)!r} runs in a process of its own, which cannot import it: "
            "define the function at the top level of a module, or write `async def`, which runs in this process"
        )
    return f"{module}:{name}"


def _error(kind: ErrorKind, problem: str) -> Result:
    return Result(f"Error: {problem}.", kind)


def _raised(error: BaseException) -> Result:
    """Return what is shown of an error: its class and message, without a trace, which has the paths of this machine."""
    return Result(f"Error: {error_text(error, _LONGEST_ERROR)}", ErrorKind.RAISED)


def _plain(value: Any) -> Any:
    """Return what JSON does not have as something that it has, and that is the same in every process."""
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if hasattr(value, "tolist"):  # of NumPy or torch
        return value.tolist()
    if _ADDRESS in (text := str(value)):
        raise TypeError(
            f"the tool returned an object of the class {type(value).__name__}, which is neither text nor JSON"
        )
    return text


def _to_text(value: Any, longest: int) -> str:
    """Return a result as text: a string as it is, anything else as JSON; cut where it has more than ``longest``
    characters. Raises TypeError, ValueError and RecursionError for what cannot be written."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=_plain)
    if len(text) > longest:
        text = f"{text[:longest]}\n[... cut: the first {longest:,} of {len(text):,} characters are shown]"
    return text.encode("utf-8", "replace").decode()  # halves of surrogate pairs have no tokens
