"""Refit between the GPUs of a host: every rank reads what its engine needs directly from the memory of its own trainer
and, over NVLink, of other ranks' trainers, in one pass and without buffers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

import msgspec
import torch
import torch.distributed as dist

from miles_spmd.weights import cuda_ipc
from miles_spmd.weights.checksums import Comparisons
from miles_spmd.weights.copy_kernel import Kind, Move, launches
from miles_spmd.weights.copy_plan import Place
from miles_spmd.weights.transport import ALIGNMENT, Bucket, gather

Buckets = Mapping[int, list[Bucket]]


class Shared(msgspec.Struct, frozen=True):
    """A tensor that other ranks read, with those of a tensor's methods that are used here."""

    where: cuda_ipc.Export
    dtype_name: str
    strides: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype_name)

    def stride(self) -> tuple[int, ...]:
        return self.strides

    def data_ptr(self) -> int:
        """Return the address in this process. Raises MappingError."""
        return cuda_ipc.address(self.where)


def map_peers(
    weights: Mapping[str, torch.Tensor], pulls: Buckets, serves: Buckets, group: dist.ProcessGroup | None
) -> dict[int, dict[str, Shared]] | None:
    """Map the tensors that this rank pulls. Returns the shared tensors of all ranks, by rank and name, or None on all
    ranks if one of them cannot map what it pulls. Collective over ``group``; see :class:`DirectRefit`."""
    problem = ""
    offered: dict[str, Shared] = {}
    names = {copy.source.tensor for buckets in serves.values() for bucket in buckets for copy in bucket.copies}
    try:
        for name in names:
            tensor = weights[name]
            where = cuda_ipc.export(tensor.data_ptr())
            offered[name] = Shared(where, str(tensor.dtype).removeprefix("torch."), tensor.stride())
    except cuda_ipc.MappingError as error:
        problem = str(error)
    shared = dict(enumerate(gather(offered, dict[str, Shared], group)))
    try:
        for rank, buckets in () if problem else pulls.items():
            for name in {copy.source.tensor for bucket in buckets for copy in bucket.copies} & set(shared[rank]):
                shared[rank][name].data_ptr()
    except cuda_ipc.MappingError as error:
        problem = f"memory of rank {rank} cannot be mapped on rank {dist.get_rank(group)}: {error}"
    problems = list(filter(None, gather(problem, str, group)))
    if problems and dist.get_rank(group) == 0:
        print(f"refit: weights go through buffers and NCCL, because {problems[0]}", file=sys.stderr)
    return None if problems else shared


