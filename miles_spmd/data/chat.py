"""Conversations: validation, and the parts of their text that the assistant wrote."""

from __future__ import annotations

from typing import Any

from miles_spmd.data.tokenizer import Message, Tokenizer, TokenizerError


def check_messages(value: Any) -> list[Message]:
    """Return a conversation without the null fields that parquet adds to every message. Raises TypeError."""
    if not isinstance(value, list) or not value:
        raise TypeError("expected a non-empty list of messages")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise TypeError(f"message {i} is {type(message).__name__} instead of an object")
        message = {key: field for key, field in message.items() if field is not None}
        if not isinstance(message.get("role"), str):
            raise TypeError(f"message {i} has no string 'role'")
        if not isinstance(message.get("content", None if "tool_calls" not in message else ""), str):
            raise TypeError(f"message {i} ({message['role']}) has no string 'content'")
        messages.append(message)
    return messages


def assistant_segments(tokenizer: Tokenizer, messages: list[Message], since: int = 0) -> list[tuple[str, bool]]:
    """Render a conversation and split it into consecutive texts; True marks what the assistant wrote in its messages
    from number ``since`` on, which is trained.

    The ranges come from the template's ``{% generation %}`` marks, or else from the text that each assistant message
    adds to the rendering of the messages before it. An assistant's text ends with the end-of-sequence token if the
    template writes one, so that the trained text is what an engine would generate. Raises TokenizerError.
    """
    text, spans = tokenizer.render_with_spans(messages)
    if spans is None:
        spans = _spans_by_prefix(tokenizer, messages, since, text)
    elif since:
        _, earlier = tokenizer.render_with_spans(messages[:since])
        spans = spans[len(earlier or ()) :]
    if not spans:
        raise TokenizerError("the chat template renders no assistant text")
    segments = []
    end = 0
    for span_start, span_end in spans:
        segments += [(text[end:span_start], False), (text[span_start:span_end], True)]
        end = span_end
    segments.append((text[end:], False))
    return [(piece, trained) for piece, trained in segments if piece]


def _spans_by_prefix(tokenizer: Tokenizer, messages: list[Message], since: int, text: str) -> list[tuple[int, int]]:
    eos = tokenizer.special_tokens.get("eos_token")
    spans = []
    for i, message in enumerate(messages):
        if i < since or message["role"] != "assistant":
            continue
        before = tokenizer.render(messages[:i], add_generation_prompt=True)
        through = tokenizer.render(messages[: i + 1], add_generation_prompt=False)
        if not (text.startswith(through) and through.startswith(before)):
            raise TokenizerError(
                f"the chat template writes assistant message {i} differently at generation time or once later messages "
                f"follow: mark the assistant's text in the template with {{% generation %}} ... {{% endgeneration %}}, "
                f"or keep one assistant message per row"
            )
        end = through.rfind(eos, len(before)) if eos else -1
        spans.append((len(before), len(through) if end < 0 else end + len(eos or "")))
    return spans
