"""Requests and responses of OpenAI's chat API, as far as a session serves them
(https://platform.openai.com/docs/api-reference/chat)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

MAX_CHOICES, MAX_STOPS = 64, 16
MODEL = "policy"
CONTEXT_FULL, ENDED = "context_length_exceeded", "session_not_found"  # codes of errors
# Fields that change the distribution which the policy samples from: [rollout] decides that.
DISTRIBUTION = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "logit_bias")
_TEXT_PARTS = ("text", "input_text", "output_text", "reasoning_text", "refusal")
T = TypeVar("T")


class RequestError(Exception):
    """A request that is refused, with the status and the error object of OpenAI's API."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @property
    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


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


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class ChatRequest(msgspec.Struct, kw_only=True):
    """``None`` is the same as a field that is left out. Further fields have no effect."""

    messages: list[ChatMessage]
    model: str = MODEL
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    temperature: Any = None
    top_p: Any = None
    top_k: Any = None
    min_p: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def limit(self) -> int | None:
        limits = [limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None]
        return min(limits, default=None)

    @property
    def without_effect(self) -> list[str]:
        """The fields that were given, and that the run decides in their place."""
        return [name for name in DISTRIBUTION if getattr(self, name) is not None]

    @property
    def key(self) -> str:
        """A digest of all that decides the response: equal for a request that a client repeats."""
        asked = msgspec.structs.replace(self, model="", stream=None, stream_options=None, return_token_ids=None)
        return hashlib.blake2b(msgspec.json.encode(asked), digest_size=12).hexdigest()

    def check(self) -> None:
        """Raise RequestError for what cannot be served."""
        if not self.messages:
            raise RequestError(400, "messages is empty", param="messages")
        if not 1 <= self.choices <= MAX_CHOICES:
            raise RequestError(400, f"n = {self.n} is not between 1 and {MAX_CHOICES}", param="n")
        if self.limit is not None and self.limit < 1:
            raise RequestError(400, f"max_tokens = {self.limit} is less than 1", param="max_tokens")
        if len(self.stops) > MAX_STOPS or not all(self.stops):
            raise RequestError(400, f"stop has an empty string, or more than {MAX_STOPS}", param="stop")
        if self.top_logprobs:
            raise RequestError(
                400, "only the sampled token has a log-prob; leave out top_logprobs", param="top_logprobs"
            )
        if self.response_format and self.response_format.get("type") != "text":
            raise RequestError(
                400, "response_format is not supported: nothing constrains sampling", param="response_format"
            )
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


def read_json(body: bytes, kind: type[T]) -> T:
    """Raises RequestError for what is not a request of this ``kind``."""
    try:
        return msgspec.json.decode(body, type=kind)
    except RecursionError:
        raise RequestError(400, "the JSON of the body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(400, f"the body is not a request of this API: {error}") from None


class Choice(msgspec.Struct, frozen=True):
    """One of the messages of a response. ``tokens`` are those that were sampled, with their log-probs if requested."""

    message: dict[str, Any]
    finish_reason: str
    tokens: list[int]
    log_probs: list[float]
    texts: list[str]  # of the tokens, each by itself, where log-probs are requested


class Response(msgspec.Struct, frozen=True):
    key: str  # of the request
    prompt: list[int]
    choices: list[Choice]


def whole(request: ChatRequest, response: Response) -> dict[str, Any]:
    """Return the body of a response that is not streamed."""
    choices = [
        {"index": i, "message": choice.message, **_end(request, choice)} for i, choice in enumerate(response.choices)
    ]
    body = _head(request, response, "chat.completion") | {"choices": choices, "usage": usage(response)}
    return body | ({"prompt_token_ids": response.prompt} if request.return_token_ids else {})


def chunks(request: ChatRequest, response: Response) -> Iterator[dict[str, Any]]:
    """Yield the events of a streamed response. The policy's message is complete before the first one."""
    head = _head(request, response, "chat.completion.chunk")
    counts = request.stream_options is not None and request.stream_options.include_usage

    def chunk(choices: list[dict[str, Any]], used: Mapping[str, int] | None = None) -> dict[str, Any]:
        return head | {"choices": choices} | ({"usage": used} if counts else {})

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


def _head(request: ChatRequest, response: Response, kind: str) -> dict[str, Any]:
    # Nothing here depends on time: an agent may act on what it gets, and runs repeat.
    return {"id": f"chatcmpl-{response.key}", "object": kind, "created": 0, "model": request.model}


def _end(request: ChatRequest, choice: Choice) -> dict[str, Any]:
    log_probs = {"content": _log_probs(choice), "refusal": None} if request.logprobs else None
    end = {"logprobs": log_probs, "finish_reason": choice.finish_reason}
    return end | ({"token_ids": choice.tokens} if request.return_token_ids else {})


def _log_probs(choice: Choice) -> Sequence[dict[str, Any]]:
    return [
        {"token": text, "logprob": log_prob, "bytes": None, "top_logprobs": []}
        for text, log_prob in zip(choice.texts, choice.log_probs, strict=True)
    ]


def usage(response: Response) -> dict[str, int]:
    prompt, sampled = len(response.prompt), sum(len(choice.tokens) for choice in response.choices)
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}
