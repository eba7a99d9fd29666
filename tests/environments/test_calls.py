"""Calls in the formats of models: read, or reported as what cannot be read, and never lost."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import pytest

from miles_spmd.environments import sglang_parsers
from miles_spmd.environments.call_formats import MARKUP
from miles_spmd.environments.calls import CallParser, Message, detect_reasoning
from miles_spmd.environments.detection import detect_format
from tests.environments.families import FAMILIES, write_family
from tests.environments.scripted import ScriptedContext

SCHEMAS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": name,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "n": {"type": "integer"}, "list": {"type": "array"}},
            },
        },
    }
    for name in ("weather", "add")
]


def parse(name: str, text: str, prompt: str = "", reasoning: str | None = None) -> Message:
    reasoning = reasoning or ("gpt-oss" if name == "gpt-oss" else "qwen3")
    return CallParser(name, SCHEMAS, reasoning).parse(text, prompt, 0)


def read(message: Message) -> list[tuple[str, Any]]:
    """Names and arguments, or for a call that cannot be read the reason."""
    return [(call.name, call.problem or call.arguments) for call in message.calls]


OSLO, ROME = ("weather", {"city": "Oslo", "n": 3}), ("weather", {"city": "Rome", "n": 1})
_CALL = '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>'
_XML = (
    "<tool_call>\n<function=weather>\n<parameter=city>\n%s\n</parameter>\n<parameter=n>\n%s\n</parameter>\n"
    "</function>\n</tool_call>"
)
_GLM = (
    "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>%s</arg_value>\n<arg_key>n</arg_key>\n"
    "<arg_value>%s</arg_value>\n</tool_call>"
)
_V31 = '<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "%s", "n": %s}<｜tool▁call▁end｜>'
_V3 = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "%s", "n": %s}\n```<｜tool▁call▁end｜>'
_CALLS = "<｜tool▁calls▁begin｜>%s<｜tool▁calls▁end｜>"
_KIMI = '<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{"city": "%s", "n": %s}<|tool_call_end|>'
_INVOKE = (
    '<invoke name="weather">\n<parameter name="city">%s</parameter>\n<parameter name="n">%s</parameter>\n</invoke>'
)
_DSML = (
    '<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="city" string="true">%s</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="n" string="false">%s</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
)
_HARMONY = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "%s", "n": %s}<|call|>'
TWO_CALLS = {
    "hermes": _CALL % '{"city": "Oslo", "n": 3}' + "\n" + (_CALL % '{"city": "Rome", "n": 1}').replace("\n", ""),
    "qwen25": _CALL % '{"city": "Oslo",  "n":3}' + _CALL % json.dumps('{"city": "Rome", "n": 1}'),
    "qwen3_coder": _XML % ("Oslo", 3) + "\n" + _XML % ("Rome", 1),
    "glm45": _GLM % ("Oslo", 3) + "\n" + _GLM % ("Rome", 1),
    "glm47": (_GLM % ("Oslo", 3) + _GLM % ("Rome", 1)).replace("\n", ""),
    "deepseekv3": _CALLS % (_V3 % ("Oslo", 3) + "\n" + _V3 % ("Rome", 1)),
    "deepseekv31": _CALLS % (_V31 % ("Oslo", 3) + _V31 % ("Rome", 1)),
    "deepseekv32": f"<｜DSML｜function_calls>\n{_DSML % ('Oslo', 3)}{_DSML % ('Rome', 1)}</｜DSML｜function_calls>",
    "deepseekv4": f"<｜DSML｜tool_calls>\n{_DSML % ('Oslo', 3)}{_DSML % ('Rome', 1)}</｜DSML｜tool_calls>",
    "kimi_k2": f"<|tool_calls_section_begin|>{_KIMI % ('Oslo', 3)}{_KIMI % ('Rome', 1)}<|tool_calls_section_end|>",
    "minimax-m2": f"<minimax:tool_call>\n{_INVOKE % ('Oslo', 3)}\n{_INVOKE % ('Rome', 1)}\n</minimax:tool_call>",
    "llama3": '<|python_tag|>{"name": "weather", "parameters": {"city": "Oslo", "n": 3}}; '
    '{"name": "weather", "parameters": {"city": "Rome", "n": 1}}',
    "pythonic": '[weather(city="Oslo", n=3), weather(city="Rome", n=1)]',
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo", "n": 3}}, '
    '{"name": "weather", "arguments": {"city": "Rome", "n": 1}}]',
    "gpt-oss": _HARMONY % ("Oslo", 3) + "<|start|>assistant" + _HARMONY % ("Rome", 1),
}


@pytest.mark.parametrize("name", TWO_CALLS)
def test_two_calls(name: str) -> None:
    message = parse(name, TWO_CALLS[name])
    assert read(message) == [OSLO, ROME]
    assert not message.content
    later = CallParser(name, SCHEMAS, "qwen3").parse(TWO_CALLS[name], "", 2)
    assert len({call.id for call in (*message.calls, *later.calls)}) == 4
    assert message == parse(name, TWO_CALLS[name])
    assert json.loads(message.to_chat()["tool_calls"][0]["function"]["arguments"]) == OSLO[1]


JSON_TEXT = "it is not valid JSON"
CASES: list[tuple[str, str, str, list[Any]]] = [
    ("hermes", "Sure. " + _CALL % '{"city": "Tromsø"}' + " Done.", "Sure.  Done.", [("weather", {"city": "Tromsø"})]),
    ("hermes", _CALL % "{'city': 1}" + _CALL % '{"n": 1}', "", [("weather", JSON_TEXT), ("weather", {"n": 1})]),
    ("hermes", (_CALL % '{"n": 1}')[:-20], "", [("weather", "it does not end with </tool_call>")]),
    ("hermes", "<tool_call>\n[1]\n</tool_call>", "", [("unknown", "not in the format")]),
    ("hermes", "<tool_call>\n{}\n</tool_call>", "", [("unknown", "it has no name of a tool")]),
    ("hermes", _CALL % "[1]", "", [("weather", "its arguments are a list, not an object")]),
    ("hermes", _CALL % "7", "", [("weather", "its arguments are a number, not an object")]),
    ("hermes", (_CALL % "{}").replace("weather", "nothing"), "", [("nothing", {})]),
    ("hermes", _CALL % ('{"list": ' + "[" * 100_000 + "]" * 100_000 + "}"), "", [("weather", "nested too deeply")]),
    ("hermes", _CALL % r'{"city": "\ud83d"}', "", [("weather", {"city": "\ud83d"})]),
    ("hermes", _CALL % f'{{"n": {"9" * 5000}}}', "", [("weather", "limit")]),
    ("hermes", "Nothing to call: {}", "Nothing to call: {}", []),
    ("qwen3_coder", (_XML % ("Oslo", 3))[:-40], "", [("weather", "it does not end with </tool_call>")]),
    ("qwen3_coder", _XML % ("  Oslo \n", "three"), "", [("weather", {"city": "  Oslo \n", "n": "three"})]),
    ("glm45", "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Os", "", [("unknown", "does not end with")]),
    ("deepseekv31", _CALLS % ("Hm " + _V31 % ("a", "}")), "Hm", [("unknown", JSON_TEXT)]),
    ("kimi_k2", _KIMI % ("a", "x"), "", [("weather", "its arguments are not valid JSON")]),
    ("llama3", '{"name": "weather", "parameters": {"n": 1}}', "", [("weather", {"n": 1})]),
    ("llama3", '{"name": "weather", "parameters": {"n": 1}', "", [("weather", JSON_TEXT)]),
    ("llama3", '{"temperature": 3}', '{"temperature": 3}', []),
    ("llama3", '<|python_tag|>weather.call(city="Oslo")', "", [("weather.call", "not in the format")]),
    ("llama3", '<|python_tag|>{"name": "add", "parameters": {}}; {"name": ', "", [("add", {}), ("unknown", JSON_TEXT)]),
    ("pythonic", '[weather(city="Oslo"', "", [("weather", "never closed")]),
    ("pythonic", "[weather('Oslo')]", "", [("weather", "arguments have names")]),
    ("pythonic", "[weather(n=f())]", "", [("weather", "malformed")]),
    ("pythonic", "[1, 2]", "[1, 2]", []),
    ("mistral", '[TOOL_CALLS][{"name": "add", "arguments": {}, "id": "abcdefgh0"}]', "", [("add", {})]),
    ("mistral", '[TOOL_CALLS]add[CALL_ID]abc[ARGS]{"n": 1}', "", [("add", {"n": 1})]),
    ("mistral", '[TOOL_CALLS]add[ARGS]{}[TOOL_CALLS]add[ARGS]{"n": ', "", [("add", {}), ("unknown", JSON_TEXT)]),
    ("mistral", "[TOOL_CALLS] [{'name'", "", [("unknown", JSON_TEXT)]),
    ("gpt-oss", " to=functions.add<|channel|>commentary json<|message|>{}<|call|>", "", [("add", {})]),
    ("gpt-oss", "<|channel|>commentary to=functions.add json<|message|>{broken", "", [("add", JSON_TEXT)]),
    ("gpt-oss", "<|channel|>final<|message|>It is 19.", "It is 19.", []),
    ("gpt-oss", "no channel at all", "no channel at all", []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES, ids=lambda value: str(value)[:20])
def test_what_else_models_write(name: str, text: str, content: str, calls: list[tuple[str, Any]]) -> None:
    message = parse(name, text)
    assert message.content == content
    found = read(message)
    assert [name for name, _ in found] == [name for name, _ in calls]
    for call, (_, expected), (_, actual) in zip(message.calls, calls, found):
        assert expected in actual if isinstance(expected, str) else expected == actual
        assert bool(call.problem) == isinstance(expected, str)
        json.dumps(message.to_chat()).encode()


_HARMONY_TEXT = "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>Hi"
REASONING = [
    ("qwen3", "", "<think>\nHm\n</think>\n\nHi", "Hm", "Hi"),
    ("qwen3", "...<think>\n", "Hm\n</think>\n\nHi", "Hm", "Hi"),
    ("qwen3", "...<think>\n", "cut", "cut", ""),
    ("qwen3", "", "Hi", "", "Hi"),
    ("qwen3", "<think>\n", "If <tool_call>{}</tool_call></think>Hi", "If <tool_call>{}</tool_call>", "Hi"),
    ("gpt-oss", "", _HARMONY_TEXT, "Hm", "Hi"),
]


@pytest.mark.parametrize(("name", "prompt", "text", "reasoning", "content"), REASONING)
def test_reasoning(name: str, prompt: str, text: str, reasoning: str, content: str) -> None:
    message = parse("gpt-oss" if name == "gpt-oss" else "hermes", text, prompt, name)
    assert (message.reasoning, message.content) == (reasoning, content)
    assert not message.calls


def test_formats_of_reasoning_by_the_marks_of_templates() -> None:
    assert detect_reasoning("<|im_start|>assistant\n") == "qwen3"
    assert detect_reasoning("<|start|>assistant<|channel|>final<|message|>") == "gpt-oss"


def random_texts(rng: random.Random, pieces: Sequence[str]) -> str:
    return "".join(rng.choice(pieces) for _ in range(rng.randint(1, 12)))


@pytest.mark.parametrize("name", sorted({*sglang_parsers.call_formats()}))
def test_random_texts_raise_nothing_and_lose_no_call(name: str) -> None:
    """Pieces of real calls in any order: every opening of a call becomes a call, and all in a short time."""
    rng, seconds = random.Random(name), time.monotonic()
    text = TWO_CALLS.get(name, "")
    cuts = [0, *sorted(rng.sample(range(1, len(text)), 12)), len(text)] if text else [0]
    pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
    pieces += ["<tool_call>", "</tool_call>", "{", "}", '"', "[", "]", "add(", "x=1, ", "\n", "<think>", "ø"]
    for _ in range(150):
        written = random_texts(rng, pieces)
        message = parse(name, written, reasoning="kimi")
        if name in MARKUP:
            assert len(message.calls) >= written.count(MARKUP[name].opening)
    assert time.monotonic() - seconds < 20


@pytest.mark.parametrize("family", FAMILIES)
def test_the_format_of_a_template_is_found(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    context = ScriptedContext(write_family(tmp_path_factory.mktemp(family), FAMILIES[family]), [])
    assert detect_format(context.render) == FAMILIES[family].format


def test_a_template_without_calls_has_no_format(tmp_path_factory: pytest.TempPathFactory) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    family = FAMILIES["qwen"]._replace(template=template)
    context = ScriptedContext(write_family(tmp_path_factory.mktemp("plain"), family), [])
    with pytest.raises(ValueError, match=r"call_format = 'auto': .*name the format .*deepseekv3, .*hermes"):
        detect_format(context.render)
    with pytest.raises(ValueError, match=r"'qwen9' is not a format of tool calls; known: auto, .*hermes"):
        CallParser("qwen9", SCHEMAS, "qwen3")


def test_parsers_load_no_torch_and_leave_no_stand_in() -> None:
    program = (
        "import sys; from miles_spmd.environments import sglang_parsers as p; p.call_formats(); "
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'sglang', 'xgrammar')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
