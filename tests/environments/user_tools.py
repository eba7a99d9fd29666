"""Tools such as users write, good and bad; named by ``module:function`` in the tests."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from enum import Enum
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np


def weather(city: str, days: int = 1, unit: Literal["c", "f"] = "c", tags: list[str] | None = None) -> str:
    """Weather forecast.

    Args:
        city: Name of the city.
        days: Number of days.
        unit: Unit of temperatures.
        tags: What to mention.
    """
    return f"{city}: {days} x 19 {unit}"


class Color(Enum):
    RED = "red"


class Leave(BaseException): ...


def paints(color: Color) -> str:
    """Paint something.

    Args:
        color: The color.
    """
    return color.value


def yields(count: int) -> Iterator[int]:
    """Count.

    Args:
        count: How far.
    """
    yield from range(count)


async def wait() -> None: ...


def add(a: float, b: float) -> float:
    """Sum of two numbers.

    Args:
        a: One.
        b: The other.
    """
    return a + b


async def lookup(key: str) -> dict[str, Any]:
    """What is known about a key.

    Args:
        key: The key.
    """
    await asyncio.sleep(0.3)
    return {"key": key, "näme": [1, None]}


def types(
    whole: int,
    real: float = 0.5,
    many: list[int] | None = None,
    table: dict[str, list[float]] | None = None,
    pair: tuple[int, float] = (0, 0.0),
    either: int | str | None = None,
    choice: Literal[1, 2] = 1,
    any_number: int | float = 1,
    anything: Any = None,
) -> str:
    """Shows what it was given.

    Args:
        whole: 1.
        real: 2.
        many: 3.
        table: 4.
        pair: 5.
        either: 6.
        choice: 7.
        any_number: 8.
        anything: 9.
    """
    return repr(list(locals().values()))


STUBBORN: list[str] = []


async def stubborn(how: str) -> str:
    """Catches what should end it.

    Args:
        how: As what.
    """
    STUBBORN.append("begins")
    caught = {"once": asyncio.CancelledError, "always": asyncio.CancelledError, "everything": BaseException}[how]
    try:
        while True:
            try:
                await asyncio.sleep(3600)
            except caught:
                STUBBORN.append("goes on")
                if how == "once":
                    return "late"
    finally:
        STUBBORN.append("ends")


KEPT: list[bytearray] = []


def misbehave(how: str) -> Any:
    """Does what it should not.

    Args:
        how: What.
    """
    match how:
        case "raise":
            raise FileNotFoundError(2, "No such file", "x.txt")
        case "raise unspeakably":
            raise Unspeakable
        case "exit":
            sys.exit(3)
        case "leave a program":
            subprocess.Popen(["sleep", "6175"])
            os._exit(7)
        case "end":
            os._exit(7)
        case "kill":
            os.kill(os.getpid(), 9)
        case "hang":
            subprocess.run(["sleep", "6174"], check=True)
        case "memory":
            return len(bytearray(3 * 2**30))
        case "leak":
            KEPT.append(bytearray(600 * 2**20))
            return len(KEPT)
        case "input":
            return input()
        case "long":
            return "x" * 100_000
        case "object":
            return {"at": Unspeakable, "ids": (1, 2)}
        case "set":
            return {"words": {"b", "a", "c"}, "numbers": np.arange(3), "one": np.float32(0.5)}
        case "coroutine":
            return wait()
        case "circle":
            ring: list[Any] = []
            ring.append(ring)
            return ring
        case "surrogate":
            return "half \ud83d pair"
        case "secrets":
            return sorted(name for name in os.environ if name.endswith("_KEY"))
        case "id":
            return os.getpid()
    return None


async def misbehave_async(how: str) -> Any:
    """Does what it should not, in the event loop.

    Args:
        how: What.
    """
    match how:
        case "interrupt":
            raise KeyboardInterrupt
        case "leave":
            raise Leave
        case "raise":
            raise KeyError("nothing here")
        case "time out":
            raise TimeoutError("of my own")
        case "cancel":
            raise asyncio.CancelledError
        case "exit":
            sys.exit()
        case "hang":
            await asyncio.sleep(60)
    return None


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def run(command: str, seconds: float = 0.5) -> str:
    """Waits.

    Args:
        command: Returned.
        seconds: How long.
    """
    time.sleep(seconds)
    return command


def untyped(city, days: int = 1):
    """Weather.

    Args:
        city: Name.
        days: Number.
    """


def undocumented(city: str) -> str:
    return city


def half_documented(city: str, days: int) -> str:
    """Weather.

    Args:
        city: Name.
    """
    return city


def variadic(*cities: str) -> str:
    """Weather.

    Args:
        cities: Names.
    """
    return ""


class VerlSearch:
    """A tool as veRL has them, without veRL's base class, which needs all of veRL."""

    live: set[str] = set()

    def __init__(self, config: dict[str, Any], tool_schema: Any) -> None:
        self.config, self.tool_schema = config, tool_schema
        self.name = tool_schema.function.name

    async def create(self, instance_id: str | None = None, **kwargs: Any) -> tuple[str, Any]:
        assert instance_id is not None
        self.live.add(instance_id)
        self.truth = kwargs.get("create_kwargs", {}).get("ground_truth", "")
        return instance_id, None

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> tuple[Any, float, dict]:
        assert instance_id in self.live
        await asyncio.sleep(0)
        return SimpleNamespace(text=f"{self.config['prefix']} {parameters['query'].upper()}{self.truth}"), 0.5, {}

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        self.live.remove(instance_id)


class VerlOfItsOwn:
    """One that makes its schema itself, and returns text."""

    def __init__(self, config: dict[str, Any], tool_schema: Any) -> None:
        pass

    def get_openai_tool_schema(self) -> dict[str, Any]:
        parameters = {"type": "object", "properties": {}}
        return {"type": "function", "function": {"name": "now", "description": "The time.", "parameters": parameters}}

    async def execute(self, instance_id: str, parameters: dict[str, Any]) -> tuple[str, float, dict]:
        return "noon", 0.0, {}
