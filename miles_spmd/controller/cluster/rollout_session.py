"""The requests of one open rollout: which engine has each of them, and where they go when an engine is lost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import msgspec

from miles_spmd.controller.cluster.listener import SEPARATOR
from miles_spmd.protocol.commands import AbortRequests, Submit
from miles_spmd.types.request import Output, Request

if TYPE_CHECKING:
    from miles_spmd.controller.cluster.cluster import Cluster


class RolloutSession:
    """Routes requests to the engines, whose first ranks are ``leaders``.

    Requests of one prompt, submitted one after another, go to one engine, which prefills the prompt once for all of
    them; the next prompt goes to the next engine. The engine of a request depends on nothing but the order of
    submission, so that a run can be repeated.
    """

    def __init__(self, cluster: Cluster, name: str, leaders: Sequence[int]) -> None:
        """``name`` is that of this rollout among those that are open."""
        self._cluster, self._name = cluster, name
        self._leaders, self._turns = [*leaders], itertools.cycle(leaders)
        self._prompt: list[int] | None = None  # of the last request
        self._turn = leaders[0]
        self._running: dict[str, tuple[int, Request]] = {}  # by rid: the rank that has the request, and the request

    def submit(self, requests: Sequence[Request]) -> None:
        """Send the requests. Raises ValueError for a rid that is already running."""
        for request in requests:
            if request.rid in self._running:
                raise ValueError(f"request {request.rid!r} is already running")
            self._assign(request)
        self._send([request.rid for request in requests])

    def _assign(self, request: Request) -> None:
        if request.input_ids != self._prompt:
            self._prompt, self._turn = request.input_ids, next(self._turns)
        self._running[request.rid] = self._turn, request

    def leave(self, ranks: Collection[int]) -> None:
        """Give the unfinished requests of engines whose leaders are among ``ranks`` to the others."""
        if not any(leader in ranks for leader in self._leaders):
            return
        self._leaders = [leader for leader in self._leaders if leader not in ranks]
        self._turns, self._prompt = itertools.cycle(self._leaders), None
        moved = [rid for rid in self.unfinished if self._running[rid][0] in ranks]
        for rid in moved:
            self._assign(self._running[rid][1])
        self._send(moved)

    @property
    def unfinished(self) -> list[str]:
        """The requests without an output, by rid."""
        finished = self._cluster.finished(self._name)
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
            self._cluster.feed(Submit(batch), [rank])

    def abort(self, rids: Sequence[str] | None = None) -> None:
        """Stop these requests (None: all). They still come out of :meth:`next`, with the tokens so far."""
        running = [rid for rid in (self._running if rids is None else rids) if rid in self._running]
        for rank in sorted({self._running[rid][0] for rid in running}):
            of_rank = [self._full(rid) for rid in running if self._running[rid][0] == rank]
            self._cluster.feed(AbortRequests(of_rank), [rank])

    def next(self, interrupt: Callable[[], bool] = lambda: False) -> Output | None:
        """Return the next finished output; None when nothing is running, or once ``interrupt`` returns True. Raises a
        WorkerError."""
        output = self._cluster.next_output(self._name, interrupt) if self._running else None
        if output is not None:
            del self._running[output.rid]
        return output

    def listen(self) -> None:
        """Take what the engines have sent, while something else is waited for. Raises a WorkerError."""
        self._cluster.listen()

    def _full(self, rid: str) -> str:
        """The name of a request among those of all rollouts."""
        return f"{self._name}{SEPARATOR}{rid}"
