"""The plug point of conversations with tools: how calls are read in what the policy writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


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
