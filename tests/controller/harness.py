"""A real cluster object and router before fake ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from miles_spmd.config import DeadlinesConfig
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.protocol.router import Router
from tests.controller.ranks import DIGEST, FakeRank


class Harness:
    """A router, its workers, and fake ranks."""

    def __init__(self, world_size: int, cells: int = 1, **deadlines: float) -> None:
        self.world_size = world_size
        self.router = Router(ranks=world_size)
        settings = DeadlinesConfig(**deadlines), DIGEST, Path("runs/x/logs")
        self.workers = Cluster(self.router, world_size, *settings, cells=cells)
        self.ranks: list[FakeRank] = []

    def add(self, rank: int, *args: Any, **settings: Any) -> FakeRank:
        self.ranks.append(
            FakeRank(self.router.credentials[min(rank, self.world_size - 1)], rank, self.world_size, *args, **settings)
        )
        return self.ranks[-1]

    def add_all(self, *args: Any, **settings: Any) -> Cluster:
        for rank in range(self.world_size):
            self.add(rank, *args, **settings)
        self.workers.wait_ready()
        return self.workers

    def close(self) -> None:
        for rank in self.ranks:
            rank.leave()
        self.router.close()


Make = Callable[..., Harness]
