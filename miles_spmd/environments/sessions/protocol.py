"""What the APIs of a session have in common: requests that are sampled, responses, and errors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Self, TypeVar

import msgspec

MODEL = "policy"
MAX_CHOICES, MAX_STOPS = 64, 16
CONTEXT_FULL, ENDED = "context_length_exceeded", "session_not_found"  # codes of errors
# Fields that change what is sampled, which the run's settings decide, with the value by which they change nothing.
DISTRIBUTION: dict[str, Any] = {
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "min_p": 0,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    # of other servers, SGLang's and vLLM's
    "repetition_penalty": 1,
    "min_tokens": 0,
    "ignore_eos": False,
    "stop_token_ids": [],
    "bad_words": [],
    "allowed_token_ids": None,
    "chat_template_kwargs": {},
}
# by which other servers are asked for a grammar which other servers are asked for a grammar
GRAMMARS = (
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"),
    *("json_schema", "regex", "ebnf"),
)
DONE = b"data: [DONE]\n\n"  # the last event of a stream
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


class Choice(msgspec.Struct, frozen=True):
    """One of the messages of a response. ``tokens`` are those that were sampled, with their log-probs if requested."""

    message: dict[str, Any]
    finish_reason: str
    tokens: list[int]
    log_probs: list[float]
    texts: list[str]  # of the tokens, each by itself, where log-probs are requested
    weight_versions: list[tuple[int, int]] = []  # that sampled the tokens, where these are told


class Response(msgspec.Struct, frozen=True):
    key: str  # of the request
    prompt: list[int]
    choices: list[Choice]

    @property
    def version(self) -> int | None:
        """Of the weights that sampled the last token of all choices; None where it is not told."""
        return max((choice.weight_versions[-1][0] for choice in self.choices if choice.weight_versions), default=None)

    @property
    def fingerprint(self) -> dict[str, str]:
        """What a body has of the weights, by OpenAI's name for what a response depends on beside its request."""
        return {} if self.version is None else {"system_fingerprint": f"weights-{self.version}"}


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class SampledRequest(msgspec.Struct, kw_only=True):
    """What requests of several APIs have in common. ``None`` is the same as a field that is left out; further fields
    have no effect."""

    model: str = MODEL
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logprobs: int | bool | None = None
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
    repetition_penalty: Any = None
    min_tokens: Any = None
    ignore_eos: Any = None
    stop_token_ids: Any = None
    bad_words: Any = None
    allowed_token_ids: Any = None
    chat_template_kwargs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    structured_outputs: Any = None
    json_schema: Any = None
    regex: Any = None
    ebnf: Any = None

    def asked(self, conversation: Callable[[str], list[dict[str, Any]] | None]) -> Self:
        """Return what the session is asked for. ``conversation`` returns the messages up to a response, its own one
        included, by the response's key; None where the session has no such response."""
        return self

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def limit(self) -> int | None:
        """Number of tokens that may be sampled; None: as many as fit."""
        raise NotImplementedError

    @property
    def asks_log_probs(self) -> bool:
        return bool(self.logprobs)

    @property
    def without_effect(self) -> list[str]:
        """The fields that were given, and that the run decides in their place."""
        return [name for name in DISTRIBUTION if getattr(self, name) is not None]

    @property
    def counts_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options is not None and self.stream_options.include_usage)

    @property
    def key(self) -> str:
        """A digest of all that decides the response: equal for a request that a client repeats."""
        asked = msgspec.structs.replace(self, model="", stream=None, stream_options=None, return_token_ids=None)
        return hashlib.blake2b(msgspec.json.encode(asked), digest_size=12).hexdigest()

    def check(self) -> None:
        """Raise RequestError for what cannot be served."""
        if not 1 <= self.choices <= MAX_CHOICES:
            raise RequestError(400, f"n = {self.n} is not between 1 and {MAX_CHOICES}", param="n")
        if self.limit is not None and self.limit < 1:
            raise RequestError(400, f"max_tokens = {self.limit} is less than 1", param="max_tokens")
        check_seed(self.seed)
        if len(self.stops) > MAX_STOPS or not all(self.stops):
            raise RequestError(400, f"stop has an empty string, or more than {MAX_STOPS}", param="stop")
        if grammar := next((name for name in GRAMMARS if getattr(self, name) is not None), None):
            raise no_grammar(grammar)

    def tokens_of(self, choice: Choice) -> dict[str, Any]:
        """Return what a choice has of its tokens."""
        versions = {"weight_versions": choice.weight_versions} if choice.weight_versions else {}
        return {"token_ids": choice.tokens, **versions} if self.return_token_ids else {}


def check_seed(seed: int | None) -> None:
    """Raises RequestError."""
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise RequestError(400, f"seed = {seed} does not fit into 64 bits", param="seed")


def no_grammar(name: str) -> RequestError:
    return RequestError(
        400,
        f"{name} is not supported: a grammar would change the distribution that is sampled from, and the log-probs "
        "that are trained on would be those of another one; ask for the format in the prompt",
        param=name,
    )


def read_json(body: bytes, kind: type[T]) -> T:
    """Raises RequestError for what is not a request of this ``kind``."""
    try:
        return msgspec.json.decode(body, type=kind)
    except RecursionError:
        raise RequestError(400, "the JSON of the body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(400, f"the body is not a request of this API: {error}") from None


def event(body: dict[str, Any], kind: str = "") -> bytes:
    """Return an event of a stream."""
    return (f"event: {kind}\n".encode() if kind else b"") + b"data: " + msgspec.json.encode(body) + b"\n\n"


def usage(response: Response) -> dict[str, int]:
    prompt, sampled = len(response.prompt), sum(len(choice.tokens) for choice in response.choices)
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}
