"""Which episode an event loop is running: a mark in memory that another process reads, also after the loop's has died.

Episodes share a process. Where one blocks it or ends it, the mark says which one did.
"""

from __future__ import annotations

import asyncio
import contextvars
import mmap
import os
import struct
import types
from collections.abc import Coroutine, Generator
from typing import Any, NamedTuple

NOBODY = -1
_FORMAT = "qq"

_episode: contextvars.ContextVar[int] = contextvars.ContextVar("episode", default=NOBODY)


class Marked(NamedTuple):
    episode: int  # NOBODY: the loop waits, or does its own work
    switches: int  # how often the loop has begun or left a task of an episode


class Mark:
    """Memory of an anonymous file, which both processes map."""

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = os.memfd_create("episode") if descriptor is None else descriptor
        size = struct.calcsize(_FORMAT)
        if descriptor is None:
            os.ftruncate(self.descriptor, size)
        self._memory, self._switches = mmap.mmap(self.descriptor, size), 0
        if descriptor is None:
            self._set(NOBODY)

    def read(self) -> Marked:
        return Marked(*struct.unpack_from(_FORMAT, self._memory))

    def close(self) -> None:
        self._memory.close()
        os.close(self.descriptor)

    def _set(self, episode: int) -> None:
        self._switches += 1
        struct.pack_into(_FORMAT, self._memory, 0, episode, self._switches)

    # --- in the process of the loop ----------------------------------------------------------------------------------

    def follow(self, loop: asyncio.AbstractEventLoop) -> None:
        """Mark what runs in all tasks that are made from now on."""

        def make(loop: asyncio.AbstractEventLoop, coroutine: Any, **arguments: Any) -> asyncio.Task[Any]:
            if _episode.get() != NOBODY:
                coroutine = self._follow(coroutine, _episode.get())
            return asyncio.Task(coroutine, loop=loop, **arguments)

        loop.set_task_factory(make)  # type: ignore[arg-type]

    def task(self, episode: int, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Return a task of ``episode``; the tasks that it makes are of this episode, too."""
        context = contextvars.copy_context()
        context.run(_episode.set, episode)
        return context.run(asyncio.ensure_future, coroutine)  # type: ignore[arg-type]

    async def _follow(self, coroutine: Coroutine[Any, Any, Any], episode: int) -> Any:
        try:
            return await self._marked(coroutine, episode)
        except (SystemExit, KeyboardInterrupt) as error:  # which would end the event loop, and with it other episodes
            raise RuntimeError(f"a task of an environment ended with {type(error).__name__}: {error}") from error

    @types.coroutine
    def _marked(self, coroutine: Coroutine[Any, Any, Any], episode: int) -> Generator[Any, Any, Any]:
        resume, value = coroutine.send, None
        while True:
            self._set(episode)
            try:
                yielded = resume(value)  # type: ignore[arg-type]
            except StopIteration as stop:
                return stop.value
            finally:
                self._set(NOBODY)
            try:
                value, resume = (yield yielded), coroutine.send
            except BaseException as error:
                value, resume = error, coroutine.throw  # type: ignore[assignment]
