"""The open rollouts of two policies as one: each request goes to the engines of the policy that plays its role."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from miles_spmd.controller.cluster.rollout_session import Cache, RolloutSession
from miles_spmd.types.request import Output, Request


class Sessions:
    """``belongs_to_second`` returns for a request's rid whether the second policy is asked."""

    def __init__(self, first: RolloutSession, second: RolloutSession, belongs_to_second: Callable[[str], bool]) -> None:
        self._first, self._second, self._belongs_to_second = first, second, belongs_to_second

    def cache_of(self, group: int) -> Cache:
        """Return the first policy's cache, which has the prefixes of a group's requests."""
        return self._first.cache_of(group)

    def submit(self, requests: Sequence[Request]) -> None:
        of_second = [request for request in requests if self._belongs_to_second(request.rid)]
        of_first = [request for request in requests if not self._belongs_to_second(request.rid)]
        for session, own in ((self._first, of_first), (self._second, of_second)):
            if own:
                session.submit(own)

    def abort(self) -> None:
        """Stop all requests. They still come out of :meth:`next`, with the tokens so far."""
        self._first.abort()
        self._second.abort()

    def next(self, interrupt: Callable[[], bool] | None = None) -> Output | None:
        """Return the next finished output of either policy; None once ``interrupt`` returns True, or, without one, when
        nothing is running. Raises a WorkerError."""
        if interrupt is None:
            return self._first.next() or self._second.next()
        if self._second.has_news:
            return next(self._second.take(), None)
        return self._first.next(lambda: self._second.has_news or interrupt())
