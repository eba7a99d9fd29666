"""Random conversations under the templates of several families: sampled tokens stay as they are, what is appended is
what the template writes in the real conversation, and nothing else reaches the tokenizer.
"""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any, NamedTuple

import pytest

from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.environments.chat import Chat, Reply
from miles_spmd.types.trajectory import FinishReason
from tests.environments.families import FAMILIES, Family, write_family
from tests.environments.scripted import ScriptedContext, Turn, to_prompt

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"To {name}",
            "parameters": {"type": "object", "properties": {"value": {"type": "string", "description": "value"}}},
        },
    }
    for name in ("look", "add")
]
PIECES = [
    "Oslo", "Tromsø", "你好", "🙂", '{"a": [1, 2]}', "\n", "\n\n", "  ", " x ", "}", "Zq7A", "Zq70E", "<b>", "'", '"',
    "\\n",
    "3.14", "</tool_response>", "<tool_call>",
]  # fmt: skip
THOUGHTS = {
    "qwen": ("<think>\n", "\n</think>\n\n"),
    "deepseek": ("", "</think>"),
    "glm": ("\n<think>", "</think>\n"),
    "harmony": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
}


class Spoken(NamedTuple):
    """What one turn of the policy is meant to be."""

    tokens: list[int]
    ended_by: str | None  # the token that it ends with, if it is special
    finish_reason: FinishReason


@pytest.fixture(scope="module", params=list(FAMILIES))
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tokenizer]:
    return request.param, write_family(tmp_path_factory.mktemp(request.param), FAMILIES[request.param])


def content(rng: random.Random, family: Family) -> str:
    return "".join(rng.choice([*PIECES, *family.special]) for _ in range(rng.randint(0, 6))) or "-"


def spoken(rng: random.Random, name: str, tokenizer: Tokenizer) -> Spoken:
    """A turn of random tokens, with calls in half of them, which ends in every way that there is."""
    family = FAMILIES[name]
    special = [tokenizer.encode(text)[0] for text in (*family.special, *family.added)]
    noise = [i for i in (rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(0, 12))) if i not in special]
    before, behind = map(tokenizer.encode, THOUGHTS.get(name, ("", "")))
    calls = rng.choice([0, 0, 1, 1, 2 if family.many else 1])
    if calls or before:
        noise = [*before, *noise, *behind] if before or behind or calls == 0 else []
    for _ in range(calls):
        text = family.call.replace("NAME", rng.choice(["look", "add", "unknown"])).replace("VALUE", "so")
        noise += tokenizer.encode(text.replace("ARGUMENTS", rng.choice(['{"value": "so"}', "{}", "{broken", "[1]"])))
    kind = rng.random()
    if kind < 0.1 and noise and noise[-1] not in special:  # a stop string
        return Spoken(noise, None, FinishReason.STOP)
    if kind < 0.2 and noise:
        return Spoken(noise, None, FinishReason.LENGTH)
    end = family.call_end if calls else family.text_end
    return Spoken([*noise, *tokenizer.encode(end)], end, FinishReason.STOP)


class Oracle:
    """The conversation as the template writes it as a whole, with a mark in place of what the policy said."""

    def __init__(self, context: ScriptedContext, name: str, messages: list[dict[str, Any]]) -> None:
        self._context, self._name, self._messages = context, name, list(messages)
        self._turns = 0

    def continuation(self, reply: Reply, added: list[dict[str, Any]], ended_by: str | None) -> tuple[str, str]:
        """The text behind what the policy said, from the whole conversation as it is now; and as it would be with other
        contents."""
        family, mark = FAMILIES[self._name], f"U{self._turns}U"
        self._turns += 1
        message: dict[str, Any] = {"role": "assistant", "content": "" if reply.calls else mark}
        if reply.calls:
            value: Any = {"value": mark} if self._name != "deepseek" else json.dumps({"value": mark})
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": value}}
                for call in reply.calls[: None if family.many else 1]
            ]
        said = [*self._messages, message]
        self._messages = said + added
        texts = (self._messages, said + [{**each, "content": "-"} for each in added])
        first, second = (self._behind(messages, mark, bool(reply.calls), ended_by) for messages in texts)
        return first, second

    def _behind(self, messages: list[dict[str, Any]], mark: str, called: bool, ended_by: str | None) -> str:
        family = FAMILIES[self._name]
        text = self._context.render(messages, tools=TOOLS).rpartition(mark)[2]
        if self._name == "llama":
            written = "<|eot_id|>"
        else:
            written = family.call_end if called else family.rewrites_end or family.text_end
        _, end, behind = text.partition(written)
        assert end
        return end + behind if ended_by is None else behind


async def converse(name: str, tokenizer: Tokenizer, seed: int) -> None:
    rng, family = random.Random(f"{name} {seed}"), FAMILIES[name]
    turns = [spoken(rng, name, tokenizer) for _ in range(rng.randint(1, 4))]
    context = ScriptedContext(tokenizer, [Turn(turn.tokens, turn.finish_reason) for turn in turns])
    prompt = to_prompt(tokenizer, [{"role": "user", "content": "What now?"}], TOOLS)
    chat = Chat(context, prompt, tools=TOOLS)
    oracle = Oracle(context, name, chat.messages)
    tokens, mask, characters, rest = list(prompt.tokens), list[int](), 0, 0
    for turn in turns:
        before = len(chat.trajectory.tokens)
        reply = await chat.respond()
        assert reply.complete == (turn.finish_reason is FinishReason.STOP)
        tokens += turn.tokens
        mask += [1] * len(turn.tokens)
        rest += 2 * len(context.decode(turn.tokens[-1:]))  # the question whether a token is special
        assert chat.trajectory.tokens[before:] == turn.tokens
        if not reply.calls and name == "mistral":
            break  # its tools move to the last user
        added = [
            {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": content(rng, family)}
            for call in reply.calls
        ] or [{"role": "user", "content": content(rng, family)}]
        expected, harmless = oracle.continuation(reply, added, turn.ended_by)
        before = len(chat.trajectory.tokens)
        assert chat.add(added)
        appended = chat.trajectory.tokens[before:]
        assert context.decode(appended) == expected
        if not any(text in message["content"] for text in family.special for message in added):
            assert appended == tokenizer.encode(expected)
        assert special_in(tokenizer, family, appended) == special_in(tokenizer, family, tokenizer.encode(harmless))
        tokens += appended
        mask += [0] * len(appended)
        characters += len(expected)
    assert chat.trajectory.tokens == tokens
    assert chat.trajectory.loss_mask == mask
    assert characters <= sum(map(len, context.encoded)) <= characters + rest


def special_in(tokenizer: Tokenizer, family: Family, tokens: list[int]) -> list[int]:
    special = {tokenizer.encode(text)[0] for text in family.special}
    return [token for token in tokens if token in special]


@pytest.mark.parametrize("seed", range(8))
def test_conversations(named: tuple[str, Tokenizer], seed: int) -> None:
    asyncio.run(converse(*named, seed))


@pytest.mark.slow
def test_a_thousand_conversations(named: tuple[str, Tokenizer]) -> None:
    for seed in range(8, 175):  # of each of six families
        asyncio.run(converse(*named, seed))
