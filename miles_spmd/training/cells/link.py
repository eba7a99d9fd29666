"""This rank's connection to the same rank of every other cell.

A cell is a whole replica: ranks with their own torch.distributed world, trainer and engines. torchft agrees before each
update on the cells that take part (a quorum), connects them, and lets a cell that is behind receive the state of one
that is not. Cells exchange nothing else but sums of gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions
from torchft import Manager, ProcessGroupGloo

from miles_spmd.training.cells.live_state import LiveState, PeerTransport

Fetch = Callable[[Mapping[int, Tensor]], list[Tensor]]  # see PartSum.combine


class LostUpdateError(RuntimeError):
    """The update was not made: nothing but gradient buffers has changed. ``missing`` are parts that no cell had, where
    that is why."""

    def __init__(self, text: str, missing: Collection[int] = ()) -> None:
        super().__init__(text)
        self.missing = sorted(missing)


@dataclass(frozen=True)
class Limits:
    """Seconds after which something counts as lost."""

    exchange: float = 30.0  # one collective between cells; also what a cell that heals and its peer wait for each other
    quorum: float = 60.0  # agreeing on the cells that take part
    connect: float = 10.0
    heartbeat: float = 0.1  # between two signs of life of a cell to the lighthouse


class CellLink:
    """Joins the cell number ``cell`` of ``cells``; collective over its ranks, which call all methods together.

    ``lighthouse``: address of torchft's lighthouse, as ``http://HOST:PORT``. ``host``: name or address under which
    other cells reach this rank. ``state``: what a cell that is behind receives. ``updates``: how many were made.
    """

    def __init__(
        self,
        cell: int,
        cells: int,
        lighthouse: str,
        state: LiveState,
        *,
        host: str = "127.0.0.1",
        updates: int = 0,
        limits: Limits = Limits(),
    ) -> None:
        self.cells = cells
        rank, size = dist.get_rank(), dist.get_world_size()
        port: list[int] = [0]
        if rank == 0:
            self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
            port = [self._store.port]
        dist.broadcast_object_list(port, 0)
        exchange = timedelta(seconds=limits.exchange)
        logging.getLogger("torchft").setLevel(logging.ERROR)
        self._group = ProcessGroupGloo(timeout=exchange)
        self._manager = Manager(
            pg=self._group,
            min_replica_size=1,
            use_async_quorum=False,  # the weights have to be there before the forward pass
            init_sync=False,  # all cells begin with the same weights
            # torchft calls them with what the transport has put in place already
            state_dict=dict,
            load_state_dict=lambda state: None,
            checkpoint_transport=PeerTransport(self._group, state),
            timeout=exchange,
            quorum_timeout=timedelta(seconds=limits.quorum),
            connect_timeout=timedelta(seconds=limits.connect),
            quorum_retries=3,
            heartbeat_interval=timedelta(seconds=limits.heartbeat),
            rank=rank,
            world_size=size,
            store_addr=host,
            store_port=port[0],
            replica_id=f"cell{cell}",
            hostname=host,
            lighthouse_addr=lighthouse if rank == 0 else None,
        )
        self._manager.load_state_dict({"step": updates, "batches_committed": 0})

    @property
    def updates(self) -> int:
        """The number of updates that this cell has made, or received."""
        return self._manager.current_step()

    def begin(self) -> None:
        """Agree on the cells that take part in the next update, and catch up with them. Raises LostUpdateError."""
        try:
            self._manager.start_quorum()
        except Exception as error:  # of libraries below torchft, too
            self._manager._quorum_future = None  # torchft would raise it again at the next start, and for ever
            raise LostUpdateError(f"no quorum: {error}") from error
        if (failed := self._manager.errored()) is not None:
            raise LostUpdateError(f"no quorum: {failed.original_exception}")

    def exchange(self, combine: Callable[[Fetch], None], own: Collection[int]) -> None:
        """Let ``combine`` fetch what the cells of the quorum have, which is the parts ``own`` here. What goes wrong
        makes :meth:`commit` fail, and is not raised: other ranks of this cell may have seen nothing."""
        try:
            combine(Exchange(self._group, self.cells, self._manager.num_participants(), own).fetch)
        except LostUpdateError as error:  # every cell knows
            self._manager.report_error(error)
        except Exception as error:
            self._manager.report_error(error)
            self._group.abort()  # cells that wait for this one must not wait until their own time is up

    def commit(self) -> None:
        """Return where the update is to be made, the same on all ranks of this cell. Raises LostUpdateError."""
        failed = self._manager.errored()
        if not self._manager.should_commit():
            cause = None if failed is None else failed.original_exception
            missing = cause.missing if isinstance(cause, LostUpdateError) else ()
            raise LostUpdateError(str(cause or "another rank of this cell could not take part"), missing)


class Exchange:
    """Fetches ``parts`` parts from the ``cells`` of a quorum. All of them call :meth:`fetch` for the same stretches.

    Raises LostUpdateError where no cell has a part.
    """

    def __init__(self, group: ProcessGroupGloo, parts: int, cells: int, own: Collection[int]) -> None:
        self._group, self._cells, self._own = group, cells, sorted(own)
        have = torch.zeros(parts, dtype=torch.uint8)
        have[self._own] = 1
        everywhere = torch.stack(self._gather(have))
        if missing := (everywhere.sum(0) == 0).nonzero().flatten().tolist():
            raise LostUpdateError(f"no cell has part {', '.join(map(str, missing))}", missing)
        self._rounds = int(everywhere.sum(1).max())
        # (cell, round) of each part: of those that have it the first; they are bitwise equal
        order = everywhere.cumsum(1, dtype=torch.int64) - 1
        owners = everywhere.argmax(0).tolist()
        self._places = [(cell, int(order[cell, part])) for part, cell in enumerate(owners)]

    def fetch(self, own: Mapping[int, Tensor]) -> list[Tensor]:
        """Return a stretch of all parts, in order, from the stretches of this cell's ``own``."""
        example = next(iter(own.values()))
        mine = torch.zeros(self._rounds, example.numel(), dtype=example.dtype)
        for number, part in enumerate(self._own):
            mine[number].copy_(own[part])
        everywhere = self._gather(mine)
        return [everywhere[cell][number].to(example.device) for cell, number in self._places]

    def _gather(self, mine: Tensor) -> list[Tensor]:
        if self._cells == 1:
            return [mine]
        gathered = [torch.empty_like(mine) for _ in range(self._cells)]
        self._group.allgather([gathered], [mine], AllgatherOptions()).wait()
        return gathered
