"""Tools that were written for veRL: a class with ``create``, ``execute`` and ``release``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from types import MappingProxyType, SimpleNamespace
from typing import Any
from uuid import uuid4

from miles_spmd.environments.tool_schemas import Schema
from miles_spmd.plugins.plug_point import import_function

row: ContextVar[Mapping[str, Any]] = ContextVar("row", default=MappingProxyType({}))
"""The metadata of the prompt whose conversation calls tools."""


def verl_tool(
    path: str, config: Mapping[str, Any], schema: Schema | None
) -> tuple[Callable[..., Awaitable[str]], Schema]:
    """Return the tool of the class ``path`` (``module:Class``), and its schema: the one that is given, which the class
    gets as veRL's own type where veRL is installed, or else the one that it has itself.

    Each call has an instance of its own, whose ``create`` gets the ``create_kwargs`` of the prompt's row. The text of
    what ``execute`` returns is the result; its reward and metrics are left out. Raises ValueError for another class,
    and PlugPointError where it cannot be imported.
    """
    cls = import_function("the environment's functions", path, ())
    if not inspect.iscoroutinefunction(getattr(cls, "execute", None)):
        raise ValueError(f"verl = {path!r} is not a class with `async def execute(self, instance_id, parameters)`")
    try:
        tool = cls(dict(config), None if schema is None else _as_verl(schema))
        found = tool.get_openai_tool_schema() if schema is None else schema
    except Exception as error:
        raise ValueError(
            f"verl = {path!r} cannot be made with its config and schema: {type(error).__name__}: {error}"
        ) from error
    if hasattr(found, "model_dump"):
        found = found.model_dump(exclude_unset=True, exclude_none=True)  # as veRL shows it to the policy
    if not isinstance(found, Mapping):
        raise ValueError(f"verl = {path!r} has no schema of its own: add `schema`, which is tool_schema in veRL's file")

    async def call(**parameters: Any) -> str:
        instance = str(uuid4())
        if hasattr(tool, "create"):
            of_row = _create_kwargs(row.get(), found.get("function", found).get("name"))
            made = await tool.create(instance, **({"create_kwargs": of_row} if of_row else {}))
            instance = made[0] if isinstance(made, tuple) else made  # newer versions add a response
        try:
            result = await tool.execute(instance, parameters)
        finally:
            if hasattr(tool, "release"):
                await tool.release(instance)
        return _text(result[0] if isinstance(result, tuple) else result)

    return call, dict(found)


def _create_kwargs(metadata: Mapping[str, Any], name: Any) -> Any:
    """Return what a row has for the tool's ``create``, in the place where veRL's data has it."""
    found: Any = metadata
    for key in ("extra_info", "tools_kwargs", name, "create_kwargs"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _text(response: Any) -> str:
    """Return the text of a ``ToolResponse``, or of what older versions return."""
    text = getattr(response, "text", response)
    return text if isinstance(text, str) else json.dumps(text, ensure_ascii=False, default=str)


def _as_verl(schema: Schema) -> Any:
    try:
        from verl.tools.schemas import OpenAIFunctionToolSchema
    except ImportError:
        return _as_object(schema)
    return OpenAIFunctionToolSchema.model_validate(schema)


def _as_object(value: Any) -> Any:
    """Return a schema with attributes, as classes read it: ``tool_schema.function.name``."""
    if isinstance(value, Mapping):
        return SimpleNamespace(**{str(name): _as_object(each) for name, each in value.items()})
    return value
