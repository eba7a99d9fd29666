"""The process that serves HTTP, in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import msgspec

from miles_spmd.environments.context import ModelSource
from miles_spmd.environments.serving.door import Door, Policy, Weights
from miles_spmd.environments.serving.messages import (
    Asked,
    Ending,
    FromServer,
    Left,
    Listening,
    Load,
    Loaded,
    Outputs,
    Problem,
    ToServer,
)
from miles_spmd.environments.sessions.protocol import RequestError
from miles_spmd.environments.sglang_parsers import call_formats
from miles_spmd.types.request import Output, Request, SamplingParams

END_SECONDS = 0.5  # in which clients get what is left to say to them
_decoder = msgspec.msgpack.Decoder(ToServer)


class Served(NamedTuple):
    """What is served, and where."""

    host: str
    port: int  # 0: a free one
    key: str
    source: ModelSource
    variables: Mapping[str, Any]  # of the chat template
    params: SamplingParams
    version: int  # of the weights that the engines have
    path: str  # from which they come


class Run:
    """The run at the other end of ``pipe``."""

    def __init__(self, pipe: Connection) -> None:
        self.ended = asyncio.Event()
        self._pipe = pipe
        self._waiting: dict[str, asyncio.Future[Output]] = {}  # by rid
        self._loading: asyncio.Future[str] | None = None

    def send(self, message: FromServer) -> None:
        with contextlib.suppress(OSError):  # the run ends
            self._pipe.send_bytes(msgspec.msgpack.encode(message))

    async def submit(self, request: Request) -> Output:
        """Raises RequestError where the server ends."""
        if self.ended.is_set():
            raise _ending()
        future: asyncio.Future[Output] = asyncio.get_running_loop().create_future()
        self._waiting[request.rid] = future
        self.send(Asked([request]))
        try:
            return await future
        except asyncio.CancelledError:
            self.send(Left(request.rid))
            raise
        finally:
            self._waiting.pop(request.rid, None)

    async def load(self, order: Load) -> str:
        """Return "" or why the engines have kept their weights. Raises RequestError."""
        if self.ended.is_set():
            raise _ending()
        self._loading = asyncio.get_running_loop().create_future()
        self.send(order)
        return await self._loading

    def read(self) -> None:
        """Take the next message."""
        try:
            message: ToServer = _decoder.decode(self._pipe.recv_bytes())
        except (EOFError, OSError):
            self._end()
            return
        match message:
            case Outputs(outputs):
                for output in outputs:
                    future = self._waiting.get(output.rid)
                    if future is not None and not future.done():
                        future.set_result(output)
            case Loaded(problem) if self._loading is not None:
                self._loading.set_result(problem)
            case Ending():
                self._end()

    def _end(self) -> None:
        self.ended.set()
        waiting: list[asyncio.Future[Any]] = [*self._waiting.values()]
        for future in waiting if self._loading is None else [*waiting, self._loading]:
            if not future.done():
                future.set_exception(_ending())


def _ending() -> RequestError:
    return RequestError(503, "the server ends", "stopped")


def serve(pipe: Connection) -> None:
    """Serve what comes through the pipe first, until the run ends."""
    call_formats()  # imports the parsers, which takes seconds, while engines are built
    served: Served = pipe.recv()
    asyncio.run(_serve(pipe, served))


async def _serve(pipe: Connection, served: Served) -> None:
    run, loop = Run(pipe), asyncio.get_running_loop()
    policy = Policy(served.source.load(), served.variables, served.params, run.submit)
    weights = Weights(served.version, served.path)
    door = Door((served.host, served.port), served.key, policy, weights, run.load)
    try:
        door.start()
    except OSError as error:
        run.send(Problem(f"cannot listen at {served.host}, port {served.port}: {error.strerror or error}"))
        return
    loop.add_reader(pipe.fileno(), run.read)
    run.send(Listening(door.url))
    await run.ended.wait()
    loop.remove_reader(pipe.fileno())
    await asyncio.sleep(END_SECONDS)
