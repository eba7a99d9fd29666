"""Moves rectangles between GPU tensors, thousands in one launch, and sums up what they hold.

Work is a table of tiles, built once: which piece of which tensor goes to which piece of which other. Addresses of
tensors are looked up by number when the kernel runs, so that memory may move between runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

COLUMNS, ROWS = 2048, 16  # of the largest tile
FIELDS = 11
VECTOR = 8  # elements: what one thread moves at a time, where everything is a multiple of it


class Move(NamedTuple):
    """``rows`` x ``columns`` elements; in each tensor they begin at an offset and rows lie ``stride`` elements apart.

    ``position`` numbers the first element among those of the checksum ``bucket``.
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
    if move.rows > 1 and not move.columns == move.source_stride == move.target_stride:
        return [_grid(move, move.columns)]
    # one run of memory on both sides: cut as suits
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
        """Copy, or only read, the sources; add up into ``sums`` (int64 [buckets]) what they are as targets' values.

        ``sources`` and ``targets`` are the tensors' addresses, int64.
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
    """What one compiled kernel does."""

    source: torch.dtype
    target: torch.dtype
    aligned: bool  # addresses are multiples of 16 bytes


def launches(moves: Iterable[tuple[Move, Kind]], device: torch.device) -> list[Launch]:
    """What does all ``moves``, in as few launches as there are kinds."""
    groups: dict[Kind, list[np.ndarray]] = {}
    for move, kind in moves:
        for table in _tiles(move):
            even = not (table[:, [1, 2, 4, 5, 7]] % VECTOR).any()
            groups.setdefault(kind._replace(aligned=kind.aligned and even), []).append(table)
    return [Launch(np.concatenate(tables), kind, device) for kind, tables in groups.items()]


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
    """The checksum of a bucket is the sum of each element's bits times 2 * position + 1, modulo 2^64. No change of one
    element goes unseen, nor the exchange of two: both change the sum by a product smaller than 2^64 and not zero.

    Both factors have 32 bits (positions count modulo 2^31), because a product of wider ones takes several instructions
    and an element then costs more to sum up than to move."""
    tile = table + tl.program_id(0).to(tl.int64) * 11
    # Addresses are written as distances from a pointer, of which the compiler knows how it is aligned.
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
