"""How conversations are written in tokens: by the chat template of a checkpoint, with one set of tools.

What the policy samples stays as it is. What others say behind it is appended as the text that the template writes for
it behind the assistant's last message, tokenized alone, with special tokens in it as text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from miles_spmd.environments.calls import CallParser, Message, detect_reasoning
from miles_spmd.environments.continuation import Continuation, ContinuationError, Render, with_marks, without_marks
from miles_spmd.environments.detection import detect_format
from miles_spmd.environments.tool_schemas import Schema
from miles_spmd.plugins.environment import Completion, Context
from miles_spmd.types.trajectory import FinishReason, Trajectory

AUTO = "auto"
_UNUSED = "hermes"  # the format of calls in a conversation without tools
_MOST_TEMPLATES = 256
_FIRST_PART = 2**16  # characters that are encoded in any case, which takes at most a tenth of a second
_CUT_TOKENS = 64  # at the end of a part, which the rest of the text may join to fewer
_PROBE = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "?"},
]


class Written(NamedTuple):
    """What the policy gets before its next message."""

    text: str
    tokens: list[int]


class Said(NamedTuple):
    """What the policy said: a view of the tokens that it sampled."""

    message: Message
    ended_by: str | None  # the special token that ended it
    stopped_by: str = ""  # the stop string that ended it, which the message is without


class TooLongError(ValueError):
    """A text that does not fit into the context, whatever stands before it."""


class Dialect:
    """``call_format`` and ``reasoning_format`` are SGLang's names, or found by what the chat template writes."""

    def __init__(
        self,
        context: Context,
        tools: Sequence[Schema] = (),
        *,
        call_format: str = AUTO,
        reasoning_format: str = AUTO,
    ) -> None:
        """Raises ValueError where a format is unknown, or none can be found."""
        self._context, self._tools = context, tools
        self._template = _template(context.render, tools, call_format, reasoning_format)

    @property
    def continuation(self) -> Continuation:
        """Raises ContinuationError for a template with which no conversation can be continued."""
        if isinstance(self._template.continuation, ContinuationError):
            raise self._template.continuation
        return self._template.continuation

    def read(
        self,
        completion: Completion,
        prompt: str,
        first_call: int,
        *,
        stop: Sequence[str] = (),
        reads_calls: bool = True,
    ) -> Said:
        """Read what the policy sampled behind ``prompt``, of which the end is enough. Calls are numbered from
        ``first_call`` on. ``stop``: strings that end the message, which is without them. ``reads_calls``: otherwise
        they are content."""
        text, ended_by, stopped_by = end(self._context, completion, stop)
        parser = self._template.parser if reads_calls else self._template.parser.without_calls()
        return Said(parser.parse(text, prompt, first_call), ended_by, stopped_by)

    def begun(self, messages: Sequence[dict[str, Any]]) -> Written:
        """Return the tokens of a whole conversation, and to begin the next message. Contents are strings, and special
        tokens in those of others than the assistant are text. Raises ValueError where the template refuses them, and
        TooLongError."""
        text = self._render(messages)
        refuse_too_long(self._context, text)
        others = [message for message in messages if message["role"] != "assistant"]
        if not any(self._spells_special(message["content"]) for message in others):
            return Written(text, self._context.encode(text, at_start=True))
        for strips in (False, True):
            contents = [one["content"].strip() if strips else one["content"] for one in others]
            mark, marked = with_marks(others, contents)
            rest = iter(marked)
            whole = [one if one["role"] == "assistant" else next(rest) for one in messages]
            try:
                unmarked, literal = without_marks(self._render(whole), mark, len(marked))
            except ContinuationError:
                continue
            if unmarked == text:
                return Written(text, self._context.encode(text, literal=literal, at_start=True))
        raise ValueError(
            "a message has the text of a special token, and the chat template does not write its content as it is"
        )

    def _render(self, messages: Sequence[dict[str, Any]]) -> str:
        """Raises ValueError."""
        try:
            return self._context.render(messages, tools=self._tools)
        except ValueError:  # some templates write arguments as text, others as an object
            return self._context.render([_with_text_arguments(one) for one in messages], tools=self._tools)

    def trims(self, role: str) -> bool:
        """Whether the template leaves out the white space around contents of messages of ``role``."""
        continuation = self._template.continuation
        return isinstance(continuation, Continuation) and continuation.trims(self._context.render, role)

    def continued(self, said: Said, messages: Sequence[dict[str, Any]]) -> Written:
        """Return what follows the tokens of ``said`` for the messages behind it, and to begin the next one. Contents
        are strings. Raises ContinuationError."""
        suffix = self.continuation.suffix(self._context.render, said.message.calls, messages)
        if said.ended_by is not None:
            suffix = suffix.behind(said.ended_by)
        return Written(suffix.text, self._context.encode(suffix.text, literal=suffix.literal))

    def _spells_special(self, text: str) -> bool:
        encode = self._context.encode
        return encode(text) != encode(text, literal=[(0, len(text))])


def refuse_too_long(context: Context, text: str) -> None:
    """Raise TooLongError where ``text`` has more tokens than the context. Of one that is much too long only the
    beginning is encoded: all of it could take a minute, in which the event loop serves nobody."""
    length = _FIRST_PART
    while length < len(text):
        tokens = context.encode(text[:length], at_start=True)
        if context.room(Trajectory(tokens[:-_CUT_TOKENS])) < 1:
            raise TooLongError(f"{len(text)} characters do not fit into the context")
        length *= 2


def end(context: Context, completion: Completion, stop: Sequence[str]) -> tuple[str, str | None, str]:
    """Return the text of a completion without what ended it, and that: a special token, or one of the strings
    ``stop``."""
    text, ended_by, last = context.decode(completion.tokens), None, completion.tokens[-1:]
    if completion.finish_reason is FinishReason.STOP and last and _is_special(context, last[0]):
        ended_by = context.decode(last)
        text = text.removesuffix(ended_by)
    place, stopped_by = min(((text.find(one), one) for one in stop if one in text), default=(len(text), ""))
    return text[:place], ended_by, stopped_by


def _is_special(context: Context, token: int) -> bool:
    """Whether a token is special: its text is this token in templates, and others in what people write."""
    text = context.decode([token])
    return context.encode(text, literal=[(0, len(text))]) != [token] == context.encode(text)


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls", ())
    written = [
        {**call, "function": {**call["function"], "arguments": _text(call["function"]["arguments"])}} for call in calls
    ]
    return {**message, "tool_calls": written} if calls else message


def _text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


class _Template(NamedTuple):
    """What was found out about a chat template, with one set of tools."""

    continuation: Continuation | ContinuationError  # which the template has in place of one
    parser: CallParser


_templates: dict[tuple[Any, ...], _Template] = {}


def _template(render: Render, tools: Sequence[Schema], calls: str, reasoning: str) -> _Template:
    """Examine a chat template; one that writes a probe as an earlier one did is the same."""
    probe = render(_PROBE, tools=tools)
    key = probe, calls, reasoning, msgspec.json.encode(tools)
    if key in _templates:
        return _templates[key]
    if calls == AUTO:
        calls = detect_format(render) if tools else _UNUSED
    parser = CallParser(calls, tools, detect_reasoning(probe) if reasoning == AUTO else reasoning)
    try:
        found = _Template(Continuation(render, tools), parser)
    except ContinuationError as error:
        return _Template(error, parser)
    if len(_templates) >= _MOST_TEMPLATES:  # where every row has tools of its own
        _templates.clear()
    _templates[key] = found
    return found
