"""The plug points of conversations with tools: the tools, and how calls are read in what the policy writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class ToolFunction(Protocol):
    """An entry of ``functions`` of ``environment.environment_kwargs``: what the policy can call. It has a docstring in
    Google style and a type hint for each parameter, from which its schema is made (docs/environments.md). A plain
    function runs in a process of its own, an ``async def`` in the event loop of the environment."""

    def __call__(self, **arguments: Any) -> Any:
        """Return text, or anything that JSON can have. ``arguments`` are valid for the schema, and of the types that
        the hints name."""
        ...


class CallReader(Protocol):
    """``call_format = "module:function"`` of ``environment.environment_kwargs``: a format of calls that SGLang does not
    know. It runs in the processes of the environment."""

    def __call__(
        self, text: str, tools: Sequence[dict[str, Any]]
    ) -> tuple[str, Sequence[tuple[str, str | Mapping[str, Any]]]]:
        """Return what a message says beside its calls, and the calls in order: name and arguments, which are a mapping,
        or JSON as text.

        ``text`` is the message without reasoning and without the token that ended it; ``tools`` are the schemas of the
        tools. Arguments that are not JSON, and a ValueError, are an error of the policy, which is told what is wrong.
        """
        ...
