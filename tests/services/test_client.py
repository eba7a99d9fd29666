"""Requests to a real server that is slow, overloaded, broken or not there."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import pytest

from miles_spmd.services.client import JsonClient, ServiceError
from tests.services.server import Reply, serving


def post(url: str, body: Any = None, *, time_limit: float = 5.0, concurrency: int = 4, **settings: Any) -> Any:
    return asyncio.run(JsonClient(url, time_limit=time_limit, concurrency=concurrency, **settings).post(body))


def test_a_reply() -> None:
    with serving(lambda body, number: {"got": body}) as server:
        client = JsonClient(server.url + "/score", time_limit=5, concurrency=2, headers={"Authorization": "Bearer x"})
        for _ in range(2):  # event loops
            assert asyncio.run(client.post({"ä": [1]})) == {"got": {"ä": [1]}}
    assert server.paths == ["/score"] * 2
    assert server.headers[0]["Authorization"] == "Bearer x"


def test_what_may_pass_is_tried_again() -> None:
    def reply(body: Any, number: int) -> Any:
        match number:
            case 0:
                return Reply({"error": "slow down"}, 429, {"Retry-After": "1"})
            case 1:
                return Reply(b"<html>bad gateway</html>", 502)
            case 2:
                raise ConnectionError
            case 3:
                return b'{"half'
        return "done"

    with serving(reply) as server:
        begin = time.monotonic()
        assert post(server.url, time_limit=20.0) == "done"
        assert 1 <= time.monotonic() - begin < 8
    assert len(server.bodies) == 5


def test_a_refusal_is_an_error_at_once() -> None:
    with (
        serving(lambda *_: Reply({"error": "no such model"}, 404)) as server,
        pytest.raises(ServiceError, match=f'{server.url}: status 404: {{"error": "no such model"}}$'),
    ):
        post(server.url)
    assert len(server.bodies) == 1
    with pytest.raises(ServiceError, match="'localhost' is not a URL"):
        post("localhost")


def test_a_service_that_stays_away_is_an_error_within_the_limit() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    begin = time.monotonic()
    with pytest.raises(ServiceError, match=rf"http://127.0.0.1:{port}/x: Client.*Error.*\(tried \d times; .* is 1 s\)"):
        post(f"http://127.0.0.1:{port}/x", time_limit=1.0)
    assert time.monotonic() - begin < 1.2


def test_slow_replies() -> None:
    with serving(lambda body, number: time.sleep(1.0 if number == 0 else 0) or "now") as server:
        assert post(server.url, time_limit=1.0) == "now"
    with serving(lambda *_: time.sleep(1.0)) as server, pytest.raises(ServiceError, match=r"no reply within 0\.\d+ s"):
        post(server.url, time_limit=0.5)


def test_requests_at_the_same_time_are_limited() -> None:
    async def all_of(client: JsonClient) -> list[Any]:
        return await asyncio.gather(*(client.post(i) for i in range(9)), return_exceptions=True)

    with serving(lambda body, number: time.sleep(0.1) or body) as server:
        client = JsonClient(server.url, time_limit=5.0, concurrency=3)
        assert asyncio.run(all_of(client)) == list(range(9))
        assert server.most_open == 3
    with serving(lambda body, number: time.sleep(0.3) or body) as server:
        replies = asyncio.run(all_of(JsonClient(server.url, time_limit=0.7, concurrency=1)))
    problems = [str(reply) for reply in replies if isinstance(reply, ServiceError)]
    assert replies[0] == 0
    assert any("1 other requests were not finished within 0.7 s" in problem for problem in problems)
