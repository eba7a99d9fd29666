"""One command under way, and what the ranks that received it have replied and reported."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from miles_spmd.controller.cluster.errors import WorkerFailedError
from miles_spmd.protocol.commands import Command
from miles_spmd.protocol.messages import Held, Hello, Overdue, Reply
from miles_spmd.protocol.results import Abandoned, Result
from miles_spmd.types.phase import Phase

R = TypeVar("R", bound=Result)


@dataclass
class PendingCall(Generic[R]):
    """One command under way, and the replies to it. Without a ``kind`` it is a start, to which ranks reply with their
    Hello. ``lost``: it was also sent to ranks of a cell that was lost; nothing is expected of them any more."""

    id: int
    kind: type[Command[R]] | None
    ranks: list[int]
    phase: Phase
    step: int
    seconds: float
    end: float  # monotonic
    replies: dict[int, Hello | Reply] = field(default_factory=dict)
    failures: dict[int, WorkerFailedError] = field(default_factory=dict)  # of ranks whose reply is one
    purpose: str = ""  # of what is not for training
    held: dict[int, Held] | None = None  # by rank, where ranks are to leave the command
    overdue: dict[int, Overdue] = field(default_factory=dict)  # where ranks stood when time was up
    hung_since: float = math.inf  # monotonic: when the first of them reported that its engine hangs
    lost: bool = False

    @property
    def result_types(self) -> tuple[type, ...]:
        """What a rank may reply with."""
        own = () if self.kind is None else (self.kind.result_type(),)
        return own if self.held is None else (*own, Abandoned)

    @property
    def done(self) -> bool:
        return len(self.replies) == len(self.ranks)

    @property
    def over(self) -> bool:
        """Whether no reply is missing, failures included."""
        return len(self.replies) + len(self.failures) == len(self.ranks)

    @property
    def hung(self) -> list[int]:
        """The ranks whose engines do not return from a step."""
        return [rank for rank, report in self.overdue.items() if report.engine_step and self.awaits(rank)]

    def awaits(self, rank: int) -> bool:
        return rank in self.ranks and rank not in self.replies and rank not in self.failures

    @property
    def place(self) -> str:
        """Phase and step, for messages."""
        if self.phase is Phase.START:
            return str(self.phase)
        return ", ".join(filter(None, [str(self.phase), f"step {self.step}", self.purpose]))
