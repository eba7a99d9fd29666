"""Formats of tool calls: how the text of a message is divided into calls, and what is read of each.

A format has a name of SGLang's and is read by SGLang's parser, which gets one call at a time: it leaves out calls that
it cannot read, sometimes with the text around them, and from one call nothing can be left out unnoticed.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from miles_spmd.environments import sglang_parsers
from miles_spmd.environments.tool_schemas import Schema

Found = tuple[str, str]  # name of a tool, and its arguments as JSON


class Block(NamedTuple):
    """The text of one call, or of calls that are not marked each. ``text`` is what the model wrote, ``whole`` what the
    parser gets."""

    text: str
    whole: str
    closed: bool = True


class Markup(NamedTuple):
    """How a format marks calls: each ``opening ... closing``, all of a message within ``begin ... end``."""

    opening: str
    closing: str
    begin: str = ""
    end: str = ""

    def divide(self, text: str) -> tuple[str, list[Block]]:
        """Return the text outside of calls, and the calls."""
        opening, closing = re.escape(self.opening), re.escape(self.closing)
        pattern = re.compile(rf"{opening}.*?(?:{closing}|(?={opening})|\Z)", re.DOTALL)
        found = [match.group() for match in pattern.finditer(text)]
        outside = pattern.sub("", text)
        for mark in filter(None, (self.begin, self.end)):
            outside = outside.replace(mark, "")
        return outside, [Block(one, self.begin + one + self.end, one.endswith(self.closing)) for one in found]


_TOOL_CALL = Markup("<tool_call>", "</tool_call>")
_DEEPSEEK = Markup("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
MARKUP = {
    "hermes": _TOOL_CALL,
    "qwen3_coder": _TOOL_CALL,
    "step3p5": _TOOL_CALL,
    "mimo": _TOOL_CALL,
    "glm45": _TOOL_CALL,
    "glm47": _TOOL_CALL,
    "poolside_v1": _TOOL_CALL,
    "trinity": _TOOL_CALL,
    "deepseekv3": _DEEPSEEK,
    "deepseekv31": _DEEPSEEK,
    "deepseekv32": Markup(
        "<｜DSML｜invoke", "</｜DSML｜invoke>", "<｜DSML｜function_calls>", "</｜DSML｜function_calls>"
    ),
    "deepseekv4": Markup("<｜DSML｜invoke", "</｜DSML｜invoke>", "<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"),
    "kimi_k2": Markup(
        "<|tool_call_begin|>", "<|tool_call_end|>", "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
    ),
    "minimax-m2": Markup("<invoke ", "</invoke>", "<minimax:tool_call>", "</minimax:tool_call>"),
}
ALIASES = {"qwen": "hermes", "qwen25": "hermes", "glm": "glm45"}  # qwen25 reads only calls with line breaks in them
_HARMONY_START = "<|start|>assistant"
# the recipient may stand before the channel, as in OpenAI's template, or behind it
_HARMONY_CALL = re.compile(
    r"\A(?P<channel>(?:<\|channel\|>)?\s*\w*)\s*to=(?P<to>[^\s<]+)(?P<rest>[^{]*?)<\|message\|>(?P<arguments>.*?)"
    r"(?P<end><\|call\|>|<\|end\|>|<\|return\|>|\Z)",
    re.DOTALL,
)
_LLAMA_TAG = "<|python_tag|>"
_LLAMA_CALL = re.compile(r'\s*\{\s*"(name|type)"\s*:')
_MISTRAL_MARK, _MISTRAL_ID = "[TOOL_CALLS]", re.compile(r"\[CALL_ID\]\w*")
_PYTHONIC = re.compile(r"\A\[\s*[A-Za-z_][\w.]*\s*\(")
_PYTHONIC_MARKS = re.compile(r"<\|python_(?:start|end)\|>")


def divide(name: str, schemas: Sequence[Schema], text: str) -> tuple[str, list[Block]]:
    """Return what a message says beside its calls, and its calls."""
    if name in _DIVIDE:
        return _DIVIDE[name](text)
    try:
        if not sglang_parsers.mentions_call(name, schemas, text):
            return text, []
        rest, _ = sglang_parsers.parse_calls(name, schemas, text)
    except Exception:
        rest = ""
    return "" if rest == text else rest, [Block(text, text)]


def read(name: str, schemas: Sequence[Schema], block: Block) -> list[Found]:
    """Return the calls of a block. Raises ValueError where it cannot be read, with the reason."""
    if not block.closed:
        raise ValueError(f"it does not end with {MARKUP[name].closing}")
    try:
        if name == "pythonic":
            found = _read_pythonic(block.whole)
        else:
            _, found = sglang_parsers.parse_calls(name, schemas, block.whole)
    except Exception as error:  # parsers raise whatever a broken text makes them raise
        raise ValueError(_reason(block.text) or f"{type(error).__name__}: {error}") from error
    if not found:
        raise ValueError(_reason(block.text) or "it is not in the format of calls")
    return found


def _reason(text: str) -> str | None:
    """Return what is wrong with a call in JSON, None if it is not JSON or nothing is found."""
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or ("<function=" in text) or ("<arg_key>" in text):
        return None
    try:
        json.loads(text[start : end + 1] if end > start else text[start:])
    except ValueError as error:
        return f"it is not valid JSON ({error})"
    except RecursionError:
        return "its JSON is nested too deeply"
    return None


def _divide_llama(text: str) -> tuple[str, list[Block]]:
    """Divide objects of JSON, with ";" or "," between them. What no object begins with is one call that cannot be read
    where a tag announces calls, and content otherwise."""
    before, tag, behind = text.partition(_LLAMA_TAG)
    if not tag:
        before, behind = ("", text) if _LLAMA_CALL.match(text) else (text, "")
    blocks = list[Block]()
    while behind := behind.lstrip(" \n\t;,"):
        try:
            _, end = json.JSONDecoder().raw_decode(behind)
        except (ValueError, RecursionError):
            if blocks and not behind.startswith(("{", "[")):
                break
            end = len(behind)
        blocks.append(Block(behind[:end], _LLAMA_TAG + behind[:end]))
        behind = behind[end:]
    return before + behind, blocks


def _divide_mistral(text: str) -> tuple[str, list[Block]]:
    """Divide texts that begin with a mark. SGLang's parser requires a blank between it and JSON, and takes no id."""
    before, *parts = _MISTRAL_ID.sub("", text).split(_MISTRAL_MARK)
    parts = [f" {part.lstrip()}" if re.match(r"\s*[\[{]", part) else part for part in parts]
    return before, [Block(_MISTRAL_MARK + part, _MISTRAL_MARK + part) for part in parts]


