"""The engines while a rollout is open: submit requests, abort them, take outputs as they finish."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from miles_spmd.protocol.commands import AbortRequests, EndGenerate, Submit
from miles_spmd.types.request import Output, Request

if TYPE_CHECKING:
    from miles_spmd.controller.cluster.cluster import Cluster


class RolloutSession:
    """Routes requests to the engines, whose first ranks are ``leaders``.

    Requests of one prompt, submitted one after another, go to one engine, which prefills the prompt once for all of
    them; the next prompt goes to the next engine. The engine of a request depends on nothing but the order of
    submission, so that a run can be repeated.
    """

    def __init__(self, cluster: Cluster, leaders: Sequence[int]) -> None:
        self._cluster = cluster
        self._leaders = leaders
        self._turns = itertools.cycle(leaders)
        self._prompt: list[int] | None = None  # of the last request
        self._turn = leaders[0]
        self._rank_of: dict[str, int] = {}  # unfinished requests

    def submit(self, requests: Sequence[Request]) -> None:
        """Send the requests. Raises ValueError for a rid that is already running."""
        batches: dict[int, list[Request]] = {}
        for request in requests:
            if request.rid in self._rank_of:
                raise ValueError(f"request {request.rid!r} is already running")
            if request.input_ids != self._prompt:
                self._prompt, self._turn = request.input_ids, next(self._turns)
            self._rank_of[request.rid] = self._turn
            batches.setdefault(self._turn, []).append(request)
        for rank, batch in batches.items():
            self._cluster.send(Submit(batch), [rank])

    def abort(self, rids: Sequence[str] | None = None) -> None:
        """Stop these requests (None: all). They still come out of :meth:`completions`, with the tokens so far."""
        running = [rid for rid in (self._rank_of if rids is None else rids) if rid in self._rank_of]
        for rank in sorted({self._rank_of[rid] for rid in running}):
            self._cluster.send(AbortRequests([rid for rid in running if self._rank_of[rid] == rank]), [rank])

    def completions(self) -> Iterator[Output]:
        """Yield outputs as they finish, until no submitted request is unfinished. Raises a WorkerError."""
        while (output := self.next()) is not None:
            yield output

    def next(self, interrupt: Callable[[], bool] = lambda: False) -> Output | None:
        """Return the next finished output; None when nothing is running, or once ``interrupt`` returns True."""
        output = self._cluster.next_output(interrupt) if self._rank_of else None
        if output is not None:
            del self._rank_of[output.rid]
        return output

    def end(self) -> None:
        """Abort what is still running and close the rollout on the engines."""
        self.abort()
        self._cluster.send(EndGenerate(), self._leaders)
