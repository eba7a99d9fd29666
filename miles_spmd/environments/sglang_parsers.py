"""SGLang's parsers of tool calls and of reasoning, as a library: text in, text out.

``import sglang`` loads torch and more, which parsing text does not need, so the modules with the parsers are imported
below stand-ins for the package and for xgrammar, which are removed again afterwards.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

_STAND_INS = ("sglang", "xgrammar")


class _Parsers(NamedTuple):
    tool: Any  # the class of a tool's schema
    calls: Any  # FunctionCallParser
    reasoning: Any  # ReasoningParser


def call_formats() -> tuple[str, ...]:
    """Return the names of all formats of tool calls; they are those of SGLang's ``--tool-call-parser``."""
    return tuple(sorted(_parsers().calls.ToolCallParserEnum))


def reasoning_formats() -> tuple[str, ...]:
    """Return the names of all formats of reasoning; they are those of SGLang's ``--reasoning-parser``."""
    return tuple(sorted(_parsers().reasoning.DetectorMap))


def parse_calls(name: str, schemas: Sequence[dict[str, Any]], text: str) -> tuple[str, list[tuple[str, str]]]:
    """Return what else is in ``text``, and its calls as names and JSON texts of arguments, in format ``name``.

    SGLang's parser raises what it happens to raise, or leaves out what it cannot read: see ``CallParser``."""
    parser = _parsers().calls(_tools(schemas), name)
    rest, calls = parser.parse_non_stream(text)
    return rest, [(call.name or "", call.parameters) for call in calls]


def mentions_call(name: str, schemas: Sequence[dict[str, Any]], text: str) -> bool:
    """Return whether ``text`` has a call in format ``name``, one that cannot be read included."""
    return bool(_parsers().calls(_tools(schemas), name).has_tool_call(text))


def split_reasoning(name: str, text: str, opened: bool) -> tuple[str, str]:
    """Return the reasoning in ``text`` and the rest, in format ``name``; ``opened``: it begins inside the reasoning,
    which the prompt has opened."""
    parser = _parsers().reasoning(name, force_reasoning=True if opened else None)
    reasoning, rest = parser.parse_non_stream(text)
    return reasoning or "", rest or ""


@cache
def reasoning_start(name: str) -> str:
    """Return the text that opens reasoning in format ``name``."""
    return _parsers().reasoning(name).detector.think_start_token


def _tools(schemas: Sequence[dict[str, Any]]) -> list[Any]:
    return [_parsers().tool(type="function", function=schema["function"]) for schema in schemas]


@cache
def _parsers() -> _Parsers:
    with _stand_ins():
        from sglang.srt.entrypoints.openai.protocol import Tool
        from sglang.srt.environ import envs
        from sglang.srt.function_call.function_call_parser import FunctionCallParser
        from sglang.srt.parser.reasoning_parser import ReasoningParser
    envs.SGLANG_FORWARD_UNKNOWN_TOOLS.set(True)  # which would otherwise be left out, and their text with them
    logging.getLogger("sglang").setLevel(logging.CRITICAL)  # a log line for every call that cannot be read
    return _Parsers(Tool, FunctionCallParser, ReasoningParser)


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Let SGLang's modules be imported without their package's own initialisation, unless it has been imported."""
    if "sglang" in sys.modules:
        yield
        return
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in _STAND_INS}
    found = importlib.util.find_spec("sglang")
    if found is None or found.submodule_search_locations is None:
        raise ModuleNotFoundError("parsing tool calls requires sglang: install launch/requirements-cpu.txt")
    package, grammar = map(types.ModuleType, _STAND_INS)
    package.__path__ = list(found.submodule_search_locations)
    vars(grammar).update(StructuralTag=Any, get_model_structural_tag=None)
    sys.modules |= {"sglang": package, "xgrammar": grammar}
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in _STAND_INS]:
            del sys.modules[name]
        sys.modules.update(before)
