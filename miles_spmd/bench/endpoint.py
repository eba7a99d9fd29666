"""What a turn of a session costs when the policy responds at once: the endpoint's own time, without an engine.

OpenAI's client holds conversations of several turns from a process of its own; in each turn the policy calls one of two
tools, whose result is the next message.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from miles_spmd.bench.openai_client import shared_client
from miles_spmd.bench.result import Row
from miles_spmd.data.template import Conversation
from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.environments.sessions.endpoint import Endpoint
from miles_spmd.environments.sessions.protocol import MODEL
from miles_spmd.environments.sessions.session import Session
from miles_spmd.plugins.environment import Completion
from miles_spmd.types.trajectory import FinishReason, Segment, Trajectory

_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>'
_RESULT = "The sum of 2 and 2 is 4. " * 8
_TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name} two integers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
            },
        },
    }
    for name in ("add", "multiply")
]


def bench_endpoint(model: Path, sessions: int, turns: int, repeats: int) -> list[Row]:
    """Return a row for ``sessions`` clients at a time, and one for a single client. ``model``: folder of a tokenizer
    with a chat template."""
    return asyncio.run(_bench(Tokenizer(model), sessions, turns, repeats))


async def _bench(tokenizer: Tokenizer, sessions: int, turns: int, repeats: int) -> list[Row]:
    near, far = multiprocessing.Pipe()
    clients = multiprocessing.get_context("spawn").Process(target=_serve_clients, args=(far, turns), daemon=True)
    clients.start()
    far.close()
    endpoint, rows = Endpoint(), list[Row]()
    await _play(endpoint, tokenizer, near, 1)  # imports and connections
    for count in (sessions, 1):
        found = [await _play(endpoint, tokenizer, near, count) for _ in range(repeats)]
        cpu, elapsed, latencies = zip(*found, strict=True)
        rows.append(
            {
                "sessions at a time": count,
                "turns of each": turns,
                "CPU ms a turn": 1000 * statistics.median(cpu) / (count * turns),
                "sessions/s": count / statistics.median(elapsed),
                "ms from request to response": 1000 * statistics.median(latencies),
            }
        )
    near.close()
    clients.join()
    return rows


async def _play(
    endpoint: Endpoint, tokenizer: Tokenizer, clients: Connection, count: int
) -> tuple[float, float, float]:
    """Return the CPU seconds of this process, the seconds that it took, and the median of a turn's seconds."""
    async with AsyncExitStack() as opened:
        made = [Session(_Context(tokenizer), call_format="hermes") for _ in range(count)]
        sessions = [await opened.enter_async_context(endpoint.open(session)) for session in made]
        used, began = time.process_time(), time.monotonic()
        clients.send([(session.base_url, session.api_key) for session in sessions])
        latency = await asyncio.to_thread(clients.recv)
        used, elapsed = time.process_time() - used, time.monotonic() - began
    if isinstance(latency, str):
        raise RuntimeError(latency)
    return used, elapsed, latency


class _Context:
    """A context whose policy calls a tool whenever it is asked."""

    index = 0

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._says = tokenizer.encode(_CALL)

    def begin(self, tokens: Sequence[int], *, role: str = "") -> Trajectory:
        return Trajectory([*tokens], [], role=role)

    async def complete(self, trajectory: Trajectory, **settings: Any) -> Completion:
        trajectory.append(Segment(self._says, log_probs=[-0.5] * len(self._says)))
        trajectory.finish_reason = FinishReason.STOP
        return Completion(self._says, FinishReason.STOP)

    def fork(self, trajectory: Trajectory) -> Trajectory:
        raise NotImplementedError  # what comes next as well: sessions do without

    def session(self, **formats: str) -> AbstractAsyncContextManager[Any]:
        raise NotImplementedError

    def room(self, trajectory: Trajectory) -> int:
        return 1 << 20

    def render(self, messages: Sequence[dict[str, Any]], *, tools: Any = (), add_generation_prompt: bool = True) -> str:
        conversation = Conversation([*messages], [*tools] or None)
        return self._tokenizer.chat_template.render(conversation, add_generation_prompt)[0]

    def encode(self, text: str, *, literal: Any = (), at_start: bool = False, templated: bool = True) -> list[int]:
        return self._tokenizer.encode_continuation(text, literal, at_start=at_start)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode([*tokens], skip_special_tokens=False)

    def count(self, name: str, value: float = 1.0) -> None:
        if not name.startswith("session_ignored/"):
            raise RuntimeError(f"the endpoint took a turn of this benchmark for a branch: {name}")


def _serve_clients(pipe: Connection, turns: int) -> None:
    asyncio.run(_serve(pipe, turns))


async def _serve(pipe: Connection, turns: int) -> None:
    """Receive addresses with their keys, and send the median seconds of a turn, or what went wrong."""
    while True:
        try:
            addresses = await asyncio.to_thread(pipe.recv)
        except EOFError:
            return
        try:
            found = await asyncio.gather(*(_converse(base_url, key, turns) for base_url, key in addresses))
            pipe.send(statistics.median(seconds for one in found for seconds in one))
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")


async def _converse(base_url: str, api_key: str, turns: int) -> list[float]:
    """Return the seconds of each turn."""
    client = shared_client().with_options(base_url=base_url, api_key=api_key)
    messages, seconds = list[Any]([{"role": "user", "content": "Add and multiply."}]), []
    for _ in range(turns):
        began = time.monotonic()
        response = await client.chat.completions.create(model=MODEL, messages=messages, tools=_TOOLS)
        seconds.append(time.monotonic() - began)
        said = response.choices[0].message
        (call,) = said.tool_calls or []
        messages += [said, {"role": "tool", "tool_call_id": call.id, "content": _RESULT}]
    return seconds
