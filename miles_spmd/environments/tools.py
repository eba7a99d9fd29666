"""The environment ``tools``: the policy may call functions until it responds without a call.

environment = "tools"
environment_kwargs = { functions = ["python", "my_tools:lookup"], max_turns = 8 }
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import cache
from typing import Any

import msgspec

from miles_spmd.environments.calls import Call, CallParser
from miles_spmd.environments.chat import AUTO, Chat, Reply
from miles_spmd.environments.execution import ErrorKind, Result, Tool, Toolbox
from miles_spmd.environments.python_tool import python_tool
from miles_spmd.environments.search_tool import search_tool
from miles_spmd.environments.verl_tool import row, verl_tool
from miles_spmd.plugins.environment import Context
from miles_spmd.types.sample import Prompt
from miles_spmd.types.trajectory import FinishReason, Trajectory

_KEYS = ({"function", "schema"}, {"verl", "schema", "config"})  # of an entry that is an object
_Entry = tuple[str | Callable[..., Any], bytes]  # a function, and what is given beside it as JSON
BUILT_IN: Mapping[str, Callable[..., Callable[..., Any]]] = {"python": python_tool, "search": search_tool}


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
    python: Mapping[str, Any] | None = None,
    search: Mapping[str, Any] | None = None,
) -> Trajectory:
    """Let the policy respond and call ``functions`` in turns. The last message of the policy, without reasoning and
    calls, is what is scored.

    A function is ``python``, ``search``, ``module:function``, an object with one of these under ``function`` and a
    ready-made schema under ``schema``, or an object with a class of veRL under ``verl``. ``python`` and ``search``:
    options of these tools. The conversation is truncated after ``max_turns`` messages of the policy, and where the
    context or the limit of the response is reached. ``tool_timeout``: seconds of one call. ``tool_memory_gib``: GiB by
    which a process of plain functions may grow; there are ``tool_workers`` of them. ``max_result_chars``: characters of
    a result that the policy sees. Raises ValueError for functions, formats and templates that cannot be used.
    """
    options = msgspec.json.encode({"python": python or {}, "search": search or {}})
    toolbox = _toolbox(_entries(functions), options, tool_timeout, tool_memory_gib, tool_workers, max_result_chars)
    chat = Chat(context, prompt, tools=toolbox.schemas, call_format=call_format, reasoning_format=reasoning_format)
    row.set(prompt.metadata)
    return await converse(context, chat, toolbox.run, max_turns)


async def converse(
    context: Context, chat: Chat, run: Callable[[Sequence[Call]], Awaitable[list[Result]]], max_turns: int
) -> Trajectory:
    """Let the policy respond, and ``run`` its calls, until it responds without one."""
    reply = await chat.respond()
    for _ in range(max_turns - 1):
        if not (reply.complete and reply.calls):
            break
        results = await run(reply.calls)
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
    tool_timeout: float = 30.0,
    tool_memory_gib: float = 4.0,
    tool_workers: int = 8,
    max_result_chars: int = 16_384,
    python: Mapping[str, Any] | None = None,
    search: Mapping[str, Any] | None = None,
) -> None:
    """Raise ValueError for arguments that cannot be used, before the first conversation."""
    if isinstance(functions, str) or not isinstance(functions, Sequence) or not functions:
        raise ValueError("functions is a list of at least one function")
    for name, count in {
        "max_turns": max_turns,
        "tool_workers": tool_workers,
        "max_result_chars": max_result_chars,
    }.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} = {count!r} is not a whole number of at least 1")
    for name, amount in {"tool_timeout": tool_timeout, "tool_memory_gib": tool_memory_gib}.items():
        if not isinstance(amount, int | float) or not 0 < amount < math.inf:
            raise ValueError(f"{name} = {amount!r} is not a number above 0")
    CallParser(
        "hermes" if call_format == AUTO else call_format, (), "qwen3" if reasoning_format == AUTO else reasoning_format
    )
    options = {"python": python, "search": search}
    for name, given in options.items():
        if given is not None and name not in (function for function, _ in _entries(functions)):
            raise ValueError(f"{name} = {dict(given)} has no effect, because functions do not contain {name!r}")
    given_options = {name: given or {} for name, given in options.items()}
    Toolbox(_tools(_entries(functions), given_options, tool_timeout=tool_timeout, max_result_chars=max_result_chars))


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


def _entries(functions: Sequence[Any]) -> tuple[_Entry, ...]:
    """Return functions, and what is given beside them as JSON: what a cache can compare."""
    return tuple(map(_entry, functions))


def _entry(function: str | Callable[..., Any] | Mapping[str, Any]) -> _Entry:
    if not isinstance(function, Mapping):
        return function, b"{}"
    given = set(function)
    if not any(given <= keys and given & {"function", "verl"} for keys in _KEYS):
        raise ValueError(
            f"functions: an entry has {', '.join(map(str, function))}; write 'module:function', or an object with "
            "'function' and 'schema', or with 'verl', 'config' and 'schema'"
        )
    return function.get("function") or function["verl"], msgspec.json.encode(dict(function) | {"function": None})


def _tools(entries: Sequence[_Entry], options: Mapping[str, Mapping[str, Any]], **limits: float) -> list[Tool]:
    """Return the tools. ``limits``: those of all of them by their names, such as ``tool_timeout``."""
    tools = []
    for function, encoded in entries:
        given = msgspec.json.decode(encoded)
        schema = given.get("schema")
        if "verl" in given:
            function, schema = verl_tool(str(function), given.get("config") or {}, schema)
        elif isinstance(function, str) and ":" not in function:
            function = _built_in(function, options.get(function, {}), limits)
        tools.append(Tool(function, schema))
    return tools


def _built_in(name: str, options: Mapping[str, Any], limits: Mapping[str, float]) -> Callable[..., Any]:
    """Return a built-in tool. Raises ValueError."""
    if (make := BUILT_IN.get(name)) is None:
        raise ValueError(f"functions: {name!r} is unknown; known: {', '.join(BUILT_IN)}, or your own 'module:function'")
    parameters = inspect.signature(make).parameters.keys()
    known = sorted(parameters - limits.keys())
    if unknown := options.keys() - known:
        raise ValueError(f"{name}: unknown options {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    try:
        return make(**options, **{limit: value for limit, value in limits.items() if limit in parameters})
    except TypeError as error:
        raise ValueError(f"{name} = {dict(options)}: {error}") from error


@cache  # one for all conversations of this process
def _toolbox(
    entries: tuple[_Entry, ...],
    options: bytes,
    timeout: float,
    memory_gib: float,
    workers: int,
    longest: int,
) -> Toolbox:
    return Toolbox(
        _tools(entries, msgspec.json.decode(options), tool_timeout=timeout, max_result_chars=longest),
        timeout=timeout,
        memory_gib=memory_gib,
        workers=workers,
        longest=longest,
    )