def _divide_pythonic(text: str) -> tuple[str, list[Block]]:
    stripped = _PYTHONIC_MARKS.sub("", text).strip()
    return ("", [Block(text, stripped)]) if _PYTHONIC.match(stripped) else (text, [])


def _read_pythonic(text: str) -> list[Found]:
    """Return the calls of ``[f(a=1), g()]``. SGLang finds them by a regular expression whose time grows exponentially
    with the number of arguments."""
    expression = ast.parse(text, mode="eval").body
    if not isinstance(expression, ast.List):
        raise ValueError("it is not a list of calls")
    found = []
    for call in expression.elts:
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("every element must be a call whose arguments have names, such as f(a=1)")
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        found.append((ast.unparse(call.func), json.dumps(arguments, ensure_ascii=False)))
    return found


def _divide_harmony(text: str) -> tuple[str, list[Block]]:
    """Divide messages with headers: those with a recipient are calls, the analysis is reasoning."""
    said, blocks = [], []
    for message in text.removeprefix(_HARMONY_START).split(_HARMONY_START):
        if match := _HARMONY_CALL.match(message):
            header = f"{_HARMONY_START}<|channel|>commentary to={match['to']} <|constrain|>json<|message|>"
            blocks.append(Block(message, header + match["arguments"] + "<|call|>"))
        else:
            said.append(message)
    return _HARMONY_START.join(said), blocks


_DIVIDE: dict[str, Callable[[str], tuple[str, list[Block]]]] = {
    "gpt-oss": _divide_harmony,
    "llama3": _divide_llama,
    "mistral": _divide_mistral,
    "pythonic": _divide_pythonic,
    **{name: markup.divide for name, markup in MARKUP.items()},
}
