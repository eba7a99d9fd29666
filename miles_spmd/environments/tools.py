"""The environment ``tools``: the policy may call functions until it responds without a call.

environment = "tools"
environment_kwargs = { functions = ["my_tools:search", "my_tools:run_python"], max_turns = 8 }
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import msgspec

from miles_spmd.environments.calls import CallParser
from miles_spmd.environments.chat import AUTO, Chat, Reply
from miles_spmd.environments.execution import ErrorKind, Result, Tool, Toolbox
from miles_spmd.plugins.environment import Context
from miles_spmd.types.sample import Prompt
from miles_spmd.types.trajectory import FinishReason, Trajectory


async def tools(
    context: Context,
    prompt: Prompt,
    *,
    functions: Sequence[str | Callable[..., Any] | Mapping[str, Any]],
    max_turns: int = 8,
    call_format: str = AUTO,
    reasoning_format: str = AUTO,
    tool_timeout: float = 30.0,
    tool_memory_gib: float = 4.0,
    tool_workers: int = 8,
    max_result_chars: int = 16_384,
) -> Trajectory:
    """Let the policy respond and call ``functions`` in turns. The last message of the policy, without reasoning and
    calls, is what is scored.

    A function is named as ``module:function``, or an object with it under ``function`` and a ready-made schema under
    ``schema``. The conversation is truncated after ``max_turns`` messages of the policy, and where the context or the
    limit of the response is reached. ``tool_timeout``: seconds of one call. ``tool_memory_gib``: GiB by which a process
    of plain functions may grow; there are ``tool_workers`` of them. ``max_result_chars``: characters of a result that
    the policy sees. Raises ValueError for functions, formats and templates that cannot be used.
    """
    toolbox = _toolbox(_entries(functions), tool_timeout, tool_memory_gib, tool_workers, max_result_chars)
    chat = Chat(context, prompt, tools=toolbox.schemas, call_format=call_format, reasoning_format=reasoning_format)
    reply = await chat.respond()
    for _ in range(max_turns - 1):
        if not (reply.complete and reply.calls):
            break
        results = await toolbox.run(reply.calls)
        _count_results(context, results)
        if not chat.add(result_messages(reply, results)):
            break
        reply = await chat.respond()
    trajectory = chat.trajectory
    if reply.calls:  # that were not executed
        trajectory.finish_reason = FinishReason.LENGTH
    trajectory.text = reply.content
    return trajectory


def _check(
    *,
    functions: Sequence[Any],
    max_turns: int = 1,
    call_format: str = AUTO,
    reasoning_format: str = AUTO,
    **_: Any,
) -> None:
    """Raise ValueError for arguments that cannot be used, before the first conversation."""
    if isinstance(functions, str) or not functions:
        raise ValueError("functions is a list of at least one function")
    if max_turns < 1:
        raise ValueError(f"max_turns = {max_turns} is less than 1")
    CallParser(
        "hermes" if call_format == AUTO else call_format, (), "qwen3" if reasoning_format == AUTO else reasoning_format
    )
    Toolbox([Tool(function, msgspec.json.decode(schema)) for function, schema in _entries(functions)])


tools.check = _check  # type: ignore[attr-defined]


def result_messages(reply: Reply, results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the messages with the results of a reply's calls, as :meth:`Chat.add` takes them."""
    return [
        {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": result.text}
        for call, result in zip(reply.calls, results, strict=True)
    ]


def _count_results(context: Context, results: Sequence[Result]) -> None:
    context.count("tool_calls", len(results))
    for kind in ErrorKind:
        context.count(f"tool_errors/{kind}", sum(result.error is kind for result in results))


def _entries(functions: Sequence[Any]) -> tuple[tuple[str | Callable[..., Any], bytes], ...]:
    """Return functions, and their schemas as JSON: what a cache can compare."""
    return tuple(map(_entry, functions))


def _entry(function: str | Callable[..., Any] | Mapping[str, Any]) -> tuple[str | Callable[..., Any], bytes]:
    if not isinstance(function, Mapping):
        return function, b"null"
    if "function" not in function or function.keys() - {"function", "schema"}:
        raise ValueError(
            f"functions: an entry has {', '.join(map(str, function))}; write 'module:function', or an object with "
            "'function' and 'schema'"
        )
    return function["function"], msgspec.json.encode(function.get("schema"))


@cache  # one for all conversations of this process
def _toolbox(
    entries: tuple[tuple[str | Callable[..., Any], bytes], ...],
    timeout: float,
    memory_gib: float,
    workers: int,
    longest: int,
) -> Toolbox:
    return Toolbox(
        [Tool(function, msgspec.json.decode(schema)) for function, schema in entries],
        timeout=timeout,
        memory_gib=memory_gib,
        workers=workers,
        longest=longest,
    )
