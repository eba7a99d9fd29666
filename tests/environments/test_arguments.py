"""What a tool gets of the numbers in a call: through the parser of calls, and into the process of a plain function."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from miles_spmd.environments.arguments import Parameters
from miles_spmd.environments.calls import CallParser
from miles_spmd.environments.execution import ErrorKind, Toolbox
from tests.environments.user_tools import types

DEFAULTS: dict[str, Any] = {
    "whole": 1, "real": 0.5, "many": None, "table": None, "pair": (0, 0.0), "either": None, "choice": 1,
    "any_number": 1, "anything": None,
}  # fmt: skip
# Arguments as JSON, and what a function with the type hints of ``types`` has to get.
CASES: list[tuple[str, dict[str, Any]]] = [
    ('{"whole": 2.0}', {"whole": 2}),
    ('{"whole": -0.0}', {"whole": 0}),
    ('{"whole": 2e3, "real": 3}', {"whole": 2000, "real": 3.0}),
    ('{"whole": 1, "real": 9007199254740993}', {"real": 9007199254740993}),  # no float has this value
    ('{"whole": 1, "many": [1.0, 2, 3e0]}', {"many": [1, 2, 3]}),
    ('{"whole": 1, "many": null, "table": {"a": [1, 2.5], "b": []}}', {"table": {"a": [1.0, 2.5], "b": []}}),
    ('{"whole": 1, "pair": [1.0, 2]}', {"pair": (1, 2.0)}),
    ('{"whole": 1, "either": 4.0}', {"either": 4}),
    ('{"whole": 1, "either": "4.0"}', {"either": "4.0"}),
    ('{"whole": 1, "choice": 2.0}', {"choice": 2}),
    ('{"whole": 1, "any_number": 2.0}', {"any_number": 2.0}),
    ('{"whole": 1, "any_number": 2}', {"any_number": 2}),
    ('{"whole": 1, "anything": [1.0, 1, true]}', {"anything": [1.0, 1, True]}),
]


@pytest.fixture(scope="module")
def toolbox() -> Iterator[Toolbox]:
    box = Toolbox([types], workers=1)
    yield box
    box.close()


def call(box: Toolbox, arguments: str) -> Any:
    text = f'<tool_call>\n{{"name": "types", "arguments": {arguments}}}\n</tool_call>'
    (read,) = CallParser("hermes", box.schemas, "qwen3").parse(text, "", 0).calls
    (result,) = asyncio.run(box.run([read]))
    return result


@pytest.mark.parametrize(("arguments", "expected"), CASES)
def test_numbers_have_the_types_of_the_hints(toolbox: Toolbox, arguments: str, expected: dict[str, Any]) -> None:
    assert call(toolbox, arguments).text == repr([*(DEFAULTS | expected).values()])


@pytest.mark.parametrize("value", ["2.5", "1e400", "NaN", "true", '"2"'])
def test_what_is_no_whole_number_is_an_error(toolbox: Toolbox, value: str) -> None:
    result = call(toolbox, f'{{"whole": {value}}}')
    assert result.error is ErrorKind.ARGUMENTS
    assert "the argument 'whole' is wrong" in result.text


def of(properties: dict[str, Any], **more: Any) -> Parameters:
    parameters = {"type": "object", "properties": properties, **more}
    return Parameters({"type": "function", "function": {"name": "f", "parameters": parameters}}, from_hints=False)


def test_in_a_schema_that_somebody_wrote_number_may_mean_whole_numbers() -> None:
    parameters = of({"topk": {"type": "number"}, "page": {"type": "integer"}, "box": {"prefixItems": [{}]}})
    given = json.loads('{"topk": 3, "page": 2.0, "box": [1]}')
    assert parameters.problem(given) is None
    assert repr(parameters.converted(given)) == "{'topk': 3, 'page': 2, 'box': [1]}"


def test_schemas_that_refer_to_parts_of_themselves() -> None:
    """As pydantic writes them for models, with a type that contains itself."""
    tree = {"type": "object", "properties": {"size": {"type": "integer"}, "next": {"$ref": "#/$defs/Tree"}}}
    parameters = of(
        {
            "tree": {"$ref": "#/$defs/Tree"},
            "limit": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "ids": {"type": "array", "items": {"allOf": [{"type": "integer"}, {"minimum": 1}]}},
        },
        **{"$defs": {"Tree": tree}},
    )
    given: dict[str, Any] = {"tree": {"size": 1.0, "next": {"size": 2.0}}, "limit": 3.0, "ids": [4.0]}
    assert parameters.problem(given) is None
    found = {"tree": {"size": 1, "next": {"size": 2}}, "limit": 3, "ids": [4]}
    assert repr(parameters.converted(given)) == repr(found)
    assert type(given["limit"]) is float  # what the policy wrote stays as it is
