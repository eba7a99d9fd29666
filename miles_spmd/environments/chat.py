"""A conversation in messages and in tokens, side by side, of which the tokens are the truth.

What the policy samples stays as it is: it is never rendered or tokenized again, even where a template would leave out
its reasoning or write its calls differently in a longer conversation. What others say is appended as the text that the
template writes for it behind the assistant's last message, tokenized alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from miles_spmd.environments.calls import Call, CallParser, Message, detect_reasoning
from miles_spmd.environments.continuation import Continuation, Render
from miles_spmd.environments.detection import detect_format
from miles_spmd.environments.tool_schemas import Schema
from miles_spmd.plugins.environment import Completion, Context
from miles_spmd.types.sample import Prompt
from miles_spmd.types.trajectory import FinishReason, Segment, Trajectory

AUTO = "auto"
_UNUSED = "hermes"  # the format of calls in a conversation without tools
_MOST_TEMPLATES = 256
_PROBE = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "?"},
]


class Reply(msgspec.Struct, frozen=True):
    """What the policy said in one turn."""

    message: Message
    completion: Completion

    @property
    def content(self) -> str:
        """Its text without reasoning, calls and the token that ended it."""
        return self.message.content

    @property
    def calls(self) -> tuple[Call, ...]:
        return self.message.calls

    @property
    def complete(self) -> bool:
        """Whether the policy ended it; otherwise a limit or the run did."""
        return self.completion.finish_reason is FinishReason.STOP


class Chat:
    """A conversation that begins with a prompt. ``trajectory`` is what it has come to; its ``messages`` grow along.

    ``tools`` are the schemas that the policy sees; None: those with which the prompt was rendered, and calls are not
    read. ``call_format`` and ``reasoning_format`` are SGLang's names, or found by what the chat template writes.
    ``role`` is that of the trajectory.
    """

    def __init__(
        self,
        context: Context,
        prompt: Prompt,
        *,
        tools: Sequence[Schema] | None = None,
        call_format: str = AUTO,
        reasoning_format: str = AUTO,
        role: str = "",
    ) -> None:
        """Raises ValueError where the prompt is not a conversation, a format is unknown, or the chat template
        cannot continue conversations."""
        messages = prompt.metadata.get("messages")
        if not messages:
            raise ValueError(
                f"prompt {prompt.uid} is plain text; a conversation requires messages in data.input_key, or "
                "data.apply_chat_template = true"
            )
        self._context, self._tools = context, tools or ()
        template = _template(context.render, self._tools, call_format, reasoning_format)
        self._continuation, self._parser = template.continuation, template.parser
        self._prompt, tokens = prompt.text, prompt.tokens
        if tools is not None:
            self._prompt = context.render(messages, tools=tools)
            tokens = tokens if self._prompt == prompt.text else context.encode(self._prompt, at_start=True)
        self.trajectory: Trajectory = context.begin(tokens, role=role)
        self.trajectory.messages = list(messages)
        self._replied = False  # and nothing was added since
        self._calls: tuple[Call, ...] = ()  # of the last reply
        self._ended_by: str | None = None  # the special token that ended it
        self._count = 0  # of all calls
        self._is_special: dict[int, bool] = {}

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as OpenAI's API has it, the prompt's messages first."""
        return self.trajectory.messages

    async def respond(self, *, max_new_tokens: int | None = None, stop: Sequence[str] = ()) -> Reply:
        """Let the policy say something. Where nothing fits into the context any more, it is empty and not complete."""
        completion = await self._context.complete(self.trajectory, max_new_tokens=max_new_tokens, stop=stop)
        text, self._ended_by, self._replied = self._context.decode(completion.tokens), None, True
        last = completion.tokens[-1:]
        if completion.finish_reason is FinishReason.STOP and last and self._special(last[0]):
            self._ended_by = self._context.decode(last)
            text = text.removesuffix(self._ended_by)
        message = self._parser.parse(text, self._prompt, self._count)
        self._calls, self._count = message.calls, self._count + len(message.calls)
        self.messages.append(message.to_chat())
        return Reply(message, completion)

    def add(self, messages: Sequence[dict[str, Any]]) -> bool:
        """Append all messages that come before the policy's next one, and what begins that one: the results of the
        tools that it called, or a user's. Return False, and append nothing, where they do not fit into the context.

        Contents are strings, in which special tokens are text. Raises ValueError where the template refuses them, and
        where the policy has said nothing since the last messages: a template may write one text around all of them.
        """
        if not self._replied:
            raise ValueError("Chat.add follows Chat.respond; give all messages between two of the policy to one call")
        if not messages or not all(isinstance(message.get("content"), str) for message in messages):
            raise ValueError("Chat.add takes a list of messages whose contents are strings")
        suffix = self._continuation.suffix(self._context.render, self._calls, messages)
        if self._ended_by is not None:
            suffix = suffix.behind(self._ended_by)
        tokens = self._context.encode(suffix.text, literal=suffix.literal)
        if len(tokens) >= self._context.room(self.trajectory):
            return False
        self.trajectory.append(Segment(tokens, sampled=False))
        self.messages.extend(messages)
        self._prompt, self._replied = suffix.text, False
        return True

    def _special(self, token: int) -> bool:
        """Whether a token is special: its text is this token in templates, and others in what people write."""
        if token not in self._is_special:
            text = self._context.decode([token])
            as_text = self._context.encode(text, literal=[(0, len(text))])
            self._is_special[token] = as_text != [token] == self._context.encode(text)
        return self._is_special[token]


class _Template(NamedTuple):
    """What was found out about a chat template, with one set of tools."""

    continuation: Continuation
    parser: CallParser


_templates: dict[tuple[Any, ...], _Template] = {}


def _template(render: Render, tools: Sequence[Schema], calls: str, reasoning: str) -> _Template:
    """Examine a chat template; one that writes a probe as an earlier one did is the same."""
    probe = render(_PROBE, tools=tools)
    key = probe, calls, reasoning, msgspec.json.encode(tools)
    if key not in _templates:
        if len(_templates) >= _MOST_TEMPLATES:  # where every row has tools of its own
            _templates.clear()
        if calls == AUTO:
            calls = detect_format(render) if tools else _UNUSED
        reasoning = detect_reasoning(probe) if reasoning == AUTO else reasoning
        _templates[key] = _Template(Continuation(render, tools), CallParser(calls, tools, reasoning))
    return _templates[key]
