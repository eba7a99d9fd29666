"""A server of HTTP, on the loopback interface of an environment process: the sessions that are open, each behind an
address and a key of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import hmac
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from miles_spmd.environments.sessions import chat, completions, protocol, responses
from miles_spmd.environments.sessions.listener import LOOPBACK, listen, url_of
from miles_spmd.environments.sessions.protocol import ENDED, RequestError
from miles_spmd.environments.sessions.session import Asked, Session

MAX_BODY = 16 * 2**20  # bytes
MAX_UNDER_WAY = 128 * 2**20  # bytes of the bodies of a session whose requests are under way
MAX_HEADERS = 32 * 2**10  # bytes
MAX_CONNECTIONS = 4096
HEADERS_TIMEOUT = 20.0  # seconds that a client has for the headers of a request
BODY_TIMEOUT = 60.0  # and for its body
WRITE_TIMEOUT = 60.0  # seconds for which a client may keep a response from being written
IDLE_TIMEOUT = 60.0  # seconds that a connection stays open behind a response
Handler = Callable[[Request], Awaitable[Response]]


class Endpoint:
    """Starts with the first session, or with :meth:`start`, and ends with its event loop. ``url`` is its address
    then."""

    def __init__(self, host: str = LOOPBACK, port: int = 0) -> None:
        """``port`` 0: a free one."""
        self.url = ""
        self._place = host, port
        self._sessions: dict[str, Session] = {}
        self._under_way = Counter[str]()  # bytes of bodies by the names of sessions
        self._server: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def open(self, session: Session) -> AsyncIterator[Session]:
        """Let a client reach ``session`` at its ``base_url``, with its ``api_key``. Raises what has failed in it."""
        if self._server is None:
            self.start()
        name = self._add(session)
        try:
            yield session
        finally:
            del self._sessions[name]
            await session.close()
            if session.failure is not None:  # in place of what the client has made of it
                raise session.failure

    def _add(self, session: Session) -> str:
        """Give ``session`` its address and its key, and return its name."""
        name = secrets.token_hex(8)
        session.base_url, session.api_key = f"{self.url}/session/{name}/v1", make_key()
        self._sessions[name] = session
        return name

    def start(self) -> None:
        """Raises OSError where the place to listen at cannot be had."""
        listener = listen(*self._place)
        self.url = url_of(listener)
        config = uvicorn.Config(
            self._application(),
            http=_Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=int(IDLE_TIMEOUT),
            h11_max_incomplete_event_size=MAX_HEADERS,
        )
        serve = _Server(config).serve([listener])
        # outside of the episode that is first: its end would be the server's
        self._server = contextvars.Context().run(asyncio.ensure_future, serve)

    def _routes(self) -> list[Route]:
        return api_routes("/session/{name}/v1", self._sample, self._models)

    def _application(self) -> Starlette:
        handlers = {RequestError: _refuse, HTTPException: _refuse_path}
        application = Starlette(routes=self._routes(), exception_handlers=handlers)  # type: ignore[arg-type]
        application.router.redirect_slashes = False
        return application

    # --- routes ------------------------------------------------------------------------------------------------------

    async def _sample(self, api: ModuleType, http: Request) -> Response:
        """Serve a request of one of the APIs: ``chat``, ``completions`` or ``responses``."""
        session = self._session(http)
        with Body(self._under_way, http.path_params["name"]) as body:
            request = api.decode(await body.read(http))
            response = await respond(session, request.asked(session.conversation))
        return written(api, request, response)

    async def _models(self, http: Request) -> Response:
        self._session(http)
        return models()

    def _session(self, http: Request) -> Session:
        """Raises RequestError unless the request has the key of the session in its path."""
        session = self._sessions.get(http.path_params["name"])
        if session is None:
            raise RequestError(404, "this session does not exist, or has ended", ENDED)
        if not has_key(http, session.api_key):
            raise RequestError(401, "Authorization is not 'Bearer' and the api_key of this session", "invalid_api_key")
        return session


def api_routes(path: str, sample: Callable[..., Awaitable[Response]], models: Handler) -> list[Route]:
    """Return those of OpenAI's API below ``path``. ``sample`` is called with a module of an API, and a request."""
    apis = ("chat/completions", chat), ("completions", completions), ("responses", responses)
    routes = [Route(f"{path}/{name}", partial(sample, api), methods=["POST"]) for name, api in apis]
    return [*routes, Route(f"{path}/models", models, methods=["GET"])]


