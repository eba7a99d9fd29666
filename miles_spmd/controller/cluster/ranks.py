"""The table of ranks: who they are, over which connection they receive commands, when each was last heard."""

from __future__ import annotations

from dataclasses import dataclass

from miles_spmd.protocol.commands import Receivers
from miles_spmd.protocol.messages import Heartbeat, RankInfo
from miles_spmd.protocol.router import Peer


@dataclass
class RankState:
    """What the controller has received from one rank."""

    info: RankInfo | None = None
    peer: Peer | None = None  # the connection that takes commands
    heartbeat: Heartbeat | None = None  # the last one
    heard: float = 0.0  # monotonic time of the last message; 0: none yet
    stopping: bool = False  # it has announced that a signal ends it


class RankTable:
    """The states of all ranks."""

    def __init__(self, world_size: int) -> None:
        self.states = [RankState() for _ in range(world_size)]

    @property
    def infos(self) -> list[RankInfo]:
        """By rank, of those that are built."""
        return [state.info for state in self.states if state.info is not None]

    def receivers(self, kind: Receivers) -> list[int]:
        """The ranks that receive a command of this kind, in order."""
        match kind:
            case Receivers.TRAINERS:
                return [info.rank for info in self.infos if info.trainer is not None]
            case Receivers.ENGINES:
                return [info.rank for info in self.infos if info.engine is not None]
            case Receivers.LEADERS:
                return [info.rank for info in self.infos if info.engine is not None and info.engine.leader]
            case Receivers.ALL:
                return [info.rank for info in self.infos]

    def name(self, rank: int) -> str:
        """For messages: with host and process id as soon as they are known."""
        info = self.states[rank].info
        return f"rank {rank} ({info.host}, pid {info.pid})" if info else f"rank {rank}"
