"""Schemas from functions, and what a function lacks for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from miles_spmd.environments.tool_schemas import SchemaError, tool_schema
from tests.environments import user_tools


def test_schema_of_a_function() -> None:
    assert tool_schema(user_tools.weather) == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather forecast.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Name of the city."},
                    "days": {"type": "integer", "description": "Number of days."},
                    "unit": {"type": "string", "enum": ["c", "f"], "description": "Unit of temperatures."},
                    "tags": {
                        "type": "array",
                        "items": {"type": "string"},
                        "nullable": True,
                        "description": "What to mention.",
                    },
                },
                "required": ["city"],
            },
            "return": {"type": "string"},
        },
    }


def test_lists_without_the_type_of_their_items() -> None:
    def collect(words: list, more: list | None = None, pair: tuple = (), counts: dict | None = None) -> str:
        """Collects.

        Args:
            words: Some.
            more: Others.
            pair: Two.
            counts: Of each.
        """
        return ""

    properties = tool_schema(collect)["function"]["parameters"]["properties"]
    assert [one["type"] for one in properties.values()] == ["array", "array", "array", "object"]
    assert [one.get("nullable", False) for one in properties.values()] == [False, True, False, True]


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (user_tools.untyped, "tool 'untyped' has no type hint for its parameter 'city'"),
        (user_tools.undocumented, "tool 'undocumented' has no docstring"),
        (user_tools.half_documented, "tool 'half_documented' .* no description for the argument 'days'"),
        (user_tools.variadic, r"tool 'variadic' has the parameter .\*cities.*; a policy gives arguments by name"),
        (lambda x: x, "tool '<lambda>' has no docstring"),
        (user_tools.paints, "tool 'paints' has the type hint Color for its parameter 'color'; a policy gives str"),
        (user_tools.yields, "tool 'yields' yields; a tool returns its result"),
        (print, r"tool 'print' has the parameter '\*args'"),
    ],
)
def test_what_a_function_lacks_is_named_with_an_example(function: Callable[..., Any], problem: str) -> None:
    with pytest.raises(SchemaError, match=f"(?s){problem}.*write it like this:\ndef weather"):
        tool_schema(function)


def test_ready_made_schemas() -> None:
    given = {"name": "search", "parameters": {"properties": {"q": {"type": "string"}}}}
    whole = {
        "type": "function",
        "function": {"name": "search", "parameters": {"type": "object", "properties": {"q": {"type": "string"}}}},
    }
    assert tool_schema(user_tools.untyped, given) == whole
    assert tool_schema(user_tools.untyped, {"type": "function", "function": given}) == whole
    with pytest.raises(SchemaError, match="schema of tool 'untyped' has no 'name'"):
        tool_schema(user_tools.untyped, {"parameters": {}})
    with pytest.raises(SchemaError, match="'search': 'parameters' is not a JSON schema of an object"):
        tool_schema(user_tools.untyped, {"name": "search", "parameters": {"type": "string"}})
