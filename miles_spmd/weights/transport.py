"""Buckets of planned rectangles, and the collectives by which ranks exchange them and agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple, TypeVar

import msgspec
import torch
import torch.distributed as dist

from miles_spmd.models.layout import region
from miles_spmd.weights.copy_plan import Copy, Ints, Place

T = TypeVar("T")
ALIGNMENT = 16  # bytes; any dtype can be viewed at a multiple, and it is the size of a vector access on a GPU


class Bucket(NamedTuple):
    """Rectangles that are sent together in a flat buffer, in the dtypes of their targets. ``offsets`` are in bytes;
    between rectangles the buffer has gaps, so that each is aligned."""

    copies: list[Copy]
    dtypes: list[torch.dtype]
    offsets: list[int]
    nbytes: int

    @property
    def payload(self) -> int:
        """Bytes of weights; ``nbytes`` includes the gaps."""
        return sum(prod(copy.shape) * dtype.itemsize for copy, dtype in zip(self.copies, self.dtypes))

    def sources(self, weights: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        return [rectangle(weights, copy.source, copy.shape) for copy in self.copies]

    def targets(self, weights: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        return [rectangle(weights, copy.target, copy.shape) for copy in self.copies]

    def segments(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Return the rectangles as views of a uint8 ``buffer``."""
        return [
            buffer[offset : offset + prod(copy.shape) * dtype.itemsize].view(dtype).view(copy.shape)
            for copy, dtype, offset in zip(self.copies, self.dtypes, self.offsets)
        ]


def rectangle(tensors: Mapping[str, torch.Tensor], place: Place, shape: Ints) -> torch.Tensor:
    """Return a view of the rectangle. Views are made anew in every refit, because storages change when trainer or
    engine releases memory."""
    return tensors[place.tensor][region(place.lead, place.start, shape)]


def gather(value: T, kind: type[T], group: dist.ProcessGroup | None) -> list[T]:
    """Return every rank's ``value``, by rank; its type ``kind`` is one that msgspec encodes. Collective."""
    encoded: list[bytes] = [b""] * dist.get_world_size(group)
    dist.all_gather_object(encoded, msgspec.msgpack.encode(value), group=group)
    return [msgspec.msgpack.decode(data, type=kind) for data in encoded]


def raise_together(problem: str, group: dist.ProcessGroup | None) -> None:
    """Raise ValueError on every rank of ``group`` if any rank has a problem, so that no rank waits for the others in a
    later collective. Collective."""
    if problems := [p for p in gather(problem, str, group) if p]:
        raise ValueError("; ".join(dict.fromkeys(problems)))


def make_buckets(copies: Sequence[Copy], dtypes: Mapping[str, torch.dtype], limit: int) -> list[Bucket]:
    """Distribute ``copies`` in order over buckets of at most ``limit`` bytes; ``dtypes`` by target tensor. Sender and
    receiver compute equal buckets from equal copies, so that only data is sent.

    A rectangle larger than a bucket is cut between rows; a single row may exceed the limit.
    """
    buckets: list[Bucket] = []
    for whole in copies:
        dtype = dtypes[whole.target.tensor]
        for copy in _cut(whole, max(1, limit // (prod(whole.shape[1:]) * dtype.itemsize))):
            nbytes = -(-prod(copy.shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
            if not buckets or buckets[-1].nbytes + nbytes > limit:
                buckets.append(Bucket([], [], [], 0))
            last = buckets[-1]
            last.copies.append(copy)
            last.dtypes.append(dtype)
            last.offsets.append(last.nbytes)
            buckets[-1] = last._replace(nbytes=last.nbytes + nbytes)
    return buckets


def _cut(copy: Copy, rows: int) -> Iterator[Copy]:
    """Yield ``copy`` in parts of at most ``rows`` rows."""
    for first in range(0, copy.shape[0], rows):
        ends = (end._replace(start=(end.start[0] + first, *end.start[1:])) for end in (copy.source, copy.target))
        yield Copy(copy.name, (min(rows, copy.shape[0] - first), *copy.shape[1:]), *ends)


def exchange(
    outgoing: torch.Tensor | None, to: int, incoming: torch.Tensor | None, source: int, group: dist.ProcessGroup | None
) -> None:
    """Send one flat buffer to a rank of ``group`` and receive one at the same time; None: nothing in that direction."""
    operations = []
    if outgoing is not None:
        operations.append(dist.P2POp(dist.isend, outgoing, group=group, group_peer=to))
    if incoming is not None:
        operations.append(dist.P2POp(dist.irecv, incoming, group=group, group_peer=source))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
