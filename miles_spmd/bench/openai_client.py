"""OpenAI's client, as agents have it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import openai


@functools.cache
def shared_client() -> openai.AsyncOpenAI:
    """Return the client whose connections this process uses for all sessions, each by ``with_options`` with its own
    ``base_url`` and ``api_key``: making one takes tens of milliseconds. It belongs to one event loop."""
    import httpx
    import openai

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    http = httpx.AsyncClient(limits=limits, timeout=None)
    return openai.AsyncOpenAI(base_url="http://localhost", api_key="none", max_retries=0, http_client=http)
