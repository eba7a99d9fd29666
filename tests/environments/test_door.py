"""What a server offers beside OpenAI's APIs, without engines: the policy says what a test lets it say."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import msgspec
import pytest

from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.environments.context import ModelView
from miles_spmd.environments.serving import door
from miles_spmd.environments.serving.door import Door, Policy, Weights
from miles_spmd.environments.serving.messages import Load
from miles_spmd.environments.sessions import endpoint
from miles_spmd.types.request import Output, Request, SamplingParams
from miles_spmd.types.trajectory import FinishReason
from tests.environments.families import FAMILIES, write_family

USER = {"role": "user", "content": "What now?"}
BODY = {"messages": [USER]}
KEY = "sk-test"


class Engine:
    """Takes requests, and responds once ``free`` is set."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.says = tokenizer.encode("Hello.<|im_end|>")
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.loads: list[Load] = []
        self.problem = ""
        self.free, self.asked = asyncio.Event(), asyncio.Event()
        self.free.set()

    async def submit(self, request: Request) -> Output:
        self.requests.append(request)
        self.asked.set()
        try:
            await self.free.wait()
        except asyncio.CancelledError:
            self.cancelled.append(request.rid)
            raise
        return Output(request.rid, self.says, [-0.5] * len(self.says), FinishReason.STOP, [(3, len(self.says))])

    async def load(self, order: Load) -> str:
        self.loads.append(order)
        await self.free.wait()
        return self.problem


Play = Callable[[Callable[[Engine, httpx.AsyncClient], Awaitable[None]]], None]


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Play:
    tokenizer = write_family(tmp_path_factory.mktemp("qwen"), FAMILIES["qwen"])

    async def run(test: Callable[[Engine, httpx.AsyncClient], Awaitable[None]]) -> None:
        engine = Engine(tokenizer)
        model = ModelView(tokenizer, 10**6, 10_000, "2026-01-01")
        params = SamplingParams(1000, temperature=0.7, top_p=0.9)
        policy = Policy(model, {}, params, engine.submit)
        served = Door(("127.0.0.1", 0), KEY, policy, Weights(3, "/first"), engine.load)
        served.start()
        headers = {"Authorization": f"Bearer {KEY}"}
        async with asyncio.timeout(30), httpx.AsyncClient(base_url=served.url, headers=headers, timeout=30) as client:
            await test(engine, client)

    return lambda test: asyncio.run(run(test))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_a_client_that_leaves_is_not_served(play: Play) -> None:
    async def test(engine: Engine, client: httpx.AsyncClient) -> None:
        engine.free.clear()
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/v1/chat/completions", json=BODY | {"n": 3}, timeout=0.2)
        await until(lambda: len(engine.cancelled) == 3)
        assert engine.cancelled == [request.rid for request in engine.requests]
        engine.free.set()
        assert (await client.post("/v1/chat/completions", json=BODY)).status_code == 200

    play(test)


def test_a_session_goes_on_without_its_client_until_it_is_deleted(play: Play) -> None:
    async def test(engine: Engine, client: httpx.AsyncClient) -> None:
        opened = (await client.post("/sessions")).json()
        engine.free.clear()
        own = {"Authorization": f"Bearer {opened['api_key']}"}
        ask = f"{opened['base_url']}/chat/completions"
        with pytest.raises(httpx.ReadTimeout):
            await client.post(ask, json=BODY, headers=own, timeout=0.2)
        assert not engine.cancelled
        again = asyncio.ensure_future(client.post(ask, json=BODY, headers=own))
        await asyncio.sleep(0.05)
        assert (await client.delete(f"/sessions/{opened['id']}")).json()["deleted"]
        assert (await again).status_code == 404
        assert engine.cancelled == [request.rid for request in engine.requests] == ["0.0"]

    play(test)


