"""The requests of one open rollout: which engine has each of them, and where they go when an engine is lost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from miles_spmd.controller.cluster.listener import SEPARATOR
from miles_spmd.protocol.commands import AbortRequests, Submit
from miles_spmd.types.request import Output, Request

if TYPE_CHECKING:
    from miles_spmd.controller.cluster.engines import Engines


class Cache(NamedTuple):
    """The keys and values that an engine has."""

    engine: int  # the rank of its leader
    tokens: int | None  # that it can hold; None: not known, or nothing stays between requests


class RolloutSession:
    """Routes requests to the engines, whose first ranks are ``leaders``.

    A rid begins with the number of a group, up to a dot. All requests of a group go to one engine, which prefills once
    what they have in common: the prompt, and the turns that came before. The next group goes to the next engine.
    """

    def __init__(self, engines: Engines, name: str, leaders: Sequence[int]) -> None:
        """``name`` is that of this rollout among those that are open."""
        self._engines, self._name = engines, name
        self._leaders = [*leaders]
        self._caches = engines.cache_tokens
        self._running: dict[str, tuple[int, Request]] = {}  # by rid: the rank that has the request, and the request

    def cache_of(self, group: int) -> Cache:
        """Return the cache that has the prefixes of a group's requests."""
        leader = self._leader_of(group)
        return Cache(leader, self._caches[leader])

    def _leader_of(self, group: int) -> int:
        return self._leaders[group % len(self._leaders)]

    def submit(self, requests: Sequence[Request]) -> None:
        """Send the requests. Raises ValueError for a rid that is already running."""
        for request in requests:
            if request.rid in self._running:
                raise ValueError(f"request {request.rid!r} is already running")
            self._assign(request)
        self._send([request.rid for request in requests])

    def _assign(self, request: Request) -> None:
        group = int(request.rid.partition(".")[0])
        self._running[request.rid] = self._leader_of(group), request

    def leave(self, ranks: Collection[int]) -> None:
        """Give the unfinished requests of engines whose leaders are among ``ranks`` to the others."""
        if not any(leader in ranks for leader in self._leaders):
            return
        self._leaders = [leader for leader in self._leaders if leader not in ranks]
        moved = [rid for rid in self.unfinished if self._running[rid][0] in ranks]
        for rid in moved:
            self._assign(self._running[rid][1])
        self._send(moved)

    @property
    def is_idle(self) -> bool:
        """Whether no request is running, and none has an output that was not taken."""
        return not self._running

    @property
    def unfinished(self) -> list[str]:
        """The requests without an output, by rid."""
        finished = self._engines.finished(self._name)
        return [rid for rid in self._running if rid not in finished]

    def submit_again(self) -> None:
        """Send the unfinished requests to engines that have none of them."""
        self._send(self.unfinished)

    def _send(self, rids: Sequence[str]) -> None:
        batches: dict[int, list[Request]] = {}
        for rid in rids:
            rank, request = self._running[rid]
            batches.setdefault(rank, []).append(msgspec.structs.replace(request, rid=self._full(rid)))
        for rank, batch in batches.items():
            self._engines.feed(Submit(batch), [rank])

    def abort(self, rids: Sequence[str] | None = None) -> None:
        """Stop these requests (None: all). They still come out of :meth:`next`, with the tokens so far."""
        running = [rid for rid in (self._running if rids is None else rids) if rid in self._running]
        for rank in sorted({self._running[rid][0] for rid in running}):
            of_rank = [self._full(rid) for rid in running if self._running[rid][0] == rank]
            self._engines.feed(AbortRequests(of_rank), [rank])

    def next(self, interrupt: Callable[[], bool] | None = None) -> Output | None:
        """Return the next finished output; None once ``interrupt`` returns True, or, without one, when nothing is
        running. Raises a WorkerError."""
        if interrupt is None and not self._running:
            return None
        output = self._engines.next_output(self._name, interrupt or (lambda: False))
        if output is not None:
            del self._running[output.rid]
        return output

    @property
    def has_news(self) -> bool:
        """Whether :meth:`take` has something to do."""
        return self._engines.failed or bool(self._engines.finished(self._name))

    def take(self) -> Iterator[Output]:
        """Yield what has finished, without waiting for more, after engines that have failed were replaced. Raises a
        WorkerError."""
        self._engines.repair()
        while self._engines.finished(self._name) and (output := self.next()) is not None:
            yield output

    def _full(self, rid: str) -> str:
        """The name of a request among those of all rollouts."""
        return f"{self._name}{SEPARATOR}{rid}"
