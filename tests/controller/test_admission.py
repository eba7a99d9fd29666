"""How many sessions run at a time: on an engine whose cache is a list of sessions, the least recently used one evicted
first."""

from __future__ import annotations

import math
import random
from collections import OrderedDict, deque

import pytest

from miles_spmd.controller.cluster.rollout_session import Cache
from miles_spmd.controller.generation.admission import Admission, Pace
from miles_spmd.types.request import Request, SamplingParams
from miles_spmd.types.trajectory import FinishReason

PROMPT = 10


class World:
    """Engines that serve ``batch`` requests of their queue in a tick, and sessions that ask again after ``pause``
    ticks. A session is a list of its lengths: tokens with which its turns end."""

    def __init__(
        self,
        sessions: list[list[int]],
        *,
        cache: int | None,
        share: float = 1.0,
        engines: int = 1,
        batch: int = 1000,
        pause: int = 0,
        longest: int = 1000,
    ) -> None:
        self.sessions, self.engines, self.batch, self.pause = sessions, engines, batch, pause
        self.cache, self.now = cache, 0.0
        self.turn = dict.fromkeys(range(len(sessions)), 0)
        self.ended_with: deque[int] = deque()
        self.cached: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(engines)]
        self.prefilled = self.needed = self.lost = 0  # tokens of histories; those of them that had been in the cache
        self.began: list[int] = []
        self.at_engines: list[int] = []  # requests, by tick
        self.pace = Pace()
        self.admission = Admission(self, self, share, longest, self.pace, lambda: self.now)

    def cache_of(self, group: int) -> Cache:
        return Cache(group % self.engines, self.cache)

    def tokens_of(self, session: int) -> int | None:
        turn = self.turn.get(session)
        return None if turn is None else self.sessions[session][turn - 1] if turn else 0

    def request(self, session: int) -> Request:
        turn = self.turn[session]
        before = self.sessions[session][turn - 1] if turn else PROMPT
        return Request(f"{session // 2}.{session}.{turn}", [0] * before, SamplingParams(max_new_tokens=1))

    def serve(self, engine: int, request: Request) -> None:
        session = int(request.rid.split(".")[1])
        cached, length = self.cached[engine], len(request.input_ids)
        if self.turn[session]:
            self.needed += length
            self.lost += 0 if session in cached else length
        cached[session] = self.sessions[session][self.turn[session]]
        cached.move_to_end(session)
        while sum(cached.values()) > (self.cache or math.inf):
            cached.popitem(last=False)

    def run(self) -> World:
        queues: list[list[Request]] = [[] for _ in range(self.engines)]
        asking = deque([(0.0, session) for session in self.turn])
        while self.turn:
            asked = [session for due, session in asking if due <= self.now]
            asking = deque((due, session) for due, session in asking if due > self.now)
            self.admission.add([self.request(session) for session in asked])
            for request in self.admission.take():
                group, session, turn = map(int, request.rid.split("."))
                self.began += [session] if turn == 0 else []
                queues[group % self.engines].append(request)
            assert any(queues) or asking, "nothing happens any more"
            self.at_engines.append(sum(map(len, queues)))
            self.now += 1
            for engine, queue in enumerate(queues):
                queue.sort(key=lambda request: request.order)
                for request in queue[: self.batch]:
                    session = int(request.rid.split(".")[1])
                    self.admission.received(request.rid)
                    self.serve(engine, request)
                    self.turn[session] += 1
                    if self.turn[session] == len(self.sessions[session]):
                        self.ended_with.append(self.sessions[session][-1])
                        del self.turn[session]
                    else:
                        asking.append((self.now + self.pause, session))
                del queue[: self.batch]
        return self

    @property
    def hits(self) -> float:
        return 1 - self.lost / self.needed


def alike(count: int) -> list[list[int]]:
    return [[30, 60, 90, 120] for _ in range(count)]


def test_no_history_is_prefilled_twice() -> None:
    """Sessions as long as they were expected to become; without a bound most of their histories are."""
    bounded = World(alike(40), cache=600, longest=110).run()
    assert bounded.hits == 1
    assert bounded.admission.most == 5
    assert World(alike(40), cache=600, share=math.inf).run().hits < 0.2
    assert World(alike(5), cache=600, share=math.inf).run().hits == 1


@pytest.mark.parametrize("seed", range(8))
def test_more_histories_stay_in_small_caches(seed: int) -> None:
    """Sessions of any lengths, on two engines whose batches are limited."""
    generator = random.Random(seed)
    sessions = []
    for _ in range(60):
        lengths, length = list[int](), PROMPT
        for _ in range(generator.randrange(1, 9)):
            lengths.append(length := length + generator.randrange(5, 40))
        sessions.append(lengths)
    worlds = {
        share: World(sessions, cache=800, share=share, engines=2, batch=8, longest=400).run()
        for share in (1.0, math.inf)
    }
    assert worlds[math.inf].hits < 0.1
    assert worlds[1.0].hits > 0.8
    for engine in range(2):  # in the order in which they have asked
        own = [session for session in worlds[1.0].began if session // 2 % 2 == engine]
        assert own == sorted(own)
    assert len(worlds[1.0].began) == 60


def test_without_a_cache_nothing_is_held_back() -> None:
    assert World(alike(40), cache=None).run().admission.most == 40


def test_one_session_always_runs() -> None:
    world = World(alike(4), cache=100).run()
    assert world.admission.most == 1
    assert world.began == [0, 1, 2, 3]


@pytest.mark.parametrize(("pause", "at_a_time"), [(0, 10), (1, 10), (9, 50)])
def test_an_engine_has_work_where_environments_are_slow(pause: int, at_a_time: int) -> None:
    """Ten sessions fit. Where each is at the engine for one tick of ten, fifty run, and five are there at a time."""
    world = World(alike(2000), cache=1200, pause=pause, longest=110).run()
    assert world.admission.most == pytest.approx(at_a_time, rel=0.2)
    middle = world.at_engines[len(world.at_engines) // 4 : -len(world.at_engines) // 4]
    assert sum(middle) / len(middle) > 4


def test_older_sessions_come_first() -> None:
    admission = World(alike(4), cache=1000, longest=110).admission
    asks = [Request(f"{group}.{group}.0", [0] * PROMPT, SamplingParams(max_new_tokens=1)) for group in range(4)]
    admission.add(asks[2:])
    admission.add(asks[:2])
    assert [(request.rid, request.order) for request in admission.take()] == [
        ("2.2.0", 0),
        ("3.3.0", 1),
        ("0.0.0", 2),
        ("1.1.0", 3),
    ]
    admission.add([Request("3.3.2", [0] * 30, SamplingParams(max_new_tokens=1))])
    assert [request.order for request in admission.take()] == [1]


def test_what_was_never_sent_is_returned() -> None:
    """That of sessions, too, that have ended while it was held back."""
    world = World(alike(4), cache=130, longest=110)
    world.admission.add([world.request(session) for session in range(4)])
    assert [request.rid for request in world.admission.take()] == ["0.0.0"]
    del world.turn[1]
    assert world.admission.take() == []
    assert [(output.rid, output.output_ids, output.finish_reason) for output in world.admission.withdraw()] == [
        ("0.1.0", [], FinishReason.ABORT),
        ("1.2.0", [], FinishReason.ABORT),
        ("1.3.0", [], FinishReason.ABORT),
    ]
    assert world.admission.withdraw() == []
    del world.turn[0]
    assert world.admission.take() == []