def test_distributions_and_seeds(play: Play) -> None:
    async def test(engine: Engine, client: httpx.AsyncClient) -> None:
        await client.post("/v1/chat/completions", json=BODY | {"seed": 5, "n": 2, "temperature": 0, "max_tokens": 7})
        first, second = (request.sampling for request in engine.requests)
        assert (first.seed, first.temperature, first.top_p, first.max_new_tokens) == (5, 0.0, 0.9, 7)
        assert second == msgspec.structs.replace(first, seed=second.seed)
        assert second.seed != 5
        engine.requests.clear()
        for _ in range(2):
            await client.post("/v1/chat/completions", json=BODY)
        one, other = engine.requests
        assert one.sampling.seed != other.sampling.seed
        assert one.sampling.temperature == 0.7
        assert one.rid.partition(".")[0] != other.rid.partition(".")[0]  # engines in turn
        engine.requests.clear()
        for settings in ({"seed": 1}, {"seed": 1, "temperature": 1.0, "top_p": 1, "top_k": 5}):
            opened = (await client.post("/sessions", json=settings)).json()
            own = {"Authorization": f"Bearer {opened['api_key']}"}
            await client.post(f"{opened['base_url']}/chat/completions", json=BODY | {"top_k": 1}, headers=own)
            shown = (await client.get(f"/sessions/{opened['id']}")).json()
            assert shown["counts"] == {"session_ignored/top_k": 1.0}
            assert shown["trajectories"][0]["weight_versions"] == [[3, len(engine.says)]]
            assert shown["trajectories"][0]["messages"][-1]["content"] == "Hello."
        one, other = engine.requests
        assert one.sampling.seed == other.sampling.seed
        assert (other.sampling.temperature, other.sampling.top_p, other.sampling.top_k) == (1.0, 1.0, 5)

    play(test)


def test_what_would_have_no_effect_is_refused(play: Play) -> None:
    """A setting that does something else than nothing, and names that are misspelt."""

    async def test(engine: Engine, client: httpx.AsyncClient) -> None:
        for name in ("chat/completions", "completions"):
            body = BODY if name == "chat/completions" else {"prompt": "Hi"}
            for setting in (
                {"repetition_penalty": 1.2},
                {"min_p": 0.1},
                {"stop_token_ids": [5]},
                {"logit_bias": {"1": 2}},
            ):
                refused = (await client.post(f"/v1/{name}", json=body | setting)).json()["error"]
                assert refused["param"] == next(iter(setting))
            neutral = {"repetition_penalty": 1.0, "frequency_penalty": 0, "min_p": 0, "logit_bias": {}, "user": "me"}
            assert (await client.post(f"/v1/{name}", json=body | neutral)).status_code == 200
        for path, wrong in (
            ("/sessions", {"temprature": 0.5}),
            ("/sessions", {"min_p": 0.5}),
            ("/sessions", {"seed": 2**64}),
            ("/weights", {"path": "/x", "versoin": 7}),
        ):
            assert (await client.post(path, json=wrong)).status_code == 400, wrong
        assert not engine.loads

    play(test)


def test_too_much(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(engine: Engine, client: httpx.AsyncClient) -> None:
        monkeypatch.setattr(door, "MAX_SESSIONS", 2)
        opened = [await client.post("/sessions", json={}) for _ in range(3)]
        assert [response.status_code for response in opened] == [200, 200, 429]
        await client.delete(f"/sessions/{opened[0].json()['id']}")
        assert (await client.post("/sessions", json={})).status_code == 200
        monkeypatch.setattr(endpoint, "MAX_BODY", 2**10)
        for path in ("/v1/completions", "/sessions", "/weights"):
            assert (await client.post(path, content=b" " * 2000)).status_code == 413
        monkeypatch.setattr(endpoint, "BODY_TIMEOUT", 0.1)
        reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        head = f"POST /weights HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 9\r\n\r\n"
        writer.write(head.encode())
        assert b" 408 " in await reader.readline()
        writer.close()

    play(test)


def test_weights_one_after_another(play: Play) -> None:
    async def test(engine: Engine, client: httpx.AsyncClient) -> None:
        engine.free.clear()
        loads = [asyncio.ensure_future(client.post("/weights", json={"path": f"/{name}"})) for name in "ab"]
        await until(lambda: bool(engine.loads))
        await asyncio.sleep(0.05)
        assert len(engine.loads) == 1
        assert (await client.get("/weights")).json() == {"version": 3, "path": "/first"}
        engine.free.set()
        assert sorted([(await one).json()["version"] for one in loads]) == [4, 5]
        engine.problem = "it is damaged"
        refused = (await client.post("/weights", json={"path": "/c", "running": "abort"})).json()["error"]
        assert refused["message"] == "weights 5 stay in use: it is damaged"
        assert engine.loads[-1] == Load("/c", 6, "abort")
        assert (await client.get("/weights")).json()["version"] == 5

    play(test)


def test_addresses(tmp_path: Path) -> None:
    from miles_spmd.environments.sessions.listener import listen, url_of

    for host, url in (("127.0.0.1", "http://127.0.0.1:"), ("localhost", "http://"), ("0.0.0.0", "http://")):
        with listen(host, 0) as listener:
            assert url_of(listener).startswith(url)
            assert "0.0.0.0" not in url_of(listener)
