"""The sums of :mod:`miles_spmd.ledger.rectangles` on a GPU: all rectangles of all tensors in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from miles_spmd.ledger.rectangles import COLUMN_STREAM, ROW_STREAM, Part

ROWS, COLUMNS = 32, 1024  # of a tile
FIELDS = 8
VECTOR = 8  # elements that a thread loads at once, if offsets and sizes are multiples of it


def tiles(located: Sequence[tuple[int, Part]]) -> np.ndarray:
    """Return int64 [tiles, FIELDS]: tensor's number, offset, stride; rows, columns; first row, first column; slot.

    ``located`` is for each slot the tensor's number and the part.
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


def even(table: np.ndarray) -> bool:
    """Return whether all tiles begin and end at multiples of VECTOR elements, provided that their tensors do."""
    return not (table[:, [1, 2, 4]] % VECTOR).any()


def add_sums(addresses: torch.Tensor, itemsize: int, table: torch.Tensor, sums: torch.Tensor, aligned: bool) -> None:
    """Add the sum of every tile of ``table`` to its slot of ``sums`` (int64), for tensors of ``itemsize`` 2 or 4 bytes
    an element at ``addresses`` (int64, by number). ``aligned``: the table is even, addresses are multiples of 16."""
    if len(table):
        here = torch.empty(16, dtype=torch.uint32 if itemsize == 4 else torch.uint16, device=table.device)
        options = {"ROW_STREAM": ROW_STREAM, "COLUMN_STREAM": COLUMN_STREAM, "VECTOR": VECTOR if aligned else 1}
        _sum_tile[(len(table),)](
            addresses, here, here.data_ptr(), table, sums, ITEM=itemsize, COLUMNS=COLUMNS, num_warps=4, **options
        )


@triton.jit
def _factor(index, STREAM: tl.constexpr):  # type: ignore[no-untyped-def]
    x = (index + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + STREAM
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return (x ^ (x >> 31)) | 1


@triton.jit
def _sum_tile(  # type: ignore[no-untyped-def]
    addresses,
    here,
    here_at,
    table,
    sums,
    ITEM: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_STREAM: tl.constexpr,
    COLUMN_STREAM: tl.constexpr,
):
    """Add the sum of one tile to its slot.

    The columns' factor is multiplied once for all rows. The rows' factor is split into two halves: a 64-bit product
    takes more instructions than one with each half, of which the upper one requires only 32 bits."""
    tile = table + tl.program_id(0).to(tl.int64) * 8
    # Addresses are relative to a pointer whose alignment the compiler knows; a cast from an integer has none.
    start = (tl.load(addresses + tl.load(tile)) - here_at) // ITEM + tl.load(tile + 1)
    stride = tl.load(tile + 2)
    rows = tl.load(tile + 3).to(tl.int32)
    columns = tl.multiple_of(tl.load(tile + 4).to(tl.int32), VECTOR)
    first_row = tl.load(tile + 5)
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    low = tl.zeros([COLUMNS], tl.uint64)
    high = tl.zeros([COLUMNS], tl.uint32)
    for row in tl.range(rows, loop_unroll_factor=4):
        at = tl.multiple_of(start + row * stride, VECTOR)
        words = tl.load(here + at + column, mask=inside, other=0).to(tl.uint32)
        factor = _factor(first_row + row, ROW_STREAM)
        low += words.to(tl.uint64) * (factor & 0xFFFFFFFF)
        high += words * (factor >> 32).to(tl.uint32)
    total = (low + (high.to(tl.uint64) << 32)) * _factor(tl.load(tile + 6) + column, COLUMN_STREAM)
    tl.atomic_add(sums + tl.load(tile + 7), tl.sum(total, 0).to(tl.int64, bitcast=True))
