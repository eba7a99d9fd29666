"""The text with which a chat template continues a conversation: what it writes behind the assistant's last message for
the messages that follow, and to begin the next one.

It is read from a dummy conversation in which a mark stands for what the model said. The real conversation is never
rendered again: templates leave out reasoning, trim texts and rewrite calls once messages follow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from miles_spmd.environments.calls import Call
from miles_spmd.environments.tool_schemas import Schema

Message = dict[str, Any]
Span = tuple[int, int]  # the first character, and the first one behind

_MARK = "Zq7"  # a text that no template writes of its own accord
_END_TOKEN, _FIRST_TOKEN = re.compile(r"<[^<>]+>\s*\Z"), re.compile(r"\s*<[^<>]+>")
_USER, _SYSTEM, _REPLY = (
    {"role": role, "content": text} for role, text in (("user", "Hi"), ("system", "Be brief."), ("assistant", "Hello."))
)


class ContinuationError(ValueError):
    """A chat template with which no conversation can be continued."""


class Render(Protocol):
    """Renders a conversation: ``Context.render``. Raises ValueError where the template refuses it."""

    def __call__(
        self, messages: Sequence[Message], *, tools: Sequence[Schema] = (), add_generation_prompt: bool = True
    ) -> str: ...


class Suffix(NamedTuple):
    """What follows the text of an assistant's message. ``literal`` are the characters that come from messages, in which
    special tokens are text. ``closing``: what it begins with to end the assistant's message, where it does."""

    text: str
    literal: tuple[Span, ...]
    closing: str

    def behind(self, end: str) -> Suffix:
        """Return what is left of it where the policy has sampled ``end``, a token that ends its message: the template's
        own one, or another one in its place."""
        if self.closing:
            cut = self.closing.rfind(end) + len(end) if end in self.closing else len(self.closing)
        else:  # in some formats it is the token that begins the next message
            start = len(self.text) - len(self.text.lstrip())
            cut = start + len(end) if self.text.startswith(end, start) else 0
        return Suffix(self.text[cut:], tuple((first - cut, last - cut) for first, last in self.literal), "")


class _Style(NamedTuple):
    """How a dummy message of the assistant is written so that the template takes it and its mark appears."""

    content: str | None
    arguments_as_text: bool = False
    with_calls: bool = True

    def message(self, calls: Sequence[Call], mark: str) -> Message:
        message: Message = {"role": "assistant", "content": self.content and self.content.replace(_MARK, mark)}
        if self.with_calls:
            arguments: Any = {"value": mark}
            arguments = json.dumps(arguments) if self.arguments_as_text else arguments
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}
                for call in calls
            ]
        return message


_TEXT = _Style(_MARK, with_calls=False)
_CALL_STYLES = (_Style(""), _Style("", True), _Style(None), _Style(None, True), _Style(_MARK), _TEXT)


class _Kind(NamedTuple):
    """What was found out about continuing with results of tools, or with a user's message."""

    style: _Style
    end: str  # what the template writes behind the text of a conversation's last message
    trims: bool  # white space around the content of the messages that follow


