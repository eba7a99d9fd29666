"""What is refused or contained at the endpoint of sessions: everything that reaches the loopback interface may try."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from typing import Any

import openai
import psutil
import pytest

from miles_spmd.environments.sessions import endpoint
from miles_spmd.environments.sessions.session import Session
from miles_spmd.plugins.environment import Completion
from miles_spmd.types.trajectory import FinishReason, Trajectory
from tests.environments.endpoint_bench import USER, Bench, HeldContext, Play, player
from tests.environments.scripted import Turn


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Play:
    return player(tmp_path_factory.mktemp("qwen"))


def test_keys(play: Play) -> None:
    async def test(bench: Bench) -> None:
        async with bench.open("Hello.<|im_end|>"), bench.endpoint.open(Session(bench.context)) as other:
            body = {"messages": [USER]}
            for key in (other.api_key, "x", bench.session.api_key[:-1], f"{bench.session.api_key}x", "\u00e9"):
                status, refused = await bench.post(body, key=key)
                assert (status, refused["error"]["code"]) == (401, "invalid_api_key")
            nobody = bench.head(2).replace(b"Authorization", b"X")
            assert (await bench.raw(nobody + b"{}"))[0] == 401
            assert (await bench.post(body, path="/session/0/v1/chat/completions"))[0] == 404
            old = bench.path
            assert not bench.context.paths
            with pytest.raises(openai.AuthenticationError):
                await openai.AsyncOpenAI(
                    base_url=bench.session.base_url, api_key=other.api_key
                ).chat.completions.create(model="a", messages=[USER])
        status, refused = await bench.post(body, path=old)
        assert (status, refused["error"]["code"]) == (404, "session_not_found")

    play(test)


MALFORMED: dict[str, Any] = {
    "nothing": b"",
    "text": b"hello",
    "half": b'{"messages": [',
    "bytes": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "surrogate": b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
    "deep": b'{"messages": [{"role": "user", "content": "x"}], "tools": ' + b"[" * 100_000,
    "list": [],
    "no messages": {},
    "empty": {"messages": []},
    "role": {"messages": [{"role": "boss", "content": "x"}]},
    "number": {"messages": [{"role": "user", "content": 5}]},
    "image": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///"}}]}]},
    "n": {"messages": [USER], "n": 0},
    "many": {"messages": [USER], "n": 10**9},
    "limit": {"messages": [USER], "max_tokens": 0},
    "float": {"messages": [USER], "max_tokens": 1.5},
    "stop": {"messages": [USER], "stop": [""]},
    "stops": {"messages": [USER], "stop": ["x"] * 100},
    "tool": {"messages": [USER], "tools": [{"type": "function"}]},
    "tool kind": {"messages": [USER], "tools": [{"type": "web_search", "function": {"name": "x"}}]},
    "seed": b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
    "top": {"messages": [USER], "top_logprobs": 5},
    "grammar": {"messages": [USER], "guided_json": {}},
    "format": {"messages": [USER], "response_format": {"type": "json_schema", "json_schema": {}}},
}


def test_malformed_bodies(play: Play) -> None:
    async def test(bench: Bench) -> None:
        async with bench.open("Hello.<|im_end|>") as client:
            for name, body in MALFORMED.items():
                status, refused = await bench.post(body)
                assert (name, status) == (name, 400)
                assert refused["error"]["type"] == "invalid_request_error"
                assert refused["error"]["message"], name
            assert (await client.chat.completions.create(model="a", messages=[USER])).choices
        assert len(bench.session.trajectories) == 1

    play(test)


def test_a_full_context(play: Play) -> None:
    async def test(bench: Bench) -> None:
        class Full(HeldContext):
            async def complete(self, trajectory: Trajectory, **settings: Any) -> Completion:
                return Completion([], FinishReason.LENGTH)

        async with bench.endpoint.open(Session(Full(bench.tokenizer, []))) as bench.session:
            status, refused = await bench.post({"messages": [USER]})
            assert (status, refused["error"]["code"]) == (400, "context_length_exceeded")
            assert (await bench.post({"messages": [USER]}))[0] == 400  # and is not remembered as a response
        assert not bench.session.trajectories

    play(test)


RESPONSES: dict[str, Any] = {
    "top": {"input": "x", "top_logprobs": 5},
    "kept elsewhere": {"input": "x", "conversation": "conv_1"},
    "prompt": {"input": "x", "prompt": {"id": "pmpt_1"}},
    "format": {"input": "x", "text": {"format": {"type": "json_object"}}},
}


def test_responses_that_would_not_be_what_was_asked_for(play: Play) -> None:
    async def test(bench: Bench) -> None:
        async with bench.open():
            for name, body in RESPONSES.items():
                status, refused = await bench.post(body, path=bench.path.replace("chat/completions", "responses"))
                assert (status, bool(refused["error"]["param"])) == (400, True), name

    play(test)


def test_a_text_that_is_much_too_long_stops_nobody(play: Play) -> None:
    """Of megabytes only the beginning is tokenized, in the event loop that serves all sessions."""

    async def test(bench: Bench) -> None:
        async with bench.open("Hello.<|im_end|>", room=1000):
            huge = "so " * 1_000_000
            told = {"role": "assistant", "content": "Hello."}
            bodies: list[tuple[str, Any]] = [
                ("chat/completions", {"messages": [{"role": "user", "content": huge}]}),
                ("chat/completions", {"messages": [USER, told, {"role": "user", "content": huge}]}),
                ("chat/completions", {"messages": [{"role": "user", "content": "<|im_end|>"}] * 20_000}),
                ("completions", {"prompt": huge}),
                ("completions", {"prompt": [1] * 1_000_000}),
            ]
            await bench.post({"messages": [USER]})
            encoded = sum(map(len, bench.context.encoded))
            for name, body in bodies:
                status, refused = await bench.post(body, path=bench.path.replace("chat/completions", name))
                assert (status, refused["error"]["code"]) == (400, "context_length_exceeded"), name
            assert sum(map(len, bench.context.encoded)) - encoded < 500_000
            assert len(bench.session.trajectories) == 1

    play(test)


def test_huge_bodies(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        async with bench.open("Hello.<|im_end|>") as client:
            status, refused = await bench.raw(bench.head(10**15))
            assert (status, refused["error"]["code"]) == (413, "body_too_large")
            monkeypatch.setattr(endpoint, "MAX_BODY", 2**20)
            chunked = bench.head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
            chunk = b"10000\r\n" + b"x" * 2**16 + b"\r\n"
            assert (await bench.raw(chunked, *[chunk] * 17))[0] == 413
            assert (await client.chat.completions.create(model="a", messages=[USER])).choices

    play(test)


def test_slow_clients(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their connections end, and others are served meanwhile."""
    for limit in ("HEADERS_TIMEOUT", "BODY_TIMEOUT", "IDLE_TIMEOUT"):
        monkeypatch.setattr(endpoint, limit, 1.0)

    async def test(bench: Bench) -> None:
        async with bench.open("Hello.<|im_end|>") as client:
            silent = await asyncio.open_connection("127.0.0.1", bench.port)
            trickling = await asyncio.open_connection("127.0.0.1", bench.port)
            half = asyncio.ensure_future(bench.raw(bench.head(100) + b"{"))
            assert (await client.chat.completions.create(model="a", messages=[USER])).choices

            async def trickle() -> None:
                for byte in bench.head(100):
                    trickling[1].write(bytes([byte]))
                    await asyncio.sleep(0.1)

            sending = asyncio.ensure_future(trickle())
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await trickling[0].readexactly(1)
            sending.cancel()
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await silent[0].readexactly(1)
            status, refused = await half
            assert (status, refused["error"]["code"]) == (408, "body_too_slow")

    play(test)


