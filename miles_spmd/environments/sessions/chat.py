"""Requests and responses of OpenAI's chat API, as far as a session serves them
(https://platform.openai.com/docs/api-reference/chat)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from miles_spmd.environments.sessions.protocol import (
    DONE,
    Choice,
    RequestError,
    Response,
    SampledRequest,
    event,
    no_grammar,
    read_json,
    usage,
)

_TEXT_PARTS = ("text", "input_text", "output_text", "reasoning_text", "refusal")


class FunctionCall(msgspec.Struct):
    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(msgspec.Struct):
    function: FunctionCall
    id: str | None = None


class Part(msgspec.Struct):
    type: str
    text: str = ""
    refusal: str = ""


class ChatMessage(msgspec.Struct):
    role: str
    content: str | list[Part] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @property
    def text(self) -> str:
        """Raises RequestError for content other than text."""
        if not isinstance(self.content, list):
            return self.content or ""
        if other := next((part.type for part in self.content if part.type not in _TEXT_PARTS), None):
            raise RequestError(400, f"content of the type {other!r} is not supported; send text", param="messages")
        return "".join(part.text or part.refusal for part in self.content)


class ChatRequest(SampledRequest, kw_only=True):
    messages: list[ChatMessage]
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None

    @property
    def limit(self) -> int | None:
        limits = [limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None]
        return min(limits, default=None)

    @property
    def without_effect(self) -> list[str]:
        demanded = ["tool_choice"] if self.tool_choice not in (None, "auto", "none") else []
        return [*super().without_effect, *demanded]

    def check(self) -> None:
        super().check()
        if not self.messages:
            raise RequestError(400, "messages is empty", param="messages")
        if self.top_logprobs:
            raise RequestError(
                400, "only the sampled token has a log-prob; leave out top_logprobs", param="top_logprobs"
            )
        if self.response_format and self.response_format.get("type") != "text":
            raise no_grammar("response_format")
        for tool in self.tools or ():
            function = tool.get("function")
            name = function.get("name") if isinstance(function, dict) else None
            if tool.get("type") != "function" or not (isinstance(name, str) and name):
                raise RequestError(400, "a tool is not a function with a name", param="tools")


def decode(body: bytes) -> ChatRequest:
    """Raises RequestError."""
    request = read_json(body, ChatRequest)
    request.check()
    return request


def whole(request: ChatRequest, response: Response) -> dict[str, Any]:
    """Return the body of a response that is not streamed."""
    choices = [
        {"index": i, "message": choice.message, **_end(request, choice)} for i, choice in enumerate(response.choices)
    ]
    body = _head(request, response, "chat.completion") | {"choices": choices, "usage": usage(response)}
    return body | ({"prompt_token_ids": response.prompt} if request.return_token_ids else {})


def events(request: ChatRequest, response: Response) -> Iterator[bytes]:
    """Yield the events of a streamed response. The policy's message is complete before the first one."""
    head = _head(request, response, "chat.completion.chunk")
    counts = request.counts_usage

    def chunk(choices: list[dict[str, Any]], used: Mapping[str, int] | None = None) -> bytes:
        return event(head | {"choices": choices} | ({"usage": used} if counts else {}))

    for i, choice in enumerate(response.choices):
        message, calls = choice.message, choice.message.get("tool_calls", ())
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        deltas += [{name: message[name]} for name in ("reasoning_content", "content") if message.get(name)]
        deltas += [{"tool_calls": [{"index": j, **call}]} for j, call in enumerate(calls)]
        for delta in deltas:
            yield chunk([{"index": i, "delta": delta, "logprobs": None, "finish_reason": None}])
        yield chunk([{"index": i, "delta": {}, **_end(request, choice)}])
    if counts:
        yield chunk([], usage(response))
    yield DONE


def _head(request: ChatRequest, response: Response, kind: str) -> dict[str, Any]:
    # Nothing here depends on time: an agent may act on what it gets, and runs repeat.
    head = {"id": f"chatcmpl-{response.key}", "object": kind, "created": 0, "model": request.model}
    return head | response.fingerprint


def _end(request: ChatRequest, choice: Choice) -> dict[str, Any]:
    log_probs = {"content": log_probs_of(choice), "refusal": None} if request.logprobs else None
    return {"logprobs": log_probs, "finish_reason": choice.finish_reason} | request.tokens_of(choice)


def log_probs_of(choice: Choice) -> list[dict[str, Any]]:
    return [
        {"token": text, "logprob": log_prob, "bytes": None, "top_logprobs": []}
        for text, log_prob in zip(choice.texts, choice.log_probs, strict=True)
    ]
