"""Forward passes that are held, released, and left: two ranks in step with each other leave before the same pass."""

from __future__ import annotations

import threading
import time

import pytest

from miles_spmd.training.passes import AbandonedError, ForwardPasses


class Rank(threading.Thread):
    """Passes that wait for the other rank, as collectives do."""

    def __init__(self, barrier: threading.Barrier, total: int, lag: float) -> None:
        super().__init__(daemon=True)
        self.barrier, self.total, self.lag = barrier, total, lag
        self.passes, self.done, self.left = ForwardPasses(), 0, False

    def run(self) -> None:
        self.passes.begin(self.total)
        try:
            for _ in range(self.total):
                self.passes.enter()
                time.sleep(self.lag)
                self.barrier.wait(10)
                self.done += 1
        except AbandonedError:
            self.left = True
        finally:
            self.passes.end()


def test_ranks_leave_before_the_same_pass() -> None:
    """Whenever they are held, also where one has begun a pass that the other has not."""
    for wait in (0.0, 0.013, 0.02, 0.05):
        barrier = threading.Barrier(2)
        ranks = [Rank(barrier, 500, 0.001), Rank(barrier, 500, 0.004)]
        for rank in ranks:
            rank.start()
        time.sleep(wait)
        held = []
        for rank in ranks:
            held.append(rank.passes.hold())
            time.sleep(0.01)
        limit = max(begun for begun, _ in held)
        assert limit < 500
        for rank in ranks:
            rank.passes.release(limit)
        for rank in ranks:
            rank.join(10)
        assert [(rank.left, rank.done) for rank in ranks] == [(True, limit)] * 2


def test_without_a_limit_all_is_done_and_the_next_command_has_none() -> None:
    passes = ForwardPasses()
    passes.begin(3)
    passes.enter()
    assert passes.hold() == (1, 3)
    passes.release(None)
    passes.enter()
    passes.enter()
    passes.end()
    assert passes.hold() == (0, None)
    passes.release(0)  # before this rank has begun the command
    passes.begin(4)
    with pytest.raises(AbandonedError):
        passes.enter()
    passes.end()
    passes.begin(1)
    passes.enter()
