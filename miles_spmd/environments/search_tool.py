"""The tool ``search``: over a corpus of its own, or by a retrieval service, whose replies can be recorded."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from typing import Any, Literal, get_args

from miles_spmd.environments.bm25 import Document, Index, read_corpus
from miles_spmd.environments.execution import ToolUnavailableError
from miles_spmd.services.client import JsonClient, ServiceError
from miles_spmd.services.recording import Recording

RequestForm = Literal["queries", "query"]
_SHARE = 0.9  # of the tool's time limit that requests may take: their error is the better one


def search_tool(
    *,
    corpus: str | None = None,
    url: str | None = None,
    topk: int = 3,
    request_form: RequestForm = "queries",
    recording: str | None = None,
    replay: bool = False,
    requests: int = 64,
    tool_timeout: float = 30.0,
) -> Callable[[str], Awaitable[str]]:
    """Return the tool, which finds ``topk`` documents for a query.

    ``corpus``: JSON-lines file with ``id``, ``text`` and optionally ``title``, which is searched by BM25. ``url``: a
    service in its place, which is sent ``{"queries": [query], "topk", "return_scores"}``, as those of Search-R1 and
    veRL, or ``{"query", "topk"}``, by ``request_form``; at most ``requests`` at the same time from an environment
    process. ``recording``: file of the service's replies; a request that it has is not sent again, and with ``replay``
    none is sent. Raises ValueError for what cannot be used.
    """
    if (corpus is None) == (url is None):
        raise ValueError("search: name either a corpus or the url of a service")
    if topk < 1 or requests < 1:
        raise ValueError(f"search: topk = {topk} and requests = {requests} must be at least 1")
    if replay and recording is None:
        raise ValueError("search: replay = true requires the recording that is replayed")
    if corpus is not None:
        if recording is not None:
            raise ValueError("search: a corpus needs no recording: its results repeat")
        index = _index(corpus)

        async def find(query: str) -> Sequence[Document]:
            return index.search(query, topk)
    else:
        if request_form not in get_args(RequestForm):
            raise ValueError(f"search: request_form = {request_form!r}; known: {', '.join(get_args(RequestForm))}")
        client = JsonClient(str(url), time_limit=_SHARE * tool_timeout, concurrency=requests)
        find = _Retriever(client, topk, request_form, _opened(recording, replay), replay).find

    async def search(query: str) -> str:
        """Search a collection of documents and return those that fit best.

        Args:
            query: What to search for.
        """
        return as_text(await find(query))

    return search


class _Retriever:
    """A service that finds documents."""

    def __init__(
        self, client: JsonClient, topk: int, form: RequestForm, recording: Recording | None, replay: bool
    ) -> None:
        self._client, self._topk, self._form = client, topk, form
        self._recording, self._replay = recording, replay

    async def find(self, query: str) -> Sequence[Document]:
        reply = await self._reply({"query": query, "topk": self._topk})
        try:
            return _documents(reply)[: self._topk]
        except (LookupError, TypeError, ValueError) as error:
            raise ToolUnavailableError(
                f"{self._client.url}: the reply {reply!r:.200} has no documents as those of Search-R1's retriever: "
                '{"result": [[{"document": {"contents": ...}}]]}'
            ) from error

    async def _reply(self, request: dict[str, Any]) -> Any:
        """Return the reply to a request, which is recorded without the form in which the service is sent it."""
        recording = self._recording
        if recording is not None and request in recording:
            return recording[request]
        if recording is not None and self._replay:
            raise ToolUnavailableError(
                f"{recording.path} has no reply to {request}, and replay = true asks nobody: record the run again, or "
                "set replay = false"
            )
        body = request
        if self._form == "queries":
            body = {"queries": [request["query"]], "topk": request["topk"], "return_scores": True}
        try:
            reply = await self._client.post(body)
        except ServiceError as error:
            raise ToolUnavailableError(f"the search service {error}") from error
        return reply if recording is None else recording.add(request, reply)


@cache  # built once for all conversations of a process
def _index(corpus: str) -> Index:
    return Index(read_corpus(corpus))


def _opened(path: str | None, replay: bool) -> Recording | None:
    try:
        return None if path is None else Recording(path, adds=not replay)
    except OSError as error:
        raise ValueError(f"search: the recording {path} cannot be opened: {error.strerror}") from error


def _documents(reply: Any) -> list[Document]:
    """Return the documents of a reply: a list, or one under ``result``, ``results`` or ``documents``, for one query or
    for a list of one. Raises LookupError, TypeError or ValueError for anything else."""
    if isinstance(reply, dict):
        (reply,) = [reply[name] for name in ("result", "results", "documents") if name in reply]
    if len(reply) == 1 and isinstance(reply[0], list):
        (reply,) = reply
    return [_document(one) for one in reply]


def _document(one: Any) -> Document:
    found = one if isinstance(one, str) else one.get("document", one)
    if isinstance(found, str):
        return Document("", found)
    if not isinstance(text := found["contents"] if "contents" in found else found["text"], str):
        raise TypeError(type(text))
    return Document("", text, str(found.get("title") or ""))


def as_text(documents: Sequence[Document]) -> str:
    """Return what the policy sees."""
    shown = [
        f"[{n}] {one.title}\n{one.text}" if one.title else f"[{n}] {one.text}" for n, one in enumerate(documents, 1)
    ]
    return "\n\n".join(shown) or "No document was found."
