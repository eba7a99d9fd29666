"""Time of a rollout of several turns, or of responses whose lengths have a long tail: the steps of ``bench step`` in an
environment that lets the policy respond ``turns`` times and gives it random tokens in between. The same conversations
can be held by OpenAI's client, which reaches the policy through a session."""

from __future__ import annotations

import asyncio
import random
import string
from collections.abc import Iterator
from typing import Any

from miles_spmd.bench.openai_client import shared_client
from miles_spmd.bench.result import Row
from miles_spmd.bench.step import bench_step
from miles_spmd.environments.chat import Chat
from miles_spmd.environments.sessions.protocol import MODEL
from miles_spmd.plugins.environment import Context
from miles_spmd.types.sample import Prompt
from miles_spmd.types.trajectory import Segment, Trajectory

SHORT = 1 / 16  # of the longest response, in a long-tailed distribution: the median
TEMPLATE = 64  # tokens that a chat template has at most around a message


async def turns(
    context: Context,
    prompt: Prompt,
    turns: int = 8,
    new_tokens: int = 64,
    given: int = 32,
    tail: bool = False,
    pause: float = 0.0,
) -> Trajectory:
    """Respond ``turns`` times by ``new_tokens`` tokens; with ``tail`` by fewer, log-normally distributed ones. Between
    two turns the environment takes ``pause`` seconds on average, at most twice as many."""
    generator = random.Random(f"{prompt.uid} {context.index}")
    trajectory = context.begin(prompt.tokens)
    for turn in range(turns):
        length = round(min(1.0, SHORT * generator.lognormvariate(0.0, 1.3)) * new_tokens) if tail else new_tokens
        await context.complete(trajectory, max_new_tokens=max(1, length))
        if turn < turns - 1:
            trajectory.append(Segment(generator.choices(prompt.tokens, k=given), sampled=False))
            if pause:
                await asyncio.sleep(generator.uniform(0, 2 * pause))
    return trajectory


async def chats(context: Context, prompt: Prompt, turns: int, new_tokens: int, given: int) -> Trajectory:
    """A user who speaks ``turns`` times, and the policy in the process of its environment."""
    chat, speaks = Chat(context, prompt), _user(context, prompt, turns, given)
    await chat.respond(max_new_tokens=new_tokens)
    for message in speaks:
        chat.add([message])
        await chat.respond(max_new_tokens=new_tokens)
    return chat.trajectory


async def clients(context: Context, prompt: Prompt, turns: int, new_tokens: int, given: int) -> list[Trajectory]:
    """The conversations of :func:`chats`, with the policy behind a session."""
    messages, speaks = [*prompt.metadata["messages"]], _user(context, prompt, turns, given)
    async with context.session() as session:
        client = shared_client().with_options(base_url=session.base_url, api_key=session.api_key)
        for message in [None, *speaks]:
            messages += [message] if message else []
            response = await client.chat.completions.create(model=MODEL, messages=messages, max_tokens=new_tokens)
            messages.append({"role": "assistant", "content": response.choices[0].message.content})
    return session.trajectories


def _user(context: Context, prompt: Prompt, turns: int, given: int) -> Iterator[dict[str, str]]:
    """Yield what the user says between two turns, of ``given`` tokens of a ``random:`` model."""
    generator = random.Random(f"{prompt.uid} {context.index}")
    for _ in range(turns - 1):
        yield {"role": "user", "content": "".join(generator.choices(string.ascii_lowercase, k=given))}


def bench_clients(
    overrides: list[str], number: int, new_tokens: int, given: int, ranks: int, **options: Any
) -> list[Row]:
    """Return two rows, with medians over the measured steps: the policy in the environment's process, and behind a
    session. ``options`` are the other arguments of bench_step."""
    arguments = f"{{turns = {number}, new_tokens = {new_tokens}, given = {given}}}"
    sessions, length = options["prompts"] * options["samples"], number * (new_tokens + given + 2 * TEMPLATE)
    rows: list[Row] = []
    for environment in ("chats", "clients"):
        settings = [
            f"environment.environment=miles_spmd.bench.turns:{environment}",
            f"environment.environment_kwargs={arguments}",
            "data.apply_chat_template=true",
            f"data.rollout_max_prompt_len={options['prompt_tokens'] + 2 * TEMPLATE}",
        ]
        (row,) = bench_step(overrides=[*settings, *overrides], response_tokens=length, ranks=ranks, **options)
        rows.append(
            {
                "policy": "through a session" if environment == "clients" else "in the environment's process",
                "sessions": f"{sessions} x {number} turns x {new_tokens} + {given}",
                "step s": row["step s"],
                "rollout s": row["rollout s"],
                "sampled tokens/s per GPU in a rollout": sessions * number * new_tokens / row["rollout s"] / ranks,
                "prefix hits": row["prefix hits"],
            }
        )
    return rows


def bench_turns(
    overrides: list[str],
    number: int,
    new_tokens: int,
    given: int,
    tail: bool,
    pause: float,
    cache_tokens: int | None,
    ranks: int,
    **options: Any,
) -> list[Row]:
    """Return one row, with medians over the measured steps. With ``cache_tokens``, which are the size of an engine's KV
    cache, there are two: all sessions begin at once, or as many as the cache is expected to hold. ``options`` are the
    other arguments of bench_step."""
    if cache_tokens is not None:
        cases = [[f"sglang.max_total_tokens={cache_tokens}", f"environment_cache_share={share}"] for share in (0, 1)]
        options |= {"number": number, "new_tokens": new_tokens, "given": given, "tail": tail, "pause": pause}
        return [bench_turns([*overrides, *case], cache_tokens=None, ranks=ranks, **options)[0] for case in cases]
    arguments = f"turns = {number}, new_tokens = {new_tokens}, given = {given}, pause = {pause}"
    environment = [
        "environment.environment=miles_spmd.bench.turns:turns",
        f"environment.environment_kwargs={{{arguments}, tail = {str(tail).lower()}}}",
    ]
    length = number * new_tokens + (number - 1) * given
    (row,) = bench_step(overrides=[*environment, *overrides], response_tokens=length, ranks=ranks, **options)
    sessions = options["prompts"] * options["samples"]
    sampled = row["tokens behind a prompt"] - (number - 1) * given
    return [
        {
            "sessions": f"{sessions} x {number} turns x {new_tokens} + {given}" + (", long-tailed" if tail else ""),
            "step s": row["step s"],
            "rollout s": row["rollout s"],
            "sampled tokens/s per GPU in a rollout": sessions * sampled / row["rollout s"] / ranks,
            "prefix hits": row["prefix hits"],
            "sessions at a time": row["sessions at a time"],
        }
    ]
