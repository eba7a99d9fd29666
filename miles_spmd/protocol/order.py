"""The order that rank 0 gives to the controller that it starts: the first message of a run, sent through a pipe."""

from __future__ import annotations

from typing import Literal

import msgspec

EXIT_SECONDS = 5.0  # which a controller that has to stop may take to close its files


class Replay(msgspec.Struct, frozen=True):
    """The steps from ``first`` to ``step`` of the run in the folder ``run``. In phase "rollout" the last step is
    generated and not trained; in phase "train" nothing is generated: the responses are those that the run recorded."""

    run: str
    first: int
    step: int
    phase: Literal["rollout", "train"] | None

    @property
    def steps(self) -> range:
        return range(self.first, self.step + 1)


class Order(msgspec.Struct, frozen=True):
    """What the controller is to do, and for whom."""

    config: str  # JSON of the resolved configuration
    task: str  # "train", "eval", "export", "replay" or "bisect"
    host: str  # name or address under which all workers reach the controller's machine
    world_size: int
    replay: Replay | None = None  # of the tasks "replay" and "bisect"
