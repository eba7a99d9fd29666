"""Recognising in what a client sends back the messages that the policy said: by meaning, since clients strip texts,
write arguments anew, leave out reasoning, and one of them (smolagents) writes calls as text.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from miles_spmd.environments.sessions.chat import ChatMessage, ToolCall
from miles_spmd.environments.sessions.protocol import RequestError

Message = dict[str, Any]  # as chat templates take it
_ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_CALLS_AS_TEXT = "Calling tools:\n"  # smolagents' mark of calls
_BROKEN = "INVALID_JSON"  # pydantic-ai's name for arguments that it could not read
_LONGEST_CALLS = 2**18  # characters of calls that are written as text
_EXACT_INTEGERS = 2**53  # below it a float holds each


class Meaning(NamedTuple):
    """What an assistant's message says, however it is written."""

    content: str
    calls: tuple[tuple[str, str], ...] = ()  # names, and arguments as JSON in one spelling

    @classmethod
    def of(cls, content: str, calls: Sequence[tuple[str, Any]]) -> Meaning:
        return cls(content.strip(), tuple((name, _arguments(value)) for name, value in calls))


def meanings(message: Message) -> list[Meaning]:
    """Return what a message of the assistant may say, the most literal reading first."""
    content = message["content"]
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    found = [Meaning.of(content, calls)]
    before, mark, behind = content.rpartition(_CALLS_AS_TEXT)
    if mark and not calls and (written := _calls_in(behind)) is not None:
        found.append(Meaning.of(before, written))
        found.append(Meaning.of(before, ()))  # where the client has found them in the content
    return found


def plain(messages: Sequence[ChatMessage]) -> list[Message]:
    """Return messages as chat templates take them: contents as text, arguments as objects, results with the names of
    their tools. Raises RequestError."""
    found, names = list[Message](), dict[str, str]()
    for message in messages:
        if (role := _ROLES.get(message.role)) is None:
            raise RequestError(400, f"the role {message.role!r} is not one of {', '.join(_ROLES)}", param="messages")
        one: Message = {"role": role, "content": message.text}
        if role == "assistant" and message.tool_calls:
            one["tool_calls"] = [_plain_call(call) for call in message.tool_calls]
            names |= {call.id: call.function.name for call in message.tool_calls if call.id is not None}
        if role == "assistant" and message.reasoning_content:
            one["reasoning_content"] = message.reasoning_content
        if role == "tool" and (call_id := message.tool_call_id) is not None:
            one["tool_call_id"] = call_id
            if call_id in names:
                one["name"] = names[call_id]
        found.append(one)
    return found


def begin(tools: Sequence[Any]) -> bytes:
    """Return the state of a conversation before its first message."""
    return _digest(b"tools", msgspec.json.encode(tools, order="sorted"))


def follow(state: bytes, message: Message, trims: Mapping[str, bool]) -> bytes:
    """Return the state of a conversation after a message that the policy did not say. ``trims``: of which roles the
    chat template leaves out the white space around contents."""
    if message["role"] == "assistant":
        return _digest(state, msgspec.json.encode(meanings(message)[0]))
    content = message["content"]
    content = content.strip() if trims[message["role"]] else content
    return _digest(state, msgspec.json.encode((message["role"], content)))


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


def _plain_call(call: ToolCall) -> dict[str, Any]:
    arguments = call.function.arguments
    if isinstance(arguments, str):
        parsed = _loads(arguments)
        arguments = parsed if isinstance(parsed, dict) else arguments
    return {"id": call.id or "", "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _calls_in(text: str) -> list[tuple[str, Any]] | None:
    """Return the calls in a list that Python has written, None where it is another text."""
    try:
        calls: Any = ast.literal_eval(text.strip()) if len(text) <= _LONGEST_CALLS else None
        return [(str(call["function"]["name"]), call["function"]["arguments"]) for call in calls]
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        return None


def _arguments(value: Any) -> str:
    """Return arguments in one spelling: objects as JSON whose names are sorted, and what cannot be read as it is."""
    for _ in range(2):  # some encode them twice
        if isinstance(value, str) and (parsed := _loads(value)) is not None:
            value = parsed
    if isinstance(value, dict) and [*value] == [_BROKEN]:
        value = value[_BROKEN]
    if isinstance(value, str):
        return value.strip()
    try:
        return json.dumps(_same_numbers(value), sort_keys=True, default=repr)
    except (RecursionError, TypeError, ValueError):
        return "unreadable"


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _same_numbers(value: Any) -> Any:
    """Return a value in which a number has one spelling: JSON has no integers of its own."""
    if isinstance(value, dict):
        return {str(name): _same_numbers(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_same_numbers(one) for one in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT_INTEGERS:
        return int(value)
    return value
