"""Layouts: which slices of checkpoint tensors a local tensor consists of.

A Hugging Face checkpoint has one name and one shape for every weight. Trainer and engine shard, fuse and interleave
these tensors in different ways; both describe theirs as rectangles of checkpoint tensors. Loading, export and refit
are then one operation: intersect rectangles and copy.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import msgspec

PADDING = ""
"""In place of a checkpoint name: local elements that checkpoints do not have (added rows of a vocabulary), zero."""


class Piece(msgspec.Struct, frozen=True):
    """The rectangle of the checkpoint tensor ``name`` that starts at ``start``, at ``local`` inside a local tensor.

    ``start``, ``local`` and ``shape`` have one entry per dimension of the checkpoint tensor. ``lead`` is the index in
    leading dimensions that only the local tensor has (a stack of experts).
    """

    name: str
    start: tuple[int, ...]
    local: tuple[int, ...]
    shape: tuple[int, ...]
    lead: tuple[int, ...] = ()


def region(lead: tuple[int, ...], start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int | slice, ...]:
    """Return the index of a rectangle in a tensor."""
    return (*lead, *(slice(at, at + size) for at, size in zip(start, shape)))


class TensorLayout(msgspec.Struct, frozen=True):
    """A local tensor's own name, and the checkpoint rectangles that fill it."""

    local_name: str
    pieces: tuple[Piece, ...]


Span = tuple[str, int, int]
"""Rows, or columns, [start, stop) of the checkpoint tensor of this name."""


def stack(spans: Iterable[Span], row_shape: tuple[int, ...], lead: tuple[int, ...] = ()) -> tuple[Piece, ...]:
    """Return the pieces of a local tensor that has the rows ``spans`` below each other, each of shape ``row_shape``."""
    pieces, row, zeros = [], 0, (0,) * len(row_shape)
    for name, start, stop in spans:
        pieces.append(Piece(name, (start, *zeros), (row, *zeros), (stop - start, *row_shape), lead))
        row += stop - start
    return tuple(pieces)


def window(spans: Iterable[Span], start: int, stop: int) -> list[Span]:
    """Return the part of ``spans`` that is in rows [start, stop) when they are below each other: a shard of a stack."""
    inside, row = [], 0
    for name, first, last in spans:
        low, high = max(start, row), min(stop, row + last - first)
        if low < high:
            inside.append((name, first + low - row, first + high - row))
        row += last - first
    return inside


def whole(name: str, shape: tuple[int, ...]) -> tuple[Piece, ...]:
    """Return the piece that is all of a checkpoint tensor."""
    return stack([(name, 0, shape[0])], shape[1:])


def beside(spans: Iterable[Span], rows: int, lead: tuple[int, ...] = ()) -> tuple[Piece, ...]:
    """Return the pieces of a local tensor that has the columns ``spans``, of ``rows`` rows, next to each other."""
    return tuple(Piece(p.name, (0, *p.start), (0, *p.local), (rows, *p.shape), lead) for p in stack(spans, ()))


def filled_shape(pieces: Iterable[Piece]) -> tuple[int, ...]:
    """Return the shape of the smallest local tensor that all ``pieces`` are inside."""
    ends = [(*(i + 1 for i in p.lead), *(at + n for at, n in zip(p.local, p.shape))) for p in pieces]
    return tuple(map(max, zip(*ends)))


def check_filled(name: str, shape: tuple[int, ...], pieces: tuple[Piece, ...]) -> None:
    """Raise ValueError naming the tensor and the piece unless ``pieces`` fill a tensor of ``shape`` exactly once."""
    for piece in pieces:
        extent = filled_shape([piece])
        if len(extent) != len(shape) or any(end > size for end, size in zip(extent, shape)):
            raise ValueError(f"{name} of shape {tuple(shape)} does not hold its piece {piece}")
    # Inside, disjoint and of the right total size: then they fill it. Sorted by their first rows, a piece can only
    # overlap with those that start before its last row, so that this takes few comparisons for thousands of pieces.
    ordered = sorted(pieces, key=lambda p: (p.lead, p.local))
    for index, piece in enumerate(ordered):
        end = piece.local[0] + piece.shape[0]
        for other in ordered[index + 1 :]:
            if other.lead != piece.lead or other.local[0] >= end:
                break
            if all(a < b + n and b < a + m for a, b, m, n in zip(piece.local, other.local, piece.shape, other.shape)):
                raise ValueError(f"{name} is filled twice, by {piece} and {other}")
    filled = sum(prod(piece.shape) for piece in pieces)
    if filled != prod(shape):
        raise ValueError(f"{name} of shape {tuple(shape)} is filled in {filled} of its {prod(shape)} elements only")
