"""What rank 0 asks of the controller that it starts: the first message of a run, sent through a pipe."""

from __future__ import annotations

from typing import Literal

import msgspec

LAST_WORDS = 5.0  # seconds a controller that has to stop may take to close its files


class Replay(msgspec.Struct, frozen=True):
    """The steps from ``first`` to ``step`` of the run in the folder ``run``. In phase "rollout" the last one does not
    train; in phase "train" nothing is generated: the answers are the run's own."""

    run: str
    first: int
    step: int
    phase: Literal["rollout", "train"] | None

    @property
    def steps(self) -> range:
        return range(self.first, self.step + 1)


class Order(msgspec.Struct, frozen=True):
    """What rank 0 asks of the controller."""

    config: str  # JSON of the resolved configuration
    task: str  # of controller.loop.run
    host: str  # under which all workers reach this machine
    world_size: int
    replay: Replay | None = None  # what the task of this name does again
