"""A process that runs episodes of an environment, beside one another, in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from miles_spmd.environments.context import ContextError, EpisodeContext, ModelSource, ModelView
from miles_spmd.environments.mark import Mark
from miles_spmd.environments.messages import Ask, Begin, Cancel, Completed, Event, Failed, Order, encode
from miles_spmd.plugins.environment import Environment
from miles_spmd.plugins.plug_point import PlugPointError, import_function
from miles_spmd.processes.child import limit_memory

if TYPE_CHECKING:
    from miles_spmd.environments.sessions.endpoint import Endpoint

SETTING = "environment.environment"
BUILTINS = {"tools": "miles_spmd.environments.tools:tools"}  # name -> module:function, imported where it runs

READY = b""  # what a process sends when its environment is imported; an error is sent as text


def load_environment(name: str, arguments: Mapping[str, Any]) -> Environment:
    """Return the environment called ``name`` with its further ``arguments``, which its attribute ``check`` gets if it
    has one. Raises PlugPointError."""
    function = import_function(SETTING, BUILTINS.get(name, name), ["single_turn", *BUILTINS])
    where = f"{SETTING} = {name!r}"
    if not inspect.iscoroutinefunction(function) and not inspect.iscoroutinefunction(type(function).__call__):
        raise PlugPointError(f"{where} is not an `async def`")
    try:
        inspect.signature(function).bind(None, None, **arguments)
    except TypeError as error:
        raise PlugPointError(
            f"{where} cannot be called with (context, prompt) and environment_kwargs: {error}"
        ) from None
    if (check := getattr(function, "check", None)) is not None:
        try:
            check(**arguments)
        except ValueError as error:
            raise PlugPointError(f"{where}, environment_kwargs: {error}") from error
    return functools.partial(function, **arguments)


class Episodes:
    """The episodes that this process runs."""

    def __init__(self, pipe: Connection, environment: Environment, model: ModelView, mark: Mark) -> None:
        self._pipe, self._environment, self._model, self._mark = pipe, environment, model, mark
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._waiting: dict[tuple[int, int], asyncio.Future[Completed]] = {}
        self._told_to_end: set[int] = set()
        self._loop = asyncio.get_running_loop()
        self.closed = asyncio.Event()

    @functools.cached_property
    def _endpoint(self) -> Endpoint:
        from miles_spmd.environments.sessions.endpoint import Endpoint  # a web server, which few environments need

        return Endpoint()

    def read(self) -> None:
        """Execute the next order."""
        try:
            order: Order = self._pipe.recv()
        except EOFError:
            self.closed.set()
            return
        match order:
            case Begin():
                self._tasks[order.episode] = self._mark.task(order.episode, self._run(order))
            case Completed():
                future = self._waiting.pop((order.episode, order.segment), None)
                if future is not None and not future.done():
                    future.set_result(order)
            case Cancel() if (task := self._tasks.get(order.episode)) is not None:
                self._told_to_end.add(order.episode)
                task.cancel()

    async def _run(self, begin: Begin) -> None:
        context = EpisodeContext(begin, self._model, self._ask, lambda: self._endpoint)
        told = self._told_to_end
        try:
            event: Event = context.finished(await self._environment(context, begin.prompt))
        except asyncio.CancelledError as error:
            if begin.episode in told:
                event = Failed(begin.episode, "cancelled", "was told to end")
            elif _is_cancelled():  # because the event loop ends, and then the process
                raise
            else:
                event = context.failed(error)
        except GeneratorExit:  # the event loop has ended
            raise
        except BaseException as error:  # an exit that leaves a task would end the event loop
            event = context.failed(error)
        told.discard(begin.episode)
        del self._tasks[begin.episode]
        for waiting in [one for one in self._waiting if one[0] == begin.episode]:
            self._waiting.pop(waiting).cancel()
        try:
            message = encode(event)
        except ValueError as error:
            message = encode(context.unusable(f"returned something else than a trajectory: {error}"))
        self._pipe.send_bytes(message)

    async def _ask(self, ask: Ask) -> Completed:
        if asyncio.get_running_loop() is not self._loop:
            raise ContextError(
                "awaited context.complete in another event loop than its own, such as one of a thread; use "
                "asyncio.run_coroutine_threadsafe with the loop in which the environment was called"
            )
        try:
            message = encode(ask)
        except ValueError as error:
            raise ContextError(f"gave context.complete what it cannot use: {error}") from error
        future: asyncio.Future[Completed] = self._loop.create_future()
        self._waiting[ask.episode, ask.segment] = future
        self._pipe.send_bytes(message)
        return await future


def _is_cancelled() -> bool:
    """Whether somebody has cancelled this task; else its function has raised CancelledError by itself."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def serve(
    pipe: Connection, name: str, arguments: Mapping[str, Any], source: ModelSource, memory_gib: float, mark: int
) -> None:
    """Import the environment, and run the episodes that are ordered through ``pipe``. ``mark`` is the file descriptor
    of a :class:`Mark`."""
    try:
        environment = load_environment(name, arguments)
    except PlugPointError as error:
        text = f"{error}\n{traceback.format_exc()}" if error.__cause__ else str(error)
        pipe.send_bytes(text.encode())
        return
    model = source.load()
    limit_memory(memory_gib)
    pipe.send_bytes(READY)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        asyncio.run(_serve(pipe, environment, model, Mark(mark)))


async def _serve(pipe: Connection, environment: Environment, model: ModelView, mark: Mark) -> None:
    episodes, loop = Episodes(pipe, environment, model, mark), asyncio.get_running_loop()
    mark.follow(loop)
    loop.add_reader(pipe.fileno(), episodes.read)
    await episodes.closed.wait()
