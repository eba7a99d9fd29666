"""Conversations, and the environment ``tools``, with real tools, tokenizers and templates, and a policy as a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.environments.chat import Chat
from miles_spmd.environments.continuation import ContinuationError
from miles_spmd.environments.process import load_environment
from miles_spmd.environments.tools import tools
from miles_spmd.plugins.plug_point import PlugPointError
from miles_spmd.types.sample import Prompt
from miles_spmd.types.trajectory import FinishReason, Trajectory
from tests.environments.families import FAMILIES, write_family
from tests.environments.scripted import ScriptedContext, Turn, to_prompt
from tests.environments.user_tools import VerlSearch

HERE = "tests.environments.user_tools:"
QUESTION = [{"role": "user", "content": "What is the weather?"}]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_family(tmp_path_factory.mktemp("qwen"), FAMILIES["qwen"])


def context_of(tokenizer: Tokenizer, *texts: str, room: int = 100_000) -> ScriptedContext:
    return ScriptedContext(tokenizer, [Turn(tokenizer.encode(text)) for text in texts], room)


def call(name: str, **arguments: Any) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def run(context: ScriptedContext, prompt: Prompt, *functions: Any, **settings: Any) -> Trajectory:
    names = [HERE + each if isinstance(each, str) else each for each in functions]
    return asyncio.run(tools(context, prompt, functions=names, **settings))


def test_a_conversation_with_tools(qwen: Tokenizer) -> None:
    context = context_of(
        qwen,
        "<think>\nHm.\n</think>\n\nLet me see."
        + call("weather", city="Oslo")
        + "\n"
        + call("add", a=1, b=2)
        + "<|im_end|>",
        call("weather", town="Oslo") + call("nothing") + "<tool_call>{broken</tool_call><|im_end|>",
        "<think>\nNow.\n</think>\n\nIt is 19.<|im_end|>",
    )
    trajectory = run(context, to_prompt(qwen, QUESTION), "weather", "add")
    assert trajectory.text == "It is 19."
    assert trajectory.finish_reason is FinishReason.STOP
    assert trajectory.turns == 3
    assert [message["role"] for message in trajectory.messages] == [
        "user", "assistant", "tool", "tool", "assistant", "tool", "tool", "tool", "assistant",
    ]  # fmt: skip
    assert trajectory.messages[1]["reasoning_content"] == "Hm."
    assert [message["content"] for message in trajectory.messages[2:4]] == ["Oslo: 1 x 19 c", "3.0"]
    ids = [each["id"] for message in trajectory.messages for each in message.get("tool_calls", [])]
    assert [message["tool_call_id"] for message in trajectory.messages if message["role"] == "tool"] == ids
    assert len(set(ids)) == 5
    text = context.decode(trajectory.tokens)
    assert '"name": "weather"' in text.split("<|im_start|>user")[0]  # the tools, which the prompt did not have
    assert "<tool_response>\nOslo: 1 x 19 c\n</tool_response>\n<tool_response>\n3.0\n</tool_response><|im_end|>" in text
    assert context.metrics == {
        "tool_calls": 5.0,
        "tool_errors/malformed": 1.0,
        "tool_errors/unknown_tool": 1.0,
        "tool_errors/arguments": 1.0,
        "tool_errors/raised": 0.0,
        "tool_errors/timeout": 0.0,
        "tool_errors/died": 0.0,
    }
    msgspec.msgpack.encode(trajectory)


def test_a_response_without_a_call_ends_it(qwen: Tokenizer) -> None:
    trajectory = run(context_of(qwen, "Hello.<|im_end|>"), to_prompt(qwen, QUESTION), "weather")
    assert (trajectory.text, trajectory.turns, trajectory.finish_reason) == ("Hello.", 1, FinishReason.STOP)


def test_a_conversation_is_truncated_after_the_last_turn(qwen: Tokenizer) -> None:
    context = context_of(qwen, *["So:" + call("add", a=1, b=2) + "<|im_end|>"] * 2)
    trajectory = run(context, to_prompt(qwen, QUESTION), "add", max_turns=2)
    assert (trajectory.text, trajectory.turns) == ("So:", 2)
    assert trajectory.finish_reason is FinishReason.LENGTH
    assert context.metrics["tool_calls"] == 1


def test_a_conversation_is_truncated_where_results_do_not_fit(qwen: Tokenizer) -> None:
    prompt = to_prompt(qwen, QUESTION)
    said = call("misbehave", how="long") + "<|im_end|>"
    context = context_of(qwen, said, room=2000)
    trajectory = run(context, prompt, "misbehave")
    assert trajectory.finish_reason is FinishReason.LENGTH
    assert trajectory.turns == 1
    assert trajectory.response == qwen.encode(said)
    assert [message["role"] for message in trajectory.messages] == ["user", "assistant"]


def test_a_call_that_was_cut_is_not_executed(qwen: Tokenizer) -> None:
    tokens = qwen.encode(call("add", a=1, b=2))
    context = ScriptedContext(qwen, [Turn(tokens, FinishReason.LENGTH)])
    trajectory = run(context, to_prompt(qwen, QUESTION), "add")
    assert trajectory.turns == 1
    assert trajectory.finish_reason is FinishReason.LENGTH
    assert "tool_calls" not in context.metrics


def test_a_prompt_that_has_the_tools_keeps_its_tokens(qwen: Tokenizer) -> None:
    first = context_of(qwen, "Hello.<|im_end|>")
    trajectory = run(first, to_prompt(qwen, QUESTION), "weather")
    rendered = Prompt("set:2", qwen.decode(trajectory.start, False), trajectory.start, metadata={"messages": QUESTION})
    again = context_of(qwen, "Hello.<|im_end|>")
    assert run(again, rendered, "weather").start == trajectory.start
    assert not [text for text in again.encoded if "Tools:" in text]


def test_a_template_of_one_call_in_a_message_gets_the_results_of_two(tmp_path: Path) -> None:
    tokenizer = write_family(tmp_path, FAMILIES["llama"])
    calls = [f'{{"name": "add", "parameters": {{"a": 1, "b": {b}}}}}' for b in (2, 3)]
    context = context_of(tokenizer, f"<|python_tag|>{'; '.join(calls)}<|eom_id|>", "3 and 4<|eot_id|>")
    trajectory = run(context, to_prompt(tokenizer, QUESTION), "add")
    role = "<|start_header_id|>ipython<|end_header_id|>\n\n"
    appended = context.decode(next(segment.tokens for segment in trajectory.segments if not segment.sampled))
    assert appended.startswith(f'{role}"3.0"<|eot_id|>{role}"4.0"<|eot_id|>')


def test_functions_with_schemas_of_their_own(qwen: Tokenizer) -> None:
    schema = {"name": "sum", "parameters": {"properties": {"a": {}, "b": {}}}}
    context = context_of(qwen, call("sum", a=1, b=2) + "<|im_end|>", "3<|im_end|>")
    trajectory = run(context, to_prompt(qwen, QUESTION), {"function": HERE + "add", "schema": schema})
    assert trajectory.messages[2]["content"] == "3"
    with pytest.raises(ValueError, match="an entry has function, scheme; write 'module:function'"):
        run(context, to_prompt(qwen, QUESTION), {"function": HERE + "add", "scheme": schema})


def test_tools_of_verl(qwen: Tokenizer) -> None:
    parameters = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
    schema = {"type": "function", "function": {"name": "find", "description": "Find.", "parameters": parameters}}
    first = call("find", query="oslo") + call("find") + call("now") + "<|im_end|>"
    prompt = to_prompt(qwen, QUESTION)
    prompt.metadata["extra_info"] = {"tools_kwargs": {"find": {"create_kwargs": {"ground_truth": "!"}}}}
    trajectory = run(
        context_of(qwen, first, "Done.<|im_end|>"),
        prompt,
        {"verl": HERE + "VerlSearch", "config": {"prefix": "Found"}, "schema": schema},
        {"verl": HERE + "VerlOfItsOwn"},
    )
    found = [message["content"] for message in trajectory.messages if message["role"] == "tool"]
    assert found[0] == "Found OSLO!"
    assert found[1].startswith("Error: the argument 'query' is missing")
    assert found[2] == "noon"
    assert not VerlSearch.live


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"functions": ["tests.environments.user_tools:nothing"]}, "cannot be imported: AttributeError"),
        ({"functions": ["tests.environments.user_tools:untyped"]}, "no type hint for its parameter 'city'"),
        ({"functions": []}, "functions is a list of at least one function"),
        ({"functions": HERE + "add"}, "functions is a list of at least one function"),
        ({"functions": [HERE + "add"], "max_turns": 0}, "max_turns = 0 is not a whole number of at least 1"),
        ({"functions": [HERE + "add"], "max_turns": "3"}, "max_turns = '3' is not a whole number"),
        ({"functions": [HERE + "add"], "tool_workers": 0}, "tool_workers = 0 is not a whole number"),
        ({"functions": [HERE + "add"], "max_result_chars": -1}, "max_result_chars = -1 is not a whole number"),
        ({"functions": [HERE + "add"], "tool_timeout": 0}, "tool_timeout = 0 is not a number above 0"),
        ({"functions": [HERE + "add"], "tool_memory_gib": "1"}, "tool_memory_gib = '1' is not a number above 0"),
        ({"functions": 5}, "functions is a list of at least one function"),
        ({"functions": [HERE + "add"], "call_format": "qwen9"}, "'qwen9' is not a format of tool calls"),
        ({"functions": [{"verl": HERE + "add"}]}, "user_tools:add' is not a class with `async def execute"),
        ({"functions": [{"verl": HERE + "VerlSearch"}]}, "cannot be made with its config and schema: AttributeError"),
        ({}, "missing a required keyword-only argument: 'functions'"),
    ],
)
def test_arguments_are_checked_where_the_environment_is_loaded(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(PlugPointError, match=f"environment.environment = 'tools'.*{problem}"):
        load_environment("tools", arguments)
    assert load_environment("tools", {"functions": [HERE + "add"]})


def test_a_prompt_of_plain_text_has_no_conversation(qwen: Tokenizer) -> None:
    with pytest.raises(ValueError, match="prompt set:1 is plain text; a conversation requires messages"):
        run(context_of(qwen), Prompt("set:1", "Hi", [1, 2]), "add")


def test_a_conversation_without_tools(qwen: Tokenizer) -> None:
    context = context_of(qwen, "One" + call("add") + "<|im_end|>", "<think>\nHm\n</think>\n\nTwo<|im_end|>")

    async def talk() -> Chat:
        chat = Chat(context, to_prompt(qwen, QUESTION))
        with pytest.raises(ValueError, match=r"Chat\.add follows Chat\.respond"):
            chat.add(QUESTION)
        assert (await chat.respond()).content == "One" + call("add")  # without tools, nothing is a call
        with pytest.raises(ValueError, match="contents are strings"):
            chat.add([{"role": "user", "content": [{"type": "text", "text": "And now?"}]}])
        assert chat.add([{"role": "user", "content": "And now? <|im_end|>"}])
        reply = await chat.respond()
        assert (reply.content, reply.message.reasoning) == ("Two", "Hm")
        return chat

    chat = asyncio.run(talk())
    added = [segment.tokens for segment in chat.trajectory.segments if not segment.sampled]
    text = "\n<|im_start|>user\nAnd now? <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert [context.decode(tokens) for tokens in added] == [text]
    assert added[0].count(qwen.encode("<|im_end|>")[0]) == 1


MOVING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'user' and loop.last and tools %}{{ tools | tojson }}{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COUNTING = "{{ messages | length }}" + MOVING.replace("{{ m.content }}", "{{ loop.index }}: {{ m.content }}")
REFUSING = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}{% endfor %}"
)
WITHOUT_RESULTS = MOVING.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' }}")


@pytest.mark.parametrize(
    ("template", "schemas", "problem"),
    [
        (MOVING, (), None),
        (COUNTING, (), "users' messages: what it writes for them depends on earlier messages"),
        (REFUSING + MOVING, ("add",), "results of tools: it refuses them .*no tools here"),
        (WITHOUT_RESULTS, ("add",), "results of tools: it does not write their content"),
        ("{{ bos_token }}", (), "users' messages: it does not write what the assistant said"),
    ],
)
def test_templates_that_cannot_continue_are_one_error(
    tmp_path: Path, template: str, schemas: Sequence[str], problem: str | None
) -> None:
    tokenizer = write_family(tmp_path, FAMILIES["qwen"]._replace(template=template))
    context, prompt = context_of(tokenizer, "Hi<|im_end|>"), Prompt("set:1", "", [1], metadata={"messages": QUESTION})
    given = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in schemas]
    if problem is None:
        Chat(context, prompt)
        return
    with pytest.raises(ContinuationError, match=f"the chat template cannot continue a conversation with {problem}"):
        Chat(context, prompt, tools=given or None, call_format="hermes")
    assert context.metrics == {}


def test_tools_that_move_to_a_later_message_are_found_when_they_would(tmp_path: Path) -> None:
    tokenizer = write_family(tmp_path, FAMILIES["mistral"])
    context = context_of(tokenizer, "Hi</s>")
    given = [{"type": "function", "function": {"name": "add", "parameters": {}}}]

    async def talk() -> None:
        chat = Chat(context, to_prompt(tokenizer, QUESTION), tools=given)
        await chat.respond()
        with pytest.raises(ContinuationError, match="users' messages: what it writes for them depends on earlier"):
            chat.add(QUESTION)

    asyncio.run(talk())