def make_key() -> str:
    return f"sk-{secrets.token_urlsafe(32)}"


def has_key(http: Request, key: str) -> bool:
    scheme, _, given = http.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), key.encode())


def written(api: ModuleType, request: Any, response: protocol.Response) -> Response:
    """Return what the client gets, in the form of ``api``."""
    return _stream(api.events(request, response)) if request.stream else as_json(200, api.whole(request, response))


def models() -> Response:
    model = {"id": protocol.MODEL, "object": "model", "created": 0, "owned_by": "miles_spmd"}
    return as_json(200, {"object": "list", "data": [model]})


async def respond(session: Session, request: Asked) -> protocol.Response:
    """Raises RequestError."""
    try:
        return await session.respond(request)
    except RequestError:
        raise
    except Exception as error:  # which the episode fails by
        raise RequestError(500, f"the session has failed: {type(error).__name__}", "session_failed") from error


class Body:
    """The body of a request, which counts towards those of its session until the response is there."""

    def __init__(self, under_way: Counter[str], name: str) -> None:
        self._under_way, self._name, self._size = under_way, name, 0

    def __enter__(self) -> Body:
        return self

    def __exit__(self, *_: object) -> None:
        self._under_way[self._name] -= self._size
        self._under_way += Counter()  # leaves out what is 0

    async def read(self, http: Request) -> bytes:
        """Raises RequestError for one that is too large, or comes too slowly."""
        self._check(int(http.headers.get("content-length", 0)))
        parts = list[bytes]()
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                async for part in http.stream():
                    self._size += len(part)
                    self._under_way[self._name] += len(part)
                    self._check(self._size)
                    parts.append(part)
        except TimeoutError:
            raise RequestError(408, f"the body was not complete within {BODY_TIMEOUT:g} s", "body_too_slow") from None
        except ClientDisconnect:
            raise RequestError(400, "the client has left") from None
        return b"".join(parts)

    def _check(self, size: int) -> None:
        if size > MAX_BODY:
            raise RequestError(413, f"the body has more than {MAX_BODY} bytes", "body_too_large")
        if self._under_way[self._name] > MAX_UNDER_WAY:
            raise RequestError(429, "too many bytes of this session are under way", "rate_limit_exceeded")


def _stream(events: Iterator[bytes]) -> Response:
    async def send() -> AsyncIterator[bytes]:
        for event in events:
            yield event

    return StreamingResponse(send(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def as_json(status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, "application/json")


def _refuse(http: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    # what is left of a body that was refused is not read
    return as_json(error.status, error.body, {"Connection": "close"} if error.status in (408, 413) else None)


def _refuse_path(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = f"{http.method} {http.url.path:.200} is not served; see POST BASE_URL/chat/completions"
    return as_json(error.status_code, RequestError(error.status_code, text).body)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the process."""
        yield


class _Connection(H11Protocol):
    """Ends connections whose client takes too long, which uvicorn does between requests only."""

    _clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        else:
            self._limit(HEADERS_TIMEOUT)

    def connection_lost(self, exc: Exception | None) -> None:
        self._limit(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._limit(None)
        elif self._clock is None:
            self._limit(HEADERS_TIMEOUT)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._limit(WRITE_TIMEOUT)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._limit(None)

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()  # closing would wait for a client that does not read

    def _limit(self, seconds: float | None) -> None:
        """Set the time at which the connection is ended; None: at no time."""
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None
        if seconds is not None and not self.transport.is_closing():
            self._clock = self.loop.call_later(seconds, self.transport.abort)
