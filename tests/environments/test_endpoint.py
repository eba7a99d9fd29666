"""The endpoint of sessions on the loopback interface: real clients, and what must be refused or contained."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import openai
import psutil
import pytest

from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.environments.sessions import endpoint
from miles_spmd.environments.sessions.endpoint import Endpoint
from miles_spmd.environments.sessions.session import Session
from miles_spmd.plugins.environment import Completion
from miles_spmd.types.trajectory import FinishReason, Trajectory
from tests.environments.families import FAMILIES, write_family
from tests.environments.scripted import ScriptedContext, Turn
from tests.environments.test_exactness import TOOLS

CALL = '<tool_call>\n{"name": "look", "arguments": {"value": "so"}}\n</tool_call>'
USER = {"role": "user", "content": "What now?"}
Test = Callable[["Bench"], Awaitable[None]]


class HeldContext(ScriptedContext):
    """The policy responds while ``free`` is set."""

    def __init__(self, tokenizer: Tokenizer, turns: Sequence[Turn], room: int = 100_000) -> None:
        super().__init__(tokenizer, turns, room)
        self.free, self.asked, self.paths = asyncio.Event(), asyncio.Event(), list[str]()
        self.free.set()

    async def complete(self, trajectory: Trajectory, **settings: Any) -> Completion:
        self.paths.append(settings["path"])
        self.asked.set()
        await self.free.wait()
        return await super().complete(trajectory, **settings)


class Bench:
    """An endpoint with one session, whose policy says what the test has written down."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.endpoint = tokenizer, Endpoint()
        self.session, self.context = Session(HeldContext(tokenizer, [])), HeldContext(tokenizer, [])

    @asynccontextmanager
    async def open(self, *said: str | Turn, room: int = 100_000) -> AsyncIterator[openai.AsyncOpenAI]:
        turns = [Turn(self.tokenizer.encode(one)) if isinstance(one, str) else one for one in said]
        self.context = HeldContext(self.tokenizer, turns, room)
        async with (
            self.endpoint.open(Session(self.context)) as self.session,
            openai.AsyncOpenAI(base_url=self.session.base_url, api_key=self.session.api_key, max_retries=0) as client,
        ):
            yield client

    @property
    def port(self) -> int:
        return int(self.session.base_url.split("/")[2].split(":")[1])

    @property
    def path(self) -> str:
        return "/" + self.session.base_url.split("/", 3)[3] + "/chat/completions"

    def head(self, length: int | str, path: str | None = None, key: str | None = None) -> bytes:
        return (
            f"POST {path or self.path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key or self.session.api_key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        ).encode()

    async def raw(self, *parts: bytes) -> tuple[int, dict[str, Any]]:
        """Send bytes on a connection of their own, and return status and body of the response."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(int(line.split(":")[1]) for line in head.splitlines() if line.startswith("content-length"))
            body = await reader.readexactly(length)
            return int(head.split()[1]), json.loads(body) if b"{" in body else {}
        finally:
            writer.close()

    async def post(self, body: Any, **head: Any) -> tuple[int, dict[str, Any]]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.raw(self.head(len(data), **head) + data)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_family(tmp_path_factory.mktemp("qwen"), FAMILIES["qwen"])


@pytest.fixture
def play(qwen: Tokenizer) -> Callable[[Test], None]:
    """Runs a test in an event loop."""

    async def run(test: Test) -> None:
        async with asyncio.timeout(60):
            await test(Bench(qwen))

    return lambda test: asyncio.run(run(test))


# --- clients ---------------------------------------------------------------------------------------------------------


def test_a_conversation_with_tools(play: Callable[[Test], None]) -> None:
    """The client appends messages as they are; the trajectory is one, with the tokens that were sampled."""

    async def test(bench: Bench) -> None:
        said = [f"<think>\nHm.\n</think>\n\nSo:{CALL}<|im_end|>", "It is 4.<|im_end|>"]
        async with bench.open(*said) as client:
            messages: list[Any] = [USER]
            first = await client.chat.completions.create(
                model="any", messages=messages, tools=TOOLS, extra_body={"return_token_ids": True}
            )
            (choice,) = first.choices
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", "So:")
            assert choice.message.model_extra["reasoning_content"] == "Hm."
            (call,) = choice.message.tool_calls
            assert (call.function.name, json.loads(call.function.arguments)) == ("look", {"value": "so"})
            assert choice.model_extra["token_ids"] == bench.tokenizer.encode(said[0])
            messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "4<|im_end|>"}]
            second = await client.chat.completions.create(model="any", messages=messages, tools=TOOLS)
            assert (second.choices[0].finish_reason, second.choices[0].message.content) == ("stop", "It is 4.")
        (trajectory,) = bench.session.trajectories
        sampled = [bench.context.decode(one.tokens) for one in trajectory.segments if one.sampled]
        assert sampled == said
        usage, all_tokens = second.usage, trajectory.tokens
        assert (usage.total_tokens, usage.completion_tokens) == (len(all_tokens), len(bench.tokenizer.encode(said[1])))
        assert first.model_extra["prompt_token_ids"] == trajectory.start
        (end,) = bench.tokenizer.encode("<|im_end|>")
        assert all_tokens.count(end) == 5  # the tools, the user, both of the policy, the result: but not what it spells
        assert [one["role"] for one in trajectory.messages] == ["user", "assistant", "tool", "assistant"]
        assert (trajectory.text, bench.context.metrics) == ("It is 4.", {})

    play(test)


def test_a_stream_is_the_response(play: Callable[[Test], None]) -> None:
    async def test(bench: Bench) -> None:
        said = f"<think>\nHm.\n</think>\n\nSo:{CALL}<|im_end|>"
        async with bench.open(said, said) as client:
            tools: Any = [{**tool, "function": tool["function"] | {"strict": True}} for tool in TOOLS]
            whole = await client.chat.completions.create(model="a", messages=[USER], tools=tools, n=2)
            stream = client.chat.completions.stream(
                model="a", messages=[USER], tools=tools, n=2, stream_options={"include_usage": True}
            )
            async with stream as events:
                streamed = await events.get_final_completion()
        for one, other in zip(whole.choices, streamed.choices, strict=True):
            assert (one.finish_reason, one.message.content) == (other.finish_reason, other.message.content)
            calls = [
                [(call.id, call.function.name, call.function.arguments) for call in choice.message.tool_calls]
                for choice in (one, other)
            ]
            assert calls[0] == calls[1]
        assert (streamed.usage, streamed.id) == (whole.usage, whole.id)  # the same request, which is not sampled again
        assert bench.context.metrics == {"session_repeats": 1.0, "session_branches/choices": 1.0}
        assert len(set(bench.context.paths)) == len(bench.session.trajectories) == 2

    play(test)


def test_the_responses_api_is_the_same_conversation(play: Callable[[Test], None]) -> None:
    async def test(bench: Bench) -> None:
        said = [f"<think>\nHm.\n</think>\n\nSo:{CALL}<|im_end|>", "It is 4.<|im_end|>"]
        tools: list[Any] = [{"type": "function", **tool["function"]} for tool in TOOLS]
        async with bench.open(*said) as client:
            given: list[Any] = [{"role": "user", "content": "What now?"}]
            first = await client.responses.create(model="a", input=given, tools=tools, instructions="Be brief.")
            assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
            assert first.output_text == "So:"
            call = first.output[2]
            assert (call.name, json.loads(call.arguments)) == ("look", {"value": "so"})
            given += [item for item in first.output if item.type != "reasoning"]
            given.append({"type": "function_call_output", "call_id": call.call_id, "output": "4"})
            stream = await client.responses.create(
                model="a", input=given, tools=tools, instructions="Be brief.", stream=True
            )
            events = [event async for event in stream]
            assert [event.sequence_number for event in events] == list(range(len(events)))
            assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "It is 4."
            assert events[-1].type == "response.completed"
            assert events[-1].response.output_text == "It is 4."
            with pytest.raises(openai.BadRequestError, match="send the whole input"):
                await client.responses.create(model="a", input="So?", previous_response_id=first.id)
        (trajectory,) = bench.session.trajectories
        assert [bench.context.decode(one.tokens) for one in trajectory.segments if one.sampled] == said
        assert [one["role"] for one in trajectory.messages] == ["system", "user", "assistant", "tool", "assistant"]
        assert not bench.context.metrics

    play(test)


def test_a_text_is_continued(play: Callable[[Test], None]) -> None:
    """A prompt that begins with an earlier one and its response keeps the tokens; another one is a branch."""

    async def test(bench: Bench) -> None:
        said = ["O", "A.</x>", "so<|im_end|>", "Hello.", "Hi."]
        async with bench.open(*said) as client:
            prompt = "<|im_start|>system\nList:"
            first = await client.completions.create(
                model="a", prompt=prompt, logprobs=1, extra_body={"return_token_ids": True}
            )
            (choice,) = first.choices
            assert (choice.text, choice.finish_reason, choice.logprobs.text_offset) == ("O", "stop", [0])
            assert (choice.logprobs.tokens, choice.logprobs.token_logprobs) == (["O"], [-0.5])
            assert first.model_extra["prompt_token_ids"] == bench.tokenizer.encode(prompt)
            second = await client.completions.create(model="a", prompt=[f"{prompt}O"], stop="</x>", max_tokens=9)
            assert second.choices[0].text == "A."
            stream = await client.completions.create(
                model="a", prompt=f"{prompt}OA.</x> And:", stream=True, stream_options={"include_usage": True}
            )
            parts = [part async for part in stream]
            assert "".join(choice.text for part in parts for choice in part.choices) == "so"
            assert parts[-1].usage.completion_tokens == 3
            other = await client.completions.create(model="a", prompt="<|im_start|>user", n=2)
            assert [one.text for one in other.choices] == ["Hello.", "Hi."]
            for wrong in ({"prompt": ["a", "b"]}, {"prompt": ""}, {"prompt": "a", "echo": True}, {"prompt": [1, 2]}):
                with pytest.raises(openai.BadRequestError):
                    await client.completions.create(model="a", **wrong)
        first_line, *others = bench.session.trajectories
        ((o,), (a,)), tokens = map(bench.tokenizer.encode, "OA"), first_line.response
        assert tokens[:2] == [o, a]
        assert bench.context.decode(first_line.tokens) == f"{prompt}OA.</x> And:so<|im_end|>"
        assert [one.turns for one in (first_line, *others)] == [3, 1, 1]
        assert bench.context.metrics == {"session_branches/conversation": 1.0, "session_branches/choices": 1.0}

    play(test)


def test_log_probs_and_limits(play: Callable[[Test], None]) -> None:
    async def test(bench: Bench) -> None:
        cut = Turn(bench.tokenizer.encode("Oslo"), FinishReason.LENGTH)
        async with bench.open(cut) as client:
            response = await client.chat.completions.create(
                model="a", messages=[USER], logprobs=True, max_completion_tokens=3, temperature=0.3
            )
        (choice,) = response.choices
        assert (choice.finish_reason, choice.message.content) == ("length", "Oslo")
        assert "".join(one.token for one in choice.logprobs.content) == "Oslo"
        assert {one.logprob for one in choice.logprobs.content} == {-0.5}
        assert bench.context.metrics == {"session_ignored/temperature": 1.0}

    play(test)


def test_a_stop_string_is_left_out_and_may_be_sent_back(play: Callable[[Test], None]) -> None:
    async def test(bench: Bench) -> None:
        async with bench.open("x = 1</code> ", "Done.<|im_end|>") as client:
            first = await client.chat.completions.create(model="a", messages=[USER], stop=["</code>", "###"])
            assert first.choices[0].message.content == "x = 1"
            said = {"role": "assistant", "content": "x = 1</code>"}
            await client.chat.completions.create(model="a", messages=[USER, said, USER])
        (trajectory,) = bench.session.trajectories
        assert "x = 1</code> <|im_end|>\n<|im_start|>user" in bench.context.decode(trajectory.tokens)

    play(test)


def test_curl(play: Callable[[Test], None]) -> None:
    async def curl(bench: Bench, *arguments: str) -> str:
        command = ["curl", "-sS", "-H", f"Authorization: Bearer {bench.session.api_key}", *arguments]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        output, _ = await process.communicate()
        return output.decode()

    async def test(bench: Bench) -> None:
        async with bench.open("Hello.<|im_end|>", "Hello.<|im_end|>"):
            url = bench.session.base_url
            assert json.loads(await curl(bench, f"{url}/models"))["data"][0]["id"] == "policy"
            body = json.dumps({"messages": [USER]})
            response = json.loads(await curl(bench, f"{url}/chat/completions", "-d", body))
            assert response["choices"][0]["message"] == {"role": "assistant", "content": "Hello."}
            large = json.dumps({"messages": [{"role": "user", "content": "so " * 20_000}], "stream": True})
            lines = (await curl(bench, f"{url}/chat/completions", "-d", large)).splitlines()
            events = [line.removeprefix("data: ") for line in lines if line]
            assert events[-1] == "[DONE]"
            assert [json.loads(one)["choices"][0]["delta"] for one in events[:-1]] == [
                {"role": "assistant", "content": ""}, {"content": "Hello."}, {},
            ]  # fmt: skip

    play(test)


def test_a_client_that_left_comes_back(play: Callable[[Test], None]) -> None:
    """What the policy was asked for is sampled once, whatever becomes of the connection."""

    async def test(bench: Bench) -> None:
        async with bench.open("Hello.<|im_end|>") as client:
            bench.context.free.clear()
            body = json.dumps({"messages": [USER], "model": "a", "stream": True}).encode()
            _, writer = await asyncio.open_connection("127.0.0.1", bench.port)
            writer.write(bench.head(len(body)) + body)
            await bench.context.asked.wait()
            writer.transport.abort()
            again = asyncio.ensure_future(client.chat.completions.create(model="a", messages=[USER]))
            while not bench.context.metrics:
                await asyncio.sleep(0.01)
            bench.context.free.set()
            assert (await again).choices[0].message.content == "Hello."
        assert len(bench.context.paths) == len(bench.session.trajectories) == 1
        assert bench.context.metrics == {"session_repeats": 1.0}

    play(test)


def test_seeds_do_not_depend_on_time(play: Callable[[Test], None]) -> None:
    """Turns have the same paths whichever request comes first, and trajectories the same order where they are sent at
    the same time."""

    async def paths(bench: Bench, numbers: Sequence[int]) -> tuple[dict[int, str], list[str]]:
        async with bench.open(*["Hello.<|im_end|>"] * 4) as client:
            bench.context.free.clear()
            found, waiting = {}, []
            for number in numbers:
                bench.context.asked.clear()
                messages = [{"role": "user", "content": f"Part {number}"}]
                waiting.append(asyncio.ensure_future(client.chat.completions.create(model="a", messages=messages)))
                await bench.context.asked.wait()
                found[number] = bench.context.paths[-1]
            bench.context.free.set()
            await asyncio.gather(*waiting)
        return found, [one.messages[0]["content"] for one in bench.session.trajectories]

    async def test(bench: Bench) -> None:
        forward, backward = await paths(bench, [0, 1, 2]), await paths(bench, [2, 0, 1])
        assert forward == backward
        assert len(set(forward[0].values())) == 3

    play(test)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_keys(play: Callable[[Test], None]) -> None:
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
    "format": {"messages": [USER], "response_format": {"type": "json_schema", "json_schema": {}}},
}


def test_malformed_bodies(play: Callable[[Test], None]) -> None:
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


def test_a_full_context(play: Callable[[Test], None]) -> None:
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


def test_huge_bodies(play: Callable[[Test], None], monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_slow_clients(play: Callable[[Test], None], monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_client_that_does_not_read(play: Callable[[Test], None], monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_heads_that_are_too_large(play: Callable[[Test], None]) -> None:
    async def test(bench: Bench) -> None:
        async with bench.open("Hello.<|im_end|>") as client:
            reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
            writer.write(b"GET / HTTP/1.1\r\nX: " + b"x" * 2**20)
            assert b"400" in await reader.readline()
            writer.close()
            assert (await client.chat.completions.create(model="a", messages=[USER])).choices

    play(test)


def test_paths(play: Callable[[Test], None]) -> None:
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


def test_idle_connections_and_a_flood(play: Callable[[Test], None]) -> None:
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


def test_a_session_that_ends_leaves_nobody_waiting(play: Callable[[Test], None]) -> None:
    async def test(bench: Bench) -> None:
        async with bench.open("Hello.<|im_end|>"):
            bench.context.free.clear()
            waiting = asyncio.ensure_future(bench.post({"messages": [USER]}))
            await bench.context.asked.wait()
        assert (await waiting)[0] == 404
        assert not bench.session.trajectories

    play(test)


def test_an_error_of_the_server_is_the_episode_s(play: Callable[[Test], None]) -> None:
    async def test(bench: Bench) -> None:
        opened = bench.open()  # of a policy that has nothing to say
        await opened.__aenter__()
        status, refused = await bench.post({"messages": [USER]})
        assert (status, refused["error"]["type"]) == (500, "server_error")
        with pytest.raises(IndexError):
            await opened.__aexit__(None, None, None)

    play(test)
