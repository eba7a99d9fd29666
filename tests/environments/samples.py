"""Environments for tests. The label of a prompt says what the environment is to do."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from miles_spmd.plugins.environment import Context
from miles_spmd.types.sample import Prompt
from miles_spmd.types.trajectory import Segment, Trajectory


async def behave(context: Context, prompt: Prompt, suffix: int = 0) -> Any:
    """Two turns, between which the environment gives a token and does what the label says."""
    trajectory = context.begin(prompt.tokens)
    await context.complete(trajectory, max_new_tokens=2)
    trajectory.append(Segment([50 + suffix], sampled=False))
    match prompt.label:
        case "raise":
            raise ValueError("no luck")
        case "exit":
            raise SystemExit(3)
        case "leave":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "block":
            time.sleep(100)
        case "wait":
            await asyncio.sleep(100)
        case "cling":
            await cling()
        case "spawn":  # the task that kills is not the environment's own
            await asyncio.gather(leave())
        case "memory":
            bytearray(64 * 2**30)
        case "leak":
            LEAKED.append(bytearray(600 * 2**20))
        case "number":
            return 5
        case "nothing":
            return []
        case "unsampled":
            return context.begin([1, 2])
        case "unknown":
            trajectory.append(Segment([128], sampled=False))
        case "invent":
            trajectory.append(Segment([1, 2]))
        case "fork":
            sibling = context.fork(trajectory)
            await asyncio.gather(context.complete(trajectory), context.complete(sibling))
            return [trajectory, sibling]
    await context.complete(trajectory)
    context.count("calls", 2)
    if prompt.label in RUIN:
        RUIN[prompt.label](trajectory)
    return trajectory


async def misuse(context: Context, prompt: Prompt) -> Trajectory:
    """Use the context as the label says."""
    trajectory = context.begin(prompt.tokens)
    match prompt.label:
        case "no start":
            context.begin([])
        case "letters":
            await context.complete(trajectory, stop="END")
        case "numbers":
            await context.complete(trajectory, stop=[5])  # type: ignore[list-item]
        case "name":
            context.count(5)  # type: ignore[arg-type]
        case "infinite":
            context.count("score", math.inf)
        case "thread":
            await asyncio.to_thread(lambda: asyncio.run(context.complete(trajectory)))  # type: ignore[arg-type]
        case "unspeakable":
            raise Unspeakable
        case "interrupt":
            raise KeyboardInterrupt
        case "cancelled":
            raise asyncio.CancelledError
        case "task":
            await asyncio.gather(exit_here())
        case "other's":
            trajectory = Trajectory(prompt.tokens, number=3)
    await context.complete(trajectory)
    return trajectory


LEAKED: list[bytearray] = []
RUIN: dict[str, Callable[[Trajectory], None]] = {
    "text": lambda trajectory: setattr(trajectory, "text", 5),
    "surrogate": lambda trajectory: setattr(trajectory, "text", "\ud800"),
    "messages": lambda trajectory: trajectory.messages.append({"content": object()}),
    "reason": lambda trajectory: setattr(trajectory, "finish_reason", "tired"),
    "reward": lambda trajectory: setattr(trajectory, "reward", math.nan),
    "detail": lambda trajectory: trajectory.reward_detail.update(score=math.inf),
    "start": lambda trajectory: trajectory.start.append(1),
    "order": lambda trajectory: trajectory.segments.reverse(),
    "gap": lambda trajectory: trajectory.segments.__delitem__(0),
    "disguised": lambda trajectory: trajectory.segments.append(
        msgspec.structs.replace(trajectory.segments.pop(), sampled=False)
    ),
    "truth": lambda trajectory: trajectory.append(Segment([True], sampled=False)),
}


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


async def exit_here() -> None:
    raise SystemExit(4)


async def overflowing(context: Context, prompt: Prompt) -> Trajectory:
    """Give more tokens than fit after each response, until there is no room."""
    trajectory = context.begin(prompt.tokens)
    while (await context.complete(trajectory, max_new_tokens=2)).tokens:
        trajectory.append(Segment([50] * 5, sampled=False))
    return trajectory


async def leave() -> None:
    os._exit(4)


async def cling() -> None:
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(100)


async def rewarded(context: Context, prompt: Prompt) -> Trajectory:
    trajectory = context.begin(prompt.tokens)
    completion = await context.complete(trajectory)
    trajectory.reward = len(completion.tokens) / 10
    trajectory.reward_detail = {"own": 1.0}
    return trajectory


def not_async(context: Context, prompt: Prompt) -> None: ...


async def conversation(context: Context, prompt: Prompt, hold: str = "", fails: bool = False) -> list[Trajectory]:
    """Two turns and a branch. It waits while the file ``hold`` exists, and with ``fails`` some fail at first."""
    trajectory = context.begin(prompt.tokens)
    await context.complete(trajectory, max_new_tokens=4)
    given = context.encode(" 42")
    trajectory.append(Segment(given, sampled=False))
    context.count("given", len(given))
    sibling = context.fork(trajectory)
    if Path(hold).exists():
        Path(f"{hold}.held").touch()
    while Path(hold).exists():
        await asyncio.sleep(0.05)
    if (
        fails
        and context.index == 1
        and (mark := Path(f"{hold}.{len(prompt.uid)}{prompt.uid[-1]}"))
        and not mark.exists()
    ):
        mark.touch()
        if prompt.uid[-1] == "3":
            raise OSError("no network")
        if prompt.uid[-1] == "4":
            os._exit(5)
    await asyncio.gather(context.complete(trajectory, max_new_tokens=3), context.complete(sibling))
    return [trajectory, sibling]
