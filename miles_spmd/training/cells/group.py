"""Connections of this rank to the same rank of every other cell."""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, AllToAllOptions
from torchft import ProcessGroupGloo


class Group(ProcessGroupGloo):
    """Connections over TCP, and beside them between GPUs (NCCL) where every rank has one of its own.

    A message that takes more than ``exchange`` seconds is lost. A connection ends when packets of the other machine do
    not arrive for ``silence`` seconds, as when it has lost its power: nobody closes it then, and gloo alone would wait
    as long as a message may take.
    """

    def __init__(self, exchange: float, silence: float) -> None:
        super().__init__(timeout=timedelta(seconds=exchange))
        self._exchange, self._silence = exchange, silence
        self._peers: set[_Ends] = set()
        self._of_devices: Any = None  # torch's type has no such methods in its declarations

    @property
    def device(self) -> torch.device:
        """Where tensors have to be that :meth:`all_to_all` and :meth:`all_gather` take."""
        return torch.device("cuda" if self._of_devices else "cpu")

    def gather(self, mine: Tensor, cells: int, seconds: float | None = None) -> list[Tensor]:
        """Return the tensor of each cell, all in host memory; within so many ``seconds``, by default the group's."""
        if cells == 1:
            return [mine]
        gathered, options = [torch.empty_like(mine) for _ in range(cells)], AllgatherOptions()
        if seconds is not None:
            options.timeout = timedelta(seconds=seconds)
        self.allgather([gathered], [mine], options).wait()
        return gathered

    def all_to_all(self, arrived: Tensor, arriving: list[int], sent: Tensor, leaving: list[int]) -> None:
        """Send to each cell its part of ``sent``, and put what they send into ``arrived``; ``leaving`` and ``arriving``
        count the elements for each cell."""
        by = self._of_devices or self
        by.alltoall_base(arrived, sent, arriving, leaving, AllToAllOptions()).wait()

    def all_gather(self, whole: Tensor, mine: Tensor) -> None:
        """Put the tensors of all cells into ``whole`` [cells, elements]."""
        if self._of_devices:
            self._of_devices._allgather_base(whole, mine).wait()
        else:
            self.allgather([[*whole]], [mine], AllgatherOptions()).wait()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """End what is under way between GPUs when a cell leaves or the time is up; NCCL itself would wait for ever.
        Returns when all of it has arrived. Raises ConnectionError otherwise."""
        if self._of_devices is None:
            yield
            return
        watch = Watch(self._peers, self._exchange, self._of_devices.abort)
        try:
            yield
            torch.cuda.current_stream().synchronize()
        finally:
            watch.close()
            if watch.reason:
                raise ConnectionError(watch.reason)

    def abort(self, errored: bool = True) -> None:
        """End all connections, so that nobody waits for this cell."""
        super().abort(errored)
        of_devices, self._of_devices = self._of_devices, None
        if of_devices is not None:
            of_devices.abort()

    def _create_pg(self, store: dist.Store, rank: int, world_size: int) -> dist.ProcessGroup:
        before = _connections()
        group = super()._create_pg(store, rank, world_size)
        self._peers = _connections().keys() - before.keys()
        for own in _duplicates(self._peers):
            with contextlib.suppress(OSError), own:
                end_where_silent(own, self._silence)
        if world_size > 1:
            gathered, mine = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)], _own_gpu()
            group.allgather([gathered], [torch.tensor([mine])], AllgatherOptions()).wait()
            if len({int(gpu) for gpu in gathered} - {0}) == world_size:
                self._of_devices = _between_gpus(dist.PrefixStore("gpu", store), rank, world_size, self._exchange)
        return group


def _own_gpu() -> int:
    """Return a number that no other GPU has, or 0 without one."""
    if not torch.cuda.is_available():
        return 0
    return xxhash.xxh3_64_intdigest(str(torch.cuda.get_device_properties().uuid).encode()) >> 1 | 1


def _between_gpus(store: dist.Store, rank: int, size: int, seconds: float) -> dist.ProcessGroupNCCL:
    options = dist.ProcessGroupNCCL.Options()
    options.config.blocking = False  # then it can be aborted at any time
    with _environment(
        TORCH_NCCL_ASYNC_ERROR_HANDLING="0",  # torch would end the process when another one's connection ends
        TORCH_NCCL_NONBLOCKING_TIMEOUT=str(math.ceil(seconds)),
    ):
        group = dist.ProcessGroupNCCL(store, rank, size, options)
        group.eager_connect_single_device(torch.device("cuda", torch.cuda.current_device()))
    return group


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Watch:
    """Calls ``end`` from a thread when one of ``connections`` ends, or after so many ``seconds``, unless it is closed
    before. Then ``reason`` says what happened, and is empty otherwise."""

    def __init__(self, connections: set[_Ends], seconds: float, end: Callable[[], object]) -> None:
        self.reason = ""
        self._end, self._seconds = end, seconds
        self._open, self._closed = socket.socketpair()
        self._sockets = list(_duplicates(connections))
        if len(self._sockets) < len(connections):
            self._lost("the connection to another cell had ended")
        self._thread = threading.Thread(target=self._watch, name="cells", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no more. Afterwards ``end`` is not called."""
        self._closed.close()
        self._thread.join()
        for each in (self._open, *self._sockets):
            each.close()

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._open, select.POLLRDHUP)
        for each in self._sockets:
            poll.register(each, select.POLLRDHUP)
        ended = {descriptor for descriptor, _ in poll.poll(1000 * self._seconds)}
        if self._open.fileno() not in ended and not self.reason:
            self._lost(
                "the connection to another cell ended while sums were exchanged"
                if ended
                else f"sums were not exchanged within {self._seconds:g} s"
            )

    def _lost(self, reason: str) -> None:
        self.reason = reason
        self._end()


def end_where_silent(connection: socket.socket, seconds: float) -> None:
    """Let the kernel end a TCP connection whose other machine confirms nothing for so many ``seconds``."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(1000 * seconds))


_Ends = tuple[tuple[object, ...], tuple[object, ...]]  # addresses of a TCP connection, this process's first


def _connections() -> dict[_Ends, int]:
    """Return the descriptors of this process's TCP connections."""
    found = psutil.Process().net_connections("tcp")
    return {(tuple(one.laddr), tuple(one.raddr)): one.fd for one in found if one.status == psutil.CONN_ESTABLISHED}


def _duplicates(connections: Iterable[_Ends]) -> Iterator[socket.socket]:
    """Return sockets of those ``connections`` that have not ended. A connection stays open as long as one of them."""
    descriptors = _connections()
    for ends in connections:
        if ends in descriptors:
            with contextlib.suppress(OSError):
                yield socket.fromfd(descriptors[ends], socket.AF_INET, socket.SOCK_STREAM)
