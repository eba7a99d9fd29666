"""Which format of tool calls a chat template writes: the one whose parser reads back a call that the template wrote."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from miles_spmd.environments import sglang_parsers
from miles_spmd.environments.call_formats import ALIASES, Schema
from miles_spmd.environments.calls import CallParser, reasoning_format

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


class Render(Protocol):
    """Renders a conversation: ``Context.render``."""

    def __call__(
        self, messages: Sequence[dict[str, Any]], *, tools: Sequence[Schema], add_generation_prompt: bool
    ) -> str: ...


def detect_format(render: Render) -> str:
    """Return the name of the format. Raises ValueError where no format, or more than one, fits."""
    names = [name for name in sglang_parsers.call_formats() if name not in ALIASES]
    for prompt, text in _written_calls(render):
        if found := [name for name in names if _reads(name, prompt, text)]:
            return min(found, key=lambda name: (*(name != preferred for preferred in _PREFERRED), name))
    raise ValueError(
        "call_format = 'auto': the chat template writes tool calls in no format that is known, or not at all; name the "
        f"format that the model was trained on: {', '.join(sglang_parsers.call_formats())}"
    )


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
        same = len(_OPEN_TAG.sub("", os.path.commonprefix([prompt, whole])))
        for before in (whole[:same], prompt):  # a prompt may open reasoning that the template leaves out later
            yield before, _END_TOKEN.sub("", whole[same:])
            yield before, whole[same:]  # where the last tag belongs to the call


def _reads(name: str, prompt: str, text: str) -> bool:
    message = CallParser(name, [_SCHEMA], reasoning_format(text)).parse(text, prompt, 0)
    return not message.content and [(call.name, call.arguments) for call in message.calls] == [(_NAME, _ARGUMENTS)]
