"""Digests of checkpoint tensors that are distributed over ranks: sums, which are the same for every distribution.

The digest of a matrix is the sum over its elements of ``bits * A(row) * B(column)`` modulo 2^64, where ``bits`` is the
element's memory as an unsigned number and A and B are odd pseudo-random 64-bit numbers. A change of one element always
changes it, since odd factors are invertible; other changes are missed with the probability of a collision. A vector is
one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from miles_spmd.models.layout import PADDING, Piece, TensorLayout

ROW_STREAM, COLUMN_STREAM = 0x243F6A8885A308D3, 0x13198A2E03707344  # digits of pi: seeds of A and B


class Rectangle(msgspec.Struct, frozen=True, array_like=True):
    """Rows and columns of the checkpoint tensor ``name``."""

    name: str
    row: int
    column: int
    rows: int
    columns: int


class Part(NamedTuple):
    """A rectangle in memory: it begins ``offset`` elements after the tensor's start, with rows ``stride`` apart."""

    rectangle: Rectangle
    offset: int
    stride: int


def parts(layout: TensorLayout, shape: Sequence[int], start: int = 0, stop: int | None = None) -> list[Part]:
    """Return the parts of the elements [start, stop), in memory order, of a contiguous local tensor of ``shape``.

    Offsets count from ``start``. Raises ValueError for a checkpoint tensor of more than two dimensions."""
    stop = int(np.prod(shape)) if stop is None else stop
    pieces = (piece for piece in layout.pieces if piece.name != PADDING)
    return [part for piece in pieces for part in _parts_of(piece, shape, start, stop)]


def _parts_of(piece: Piece, shape: Sequence[int], start: int, stop: int) -> Iterator[Part]:
    if len(piece.shape) > 2:
        raise ValueError(f"{piece.name} has {len(piece.shape)} dimensions; digests support at most two")
    missing = 2 - len(piece.shape)  # dimensions: a vector is one row
    (row, column), (at_row, at_column) = (0,) * missing + piece.start, (0,) * missing + piece.local
    rows, columns = (1,) * missing + piece.shape
    width = shape[-1]
    lead = int(np.ravel_multi_index(piece.lead, shape[: len(piece.lead)])) if piece.lead else 0
    first = (lead * (shape[-2] if len(shape) > 1 else 1) + at_row) * width + at_column
    for r, c, h, w in _inside(rows, columns, first, width, start, stop):
        yield Part(Rectangle(piece.name, row + r, column + c, h, w), first + r * width + c - start, width)


def _inside(rows: int, columns: int, first: int, width: int, start: int, stop: int) -> Iterator[tuple[int, ...]]:
    """Yield (row, column, rows, columns) of the rectangle's parts in [start, stop).

    Row r of the rectangle begins at ``first + r * width``. A range of memory, such as a distributed optimizer's shard,
    contains at most an end of one row, a block of whole rows, and a beginning of another: three rectangles."""
    whole_from = min(max(-((first - start) // width), 0), rows)
    whole_to = min(max((stop - first - columns) // width + 1, 0), rows)
    if whole_from < whole_to:
        yield whole_from, 0, whole_to - whole_from, columns
    for r in sorted({whole_from - 1, whole_to} - set(range(whole_from, whole_to))):
        at = first + r * width
        low, high = max(0, start - at), min(columns, stop - at)
        if 0 <= r < rows and low < high:
            yield r, low, 1, high - low


def factors(stream: int, first: int, count: int) -> np.ndarray:
    """Return A or B of ``count`` rows or columns from ``first`` on, uint64: SplitMix64's finaliser, made odd."""
    with np.errstate(over="ignore"):
        x = np.arange(first + 1, first + 1 + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(stream)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (x ^ (x >> np.uint64(31))) | np.uint64(1)


def sum_digests(ranks: Iterable[tuple[Sequence[Rectangle], np.ndarray]]) -> tuple[dict[str, int], list[str]]:
    """Return the digest of each tensor, sorted by name, from every rank's rectangles and their sums.

    A rectangle that several ranks have counts once. Also return the names of tensors of which two ranks have different
    contents for the same rectangle; the first rank's counts."""
    seen: dict[Rectangle, int] = {}
    inconsistent: dict[str, None] = {}
    totals: dict[str, int] = {}
    for rectangles, sums in ranks:
        for rectangle, value in zip(rectangles, sums.tolist(), strict=True):
            if seen.setdefault(rectangle, value) != value:
                inconsistent[rectangle.name] = None
    for rectangle, value in seen.items():
        totals[rectangle.name] = (totals.get(rectangle.name, 0) + value) % 2**64
    return dict(sorted(totals.items())), list(inconsistent)
