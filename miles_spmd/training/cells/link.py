"""This rank's connection to the same rank of every other cell.

A cell is a whole replica: ranks with their own torch.distributed world, trainers and engines. torchft agrees on the
cells that are there (a quorum), connects them, and lets a cell that is behind receive the state of one that is not.
Cells exchange nothing else but sums of gradients.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
import xxhash
from torchft import Manager

from miles_spmd.config.resilience import ResilienceConfig
from miles_spmd.protocol.router import address_towards
from miles_spmd.training.cells.exchange import Exchange, LostUpdateError, Space
from miles_spmd.training.cells.group import Group
from miles_spmd.training.cells.live_state import LiveState, PeerTransport
from miles_spmd.training.reduction import Total
from miles_spmd.types.cell import Cell

# torchft's count: it lets a cell receive the state of those that have counted further
DAMAGED, JOINED, FOUNDED = -1, 0, 1


@dataclass(frozen=True)
class Limits:
    """Seconds after which something counts as lost."""

    exchange: float  # one collective between cells; also what a cell that heals and its peer wait for each other
    quorum: float  # agreeing on the cells that are there; also what the others wait for a cell that catches up
    connect: float
    heartbeat: float  # between two signs of life of a cell to the lighthouse
    silence: float  # of the machine of another cell, however long the message may take

    @classmethod
    def of(cls, config: ResilienceConfig) -> Limits:
        exchange, silence = config.exchange_timeout, config.cell_timeout
        return cls(exchange, 5 * exchange, min(10.0, exchange), min(0.1, silence / 10), silence)


class CellLink:
    """Joins ``cell`` to the others for ``state``, which a cell that is behind receives from a peer. Collective over the
    ranks of the cell, which call all methods together.

    The others know nothing of the cell before its first :meth:`begin`: torchft would let them wait for a cell that is
    alive and does not ask to take part.
    """

    def __init__(self, cell: Cell, state: LiveState, limits: Limits) -> None:
        self.cells = cell.cells
        self._cell, self._state, self._limits = cell, state, limits
        self._group = Group(limits.exchange, limits.silence)
        self._space = Space()
        self._joined: Manager | None = None
        self._count = JOINED  # until there is a manager, which counts then
        self.changed = False  # the state, when this cell met the others the last time

    @property
    def updates(self) -> int:
        """The number of updates that the cells have made since they began; skipped ones count."""
        return max(0, (self._joined.current_step() if self._joined else self._count) - FOUNDED)

    def found(self) -> None:
        """What this cell has is what cells that join later have to catch up with. Does nothing where it has met the
        others already."""
        if self._joined is None:
            self._count = FOUNDED
        elif self._joined.current_step() == JOINED:
            self._set_count(FOUNDED)

    def begin(self, purpose: str) -> None:
        """Agree on the cells that are there, and catch up with them. All of them have to have the same ``purpose``.
        Raises LostUpdateError."""
        manager, problem = self._manager(), ""
        self._state.received, self.changed = 0, False
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what is sent is read in another stream
        try:
            manager.start_quorum()
            if (failed := manager.errored()) is not None:
                raise failed.original_exception
            mine = torch.tensor([xxhash.xxh3_64_intdigest(purpose.encode()) >> 1])
            # as long as a third cell may need to catch up
            if len({int(other) for other in self._group.gather(mine, self._participants, self._limits.quorum)}) > 1:
                problem = f"cells met for different purposes, this one to {purpose}"
        except Exception as error:  # of libraries below torchft, too
            problem = f"no quorum: {error}"
            manager._quorum_future = None  # torchft would raise its error again at the next start, and for ever
            self._group.abort()  # cells that wait for this one must not wait until their own time is up
        count, state = manager.current_step(), self._state
        lost, damaged, received, most, least = _largest(bool(problem), not state.whole, state.received, count, -count)
        self.changed = bool(damaged or received)
        if damaged or most != -least:  # or some ranks have caught up, and others have not
            self._set_count(DAMAGED)
        if lost:
            self._lose(problem or "another rank of this cell could not take part")
        if manager.current_step() < FOUNDED:
            self._lose("no cell is there from which this one, with which the run did not begin, could catch up")

    def exchange(self, combine: Callable[[Total], None], own: Collection[int]) -> None:
        """Let ``combine`` sum what the cells of the quorum have, which is the parts ``own`` here. What goes wrong
        makes :meth:`commit` fail, and is not raised: other ranks of this cell may have seen nothing."""
        try:
            rank = self._manager().participating_rank() or 0
            exchange = Exchange(self._group, self._space, self.cells, rank, self._participants, own)
            with self._group.watched():
                combine(exchange.total)
        except LostUpdateError as error:  # every cell knows
            self._manager().report_error(error)
        except Exception as error:
            self._manager().report_error(error)
            self._group.abort()

    def commit(self) -> None:
        """Return where the update is to be made, the same on all ranks of this cell. Raises LostUpdateError."""
        manager = self._manager()
        cause = None if (failed := manager.errored()) is None else failed.original_exception
        missing = cause.missing if isinstance(cause, LostUpdateError) else []
        # Ranks that have fetched nothing learn what is missing, and none waits in torchft for the others' time limits.
        lost, *nobody_has = _largest(cause is not None, *(part in missing for part in range(self.cells)))
        problem = str(cause or "another rank of this cell could not take part")
        if lost:
            self._lose(problem, [part for part, absent in enumerate(nobody_has) if absent])
        if not manager.should_commit():
            raise LostUpdateError(problem)

    def _lose(self, problem: str, missing: Collection[int] = ()) -> NoReturn:
        """Raise, on all ranks of this cell, and let torchft connect the cells anew when they meet the next time."""
        error = LostUpdateError(problem, missing)
        self._manager().report_error(error)
        self._manager().should_commit()
        raise error

    @property
    def _participants(self) -> int:
        return self._manager().num_participants()

    def _set_count(self, count: int) -> None:
        self._manager().load_state_dict({"step": count, "batches_committed": 0})

    def _manager(self) -> Manager:
        if self._joined is None:
            self._joined = self._join()
        return self._joined

    def _join(self) -> Manager:
        # this machine's address on the interface by which it reaches the lighthouse: other cells reach it there
        host = address_towards(self._cell.host) or socket.gethostname()
        rank, place = dist.get_rank(), [(host, 0)]
        if rank == 0:
            server = socket.create_server((host, 0))
            place = [server.getsockname()[:2]]
            self._store = dist.TCPStore(
                *place[0], is_master=True, wait_for_workers=False, master_listen_fd=server.detach()
            )
        dist.broadcast_object_list(place, 0)
        store_host, port = place[0]
        logging.getLogger("torchft").setLevel(logging.ERROR)
        limits = self._limits
        manager = Manager(
            pg=self._group,
            min_replica_size=1,
            use_async_quorum=False,  # parts are exchanged right after the cells have met
            init_sync=False,  # the cells with which a run begins have the same weights
            # torchft calls them with what the transport has put in place already
            state_dict=dict,
            load_state_dict=lambda state: None,
            checkpoint_transport=PeerTransport(self._group, self._state),
            timeout=timedelta(seconds=limits.exchange),
            quorum_timeout=timedelta(seconds=limits.quorum),
            connect_timeout=timedelta(seconds=limits.connect),
            quorum_retries=3,
            heartbeat_interval=timedelta(seconds=limits.heartbeat),
            rank=rank,
            world_size=dist.get_world_size(),
            store_addr=store_host,
            store_port=port,
            replica_id=f"cell{self._cell.number}",
            hostname=host,
            lighthouse_addr=self._cell.lighthouse if rank == 0 else None,
        )
        manager.load_state_dict({"step": self._count, "batches_committed": 0})
        # cells that begin at the same time have given a sign of life before the first of them asks for the others
        time.sleep(2 * limits.heartbeat)
        return manager


def _largest(*values: int) -> list[int]:
    """Return the largest of each value on the ranks of this cell."""
    found = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [int(value) for value in found]