class Continuation:
    """The suffixes of one chat template with one set of tools."""

    def __init__(self, render: Render, tools: Sequence[Schema] = ()) -> None:
        """Raises ContinuationError unless results of tools can follow calls; without tools, unless users' messages can
        follow."""
        self._tools, self._kinds = tools, dict[str, _Kind]()
        self._kind(render, "tool" if tools else "user")

    def suffix(self, render: Render, calls: Sequence[Call], messages: Sequence[Message]) -> Suffix:
        """Return the text for ``messages`` (which may be none) that follow an assistant's message with ``calls``, as
        far as and with what begins the next one. Contents are strings. Raises ContinuationError."""
        role = "tool" if messages and messages[0]["role"] == "tool" else "user"
        kind = self._kind(render, role)
        contents = [message["content"].strip() if kind.trims else message["content"] for message in messages]
        mark, marked = with_marks(messages, contents)
        reason = "it refuses these messages"
        for some in (calls, calls[:1]):  # some templates take, or write, one call in a message only
            assistant = kind.style.message(some, f"{mark}A")
            try:
                said = render([_USER, assistant], tools=self._tools, add_generation_prompt=False)
                text = render([_USER, assistant, *marked], tools=self._tools)
            except ValueError as error:
                reason = f"it refuses these messages ({error})"
                continue
            divided = _divide(said, text, f"{mark}A", kind.end)
            if divided is not None:
                return Suffix(*without_marks(divided[1], mark, len(messages)), divided[0])
        raise ContinuationError(self._problem(role, reason))

    def trims(self, render: Render, role: str) -> bool:
        """Whether the white space around contents of messages of ``role`` is left out."""
        try:
            return self._kind(render, "tool" if role == "tool" else "user").trims
        except ContinuationError:
            return False

    def _kind(self, render: Render, role: str) -> _Kind:
        if role not in self._kinds:
            self._kinds[role] = self._examine(render, role)
        return self._kinds[role]

    def _examine(self, render: Render, role: str) -> _Kind:
        reason = "it refuses them"
        for style in _CALL_STYLES if role == "tool" else (_TEXT,):
            assistant, message = self._turn(role, style, "call00000")
            try:
                end = render([_USER, _TEXT.message([], f"{_MARK}A")], tools=self._tools, add_generation_prompt=False)
                said = render([_USER, assistant], tools=self._tools, add_generation_prompt=False)
                text = render([_USER, assistant, message], tools=self._tools)
            except ValueError as error:
                reason = f"it refuses them ({error})"
                continue
            end, after = (one.rpartition(f"{_MARK}A")[2] for one in (end, text))
            if f"{_MARK}A" not in said or f"{_MARK}A" not in text:
                reason = "it does not write what the assistant said"
            elif f"{_MARK}B" not in after:
                reason = "it does not write their content"
            elif _divide(said, text, f"{_MARK}A", end) is None:
                reason = "it writes what the assistant said differently once they follow"
                break
            elif any(other != after for other in self._after_others(render, role, style)):
                reason = "what it writes for them depends on earlier messages"
                break
            else:
                return _Kind(style, end, f" {_MARK}B " not in after)
        raise ContinuationError(self._problem(role, reason))

    def _turn(self, role: str, style: _Style, call_id: str) -> tuple[Message, Message]:
        """Return a dummy message of the assistant, and one that follows it."""
        call = Call(call_id, self._tools[0]["function"]["name"] if self._tools else "tool")
        message = {"role": role, "content": f" {_MARK}B "}
        if role == "tool":
            message |= {"tool_call_id": call.id, "name": call.name}
        return style.message([call], f"{_MARK}A"), message

    def _after_others(self, render: Render, role: str, style: _Style) -> Iterator[str]:
        """Yield what is behind the mark in other conversations: it must be the same in all that the template takes."""
        last = self._turn(role, style, "call00000")
        before = [_USER, *self._turn(role, style, "call00001"), _REPLY] if role == "tool" else [_USER, _REPLY]
        others = [([*before, _USER, *last], self._tools), ([_SYSTEM, _USER, *last], self._tools)]
        if role == "user":
            others.append(([_USER, *last], ()))  # some templates write the tools again, before the last user's message
        for messages, tools in others:
            try:
                text = render(messages, tools=tools)
            except ValueError:
                continue
            yield text.rpartition(f"{_MARK}A")[2]

    def _problem(self, role: str, reason: str) -> str:
        what = "results of tools" if role == "tool" else "users' messages"
        return (
            f"the chat template cannot continue a conversation with {what}: {reason}. Put a template into "
            "chat_template.jinja whose text for later messages does not depend on earlier ones"
        )


def with_marks(messages: Sequence[Message], contents: Sequence[str]) -> tuple[str, list[Message]]:
    """Return messages with marks around their ``contents``, and the mark."""
    mark = _MARK
    while any(mark in content for content in contents):
        mark += "q"
    marked = [
        {**message, "content": f"{mark}{i}B{content}{mark}{i}E"}
        for i, (message, content) in enumerate(zip(messages, contents))
    ]
    return mark, marked


def _divide(said: str, continued: str, mark: str, end: str) -> tuple[str, str] | None:
    """Return what ends the assistant's message, and all that is behind its text, in a conversation that is
    ``continued`` and ends with what was ``said`` otherwise; None where it is not the same conversation.

    Behind the mark there may be the rest of a call, and then comes the ``end``, or another token in its place."""
    if mark not in said or mark not in continued:
        return None
    rest, after = said.rpartition(mark)[2], continued.rpartition(mark)[2]
    markup = rest.removesuffix(end) if rest.endswith(end) else _END_TOKEN.sub("", rest)
    if not after.startswith(markup):
        return None
    closing, after = rest.removeprefix(markup).rstrip(), after.removeprefix(markup)
    if closing and not after.startswith(closing):
        other = _FIRST_TOKEN.match(after)
        closing = other.group() if other else ""
    return closing, after


def without_marks(text: str, mark: str, count: int) -> tuple[str, tuple[Span, ...]]:
    """Return the text without the marks around contents, and where the contents then stand."""
    parts, spans, length = [], [], 0
    for i in range(count):
        before, _, text = text.partition(f"{mark}{i}B")
        content, found, text = text.partition(f"{mark}{i}E")
        if not found:
            raise ContinuationError(f"the chat template does not write the content of message {i} of those that follow")
        parts += [before, content]
        spans.append((length + len(before), length + len(before) + len(content)))
        length += len(before) + len(content)
    return "".join([*parts, text]), tuple(spans)
