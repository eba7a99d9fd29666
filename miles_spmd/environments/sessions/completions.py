"""Requests and responses of OpenAI's completions API: a text that the policy continues
(https://platform.openai.com/docs/api-reference/completions)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from miles_spmd.environments.sessions.protocol import (
    DONE,
    Choice,
    RequestError,
    Response,
    SampledRequest,
    event,
    read_json,
    usage,
)

_LIMIT = 16  # tokens, as OpenAI has it where a request names none


class CompletionRequest(SampledRequest, kw_only=True):
    """``prompt`` may be a list with one text, or one of tokens."""

    prompt: str | list[str | int]
    max_tokens: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    @property
    def text(self) -> str:
        """The prompt; "" where there is not exactly one text."""
        texts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return texts[0] if len(texts) == 1 and isinstance(texts[0], str) else ""

    @property
    def tokens(self) -> list[int]:
        """The prompt; none where it is text."""
        tokens = [] if isinstance(self.prompt, str) else [token for token in self.prompt if isinstance(token, int)]
        return tokens if len(tokens) == len(self.prompt) else []

    @property
    def limit(self) -> int:
        return _LIMIT if self.max_tokens is None else self.max_tokens

    @property
    def asks_log_probs(self) -> bool:
        # the number is that of further tokens at each place: with 0 there is the sampled one alone
        return self.logprobs is not None and self.logprobs is not False

    def check(self) -> None:
        super().check()
        if not (self.text or self.tokens):
            raise RequestError(400, "prompt is empty, or several texts; send a request for each", param="prompt")
        if self.echo or self.suffix or self.best_of not in (None, self.choices):
            raise RequestError(400, "echo, suffix and best_of are not supported")
        if self.logprobs is not None and self.logprobs > 1:
            raise RequestError(400, "only the sampled token has a log-prob; send logprobs = 1", param="logprobs")


def decode(body: bytes) -> CompletionRequest:
    """Raises RequestError."""
    request = read_json(body, CompletionRequest)
    request.check()
    return request


def whole(request: CompletionRequest, response: Response) -> dict[str, Any]:
    """Return the body of a response that is not streamed."""
    choices = [_choice(request, number, choice) for number, choice in enumerate(response.choices)]
    body = _head(request, response) | {"choices": choices, "usage": usage(response)}
    return body | ({"prompt_token_ids": response.prompt} if request.return_token_ids else {})


def events(request: CompletionRequest, response: Response) -> Iterator[bytes]:
    """Yield the events of a streamed response, one for each choice."""
    for number, choice in enumerate(response.choices):
        yield event(_head(request, response) | {"choices": [_choice(request, number, choice)]})
    if request.counts_usage:
        yield event(_head(request, response) | {"choices": [], "usage": usage(response)})
    yield DONE


def _head(request: CompletionRequest, response: Response) -> dict[str, Any]:
    head = {"id": f"cmpl-{response.key}", "object": "text_completion", "created": 0, "model": request.model}
    return head | response.fingerprint


def _choice(request: CompletionRequest, number: int, choice: Choice) -> dict[str, Any]:
    log_probs = None
    if request.asks_log_probs:
        places = itertools.accumulate((len(text) for text in choice.texts[:-1]), initial=0)
        log_probs = {
            "tokens": choice.texts,
            "token_logprobs": choice.log_probs,
            "top_logprobs": None,
            "text_offset": list(places),
        }
    fields = {"index": number, "text": choice.message["content"], "logprobs": log_probs}
    return fields | {"finish_reason": choice.finish_reason} | request.tokens_of(choice)
