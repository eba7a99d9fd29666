"""An endpoint of sessions in an event loop, whose policy says what a test has written down."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai

from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.environments.sessions.endpoint import Endpoint
from miles_spmd.environments.sessions.session import Session
from miles_spmd.plugins.environment import Completion
from miles_spmd.types.trajectory import Trajectory
from tests.environments.families import FAMILIES, write_family
from tests.environments.scripted import ScriptedContext, Turn

USER = {"role": "user", "content": "What now?"}
Test = Callable[["Bench"], Awaitable[None]]
Play = Callable[[Test], None]


class HeldContext(ScriptedContext):
    """The policy responds while ``free`` is set."""

    def __init__(self, tokenizer: Tokenizer, turns: Sequence[Turn], room: int = 100_000) -> None:
        super().__init__(tokenizer, turns, room)
        self.free, self.asked, self.paths = asyncio.Event(), asyncio.Event(), list[str]()
        self.free.set()

    async def complete(self, trajectory: Trajectory, **settings: Any) -> Completion:
        self.paths.append(settings["path"])
        self.asked.set()
        await self.free.wait()
        return await super().complete(trajectory, **settings)


class Bench:
    """An endpoint with one session, whose policy says what the test has written down."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.endpoint = tokenizer, Endpoint()
        self.session, self.context = Session(HeldContext(tokenizer, [])), HeldContext(tokenizer, [])

    @asynccontextmanager
    async def open(self, *said: str | Turn, room: int = 100_000) -> AsyncIterator[openai.AsyncOpenAI]:
        turns = [Turn(self.tokenizer.encode(one)) if isinstance(one, str) else one for one in said]
        self.context = HeldContext(self.tokenizer, turns, room)
        async with (
            self.endpoint.open(Session(self.context)) as self.session,
            openai.AsyncOpenAI(base_url=self.session.base_url, api_key=self.session.api_key, max_retries=0) as client,
        ):
            yield client

    @property
    def port(self) -> int:
        return int(self.session.base_url.split("/")[2].split(":")[1])

    @property
    def path(self) -> str:
        return "/" + self.session.base_url.split("/", 3)[3] + "/chat/completions"

    def head(self, length: int | str, path: str | None = None, key: str | None = None) -> bytes:
        return (
            f"POST {path or self.path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key or self.session.api_key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        ).encode()

    async def raw(self, *parts: bytes) -> tuple[int, dict[str, Any]]:
        """Send bytes on a connection of their own, and return status and body of the response."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(int(line.split(":")[1]) for line in head.splitlines() if line.startswith("content-length"))
            body = await reader.readexactly(length)
            return int(head.split()[1]), json.loads(body) if b"{" in body else {}
        finally:
            writer.close()

    async def post(self, body: Any, **head: Any) -> tuple[int, dict[str, Any]]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.raw(self.head(len(data), **head) + data)


def player(folder: Path) -> Play:
    """Return what runs a test in an event loop, with a tokenizer that is written to ``folder``."""
    tokenizer = write_family(folder, FAMILIES["qwen"])

    async def run(test: Test) -> None:
        async with asyncio.timeout(60):
            await test(Bench(tokenizer))

    return lambda test: asyncio.run(run(test))