class DirectRefit:
    """This rank's part of a refit. ``pulls``: buckets by the rank (of ``group``) that holds their sources, this rank
    included; ``serves``: buckets by the other rank that pulls them; ``shared``: tensors of other ranks, by rank and
    name.

    All ranks of ``group`` construct and run it together. Shared tensors must stay at their addresses.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        engine_weights: Mapping[str, torch.Tensor],
        pulls: Buckets,
        serves: Buckets,
        shared: Mapping[int, Mapping[str, Shared]],
        device: torch.device,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._group, self._rank, self._device = group, dist.get_rank(group), device
        others = [rank for rank in range(dist.get_world_size(group)) if rank != self._rank]
        self._own = len(pulls.get(self._rank, ()))
        self._pulls = [(bucket, rank) for rank in (self._rank, *others) for bucket in pulls.get(rank, ())]
        serving = [bucket for rank in others for bucket in serves.get(rank, ())]
        # number of checksums that go to and come from every rank, as all_to_all takes them; none from a rank to itself
        self._served, self._pulled = ([0] * (len(others) + 1) for _ in range(2))
        for rank in others:
            self._served[rank], self._pulled[rank] = len(serves.get(rank, ())), len(pulls.get(rank, ()))
        self._reads_peers = any(shared.values())  # whether any rank reads another's memory; equal on all ranks
        self._sources = _Tensors({**shared, self._rank: weights}, device)
        self._targets = _Tensors({self._rank: engine_weights}, device)
        pulling = _interleaved(self._pulls, self._rank)
        self._copy = launches(_moves(pulling, self._sources, self._targets), device)
        self._check = launches(_moves(pulling, None, self._targets), device)
        self._serve = launches(_moves(list(enumerate(serving)), self._sources, None), device)

    def run(self, comparisons: Comparisons | None) -> None:
        """Copy all weights. Unless ``comparisons`` is None, add to it, for every bucket, whether the checksums of what
        the owner holds, what was read and what was written are equal."""
        sources, targets = self._sources.addresses(), self._targets.addresses()
        served, read, written = (self._sums(count) for count in (sum(self._served), *[len(self._pulls)] * 2))
        checks = comparisons is not None
        # Owners sum their own memory, because the reader alone could not detect an error on the way.
        if checks:
            for launch in self._serve:
                launch(sources, sources, served, copy=False, checksum=True)
        sent = self._sums(sum(self._pulled))
        # It orders the devices' streams, too: a rank reads only after the owners' streams have reached this point, at
        # which their optimizer steps are done. It is therefore needed without checksums as well.
        if self._reads_peers:
            dist.all_to_all_single(sent, served, self._pulled, self._served, group=self._group)
        for launch in self._copy:
            launch(sources, targets, read, copy=True, checksum=checks)
        if comparisons is not None:
            for launch in self._check:
                launch(targets, targets, written, copy=False, checksum=True)
            sent = torch.cat([read[: self._own], sent])
            comparisons.add((sent != read) | (read != written), self._pulls)
        if self._reads_peers:  # in the same way, weights change only after all ranks have read them
            dist.all_reduce(self._sums(1), group=self._group)

    def _sums(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int64, device=self._device)


class _Tensors:
    """Tensors by number, in the order of their first use, with their addresses on the device."""

    def __init__(self, by_rank: Mapping[int, Mapping[str, torch.Tensor | Shared]], device: torch.device) -> None:
        self._by_rank, self._device = by_rank, device
        self._numbers: dict[tuple[int, str], int] = {}
        self._tensors: list[torch.Tensor | Shared] = []
        self._addresses: list[int] = []
        self._on_device: torch.Tensor | None = None

    def locate(self, place: Place) -> tuple[tuple[int, int, int], torch.dtype, bool]:
        """Return the number of the tensor and, in elements, the offset of ``place`` in it and the distance of its rows;
        then its dtype, and whether it is aligned. Raises MappingError."""
        key = place.rank, place.tensor
        if key not in self._numbers:
            self._numbers[key] = len(self._tensors)
            self._tensors.append(self._by_rank[place.rank][place.tensor])
            self._addresses.append(self._tensors[-1].data_ptr())
        number = self._numbers[key]
        tensor, aligned = self._tensors[number], self._addresses[number] % ALIGNMENT == 0
        offset = sum(at * stride for at, stride in zip((*place.lead, *place.start), tensor.stride()))
        return (number, offset, tensor.stride()[len(place.lead)]), tensor.dtype, aligned

    def addresses(self) -> torch.Tensor:
        """Return the current addresses, int64 [tensors], on the device. Raises RuntimeError when one is no longer
        aligned, although the kernels assume it."""
        now = [tensor.data_ptr() for tensor in self._tensors]
        if self._on_device is None or now != self._addresses:
            if any(a % ALIGNMENT and not b % ALIGNMENT for a, b in zip(now, self._addresses)):
                raise RuntimeError("refit: a tensor has moved to an address that is not a multiple of 16 bytes")
            self._addresses = now
            self._on_device = torch.tensor(now, dtype=torch.int64).to(self._device)
        return self._on_device


def _interleaved(pulls: Sequence[tuple[Bucket, int]], rank: int) -> list[tuple[int, Bucket]]:
    """Return the buckets with their numbers, one of each source in turn. Different ranks start with different sources,
    so that they do not all read from one rank at a time, whose NVLink would limit them all."""
    by_source: dict[int, list[tuple[int, Bucket]]] = {}
    for number, (bucket, source) in enumerate(pulls):
        by_source.setdefault(source, []).append((number, bucket))
    sources = sorted(by_source)
    first = rank % max(1, len(sources))
    turns = zip_longest(*(by_source[source] for source in (*sources[first:], *sources[:first])))
    return [numbered for turn in turns for numbered in turn if numbered is not None]


def _moves(
    buckets: Sequence[tuple[int, Bucket]], sources: _Tensors | None, targets: _Tensors | None
) -> Iterator[tuple[Move, Kind]]:
    """Yield the moves that copy the buckets' rectangles; with one side only, moves that read its rectangles, for
    checksums of the values in the targets' dtype."""
    for number, bucket in buckets:
        for copy, dtype, offset in zip(bucket.copies, bucket.dtypes, bucket.offsets):
            held = [side.locate(at) for side, at in ((sources, copy.source), (targets, copy.target)) if side]
            (source, held_dtype, _), (target, _, _) = held[0], held[-1]
            rows, columns = (1, *copy.shape)[-2:]
            move = Move(*source, *target, rows, columns, offset // dtype.itemsize, number)
            yield move, Kind(held_dtype, dtype, all(aligned for *_, aligned in held))