def test_a_client_that_does_not_read(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection ends, so that nothing is held for it."""
    monkeypatch.setattr(endpoint, "WRITE_TIMEOUT", 0.5)

    async def test(bench: Bench) -> None:
        said = Turn(bench.tokenizer.encode("a") * 90_000)
        async with bench.open(said, "Hello.<|im_end|>") as client:
            body = json.dumps({"messages": [USER], "logprobs": True}).encode()
            with socket.create_connection(("127.0.0.1", bench.port)) as deaf:
                deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                deaf.sendall(bench.head(len(body)) + body)

                def held() -> bool:
                    ends = psutil.Process().net_connections("tcp")
                    return any(one.raddr and one.raddr.port == deaf.getsockname()[1] for one in ends)

                while not held():
                    await asyncio.sleep(0.05)
                while held():
                    await asyncio.sleep(0.05)
            assert (await client.chat.completions.create(model="a", messages=[USER])).choices

    play(test)


def test_heads_that_are_too_large(play: Play) -> None:
    async def test(bench: Bench) -> None:
        async with bench.open("Hello.<|im_end|>") as client:
            reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
            writer.write(b"GET / HTTP/1.1\r\nX: " + b"x" * 2**20)
            assert b"400" in await reader.readline()
            writer.close()
            assert (await client.chat.completions.create(model="a", messages=[USER])).choices

    play(test)


def test_paths(play: Play) -> None:
    async def test(bench: Bench) -> None:
        async with bench.open(), bench.endpoint.open(Session(bench.context)) as other:
            name = other.base_url.split("/")[4]
            own = bench.path.split("/")[2]
            for path in (
                f"/session/{own}/v1/../../{name}/v1/chat/completions",
                f"/session/{own}/v1/%2e%2e/%2e%2e/{name}/v1/chat/completions",
                f"/session/{own}%2F..%2F{name}/v1/chat/completions",
                f"//session/{own}/v1/chat/completions",
                f"/session/{own}%00/v1/chat/completions",
                f"/session/{own}/v1/chat/completions/",
                f"/SESSION/{own}/v1/chat/completions",
                "/",
                "*",
                "http://127.0.0.1/etc/passwd",
            ):
                status, refused = await bench.post({"messages": [USER]}, path=path)
                assert (path, status) == (path, 404)
                assert refused["error"]["type"] == "invalid_request_error"
            get = bench.head(0).replace(b"POST", b"GET")
            assert (await bench.raw(get))[0] == 405
            assert not bench.context.paths

    play(test)


def test_idle_connections_and_a_flood(play: Play) -> None:
    """A thousand connections that say nothing, and as many requests at a time as a session may have."""
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 2500

    async def test(bench: Bench) -> None:
        async with bench.open(*["Hello.<|im_end|>"] * 300) as client:
            idle = [await asyncio.open_connection("127.0.0.1", bench.port) for _ in range(1000)]
            bench.context.free.clear()
            flood = [
                asyncio.ensure_future(bench.post({"messages": [{"role": "user", "content": str(n)}]}))
                for n in range(300)
            ]
            while sum(one.done() for one in flood) < 300 - 256:
                await asyncio.sleep(0.01)
            bench.context.free.set()
            statuses = [status for status, _ in await asyncio.gather(*flood)]
            assert (statuses.count(200), statuses.count(429)) == (256, 44)
            assert (await client.chat.completions.create(model="a", messages=[USER])).choices
            for _, writer in idle:
                writer.close()
        assert len(bench.session.trajectories) == 257

    play(test)


def test_a_session_that_ends_leaves_nobody_waiting(play: Play) -> None:
    async def test(bench: Bench) -> None:
        async with bench.open("Hello.<|im_end|>"):
            bench.context.free.clear()
            waiting = asyncio.ensure_future(bench.post({"messages": [USER]}))
            await bench.context.asked.wait()
        assert (await waiting)[0] == 404
        assert not bench.session.trajectories

    play(test)


def test_an_error_of_the_server_is_the_episode_s(play: Play) -> None:
    async def test(bench: Bench) -> None:
        opened = bench.open()  # of a policy that has nothing to say
        await opened.__aenter__()
        status, refused = await bench.post({"messages": [USER]})
        assert (status, refused["error"]["type"]) == (500, "server_error")
        with pytest.raises(IndexError):
            await opened.__aexit__(None, None, None)

    play(test)
