"""Tensors of all ranks in one folder: every rank writes the parts that it holds, and any other layout can read them.

``rank_00003.bin`` has the bytes of rank 3's parts, end to end; ``rank_00003.json`` says where which part of which
tensor lies, and what its digest is. Whoever marks the folder as complete keeps the digests of these indexes: with them,
everything that is read is known to be what was written. Ranks need not communicate, neither to write nor to read.
Nothing in these files could be executed.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec
import numpy as np
import torch
import xxhash
from torch import Tensor

from miles_spmd.types.files import naming

PART_BYTES = 64 << 20  # of a part at most: what another layout has to read to get one row of it


class DamagedError(ValueError):
    """A file that is missing, cannot be read, or whose content is not what was written."""


class Share(NamedTuple):
    """A rectangle of the matrix ``key`` of ``shape``, beginning at ``row`` and ``column``. A vector is one row."""

    key: str
    shape: tuple[int, int]
    row: int
    column: int
    values: Tensor  # [rows, columns]; where they are written, on the host


def split(share: Share) -> Iterator[Share]:
    """Yield ``share`` in blocks of rows, none of more than PART_BYTES unless one row is. Each is read as a whole."""
    rows, columns = share.values.shape
    block = max(1, PART_BYTES // (columns * share.values.dtype.itemsize))
    for at in range(0, rows, block):
        yield share._replace(row=share.row + at, values=share.values[at : at + block])


class Part(msgspec.Struct):
    """A rectangle of a tensor, contiguous in the file of its rank."""

    offset: int  # in the file, bytes
    start: tuple[int, int]  # of its first element in the tensor
    shape: tuple[int, int]
    digest: str


class Stored(msgspec.Struct):
    """A tensor, and the parts of it that a rank has written."""

    dtype: str
    shape: tuple[int, int]
    parts: list[Part]


class Index(msgspec.Struct):
    """What one rank has written. ``notes`` are whatever else describes the tensors, in JSON's types."""

    notes: dict[str, Any]
    ranks: int  # that have written into this folder
    size: int  # bytes of this rank's file
    tensors: dict[str, Stored]


class Written(NamedTuple):
    """What :func:`write` has written."""

    digest: str  # of the index
    nbytes: int
    seconds: float


def write(folder: Path, rank: int, ranks: int, shares: Iterable[Share], notes: dict[str, Any]) -> Written:
    """Write this rank's ``shares`` into ``folder``, in which it must have no files yet. Raises OSError, which names the
    file."""
    started = time.monotonic()
    tensors: dict[str, Stored] = {}
    data, index = _names(folder, rank)
    folder.mkdir(parents=True, exist_ok=True)
    with naming(data), data.open("xb", buffering=0) as file:
        size = 0
        for share in shares:
            stored = tensors.setdefault(share.key, Stored(_name(share.values.dtype), share.shape, []))
            content = share.values.contiguous().view(-1).view(torch.uint8).numpy()
            shape = share.values.shape[0], share.values.shape[1]
            stored.parts.append(Part(size, (share.row, share.column), shape, _digest(content)))
            size += _write_all(file, content)
        os.fsync(file.fileno())
    encoded = msgspec.json.encode(Index(notes, ranks, size, tensors))
    with naming(index), index.open("xb", buffering=0) as file:
        _write_all(file, encoded)
        os.fsync(file.fileno())
    return Written(_digest(encoded), size + len(encoded), time.monotonic() - started)


class Reader:
    """Reads tensors from a folder that all ranks have filled, under any layout. ``digests`` are those of the indexes,
    by rank; none: the indexes are not compared with any. Its methods may be called by several threads. Raises
    DamagedError."""

    def __init__(self, folder: Path, digests: Sequence[str] = ()) -> None:
        self._folder = folder
        first = self._index(0, digests)
        self.notes = first.notes
        if digests and first.ranks != len(digests):
            raise DamagedError(
                f"{folder} is damaged: {first.ranks} ranks have written it, {len(digests)} were recorded"
            )
        self._tensors: dict[str, tuple[Stored, list[tuple[int, Part]]]] = {}
        for rank in range(first.ranks):
            index = first if rank == 0 else self._index(rank, digests)
            for key, stored in index.tensors.items():
                self._tensors.setdefault(key, (stored, []))[1].extend((rank, part) for part in stored.parts)

    def _index(self, rank: int, digests: Sequence[str]) -> Index:
        data, path = _names(self._folder, rank)
        encoded = _read(path)
        if digests and _digest(encoded) != digests[rank]:
            raise DamagedError(f"{path} is damaged: its digest is not the one that was recorded")
        try:
            index = msgspec.json.decode(encoded, type=Index)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DamagedError(f"{path} is damaged: {error}") from error
        try:
            size = data.stat().st_size
        except OSError as error:
            raise DamagedError(_unreadable(data, error)) from error
        if size != index.size:
            raise DamagedError(f"{data} is damaged: it has {size} bytes, {index.size} were written")
        return index

    @property
    def keys(self) -> set[str]:
        return set(self._tensors)

    def has(self, share: Share) -> bool:
        """Return whether the folder has a tensor of this name and shape."""
        return share.key in self._tensors and self._tensors[share.key][0].shape == share.shape

    @torch.no_grad()
    def read(self, share: Share) -> None:
        """Fill ``share.values``, on any device and converted to its dtype. Raises ValueError for another shape."""
        stored, parts = self._tensors[share.key]
        if stored.shape != share.shape:
            raise ValueError(f"tensor {share.key} was {[*stored.shape]}, is now {[*share.shape]}")
        start, shape = (share.row, share.column), share.values.shape
        covered = 0
        for rank, part in parts:
            low = [*map(max, start, part.start)]
            high = [min(a + n, b + m) for a, n, b, m in zip(start, shape, part.start, part.shape)]
            if all(map(int.__lt__, low, high)):
                values = self._values(share.key, stored.dtype, rank, part)
                share.values[_slices(low, high, start)].copy_(values[_slices(low, high, part.start)])
                covered += math.prod(b - a for a, b in zip(low, high))
        if covered != share.values.numel():
            raise DamagedError(f"{self._folder} is damaged: parts of tensor {share.key} are missing")

    def _values(self, key: str, dtype: str, rank: int, part: Part) -> Tensor:
        path, kind = _names(self._folder, rank)[0], getattr(torch, dtype)
        try:
            data = np.fromfile(path, np.uint8, math.prod(part.shape) * kind.itemsize, offset=part.offset)
        except OSError as error:
            raise DamagedError(_unreadable(path, error)) from error
        if _digest(data) != part.digest:
            raise DamagedError(f"{path} is damaged: the digest of tensor {key} is not the one that was recorded")
        return torch.from_numpy(data).view(kind).view(part.shape)


def _names(folder: Path, rank: int) -> tuple[Path, Path]:
    return folder / f"rank_{rank:05d}.bin", folder / f"rank_{rank:05d}.json"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _slices(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin))


def _write_all(file: BinaryIO, content: Any) -> int:
    rest = memoryview(content)
    while rest:  # a write takes at most 2 GiB, and less where the disk is full
        rest = rest[file.write(rest) :]
    return len(content)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamagedError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path} is missing" if isinstance(error, FileNotFoundError) else f"{path} cannot be read: {error.strerror}"


def _digest(data: Any) -> str:
    return xxhash.xxh3_128_hexdigest(data)
