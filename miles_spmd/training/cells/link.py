"""This rank's connection to the same rank of every other cell.

A cell is a whole replica: ranks with their own torch.distributed world, trainers and engines. torchft agrees on the
cells that are there (a quorum), connects them, and lets a cell that is behind receive the state of one that is not.
Cells exchange nothing else but sums of gradients.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import psutil
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, AllToAllOptions
from torchft import Manager, ProcessGroupGloo

from miles_spmd.config.resilience import ResilienceConfig
from miles_spmd.protocol.router import address_towards
from miles_spmd.training.cells.live_state import LiveState, PeerTransport
from miles_spmd.training.reduction import Total, add_tree
from miles_spmd.types.cell import Cell

# torchft's count: it lets a cell receive the state of those that have counted further
DAMAGED, JOINED, FOUNDED = -1, 0, 1


class LostUpdateError(RuntimeError):
    """The cells could not meet, or the update was not made: nothing but gradient buffers has changed, and what was
    received from another cell. ``missing`` are parts that no cell had, where that is why, and ``overwritten`` those
    that this cell has no more."""

    def __init__(self, text: str, missing: Collection[int] = ()) -> None:
        super().__init__(text)
        self.missing = sorted(missing)
        self.overwritten: list[int] = []


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
        self._group = Group(limits)
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
            if len({int(other) for other in _gather(self._group, self._participants, mine, self._limits.quorum)}) > 1:
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
            combine(Exchange(self._group, self._space, self.cells, rank, self._participants, own).total)
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


class Group(ProcessGroupGloo):
    """Connections to other cells that end when packets of theirs do not arrive any more, as when their machine has lost
    its power: nobody closes them then, and gloo alone would wait as long as a message may take."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(timeout=timedelta(seconds=limits.exchange))
        self._silence = limits.silence

    def _create_pg(self, store: dist.Store, rank: int, world_size: int) -> dist.ProcessGroup:
        before = _connections()
        group = super()._create_pg(store, rank, world_size)
        for descriptor, *_ in _connections() - before:
            with contextlib.suppress(OSError), socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM) as own:
                end_where_silent(own, self._silence)
        return group


def end_where_silent(connection: socket.socket, seconds: float) -> None:
    """Let the kernel end a TCP connection whose other machine confirms nothing for so many ``seconds``."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(1000 * seconds))


def _connections() -> set[tuple[int, tuple[object, ...], tuple[object, ...]]]:
    """Return descriptor and both addresses of each TCP connection of this process."""
    found = psutil.Process().net_connections("tcp")
    return {(one.fd, one.laddr, one.raddr) for one in found if one.status == psutil.CONN_ESTABLISHED}


class Space:
    """Host memory for what is under way between cells. It is used again, because the kernel has to map new memory
    first, page by page."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def tensor(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Return a tensor whose values are undefined; valid until the next one of this name."""
        nbytes = math.prod(shape) * dtype.itemsize
        if name not in self._memory or self._memory[name].numel() < nbytes:
            self._memory[name] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        return self._memory[name][:nbytes].view(dtype).view(shape)


class Exchange:
    """Sums ``parts`` parts, which the ``cells`` of a quorum have; this one is number ``rank`` of them. All of them call
    :meth:`total` for the same stretches.

    Raises LostUpdateError where no cell has a part.
    """

    def __init__(
        self, group: ProcessGroupGloo, space: Space, parts: int, rank: int, cells: int, own: Collection[int]
    ) -> None:
        self._group, self._space, self._cells = group, space, cells
        have = torch.zeros(parts, dtype=torch.uint8)
        have[[*own]] = 1
        everywhere = torch.stack(self._gather(have))
        if missing := (everywhere.sum(0) == 0).nonzero().flatten().tolist():
            raise LostUpdateError(f"no cell has part {', '.join(map(str, missing))}", missing)
        senders = everywhere.argmax(0)  # of cells that have a part the first; what they have is bitwise equal
        self._counts = senders.bincount(minlength=cells).tolist()
        self._arrival = senders.argsort(stable=True).tolist()  # parts in the order in which they arrive
        self._own = [part for part in self._arrival if senders[part] == rank]

    def total(self, own: Mapping[int, Tensor], stretch: Tensor) -> None:
        """Replace a ``stretch`` by the sum of all parts, from the stretches of the parts that this cell has, one of
        which may be ``stretch`` itself. Each cell sums one piece of it."""
        size, dtype = -(-stretch.numel() // self._cells), stretch.dtype
        pieces = self._space.tensor("pieces", dtype, self._cells, len(self._own), size)  # by receiver and part
        for row, part in enumerate(self._own):
            for receiver, piece in enumerate(own[part].split(size)):
                pieces[receiver, row, : piece.numel()].copy_(piece)
        terms = dict(zip(self._arrival, self._exchange(pieces)))
        summed = add_tree([terms[part] for part in sorted(terms)])
        whole = summed
        if self._cells > 1:
            whole = self._space.tensor("whole", dtype, self._cells, size)
            self._group.allgather([[*whole]], [summed], AllgatherOptions()).wait()
        stretch.copy_(whole.view(-1)[: stretch.numel()])

    def _exchange(self, pieces: Tensor) -> Tensor:
        """Send to each cell its ``pieces``; return what all have sent to this one, by sender and part."""
        size = pieces.shape[-1]
        if self._cells == 1:
            return pieces.view(-1, size)
        arrived = self._space.tensor("arrived", pieces.dtype, len(self._arrival), size)
        sent, counts = [len(self._own) * size] * self._cells, [count * size for count in self._counts]
        self._group.alltoall_base(arrived.view(-1), pieces.view(-1), counts, sent, AllToAllOptions()).wait()
        return arrived

    def _gather(self, mine: Tensor) -> list[Tensor]:
        return _gather(self._group, self._cells, mine)


def _gather(group: ProcessGroupGloo, cells: int, mine: Tensor, seconds: float | None = None) -> list[Tensor]:
    """Return the tensor of each cell; within so many ``seconds``, by default the group's."""
    if cells == 1:
        return [mine]
    gathered, options = [torch.empty_like(mine) for _ in range(cells)], AllgatherOptions()
    if seconds is not None:
        options.timeout = timedelta(seconds=seconds)
    group.allgather([gathered], [mine], options).wait()
    return gathered


def _largest(*values: int) -> list[int]:
    """Return the largest of each value on the ranks of this cell."""
    found = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [int(value) for value in found]
