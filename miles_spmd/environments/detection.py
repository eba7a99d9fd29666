"""Which format of tool calls a chat template writes: the one whose parser reads back a call that the template wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from miles_spmd.environments import sglang_parsers
from miles_spmd.environments.call_formats import ALIASES
from miles_spmd.environments.calls import CallParser, detect_reasoning
from miles_spmd.environments.continuation import Render

_NAME, _ARGUMENTS = "get_item", {"place": "Oslo Q7", "count": 3}
_SCHEMA = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Item at a place",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "place"},
                "count": {"type": "integer", "description": "count"},
            },
            "required": ["place", "count"],
        },
    },
}
_USER = {"role": "user", "content": "Hi"}
_STYLES = (("", False), ("", True), (None, False), (None, True))  # content beside a call; arguments as JSON text
_END_TOKEN = re.compile(r"\s*<[^<>]+>\s*\Z")
_OPEN_TAG = re.compile(r"<[^<>]*\Z")
# Where several formats read the same call, those that read most of what models write; then by name.
_PREFERRED = ("hermes", "qwen3_coder", "glm45", "glm47")


def detect_format(render: Render) -> str:
    """Return the name of the format. Raises ValueError where none fits."""
    names = [name for name in sglang_parsers.call_formats() if name not in ALIASES]
    for prompt, text in _written_calls(render):
        unread = {name: _unread(name, prompt, text) for name in names}
        if found := {name: count for name, count in unread.items() if count is not None}:
            return min(found, key=lambda name: (found[name], _rank(name), name))
    raise ValueError(
        "call_format = 'auto': the chat template writes tool calls in no format that is known, or not at all; name the "
        f"format that the model was trained on: {', '.join(sglang_parsers.call_formats())}"
    )


def _rank(name: str) -> int:
    return _PREFERRED.index(name) if name in _PREFERRED else len(_PREFERRED)


def _written_calls(render: Render) -> Iterator[tuple[str, str]]:
    """Yield what the template writes to begin a message, and what it writes for one with a call."""
    for content, as_text in _STYLES:
        arguments = json.dumps(_ARGUMENTS) if as_text else _ARGUMENTS
        function = {"name": _NAME, "arguments": arguments}
        call = {"id": "call00000", "type": "function", "function": function}
        message = {"role": "assistant", "content": content, "tool_calls": [call]}
        try:
            prompt = render([_USER], tools=[_SCHEMA], add_generation_prompt=True)
            whole = render([_USER, message], tools=[_SCHEMA], add_generation_prompt=False)
        except ValueError:  # a template may refuse one of the styles
            continue
        same = next((i for i, (a, b) in enumerate(zip(prompt, whole)) if a != b), min(len(prompt), len(whole)))
        same = len(_OPEN_TAG.sub("", whole[:same]))
        for before in (whole[:same], prompt):  # a prompt may open reasoning that the template leaves out later
            yield before, _END_TOKEN.sub("", whole[same:])
            yield before, whole[same:]  # where the last tag belongs to the call


def _unread(name: str, prompt: str, text: str) -> int | None:
    """Return how many characters a format leaves as content, such as an end token; None where it misses the call."""
    message = CallParser(name, [_SCHEMA], detect_reasoning(text)).parse(text, prompt, 0)
    calls = [(call.name, call.arguments) for call in message.calls]
    return len(message.content) if calls == [(_NAME, _ARGUMENTS)] else None
