"""A conversation in messages and in tokens, side by side, of which the tokens are the truth.

What the policy samples stays as it is: it is never rendered or tokenized again, even where a template would leave out
its reasoning or write its calls differently in a longer conversation. What others say is appended as the text that the
template writes for it behind the assistant's last message, tokenized alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from miles_spmd.environments.calls import Call, Message
from miles_spmd.environments.dialect import AUTO, Dialect, Said
from miles_spmd.environments.tool_schemas import Schema
from miles_spmd.plugins.environment import Completion, Context
from miles_spmd.types.sample import Prompt
from miles_spmd.types.trajectory import FinishReason, Segment, Trajectory


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
        self._dialect = Dialect(context, self._tools, call_format=call_format, reasoning_format=reasoning_format)
        _ = self._dialect.continuation  # or the error that the template has none
        self._prompt, tokens = prompt.text, prompt.tokens
        if tools is not None:
            self._prompt = context.render(messages, tools=tools)
            tokens = tokens if self._prompt == prompt.text else context.encode(self._prompt, at_start=True)
        self.trajectory: Trajectory = context.begin(tokens, role=role)
        self.trajectory.messages = list(messages)
        self._said: Said | None = None  # in the last reply, unless something was added since
        self._count = 0  # of all calls

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as OpenAI's API has it, the prompt's messages first."""
        return self.trajectory.messages

    async def respond(self, *, max_new_tokens: int | None = None, stop: Sequence[str] = ()) -> Reply:
        """Let the policy say something. Where nothing fits into the context any more, it is empty and not complete."""
        completion = await self._context.complete(self.trajectory, max_new_tokens=max_new_tokens, stop=stop)
        said = self._said = self._dialect.read(completion, self._prompt, self._count)
        self._count += len(said.message.calls)
        self.messages.append(said.message.to_chat())
        return Reply(said.message, completion)

    def add(self, messages: Sequence[dict[str, Any]]) -> bool:
        """Append all messages that come before the policy's next one, and what begins that one: the results of the
        tools that it called, or a user's. Return False, and append nothing, where they do not fit into the context.

        Contents are strings, in which special tokens are text. Raises ValueError where the template refuses them, and
        where the policy has said nothing since the last messages: a template may write one text around all of them.
        """
        if self._said is None:
            raise ValueError("Chat.add follows Chat.respond; give all messages between two of the policy to one call")
        if not messages or not all(isinstance(message.get("content"), str) for message in messages):
            raise ValueError("Chat.add takes a list of messages whose contents are strings")
        written = self._dialect.continued(self._said, messages)
        if len(written.tokens) >= self._context.room(self.trajectory):
            return False
        self.trajectory.append(Segment(written.tokens, sampled=False))
        self.messages.extend(messages)
        self._prompt, self._said = written.text, None
        return True
