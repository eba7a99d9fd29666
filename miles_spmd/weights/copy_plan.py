"""Which rectangle travels from which rank's tensor into which rank's tensor.

A pure function of what all ranks hold and want. Every rank computes only its own part (what it copies, sends and
receives), and any two ranks agree on the order of what goes between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from miles_spmd.models.layout import PADDING, Piece, TensorLayout

Ints = tuple[int, ...]


class Holding(msgspec.Struct, frozen=True):
    """What one rank declares to all others. ``target_dtypes``: torch dtype names by target tensor; ``on_gpu``: whether
    all sources, and all targets, are on one GPU."""

    host: str
    sources: list[TensorLayout]
    targets: list[TensorLayout]
    target_dtypes: dict[str, str]
    on_gpu: tuple[bool, bool] = (False, False)


class Place(NamedTuple):
    """Where a rectangle begins inside a rank's local tensor."""

    rank: int
    tensor: str
    lead: Ints
    start: Ints


class Copy(NamedTuple):
    """One rectangle of the checkpoint tensor ``name``, from a place in a source tensor to one in a target tensor."""

    name: str
    shape: Ints
    source: Place
    target: Place


class Plan(NamedTuple):
    """One rank's part: copies inside this process, by peer what it sends and receives, and the padding it zeroes."""

    local: list[Copy]
    sends: dict[int, list[Copy]]
    receives: dict[int, list[Copy]]
    padding: list[tuple[Place, Ints]]


class _Held(NamedTuple):
    """A rectangle of a checkpoint tensor, and every rank that holds exactly it."""

    start: Ints
    shape: Ints
    places: dict[int, tuple[str, Piece]]


def make_plan(holdings: Sequence[Holding], rank: int) -> Plan:
    """The part of ``rank``. Raises ValueError naming tensor and rectangle when nobody holds what a target needs.

    A rank's own slice is preferred, then one on the same host; equal holders take turns, so that no rank serves all.
    """
    index = _index(holdings)
    mine = {piece.name for layout in holdings[rank].sources for piece in layout.pieces}
    plan = Plan([], {}, {}, [])
    for target_rank, holding in enumerate(holdings):
        for turn, (tensor, piece) in enumerate(_pieces(holding.targets)):
            if piece.name == PADDING:
                if target_rank == rank:
                    plan.padding.append((Place(rank, tensor, piece.lead, piece.local), piece.shape))
                continue
            if target_rank != rank and piece.name not in mine:
                continue
            for copy in _copies(index.get(piece.name, []), tensor, piece, target_rank, turn, holdings):
                if copy.source.rank == target_rank == rank:
                    plan.local.append(copy)
                elif target_rank == rank:
                    plan.receives.setdefault(copy.source.rank, []).append(copy)
                elif copy.source.rank == rank:
                    plan.sends.setdefault(target_rank, []).append(copy)
    return plan


def _pieces(layouts: list[TensorLayout]) -> Iterator[tuple[str, Piece]]:
    return ((layout.local_name, piece) for layout in layouts for piece in layout.pieces)


def _index(holdings: Sequence[Holding]) -> dict[str, list[_Held]]:
    """Every distinct rectangle that anyone holds, by checkpoint tensor."""
    by_rectangle: dict[tuple[str, Ints, Ints], _Held] = {}
    index: dict[str, list[_Held]] = {}
    for rank, holding in enumerate(holdings):
        for tensor, piece in _pieces(holding.sources):
            if piece.name == PADDING:
                continue
            key = (piece.name, piece.start, piece.shape)
            held = by_rectangle.get(key)
            if held is None:
                held = by_rectangle[key] = _Held(piece.start, piece.shape, {})
                index.setdefault(piece.name, []).append(held)
            held.places.setdefault(rank, (tensor, piece))
    return index


def _copies(
    candidates: list[_Held], tensor: str, need: Piece, target_rank: int, turn: int, holdings: Sequence[Holding]
) -> Iterator[Copy]:
    """Cut the rectangle ``need`` among ``candidates`` until nothing of it is left."""
    todo = [(need.start, need.shape)]
    for held in (
        sorted(candidates, key=lambda held: target_rank not in held.places) if len(candidates) > 1 else candidates
    ):
        rest = []
        for start, shape in todo:
            common = _intersection(start, shape, held)
            if common is None:
                rest.append((start, shape))
                continue
            rest += _difference(start, shape, *common)
            source_rank = _choose(held.places, target_rank, turn, holdings)
            source_tensor, piece = held.places[source_rank]
            yield Copy(
                need.name,
                common[1],
                Place(source_rank, source_tensor, piece.lead, _inside(piece, common[0])),
                Place(target_rank, tensor, need.lead, _inside(need, common[0])),
            )
        todo = rest
        if not todo:
            return
    start, shape = todo[0]
    raise ValueError(
        f"no rank holds the part of {need.name} that starts at {start} with shape {shape}, "
        f"needed for {tensor} on rank {target_rank}"
    )


def _choose(places: dict[int, tuple[str, Piece]], target_rank: int, turn: int, holdings: Sequence[Holding]) -> int:
    if target_rank in places:
        return target_rank
    near = [rank for rank in places if holdings[rank].host == holdings[target_rank].host]
    ranks = near or list(places)
    return ranks[(target_rank + turn) % len(ranks)]


def _inside(piece: Piece, start: Ints) -> Ints:
    """Where the checkpoint position ``start`` lies in the local tensor that ``piece`` belongs to."""
    return tuple(local + at - first for local, at, first in zip(piece.local, start, piece.start))


def _intersection(start: Ints, shape: Ints, held: _Held) -> tuple[Ints, Ints] | None:
    if start == held.start and shape == held.shape:
        return start, shape
    low = tuple(map(max, start, held.start))
    high = tuple(min(a + m, b + n) for a, m, b, n in zip(start, shape, held.start, held.shape))
    extent = tuple(end - begin for begin, end in zip(low, high))
    return (low, extent) if min(extent) > 0 else None


def _difference(start: Ints, shape: Ints, hole_start: Ints, hole_shape: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Disjoint rectangles that make up a rectangle less a hole inside it."""
    for dim, (first, size, hole, hole_size) in enumerate(zip(start, shape, hole_start, hole_shape)):
        for low, high in ((first, hole), (hole + hole_size, first + size)):
            if low < high:
                yield (
                    (*hole_start[:dim], low, *start[dim + 1 :]),
                    (*hole_shape[:dim], high - low, *shape[dim + 1 :]),
                )
