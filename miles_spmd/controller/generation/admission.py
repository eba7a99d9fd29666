"""How many sessions run at a time: as many as the engines' caches are expected to hold.

A session is an episode with the tokens of all its turns. Between two turns the engine keeps their keys and values as
long as it has room. Where more sessions run than fit, each turn evicts what another session needs next, and most turns
prefill their whole history again. So with `environment_cache_share` the first request of a session is held back while
those that have begun fill the cache of its engine. A session that has begun is never held back, and in the engine's
queue older ones come first.

An engine that keeps a cache and has nothing to do saves nothing. Where environments are slow, more sessions run than
fit: so many that about half of what would fit is at the engines at a time.

Only the order of requests follows from this, and none of their content.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import msgspec

from miles_spmd.controller.cluster.rollout_session import Cache
from miles_spmd.types.request import Output, Request
from miles_spmd.types.trajectory import FinishReason

AT_ENGINES = 0.5  # of the sessions that fit, those that are to be at the engines at a time
_OLDER = 1 - 1 / 1024  # weight of what was before another turn


class Engines(Protocol):
    """The engines of an open rollout."""

    def cache_of(self, group: int) -> Cache: ...


class Sessions(Protocol):
    """The episodes of a rollout, which their requests name: ``group.session.segment``."""

    @property
    def ended_with(self) -> Collection[int]:
        """The tokens of the sessions that have ended lately, as in :meth:`tokens_of`."""
        ...

    def tokens_of(self, session: int) -> int | None:
        """Return how many tokens of the cache are needed by this session alone, as far as is known; None once it has
        ended."""
        ...


class Pace:
    """How long turns have taken lately: policy and environment in seconds, of which older ones count less."""

    def __init__(self) -> None:
        self._policy = self._environment = 0.0

    def add(self, *, policy: float = 0.0, environment: float = 0.0) -> None:
        self._policy = _OLDER * self._policy + policy
        self._environment = _OLDER * self._environment + environment

    @property
    def at_policy(self) -> float:
        """The share of their time for which sessions wait for the policy; 1 as long as nothing is known."""
        return self._policy / total if (total := self._policy + self._environment) else 1.0


class _Begun(msgspec.Struct):
    group: int
    order: int
    longest: int  # tokens that it can come to
    since: float = 0.0  # monotonic: when its last request was sent, or its last response came


class Admission:
    """Decides when the requests of a rollout are sent.

    The sessions that run may fill ``share`` of a cache. Each of them is expected to need as many tokens as those that
    have ended, on average, or what it needs already, if that is more. As long as none has ended, each is expected to
    become as long as it can, ``longest`` tokens behind its prompt. One session per engine may always run.
    """

    def __init__(
        self,
        sessions: Sessions,
        engines: Engines,
        share: float,
        longest: int,
        pace: Pace,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``share``: infinite where nothing is to be held back or brought into another order. ``pace``: that of earlier
        rollouts, which goes on."""
        self._sessions, self._engines, self._share, self._longest = sessions, engines, share, longest
        self._pace, self._clock = pace, clock
        self._begun: dict[int, _Begun] = {}
        self._ready: list[Request] = []
        self._held: deque[Request] = deque()  # of sessions that have not begun
        self._dropped: list[Request] = []  # of sessions that have ended before
        self._count = 0
        self.most = 0  # sessions that ran at the same time

    def add(self, requests: Sequence[Request]) -> None:
        for request in requests:
            begun = self._begun.get(_names(request.rid)[1])
            if begun is None:
                self._held.append(request)
            else:
                self._pace.add(environment=self._clock() - begun.since)
                self._send(begun, request)

    def received(self, rid: str) -> None:
        """The response to a request is there."""
        if (begun := self._begun.get(_names(rid)[1])) is not None:
            now = self._clock()
            self._pace.add(policy=now - begun.since)
            begun.since = now

    def take(self) -> list[Request]:
        """Return the requests that are to be sent now."""
        if self._held:
            self._begin()
        ready, self._ready = self._ready, []
        return ready

    def withdraw(self) -> list[Output]:
        """Return outputs for the requests that were never sent."""
        unsent, self._held, self._dropped = [*self._dropped, *self._held], deque(), []
        return [Output(request.rid, [], [], FinishReason.ABORT, []) for request in unsent]

    def _begin(self) -> None:
        """Let sessions begin, on each engine in the order in which they have asked."""
        ended = self._sessions.ended_with
        expected = sum(ended) / len(ended) if ended else None
        filled = self._filled(expected)
        share = self._share * max(1.0, AT_ENGINES / self._pace.at_policy) if self._pace.at_policy else math.inf
        held, full = deque[Request](), set[int]()
        for request in self._held:
            group, session = _names(request.rid)
            if self._sessions.tokens_of(session) is None:
                self._dropped.append(request)
                continue
            begun = self._begun.get(session)
            if begun is None:
                (engine, tokens), longest = self._engines.cache_of(group), len(request.input_ids) + self._longest
                needs = longest if expected is None else expected
                if engine in full or (
                    tokens is not None and filled[engine] and filled[engine] + needs > share * tokens
                ):
                    full.add(engine)
                    held.append(request)
                    continue
                filled[engine] += needs
                begun = self._begun[session] = _Begun(group, self._count, longest)
                self._count += 1
            self._send(begun, request)
        self._held, self.most = held, max(self.most, len(self._begun))

    def _filled(self, expected: float | None) -> defaultdict[int, float]:
        """Return the tokens that the sessions which run are expected to need, by engine."""
        filled = defaultdict[int, float](float)
        for session, begun in list(self._begun.items()):
            if (own := self._sessions.tokens_of(session)) is None:
                del self._begun[session]
                continue
            filled[self._engines.cache_of(begun.group).engine] += (
                begun.longest if expected is None else max(own, expected)
            )
        return filled

    def _send(self, begun: _Begun, request: Request) -> None:
        begun.since = self._clock()
        if math.isfinite(self._share):
            request = msgspec.structs.replace(request, order=begun.order)
        self._ready.append(request)


def _names(rid: str) -> tuple[int, int]:
    """The group and the session of a request."""
    group, session, _ = rid.split(".")
    return int(group), int(session)
