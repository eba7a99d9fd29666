"""Conversations: validation, and the parts of their text that the assistant wrote."""

from __future__ import annotations

from functools import partial
from typing import Any

from miles_spmd.data.template import ChatTemplate, Conversation, Message, Span, TemplateError
from miles_spmd.data.tokenizer import Segment, Tokenizer

_SAID_ELSEWHERE = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def check_messages(value: Any) -> list[Message]:
    """Return a conversation as it is: a template may tell a field that is null from one that is missing.

    Contents are strings or lists of text parts; the assistant's may be null or missing beside tool calls or reasoning.
    Raises TypeError.
    """
    if not isinstance(value, list) or not value:
        raise TypeError("expected a non-empty list of messages")
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise TypeError(f"message {i} is {type(message).__name__} instead of an object")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise TypeError(f"message {i} has no string 'role'")
        if message.get("weight") not in (None, 0, 1):
            raise TypeError(f"message {i} ({role}) has the weight {message['weight']!r}; it can be 0 or 1")
        if isinstance(content, list):
            for part in content:
                _check_part(part, f"message {i} ({role})")
        elif not isinstance(content, str) and (content is not None or not any(map(message.get, _SAID_ELSEWHERE))):
            raise TypeError(f"message {i} ({role}) has no string 'content'")
    return value


def _check_part(part: Any, where: str) -> None:
    if not isinstance(part, str | dict):
        raise TypeError(f"{where} has a content part of type {type(part).__name__} instead of an object")
    if isinstance(part, dict) and not (part.get("type", "text") == "text" and isinstance(part.get("text"), str)):
        raise TypeError(f"{where} has a content part of type {part.get('type')!r}; only text is supported")


def has_content(message: Message) -> bool:
    """Whether a message contains more than white space, tool calls and reasoning included."""
    content = message.get("content") or ""
    parts = content if isinstance(content, list) else [content]
    texts = [part if isinstance(part, str) else part["text"] for part in parts]
    return bool("".join(texts).strip()) or any(map(message.get, _SAID_ELSEWHERE))


def assistant_segments(
    tokenizer: Tokenizer, conversation: Conversation | list[Message], since: int = 0
) -> list[Segment]:
    """Render a conversation and split it into consecutive texts; True marks what the assistant wrote in its messages
    from number ``since`` on, which is trained unless a message has the ``weight`` 0.

    The ranges come from the template's ``{% generation %}`` marks, or else from the text that each assistant message
    adds to the rendering of the messages before it. An assistant's text ends with the end-of-sequence token if the
    template writes one, so that the trained text is what an engine would generate. Raises TemplateError.
    """
    template = tokenizer.chat_template
    if not isinstance(conversation, Conversation):
        conversation = Conversation(conversation)
    text, spans = template.render(conversation, add_generation_prompt=False)
    trained = [i for i, message in enumerate(conversation.messages) if i >= since and _is_trained(message)]
    if spans is None:
        spans = _spans_by_prefix(template, conversation, trained, text, tokenizer.special_tokens.get("eos_token"))
    elif len(trained) < sum(message["role"] == "assistant" for message in conversation.messages):
        count = partial(_count_spans, template, conversation)
        spans = [span for i in trained for span in spans[count(i) : count(i + 1)]]
    if not trained:
        raise TemplateError("every message of the assistant has the weight 0, so that nothing is trained")
    if not any(start < end for start, end in spans):
        raise TemplateError("the chat template renders no assistant text")
    segments = []
    end = 0
    for span_start, span_end in spans:
        segments += [(text[end:span_start], False), (text[span_start:span_end], True)]
        end = span_end
    segments.append((text[end:], False))
    return [(piece, trained) for piece, trained in segments if piece]


def _is_trained(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def _count_spans(template: ChatTemplate, conversation: Conversation, messages: int) -> int:
    """Return how many spans a template with marks has in the first messages of a conversation."""
    if not any(message["role"] == "assistant" for message in conversation.messages[:messages]):
        return 0  # some templates refuse a conversation that has no more than this
    return len(template.render(conversation.first(messages), add_generation_prompt=False)[1] or ())


def _spans_by_prefix(
    template: ChatTemplate, conversation: Conversation, trained: list[int], text: str, eos: str | None
) -> list[Span]:
    spans = []
    for i in trained:
        before, _ = template.render(conversation.first(i), add_generation_prompt=True)
        through, _ = template.render(conversation.first(i + 1), add_generation_prompt=False)
        if not (text.startswith(through) and through.startswith(before)):
            raise TemplateError(
                f"the chat template writes assistant message {i} differently at generation time or once later messages "
                f"follow: mark the assistant's text in the template with {{% generation %}} ... {{% endgeneration %}}, "
                f"or keep one assistant message per row"
            )
        end = through.rfind(eos, len(before)) if eos else -1
        spans.append((len(before), len(through) if end < 0 else end + len(eos or "")))
    return spans
