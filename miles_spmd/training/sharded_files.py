"""Tensors of all ranks in one folder: every rank writes the parts that it holds, and any other layout can read them.

``rank_00003.bin`` has the bytes of rank 3's parts, end to end; ``index.json`` says where which part of which tensor
lies, and what its digest is. Whoever marks the folder as complete keeps the digest of the index: with it, everything
that is read is known to be what was written. Nothing in these files could be executed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import torch
import torch.distributed as dist
import xxhash
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import is_main_replica
from torch import Tensor

from miles_spmd.types.files import naming, write_whole

INDEX = "index.json"


class DamagedError(ValueError):
    """A file that is missing, or whose content is not what was written."""


class Part(msgspec.Struct):
    """A rectangle of a tensor, contiguous in the file of one rank."""

    rank: int
    offset: int  # in the file, bytes
    start: list[int]  # of its first element in the tensor
    shape: list[int]
    digest: str


class Stored(msgspec.Struct):
    """A tensor, and the parts that it consists of."""

    dtype: str
    shape: list[int]
    parts: list[Part]


class Index(msgspec.Struct):
    """What a folder holds. ``notes`` are whatever else describes the tensors, in JSON's types."""

    notes: dict[str, Any]
    sizes: list[int]  # bytes of the file of each rank
    tensors: dict[str, Stored]


def write(folder: Path, tensors: Iterable[ShardedTensor], notes: dict[str, Any]) -> str:
    """Write the main replicas among ``tensors`` into ``folder``, which must be empty or new; all ranks call it.

    Return the digest of the index on rank 0, "" on the others. ``notes`` are rank 0's. Raises OSError.
    """
    rank = dist.get_rank()
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    own: dict[str, Stored] = {}
    with naming(path := folder / _file(rank)), path.open("xb") as file:
        for tensor in tensors:
            if is_main_replica(tensor.replica_id):
                # a copy, also of a CPU's tensor: a storage that numpy has seen could not be offloaded any more
                copied = tensor.data.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
                data = copied.view(-1).view(torch.uint8).numpy()
                stored = own.setdefault(tensor.key, Stored(str(tensor.dtype), [*tensor.global_shape], []))
                stored.parts.append(Part(rank, file.tell(), *_rectangle(tensor), _digest(data)))
                file.write(data)
        size = _finish(file)
    sent: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(msgspec.msgpack.encode((size, own)), sent if rank == 0 else None)  # ranks exchange plain objects
    if rank != 0:
        return ""
    of_ranks = [msgspec.msgpack.decode(each, type=tuple[int, dict[str, Stored]]) for each in sent]
    index = Index(notes, [size for size, _ in of_ranks], {})
    for _, of_rank in of_ranks:
        for key, stored in of_rank.items():
            index.tensors.setdefault(key, Stored(stored.dtype, stored.shape, [])).parts.extend(stored.parts)
    encoded = msgspec.json.encode(index)
    write_whole(folder / INDEX, encoded, sync=True)
    return _digest(encoded)


class Reader:
    """Reads tensors from a folder that :func:`write` filled, under any layout. ``digest`` is what it returned; "": the
    index is not compared with one. Raises DamagedError."""

    def __init__(self, folder: Path, digest: str = "") -> None:
        self._folder = folder
        path = folder / INDEX
        if not path.is_file():
            raise DamagedError(f"{path} is missing")
        encoded = path.read_bytes()
        if digest and _digest(encoded) != digest:
            raise DamagedError(f"{path} is damaged: its digest is not the one that was recorded")
        try:
            index = msgspec.json.decode(encoded, type=Index)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DamagedError(f"{path} is damaged: {error}") from error
        self.notes, self._tensors = index.notes, index.tensors
        for rank, size in enumerate(index.sizes):
            file = folder / _file(rank)
            if not file.is_file():
                raise DamagedError(f"{file} is missing")
            if file.stat().st_size != size:
                raise DamagedError(f"{file} is damaged: it has {file.stat().st_size} bytes, {size} were written")

    @property
    def keys(self) -> set[str]:
        return set(self._tensors)

    def has(self, tensor: ShardedTensor) -> bool:
        """Return whether the folder has a tensor of this name and shape."""
        stored = self._tensors.get(tensor.key)
        return stored is not None and stored.shape == [*tensor.global_shape]

    @torch.no_grad()
    def read(self, tensor: ShardedTensor) -> Tensor:
        """Return the values of ``tensor``, in its memory if it has some. Elements that a tensor of
        ``allow_shape_mismatch`` has beyond the stored ones are 0. Raises ValueError for another shape or dtype."""
        stored = self._tensors[tensor.key]
        if not (self.has(tensor) or tensor.allow_shape_mismatch) or stored.dtype != str(tensor.dtype):
            now = f"{tensor.dtype} {[*tensor.global_shape]}"
            raise ValueError(f"tensor {tensor.key} was {stored.dtype} {stored.shape}, is now {now}")
        out = torch.empty(tensor.local_shape, dtype=tensor.dtype) if tensor.data is None else tensor.data.detach()
        whole = out[(None,) * tensor.prepend_axis_num]  # with all axes of the stored tensor
        start, shape = _rectangle(tensor)
        if tensor.allow_shape_mismatch:
            whole.zero_()
        covered = 0
        for part in stored.parts:
            low = [*map(max, start, part.start)]
            high = [min(a + n, b + m) for a, n, b, m in zip(start, shape, part.start, part.shape)]
            if all(map(int.__lt__, low, high)):
                values = self._values(tensor, part)
                whole[_slices(low, high, start)].copy_(values[_slices(low, high, part.start)])
                covered += math.prod(b - a for a, b in zip(low, high))
        if covered != math.prod(max(0, min(n, size - a)) for a, n, size in zip(start, shape, stored.shape)):
            raise DamagedError(f"{self._folder / INDEX} is damaged: parts of tensor {tensor.key} are missing")
        return out

    def _values(self, tensor: ShardedTensor, part: Part) -> Tensor:
        path, count = self._folder / _file(part.rank), math.prod(part.shape) * tensor.dtype.itemsize
        data = np.fromfile(path, np.uint8, count, offset=part.offset)
        if _digest(data) != part.digest:
            raise DamagedError(f"{path} is damaged: the digest of tensor {tensor.key} is not the one that was recorded")
        return torch.from_numpy(data).view(tensor.dtype).view(part.shape)


def _file(rank: int) -> str:
    return f"rank_{rank:05d}.bin"


def _rectangle(tensor: ShardedTensor) -> tuple[list[int], list[int]]:
    """Return the start and the shape of what this rank has of the whole tensor."""
    return [*tensor.global_offset], [1] * tensor.prepend_axis_num + [*tensor.local_shape]


def _slices(low: list[int], high: list[int], origin: list[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin))


def _finish(file: BinaryIO) -> int:
    """Make sure that all is on the disk; return how many bytes."""
    file.flush()
    os.fsync(file.fileno())
    return file.tell()


def _digest(data: Any) -> str:
    return xxhash.xxh3_128_hexdigest(data)
