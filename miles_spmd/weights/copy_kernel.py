"""Kernel that copies rectangles between GPU tensors, thousands in one launch, and computes checksums of them.

The work is a table of tiles, built once; a tile is a part of a source tensor and the part of a target tensor that it is
copied to. Tiles name tensors by number, and the kernel looks addresses up when it runs, so that memory may move between
runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

COLUMNS, ROWS = 2048, 16  # size of the largest tile, in elements
FIELDS = 11
VECTOR = 8  # elements that a thread copies at a time, if all offsets, strides and widths are multiples of it


class Move(NamedTuple):
    """Copy of ``rows`` x ``columns`` elements. Offsets and strides are in elements: where the rectangle starts in the
    tensor of this number, and the distance of its rows.

    ``position`` is that of the first element among the elements of the checksum ``bucket``.
    """

    source: int
    source_offset: int
    source_stride: int
    target: int
    target_offset: int
    target_stride: int
    rows: int
    columns: int
    position: int
    bucket: int


def _tiles(move: Move) -> list[np.ndarray]:
    """Return tables of tiles, int64 [tiles, FIELDS], that cover ``move``."""
    if move.rows > 1 and not move.columns == move.source_stride == move.target_stride:
        return [_grid(move, move.columns)]
    # The elements are contiguous on both sides, so the shape is free: full tiles, and one row for what remains. Norms
    # and narrow matrices would otherwise be many small tiles.
    rows, rest = divmod(move.rows * move.columns, COLUMNS)
    done = rows * COLUMNS
    body = move._replace(rows=rows, columns=COLUMNS, source_stride=COLUMNS, target_stride=COLUMNS)
    tail = move._replace(
        rows=1,
        columns=rest,
        source_offset=move.source_offset + done,
        target_offset=move.target_offset + done,
        position=move.position + done,
    )
    return [_grid(part, part.columns) for part in (body, tail) if part.rows and part.columns]


def _grid(move: Move, row_length: int) -> np.ndarray:
    """int64 [tiles, FIELDS]: source, offset, stride; target, offset, stride; rows, columns; position of the first
    element, distance of positions between rows; bucket."""
    grid = np.mgrid[0 : move.rows : ROWS, 0 : move.columns : COLUMNS]
    row, column = grid[0].ravel(), grid[1].ravel()
    fields = (
        move.source,
        move.source_offset + row * move.source_stride + column,
        move.source_stride,
        move.target,
        move.target_offset + row * move.target_stride + column,
        move.target_stride,
        np.minimum(move.rows - row, ROWS),
        np.minimum(move.columns - column, COLUMNS),
        move.position + row * row_length + column,
        row_length,
        move.bucket,
    )
    return np.stack([np.broadcast_to(np.asarray(field, np.int64), row.shape) for field in fields], axis=1)


class Launch:
    """Tiles of one kind, on the device: int64 [tiles, FIELDS], as _grid makes them."""

    def __init__(self, table: np.ndarray, kind: Kind, device: torch.device) -> None:
        self._count = len(table)
        self._table = torch.from_numpy(table).to(device)
        self._source, self._target = (torch.empty(16, dtype=d, device=device) for d in (kind.source, kind.target))
        self._options: dict[str, Any] = {
            "WORD": tl.uint16 if kind.target.itemsize == 2 else tl.uint32,
            "VECTOR": VECTOR if kind.aligned else 1,
            "COLUMNS": COLUMNS,
            "num_warps": 8,
        }

    def __call__(
        self, sources: torch.Tensor, targets: torch.Tensor, sums: torch.Tensor, *, copy: bool, checksum: bool
    ) -> None:
        """Copy the sources (``copy``), and add the checksums of their values, cast to the targets' dtype, to ``sums``,
        int64 [buckets] (``checksum``).

        ``sources`` and ``targets`` are addresses of tensors by number, int64 [tensors], on the device.
        """
        _move_tiles[(self._count,)](
            self._source,
            sources,
            self._source.data_ptr(),
            self._target,
            targets,
            self._target.data_ptr(),
            self._table,
            sums,
            COPY=copy,
            SUM=checksum,
            **self._options,
        )


class Kind(NamedTuple):
    """Moves of one kind are done by one compiled kernel, in one launch."""

    source: torch.dtype
    target: torch.dtype
    aligned: bool  # addresses are multiples of 16 bytes, and the fields of tiles multiples of VECTOR


def launches(moves: Iterable[tuple[Move, Kind]], device: torch.device) -> list[Launch]:
    """Return launches that do all ``moves``, one for each kind."""
    groups: dict[Kind, list[np.ndarray]] = {}
    for move, kind in moves:
        for table in _tiles(move):
            vectors = not (table[:, [1, 2, 4, 5, 7]] % VECTOR).any()  # offsets, strides, columns
            groups.setdefault(kind._replace(aligned=kind.aligned and vectors), []).append(table)
    return [Launch(np.concatenate(tables), kind, device) for kind, tables in groups.items()]


def word_sum(buffer: torch.Tensor) -> torch.Tensor:
    """Return the checksum of a flat uint8 buffer's 32-bit words as an int64 scalar on its device; the host does not
    wait for it."""
    words = buffer.view(torch.int32)
    addresses = torch.full((1,), words.data_ptr(), dtype=torch.int64, device=words.device)
    total = torch.zeros_like(addresses)
    for launch in _whole_buffer(words.numel(), words.device, words.data_ptr() % 16 == 0):
        launch(addresses, addresses, total, copy=False, checksum=True)
    return total[0]


@cache
def _whole_buffer(words: int, device: torch.device, aligned: bool) -> list[Launch]:
    move = Move(0, 0, words, 0, 0, words, 1, words, 0, 0)
    return launches([(move, Kind(torch.int32, torch.int32, aligned))], device)


@triton.jit
def _move_tiles(  # type: ignore[no-untyped-def]
    source,
    source_addresses,
    source_here,
    target,
    target_addresses,
    target_here,
    table,
    sums,
    COPY: tl.constexpr,
    SUM: tl.constexpr,
    WORD: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Copy and sum one tile. The checksum of a bucket is the sum over its elements of their bits times
    (2 * position + 1), modulo 2^64. It detects every change of one element and every exchange of two: both change the
    sum by a non-zero product smaller than 2^64.

    Both factors have 32 bits (positions count modulo 2^31), because a product of wider ones takes several instructions
    and the checksum of an element would then take longer than its copy."""
    tile = table + tl.program_id(0).to(tl.int64) * 11
    # Triton cannot make a typed pointer from an integer. Addresses are therefore expressed as distances, in elements,
    # from the pointer of a small tensor of the dtype (source, target), whose alignment the compiler knows.
    item: tl.constexpr = source.dtype.element_ty.primitive_bitwidth // 8
    item_out: tl.constexpr = target.dtype.element_ty.primitive_bitwidth // 8
    source_at = (tl.load(source_addresses + tl.load(tile)) - source_here) // item + tl.load(tile + 1)
    source_stride = tl.load(tile + 2)
    target_at = (tl.load(target_addresses + tl.load(tile + 3)) - target_here) // item_out + tl.load(tile + 4)
    target_stride = tl.load(tile + 5)
    rows = tl.load(tile + 6).to(tl.int32)
    columns = tl.multiple_of(tl.load(tile + 7).to(tl.int32), VECTOR)
    position = tl.load(tile + 8)
    row_length = tl.load(tile + 9)
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    total = tl.zeros([COLUMNS], tl.uint64)
    for row in range(rows):
        # The hints make vector accesses of 16 bytes; they hold because VECTOR is 1 unless everything is aligned.
        start = tl.multiple_of(source_at + row * source_stride, VECTOR)
        values = tl.load(source + start + column, mask=inside, other=0).to(target.dtype.element_ty)
        if COPY:
            start = tl.multiple_of(target_at + row * target_stride, VECTOR)
            tl.store(target + start + column, values, mask=inside)
        if SUM:
            words = values.to(WORD, bitcast=True).to(tl.uint32)
            factors = (2 * (position + row * row_length) + 1).to(tl.uint32) + 2 * column.to(tl.uint32)
            total += words.to(tl.uint64) * factors.to(tl.uint64)
    if SUM:
        tl.atomic_add(sums + tl.load(tile + 10), tl.sum(total, 0).to(tl.int64, bitcast=True))
