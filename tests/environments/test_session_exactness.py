"""Random sessions under the templates of several families: whatever a client does to a history, sampled tokens stay as
they are, what is appended is what the template writes, and everything else is a branch that is counted.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from typing import Any, NamedTuple

import pytest

from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.environments.sessions.chat import ChatRequest, decode, whole
from miles_spmd.environments.sessions.protocol import RequestError, Response
from miles_spmd.environments.sessions.session import Session
from miles_spmd.types.trajectory import Trajectory
from tests.environments.families import FAMILIES, write_family
from tests.environments.scripted import ScriptedContext, Turn
from tests.environments.test_exactness import PIECES, TOOLS, Spoken, special_in, spoken

FEWER_TOOLS = TOOLS[:1]
RESULTS_AS_USER = ("qwen", "deepseek", "llama", "harmony")  # whose end of a message is the same behind calls


class Node(NamedTuple):
    """A turn as the client and as an independent computation have it."""

    client: list[dict[str, Any]]  # what the client would send next, before it has anything to add
    oracle: list[dict[str, Any]]  # the same for the template, with a mark in place of what the policy said
    tokens: list[int]
    mask: list[int]  # of all tokens
    ended_by: str | None
    calls: list[dict[str, Any]]
    parent: Node | None
    given: list[int]  # the tokens before what the policy said
    tools: list[Any]


class Driver:
    """Plays one session, and computes what has to become of it."""

    def __init__(self, name: str, tokenizer: Tokenizer, seed: int) -> None:
        self.rng, self.name, self.family = random.Random(f"session {name} {seed}"), name, FAMILIES[name]
        self.tokenizer = tokenizer
        self.sampled: list[tuple[Spoken, list[int]]] = []  # with the tokens before it
        self.context = ScriptedContext(tokenizer, [self._say] * 1000)
        self.session = Session(self.context)
        self.nodes: list[Node] = []
        self.branches: Counter[str] = Counter()
        self.tools_seen: set[int] = set()
        self.repeats = 0

    def _say(self, trajectory: Trajectory) -> Turn:
        said = spoken(self.rng, self.name, self.tokenizer)
        while not said.tokens:
            said = spoken(self.rng, self.name, self.tokenizer)
        self.sampled.append((said, trajectory.tokens))
        return Turn(said.tokens, said.finish_reason)

    async def play(self) -> None:
        while not self.nodes:
            await self.begin()
        for _ in range(self.rng.randint(1, 7)):
            await self.rng.choice([self.go_on, self.go_on, self.go_on, self.begin, self.edit])()
        parents = {id(node.parent) for node in self.nodes}
        expected = [(node.tokens, node.mask) for node in self.nodes if id(node) not in parents]
        got = [(one.tokens, [0] * len(one.start) + one.loss_mask) for one in self.session.trajectories]
        assert sorted(got) == sorted(expected)
        counted = {key: count for key, count in self.context.metrics.items() if key.startswith("session_branches")}
        assert counted == {f"session_branches/{reason}": count for reason, count in self.branches.items()}
        assert self.context.metrics.get("session_repeats", 0) == self.repeats

    # --- what a client does ------------------------------------------------------------------------------------------

    async def begin(self) -> None:
        messages = [{"role": "user", "content": self.content()}]
        if self.rng.random() < 0.5 and self.name != "mistral":
            messages.insert(0, {"role": self.rng.choice(["system", "developer"]), "content": self.content()})
        await self.ask(messages, self.rng.choice([TOOLS, TOOLS, FEWER_TOOLS]), "conversation" if self.nodes else None)

    async def go_on(self) -> None:
        """Continue a turn, the newest or an earlier one, after what clients do to histories."""
        node = self.nodes[-1] if self.rng.random() < 0.7 else self.rng.choice(self.nodes)
        client, added = [*map(self.rewritten, node.client)], self.added(node)
        if node.calls and self.name in RESULTS_AS_USER and self.rng.random() < 0.3:
            client[-1] = calls_as_text(node.client[-1])
            added = [{"role": "user", "content": self.content()}]
        if self.name == "mistral" and added[0]["role"] == "user":  # its tools move to the last user
            await self.ask([*client, *added], node.tools, "template")
            return
        await self.ask([*client, *added], node.tools, None, node, added)

    async def edit(self) -> None:
        """Change what the policy said, or the tools that it was shown."""
        node = self.rng.choice(self.nodes)
        tools = self.rng.choice([node.tools, node.tools, TOOLS, FEWER_TOOLS])
        said = {"role": "assistant", "content": f"I never said that, {len(self.nodes)}."}
        reason = "history" if len(tools) in self.tools_seen else "tools"
        await self.ask([*node.client[:-1], said, {"role": "user", "content": "So?"}], tools, reason)

    def recognised(self, node: Node, client: list[dict[str, Any]], given: list[int]) -> Node:
        """Return the turn that was continued: one of those whose whole history says the same, and the very one where
        the client has kept what it thought."""
        same = [one for one in self.nodes if [*map(meaning, one.client)] == [*map(meaning, node.client)]]
        if [*map(thought, client)] == [*map(thought, node.client)]:
            same = [one for one in same if [*map(thought, one.client)] == [*map(thought, node.client)]]
        return next(one for one in same if given[: len(one.tokens)] == one.tokens)

    def content(self) -> str:
        return "".join(self.rng.choice([*PIECES, *self.family.special]) for _ in range(self.rng.randint(0, 6))) or "-"

    def added(self, node: Node) -> list[dict[str, Any]]:
        results = [{"role": "tool", "tool_call_id": call["id"], "content": self.content()} for call in node.calls]
        return results or [{"role": "user", "content": self.content()}]

    def rewritten(self, message: dict[str, Any]) -> dict[str, Any]:
        if message["role"] != "assistant":
            return message
        message = json.loads(json.dumps(message))
        if self.rng.random() < 0.5:
            message.pop("reasoning_content", None)
        if not message["content"]:
            message["content"] = self.rng.choice([None, ""])
        elif self.rng.random() < 0.5 and isinstance(message["content"], str):
            message["content"] = [{"type": "text", "text": f" {message['content']}\n"}]
        for call in message.get("tool_calls", ()):
            if self.rng.random() < 0.5:
                call["function"]["arguments"] = written_anew(call["function"]["arguments"])
        return message

    # --- what has to become of it ------------------------------------------------------------------------------------

    async def ask(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any],
        reason: str | None,
        parent: Node | None = None,
        added: list[dict[str, Any]] | None = None,
    ) -> None:
        """Send a request, now and then twice, and compare what the policy is given with what it should be."""
        self.tools_seen.add(len(tools))
        count = self.rng.choice([1, 1, 1, 2])
        request = decode(
            json.dumps({"messages": messages, "tools": tools, "n": count, "seed": len(self.nodes)}).encode()
        )
        asked = len(self.sampled)
        try:
            response = await self.session.respond(request)
        except RequestError as error:
            refused = "rejects this conversation" in str(error) or "special token" in str(error)
            if not (refused and error.status == 400 and parent is None and len(self.sampled) == asked):
                raise
            return
        if self.rng.random() < 0.3:
            self.repeats += 1
            assert await self.session.respond(request) is response
        self.branches += Counter(filter(None, [reason]))
        if count > 1:
            self.branches["choices"] += count - 1
        added = added or []
        (given, *others) = [before for _, before in self.sampled[asked:]]
        assert all(other == given for other in others)
        if parent is None:
            text, harmless, oracle = self.whole_conversation(request, tools)
            self.compare(given, text, harmless, messages)
            mask = [0] * len(given)
        else:
            parent = self.recognised(parent, messages[: len(parent.client)], given)
            if any(other.parent is parent for other in self.nodes):
                self.branches["fork"] += 1
            text, harmless, oracle = self.continuation(parent, added, tools)
            self.compare(given[len(parent.tokens) :], text, harmless, added)
            mask = parent.mask + [0] * (len(given) - len(parent.tokens))
        self.note(request, response, messages, oracle, given, mask, parent, asked, tools)

    def note(
        self,
        request: ChatRequest,
        response: Response,
        messages: list[dict[str, Any]],
        oracle: list[dict[str, Any]],
        given: list[int],
        mask: list[int],
        parent: Node | None,
        asked: int,
        tools: list[Any],
    ) -> None:
        body = json.loads(json.dumps(whole(request, response)))
        for (said, _), choice in zip(self.sampled[asked:], body["choices"], strict=True):
            message = choice["message"]
            calls = message.get("tool_calls", [])
            assert choice["finish_reason"] == (
                "length" if said.finish_reason == "length" else "tool_calls" if calls else "stop"
            )
            self.nodes.append(
                Node(
                    [*messages, message],
                    oracle,
                    given + said.tokens,
                    mask + [1] * len(said.tokens),
                    said.ended_by,
                    calls,
                    parent,
                    given,
                    tools,
                )
            )

    def compare(self, given: list[int], text: str, harmless: str, messages: list[dict[str, Any]]) -> None:
        """``harmless``: the text with contents in which nobody has written a special token."""
        assert self.context.decode(given) == text
        special = special_in(self.tokenizer, self.family, given)
        assert special == special_in(self.tokenizer, self.family, self.tokenizer.encode(harmless))
        if not any(one in str(message["content"]) for one in self.family.special for message in messages):
            assert given == self.tokenizer.encode(text)

    def whole_conversation(self, request: ChatRequest, tools: list[Any]) -> tuple[str, str, list[dict[str, Any]]]:
        plain = []
        for message in request.messages:
            one: dict[str, Any] = {"role": message.role.replace("developer", "system"), "content": message.text}
            if message.tool_calls:
                one["tool_calls"] = [
                    {
                        "id": call.id,
                        "type": "function",
                        "function": {
                            "name": call.function.name,
                            "arguments": arguments(call.function.arguments, self.name),
                        },
                    }
                    for call in message.tool_calls
                ]
            if message.reasoning_content:
                one["reasoning_content"] = message.reasoning_content
            if message.tool_call_id:
                one["tool_call_id"] = message.tool_call_id
                one["name"] = next(
                    call.function.name
                    for other in request.messages
                    for call in other.tool_calls or ()
                    if call.id == message.tool_call_id
                )
            plain.append(one)
        harmless = [one if one["role"] == "assistant" else one | {"content": "-"} for one in plain]
        first, second = (self.context.render(one, tools=tools) for one in (plain, harmless))
        return first, second, plain

    def continuation(
        self, parent: Node, added: list[dict[str, Any]], tools: list[Any]
    ) -> tuple[str, str, list[dict[str, Any]]]:
        """Return the text behind what the policy said, from the whole conversation with a mark in its place."""
        mark, called = f"U{len(self.nodes)}U", added[0]["role"] == "tool"
        said: dict[str, Any] = {"role": "assistant", "content": "" if called else mark}
        if called:
            value: Any = {"value": mark} if self.name != "deepseek" else json.dumps({"value": mark})
            said["tool_calls"] = [
                {
                    "id": call["id"],
                    "type": "function",
                    "function": {"name": call["function"]["name"], "arguments": value},
                }
                for call in parent.calls[: None if self.family.many else 1]
            ]
        names = {call["id"]: call["function"]["name"] for call in parent.calls}
        named = [{**one, "name": names[one["tool_call_id"]]} if called else one for one in added]
        before = [*parent.oracle, said]
        harmless = [one | {"content": "-"} for one in named]
        first, second = (
            self.behind([*before, *those], mark, called, parent.ended_by, tools) for those in (named, harmless)
        )
        return first, second, [*before, *named]

    def behind(
        self, messages: list[dict[str, Any]], mark: str, called: bool, ended_by: str | None, tools: list[Any]
    ) -> str:
        text = self.context.render(messages, tools=tools).rpartition(mark)[2]
        if self.name == "llama":
            written = "<|eot_id|>"
        else:
            written = self.family.call_end if called else self.family.rewrites_end or self.family.text_end
        _, end, rest = text.partition(written)
        assert end
        return end + rest if ended_by is None else rest


def arguments(text: Any, name: str) -> Any:
    value = text
    if isinstance(text, str):
        try:
            value = json.loads(text)
        except ValueError:
            return text
        value = value if isinstance(value, dict) else text
    return json.dumps(value, ensure_ascii=False) if name == "deepseek" and isinstance(value, dict) else value


def thought(message: dict[str, Any]) -> str:
    return message.get("reasoning_content", "")


def meaning(message: dict[str, Any]) -> Any:
    calls = [
        (call["function"]["name"], json.loads(written_anew(call["function"]["arguments"])))
        for call in message.get("tool_calls", [])
    ]
    return message["content"] or "", calls


def written_anew(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return json.dumps({"INVALID_JSON": text})
    return json.dumps(value, indent=2, sort_keys=True)


def calls_as_text(message: dict[str, Any]) -> dict[str, Any]:
    calls = [
        {
            "id": call["id"],
            "type": "function",
            "function": {"name": call["function"]["name"], "arguments": call["function"]["arguments"]},
        }
        for call in message["tool_calls"]
    ]
    text = f"{message['content'] or ''}\nCalling tools:\n{calls}"
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


@pytest.fixture(scope="module", params=list(FAMILIES))
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tokenizer]:
    return request.param, write_family(tmp_path_factory.mktemp(request.param), FAMILIES[request.param])


@pytest.mark.parametrize("seed", range(8))
def test_sessions(named: tuple[str, Tokenizer], seed: int) -> None:
    asyncio.run(Driver(*named, seed).play())


@pytest.mark.slow
def test_a_thousand_sessions(named: tuple[str, Tokenizer]) -> None:
    for seed in range(8, 175):  # of each of six families
        asyncio.run(Driver(*named, seed).play())
