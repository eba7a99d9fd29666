"""The sums of :mod:`miles_spmd.determinism.rectangles` on a GPU: all rectangles of all tensors in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from miles_spmd.determinism.rectangles import COLUMN_STREAM, ROW_STREAM, Part

ROWS, COLUMNS = 32, 1024  # of a tile
FIELDS = 8


def tiles(located: Sequence[tuple[int, Part]]) -> np.ndarray:
    """int64 [tiles, FIELDS]: number of the tensor, offset, stride; rows, columns; first row, first column; slot.

    ``located``: for each slot, the tensor's number and the part.
    """
    tables = []
    for slot, (tensor, (rectangle, offset, stride)) in enumerate(located):
        row, column = (axis.ravel() for axis in np.mgrid[0 : rectangle.rows : ROWS, 0 : rectangle.columns : COLUMNS])
        fields = (
            tensor,
            offset + row * stride + column,
            stride,
            np.minimum(rectangle.rows - row, ROWS),
            np.minimum(rectangle.columns - column, COLUMNS),
            rectangle.row + row,
            rectangle.column + column,
            slot,
        )
        tables.append(np.stack([np.broadcast_to(np.asarray(field, np.int64), row.shape) for field in fields], axis=1))
    return np.concatenate(tables) if tables else np.empty((0, FIELDS), np.int64)


def add_sums(addresses: torch.Tensor, itemsize: int, table: torch.Tensor, sums: torch.Tensor) -> None:
    """Add the sum of every tile of ``table`` to its slot of ``sums`` (int64), for tensors of ``itemsize`` 2 or 4 bytes
    an element at ``addresses`` (int64, by number)."""
    if len(table):
        streams = {"ROW_STREAM": ROW_STREAM, "COLUMN_STREAM": COLUMN_STREAM}
        _sum_tile[(len(table),)](addresses, table, sums, WIDE=itemsize == 4, COLUMNS=COLUMNS, num_warps=4, **streams)


@triton.jit
def _factor(index, STREAM: tl.constexpr):  # type: ignore[no-untyped-def]
    x = (index + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + STREAM
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return (x ^ (x >> 31)) | 1


@triton.jit
def _sum_tile(  # type: ignore[no-untyped-def]
    addresses,
    table,
    sums,
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_STREAM: tl.constexpr,
    COLUMN_STREAM: tl.constexpr,
):
    """One product of 64 bits for an element; the columns' factor comes once for all rows of the tile."""
    tile = table + tl.program_id(0).to(tl.int64) * 8
    kind = tl.pointer_type(tl.uint32) if WIDE else tl.pointer_type(tl.uint16)
    base = tl.load(addresses + tl.load(tile)).to(kind) + tl.load(tile + 1)
    stride = tl.load(tile + 2)
    rows = tl.load(tile + 3).to(tl.int32)
    columns = tl.load(tile + 4).to(tl.int32)
    first_row = tl.load(tile + 5)
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    total = tl.zeros([COLUMNS], tl.uint64)
    for row in range(rows):
        words = tl.load(base + row * stride + column, mask=inside, other=0)
        total += words.to(tl.uint64) * _factor(first_row + row, ROW_STREAM)
    total *= _factor(tl.load(tile + 6) + column, COLUMN_STREAM)
    tl.atomic_add(sums + tl.load(tile + 7), tl.sum(total, 0).to(tl.int64, bitcast=True))
