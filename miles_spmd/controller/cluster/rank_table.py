"""The ranks of a run, what the controller has received from each, and the cells that they are divided into."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from miles_spmd.protocol.commands import Receivers
from miles_spmd.protocol.messages import Heartbeat, RankInfo
from miles_spmd.protocol.router import Peer
from miles_spmd.types.engine_group import POLICY


@dataclass
class RankState:
    """What the controller has received from one rank."""

    info: RankInfo | None = None
    peer: Peer | None = None  # the connection that takes commands
    heartbeat: Heartbeat | None = None  # the last one
    heard: float = 0.0  # monotonic time of the last message; 0: none yet
    side: Peer | None = None  # the connection of its watchdog
    stopping: bool = False  # it has announced that a signal ends it
    asked: tuple[float, str] | None = None  # the signal that has requested it to stop, and when (monotonic)


class RankTable:
    """The states of all ranks. They are those of ``cells`` cells, one after another; ``members`` are the cells that
    take part at present, in order."""

    def __init__(self, world_size: int, cells: int = 1) -> None:
        self.states = [RankState() for _ in range(world_size)]
        self.cells, self.cell_size = cells, world_size // cells
        self.members = list(range(cells))

    def cell_of(self, rank: int) -> int:
        return rank // self.cell_size

    def ranks_of(self, cell: int) -> range:
        return range(cell * self.cell_size, (cell + 1) * self.cell_size)

    def among_cells(self, info: RankInfo) -> RankInfo:
        """Return ``info`` with numbers of engines, and of ranks that wait for each other, that no other cell has."""
        first = self.ranks_of(self.cell_of(info.rank))[0]
        trainer, engine = info.trainer, info.engine
        if trainer is not None:
            trainer = msgspec.structs.replace(trainer, waits_with=first + trainer.unit)
        if engine is not None:
            engine = msgspec.structs.replace(engine, engine=first + engine.engine)
        return msgspec.structs.replace(info, trainer=trainer, engine=engine)

    def infos_of(self, *cells: int) -> list[RankInfo]:
        """By rank, of those that are built."""
        states = (self.states[rank] for cell in cells for rank in self.ranks_of(cell))
        return [state.info for state in states if state.info is not None]

    @property
    def infos(self) -> list[RankInfo]:
        """By rank, of those that take part and are built."""
        return self.infos_of(*self.members)

    def receivers(self, kind: Receivers, *cells: int, group: str = POLICY) -> list[int]:
        """The ranks of the engine group ``group`` that receive a command of this kind, in order; those of ``cells``, or
        of all that take part."""
        infos = self.infos_of(*(cells or self.members))
        if kind is Receivers.ALL:
            return [info.rank for info in infos]
        of_group = [info for info in infos if info.group == group]
        match kind:
            case Receivers.TRAINERS:
                return [info.rank for info in of_group if info.trainer is not None]
            case Receivers.ENGINES:
                return [info.rank for info in of_group if info.engine is not None]
            case Receivers.LEADERS:
                return [info.rank for info in of_group if info.engine is not None and info.engine.leader]
            case Receivers.GROUP:
                return [info.rank for info in of_group]

    def engine_of(self, rank: int) -> int | None:
        """The number of the engine that the rank is part of, among those of its group."""
        info = self.states[rank].info
        return None if info is None or info.engine is None else info.engine.engine

    def name(self, rank: int) -> str:
        """For messages: with host and process id as soon as they are known."""
        info = self.states[rank].info
        return f"rank {rank} ({info.host}, pid {info.pid})" if info else f"rank {rank}"
