"""From a Python function to the JSON schema by which a chat template shows it to the policy."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_type_hints, is_typeddict

Schema = dict[str, Any]
"""A tool as OpenAI's API has it: ``{"type": "function", "function": {"name", "description", "parameters"}}``."""

_PLAIN = (Any, str, int, float, bool, list, dict, tuple, type(None))  # what arguments are, as JSON has them
_EXAMPLE = '''def weather(city: str, days: int = 1) -> str:
    """Weather forecast for a city.

    Args:
        city: Name of the city.
        days: Number of days.
    """'''


class SchemaError(ValueError):
    """A function without what its schema requires. The message names it, the parameter, and the remedy."""


def tool_schema(function: Callable[..., Any], given: Schema | None = None) -> Schema:
    """Return the schema of ``function``: from its signature, type hints and docstring in Google style, or the one that
    is ``given``, with or without the part around ``"function"``. Raises SchemaError."""
    name = getattr(function, "__name__", None) or repr(function)
    if given is not None:
        return _complete(given, name)
    from transformers.utils.chat_template_utils import get_json_schema

    if problem := _problem(function):
        raise SchemaError(f"tool {name!r} {problem}; write it like this:\n{_EXAMPLE}")
    try:
        return _with_arrays(get_json_schema(function), _hints(function))
    except Exception as error:  # it raises what it happens to meet
        problem = str(error) or type(error).__name__
        raise SchemaError(f"tool {name!r} has no usable schema: {problem}; write it like this:\n{_EXAMPLE}") from error


def _problem(function: Callable[..., Any]) -> str | None:
    try:
        parameters = inspect.signature(function).parameters.values()
        hints = _hints(function)
    except (TypeError, ValueError):
        return "has no signature"
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        return "yields; a tool returns its result"
    if not (inspect.getdoc(function) or "").strip():
        return "has no docstring, which tells the policy what it does"
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            return f"has the parameter {str(parameter)!r}; a policy gives arguments by name"
        if parameter.annotation is parameter.empty and parameter.name != "self":
            return f"has no type hint for its parameter {parameter.name!r}"
        hint = hints.get(parameter.name)
        if isinstance(hint, type) and hint not in _PLAIN and not is_typeddict(hint):
            return (
                f"has the type hint {hint.__name__} for its parameter {parameter.name!r}; a policy gives str, int, "
                "float, bool, list or dict, and Literal[...] names the values that it may choose from"
            )
    return None


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except Exception:  # a name that does not exist here, which transformers reports
        return {}


def _with_arrays(schema: Schema, hints: Mapping[str, Any]) -> Schema:
    """Correct what transformers writes for ``list`` and ``tuple`` without the type of their items: an object."""
    for name, parameter in schema["function"]["parameters"]["properties"].items():
        hint = hints.get(name)
        if {hint, *(get_args(hint) if type(None) in get_args(hint) else ())} & {list, tuple}:
            parameter["type"] = "array"
    return schema


def _complete(given: Mapping[str, Any], name: str) -> Schema:
    function = given.get("function", given)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise SchemaError(f"the schema of tool {name!r} has no 'name'; write {{'name', 'description', 'parameters'}}")
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise SchemaError(f"the schema of tool {function['name']!r}: 'parameters' is not a JSON schema of an object")
    return {"type": "function", "function": {**function, "parameters": {"type": "object", **parameters}}}
