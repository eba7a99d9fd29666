"""What a message of the policy consists of: reasoning, content and tool calls, those included that cannot be read.

It is a view for tools, rewards and people. The tokens that were sampled stay what is trained, whatever is read here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from miles_spmd.environments import call_formats, sglang_parsers
from miles_spmd.environments.call_formats import ALIASES, Block
from miles_spmd.environments.tool_schemas import Schema
from miles_spmd.plugins.conversation import CallReader
from miles_spmd.plugins.plug_point import PlugInError, PlugPoint

UNKNOWN_NAME = "unknown"
READERS: PlugPoint[CallReader] = PlugPoint("environment.environment_kwargs: call_format", {}, CallReader)
_NAME = re.compile(
    r'"name"\s*:\s*"([\w.-]+)|<function=([\w.-]+)|name="([\w.-]+)|functions\.([\w-]+)|([A-Za-z_][\w.]*)\('
)
# Markers in a chat template or in what it writes -> the format of reasoning; the first that occurs counts.
_REASONING = {
    "<|channel|>": "gpt-oss",
    "<|channel>": "gemma4",
    "[THINK]": "mistral",
    "◁think▷": "kimi",
    "<mm:think>": "minimax-m3",
    "<|inner_prefix|>": "apertus2509",
    "<|START_THINKING|>": "cohere_command4",
}


class Call(msgspec.Struct, frozen=True):
    """A call of a tool. ``problem``, where there is one, is what makes it unreadable, and ``arguments`` is empty."""

    id: str
    name: str  # UNKNOWN_NAME where an unreadable call does not show one
    arguments: dict[str, Any] = {}
    problem: str = ""
    text: str = "{}"  # the arguments as JSON; of an unreadable call, what the policy wrote


class Message(msgspec.Struct, frozen=True):
    """One message of the policy."""

    content: str
    reasoning: str = ""
    calls: tuple[Call, ...] = ()

    def to_chat(self) -> dict[str, Any]:
        """Return it as OpenAI's API has it, with arguments as text; those of an unreadable call are its whole text."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.text}}
                for call in self.calls
            ]
        return message


class CallParser:
    """Reads messages in one format of calls and one of reasoning (``sglang_parsers`` has the names). The format of
    calls may be a user's function, too."""

    def __init__(self, format: str, schemas: Sequence[Schema], reasoning: str) -> None:
        """Raises ValueError where a format is unknown, or a user's function cannot be called."""
        self._reader = READERS.resolve(format) if ":" in format else None
        if self._reader is None:
            _check("tool calls", format, sglang_parsers.call_formats())
        _check("reasoning", reasoning, sglang_parsers.reasoning_formats())
        self.format = ALIASES.get(format, format)
        self._schemas, self._reasoning = schemas, reasoning

    def parse(self, text: str, prompt: str, first: int) -> Message:
        """Read ``text``, which the policy wrote behind ``prompt``. The calls are numbered from ``first`` on, so that
        their ids differ in a conversation and do not depend on anything else."""
        opened = prompt.rstrip().endswith(sglang_parsers.reasoning_start(self._reasoning))
        if self.format == "gpt-oss":  # calls are messages beside those with the reasoning
            rest, blocks = self._divide(text)
            reasoning, content = self._split_reasoning(rest, opened)
        else:
            reasoning, rest = self._split_reasoning(text, opened)
            if self._reader is not None and self._schemas:
                content, own = self._read_by(self._reader, rest, first)
                return Message(content.strip(), reasoning.strip(), own)
            content, blocks = self._divide(rest)
        calls: list[Call] = []
        for block in blocks:
            calls += self._read(block, first + len(calls))
        return Message(content.strip(), reasoning.strip(), tuple(calls))

    def without_calls(self) -> CallParser:
        """Return a parser that reads reasoning and content only."""
        return CallParser(self.format, (), self._reasoning)

    def _divide(self, text: str) -> tuple[str, list[Block]]:
        return call_formats.divide(self.format, self._schemas, text) if self._schemas else (text, [])

    def _read_by(self, reader: CallReader, text: str, first: int) -> tuple[str, tuple[Call, ...]]:
        """Read a message by a user's function. Raises PlugInError."""
        try:
            returned = reader(text, self._schemas)
        except PlugInError as error:
            if not isinstance(error.__cause__, ValueError):
                raise
            return "", (Call(self._id(UNKNOWN_NAME, first), UNKNOWN_NAME, problem=str(error.__cause__), text=text),)
        try:
            content, found = returned
            named = [(_encodable(name), arguments) for name, arguments in found]
            texts = [one if isinstance(one, str) else json.dumps(dict(one), ensure_ascii=False) for _, one in named]
            content = _encodable(content)
        except (TypeError, ValueError, AttributeError):
            expected = "a text, and a list with the name and the arguments of each call"
            raise READERS.returned(self.format, returned, expected) from None
        calls = []
        for number, ((name, _), one) in enumerate(zip(named, map(_encodable, texts)), first):
            try:
                calls.append(Call(self._id(name, number), name, _arguments(one), text=one))
            except ValueError as error:
                calls.append(Call(self._id(name, number), name, problem=str(error), text=one))
        return content, tuple(calls)

    def _split_reasoning(self, text: str, opened: bool) -> tuple[str, str]:
        try:
            reasoning, rest = sglang_parsers.split_reasoning(self._reasoning, text, opened)
        except Exception:  # whatever a broken text makes it raise
            return "", text
        return (reasoning, rest) if reasoning or rest else ("", text)  # gpt-oss's loses text without headers

    def _read(self, block: Block, first: int) -> list[Call]:
        try:
            found = [
                (_encodable(name), _encodable(text), _arguments(text))
                for name, text in call_formats.read(self.format, self._schemas, block)
            ]
            if not all(name for name, _, _ in found):
                raise ValueError("it has no name of a tool")
        except ValueError as error:
            shown = _NAME.search(block.text)
            name = next(filter(None, shown.groups())) if shown else UNKNOWN_NAME
            return [Call(self._id(name, first), name, problem=str(error), text=block.text)]
        return [
            Call(self._id(name, first + i), name, arguments, text=text)
            for i, (name, text, arguments) in enumerate(found)
        ]

    def _id(self, name: str, number: int) -> str:
        """Return nine letters and digits, which Mistral's templates require, or what Kimi's show to the model."""
        return f"functions.{name}:{number}" if self.format == "kimi_k2" else f"call{number:05d}"


def _arguments(text: str) -> dict[str, Any]:
    """Return the arguments of a call. Raises ValueError."""
    try:
        value = json.loads(text)
        if isinstance(value, str):  # encoded twice, as OpenAI's API has them
            value = json.loads(value)
    except ValueError as error:
        raise ValueError(f"its arguments are not valid JSON ({error})") from None
    except RecursionError:
        raise ValueError("its arguments are nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"its arguments are {_kind(value)}, not an object")
    return value


def _encodable(text: str) -> str:
    r"""Return a text without halves of surrogate pairs, which JSON can spell (``\ud83d``) and no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def detect_reasoning(*texts: str) -> str:
    """Return the format of reasoning by the marks in ``texts``, which a chat template wrote; by default that of
    ``<think>``, which leaves messages without one as they are."""
    return next((name for mark, name in _REASONING.items() if any(mark in text for text in texts)), "qwen3")


def _check(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(f"{name!r} is not a format of {what}; known: auto, {', '.join(known)}")
