"""JSON over HTTP with services that may be slow, overloaded or away for a moment: a retriever, a judge, a reward."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import msgspec

from miles_spmd.types.printable import printable

_FIRST_DELAY, _LONGEST_DELAY = 0.25, 10.0  # seconds between attempts, which double
_LEAST_SHARE = 0.05  # of the time limit: an attempt with less time is not begun
_LONGEST_EXCERPT = 300  # characters of a service's reply in an error
_OVERLOADED = (408, 425, 429)  # and 5xx: the same request may succeed later


class ServiceError(RuntimeError):
    """A service that gave no usable reply. The message names the URL and the cause."""


class _TemporaryError(Exception):
    """An attempt that failed in a way that another one may not. ``delay``: seconds that the service has asked for."""

    def __init__(self, problem: str, delay: float = 0.0) -> None:
        super().__init__(problem)
        self.delay = delay


class JsonClient:
    """Posts JSON to one URL. An object may be used in several event loops, one after another."""

    def __init__(
        self, url: str, *, time_limit: float, concurrency: int, headers: Mapping[str, str] | None = None
    ) -> None:
        """``time_limit``: seconds of a request, with its attempts and the time for which it waits for others; an
        attempt may take half of it. ``concurrency``: number of requests at the same time in an event loop; others
        wait. Proxies come from the variables of the environment, as with other clients."""
        self.url = url
        self._time_limit, self._concurrency, self._headers = time_limit, concurrency, dict(headers or {})
        self._slots: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()

    async def post(self, body: Any) -> Any:
        """Post ``body`` and return the reply. A lost connection, a slow reply, the status 408, 425, 429 or 5xx, and a
        reply that is not JSON are tried again, with growing delays, until the time limit. Raises ServiceError."""
        deadline = time.monotonic() + self._time_limit
        slots = self._slots.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self._concurrency))
        try:
            async with asyncio.timeout(self._time_limit):
                await slots.acquire()
        except TimeoutError:
            others = f"{self._concurrency} other requests were not finished within {self._time_limit:g} s"
            raise ServiceError(f"{self.url}: {others}") from None
        try:
            return await self._attempts(msgspec.json.encode(body), deadline)
        finally:
            slots.release()

    async def _attempts(self, body: bytes, deadline: float) -> Any:
        attempts, delay = 0, _FIRST_DELAY
        while True:
            attempts += 1
            try:
                return await self._attempt(body, min(self._time_limit / 2, deadline - time.monotonic()))
            except _TemporaryError as error:
                pause = max(error.delay, delay * random.uniform(0.5, 1))
                if time.monotonic() + pause > deadline - _LEAST_SHARE * self._time_limit:
                    tried = f"tried {attempts} times" if attempts > 1 else "tried once"
                    limit = f"the time limit is {self._time_limit:g} s"
                    raise ServiceError(f"{self.url}: {error} ({tried}; {limit})") from error
                await asyncio.sleep(pause)
                delay = min(2 * delay, _LONGEST_DELAY)

    async def _attempt(self, body: bytes, seconds: float) -> Any:
        from aiohttp import ClientError, ClientSession, ClientTimeout, InvalidURL  # takes half a second

        headers = {"Content-Type": "application/json", **self._headers}
        try:
            # a session per attempt: rewards use one client in many event loops, and none is left to close it
            async with (
                ClientSession(timeout=ClientTimeout(total=seconds), trust_env=True) as session,
                session.post(self.url, data=body, headers=headers) as reply,
            ):
                status, content, asked = reply.status, await reply.read(), reply.headers.get("Retry-After", "")
        except TimeoutError as error:
            raise _TemporaryError(f"no reply within {seconds:.3g} s") from error
        except InvalidURL as error:
            raise ServiceError(f"{self.url!r} is not a URL") from error
        except (ClientError, OSError) as error:
            raise _TemporaryError(f"{type(error).__name__}: {printable(str(error), _LONGEST_EXCERPT)}") from error
        if not 200 <= status < 300:
            problem = f"status {status}: {_excerpt(content)}"
            if status in _OVERLOADED or status >= 500:
                raise _TemporaryError(problem, float(asked) if asked.isdecimal() else 0.0)
            raise ServiceError(f"{self.url}: {problem}")
        try:
            return msgspec.json.decode(content)
        except msgspec.DecodeError as error:
            raise _TemporaryError(f"the reply is not JSON: {_excerpt(content)}") from error


def _excerpt(content: bytes) -> str:
    return printable(" ".join(content.decode("utf-8", "replace").split()), _LONGEST_EXCERPT)
