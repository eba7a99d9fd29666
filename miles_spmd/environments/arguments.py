"""The arguments of a call against the schema of its tool: what is wrong with them, and what the tool gets of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError as InvalidSchema
from jsonschema.exceptions import ValidationError

from miles_spmd.environments.tool_schemas import Schema, SchemaError
from miles_spmd.types.printable import printable

_MOST_PROBLEMS = 3  # of the arguments of one call that are reported
_LONGEST_MESSAGE = 500  # characters of what a schema wrote into an error


class Parameters:
    """The parameters of a tool. ``from_hints``: the schema was made from Python's type hints, so that ``number`` means
    a float; in a schema that somebody wrote it may stand for whole numbers as well."""

    def __init__(self, schema: Schema, from_hints: bool) -> None:
        """``schema`` is that of the tool. Raises SchemaError where it is not valid."""
        self._name, self._from_hints = schema["function"]["name"], from_hints
        self._schema = _nullable(schema["function"]["parameters"])
        try:
            Draft202012Validator.check_schema(self._schema)
        except InvalidSchema as error:
            raise SchemaError(f"the schema of tool {self._name!r} is not valid: {error.message}") from error
        self._validator = Draft202012Validator(self._schema)

    def problem(self, arguments: Mapping[str, Any]) -> str | None:
        """Return what is wrong with arguments, for the policy."""
        known, required = self._schema.get("properties", {}), self._schema.get("required", [])
        found = [f"the argument {name!r} is missing" for name in required if name not in arguments]
        if not self._schema.get("additionalProperties"):
            found += [f"the argument {name!r} does not exist" for name in arguments if name not in known]
        found += [_described(error) for error in self._validator.iter_errors(dict(arguments))]
        if not (found := list(filter(None, found))):
            return None
        takes = ", ".join(f"{name} ({_type(known[name])}{'' if name in required else ', optional'})" for name in known)
        return f"{'; '.join(found[:_MOST_PROBLEMS])}. {self._name} takes {takes or 'no arguments'}"

    def converted(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return arguments without a problem in the Python types that the schema names, at every depth. JSON does not
        distinguish 2 from 2.0, so that policies write either; Python functions do."""
        converted: dict[str, Any] = self._convert(dict(arguments), self._schema)
        return converted

    def _convert(self, value: Any, schema: Any) -> Any:
        if not isinstance(schema, Mapping):  # true: anything
            return value
        parts = self._applied(value, schema)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = self._number(value, schema)
        elif isinstance(value, list):
            first, rest = schema.get("prefixItems", []), schema.get("items")
            schemas = [*first, *[rest] * len(value)]
            value = [self._convert(item, of_item) for item, of_item in zip(value, schemas)]
            if first and self._from_hints:
                value = tuple(value)
        elif isinstance(value, dict):
            known, rest = schema.get("properties", {}), schema.get("additionalProperties")
            value = {name: self._convert(item, known.get(name, rest)) for name, item in value.items()}
        for part in parts:
            value = self._convert(value, part)
        return value

    def _number(self, value: float, schema: Mapping[str, Any]) -> float:
        given = schema.get("type", ())
        types = {given} if isinstance(given, str) else {*given}
        if isinstance(value, float) and "integer" in types and "number" not in types:
            return int(value)  # a valid integer has no fraction
        if isinstance(value, int) and "number" in types and "integer" not in types and self._from_hints:
            return float(value) if abs(value) <= 2**53 else value  # beyond, a float would be another number
        return value

    def _applied(self, value: Any, schema: Mapping[str, Any]) -> list[Any]:
        """Return the schemas within ``schema`` that are about the same value."""
        parts = [*schema.get("allOf", [])]
        for key in ("anyOf", "oneOf"):
            fitting = (one for one in schema.get(key, []) if self._validator.evolve(schema=one).is_valid(value))
            parts += [*fitting][:1]
        if "$ref" in schema and (found := self._referred(schema["$ref"])) is not None:
            parts.append(found)
        return parts

    def _referred(self, reference: str) -> Any:
        """Return the part of this schema that is meant, None for one in another place."""
        found: Any = self._schema
        for key in reference.removeprefix("#/").split("/"):
            found = found.get(key) if isinstance(found, Mapping) else None
        return found


def _nullable(schema: Any) -> Any:
    """Return the schema with OpenAPI's ``nullable``, which transformers writes, as JSON schema has it."""
    if isinstance(schema, list):
        return [_nullable(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: _nullable(value) for key, value in schema.items() if key != "nullable"}
    if schema.get("nullable") is not True:
        return changed
    if not isinstance(changed.get("type"), str):
        return {"anyOf": [changed, {"type": "null"}]}
    changed["type"] = [changed["type"], "null"]
    if "enum" in changed:
        changed["enum"] = [*changed["enum"], None]
    return changed


def _described(error: ValidationError) -> str:
    """Return what is wrong with a value; "" for what is reported with the names of arguments."""
    if not error.path and error.validator in ("required", "additionalProperties"):
        return ""
    where = "".join(f"[{part!r}]" for part in list(error.path)[1:])
    name = error.path[0] if error.path else ""
    return f"the argument {name!r}{where} is wrong: {printable(error.message, _LONGEST_MESSAGE)}"


def _type(schema: Any) -> str:
    kind = schema.get("type", "any") if isinstance(schema, dict) else "any"
    return " or ".join(kind) if isinstance(kind, list) else str(kind)
