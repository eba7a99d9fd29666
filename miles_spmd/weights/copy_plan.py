"""Plans which rectangle is copied from which rank's tensor into which rank's tensor.

The plan is a pure function of the layouts of all ranks. Every rank computes only its own part (what it copies, sends
and receives), and any two ranks have the copies between them in the same order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from miles_spmd.models.layout import PADDING, Piece, TensorLayout

Ints = tuple[int, ...]


class Holding(msgspec.Struct, frozen=True):
    """What one rank holds, which it sends to all others. ``target_dtypes``: torch dtype names by target tensor;
    ``on_gpu``: whether all sources, and whether all targets, are on one GPU."""

    host: str
    sources: list[TensorLayout]
    targets: list[TensorLayout]
    target_dtypes: dict[str, str]
    on_gpu: tuple[bool, bool] = (False, False)


class Place(NamedTuple):
    """Where a rectangle starts inside a rank's local tensor; ``lead`` and ``start`` as in :class:`Piece`'s ``lead`` and
    ``local``."""

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
    """One rank's part: copies inside its process, copies that it sends and receives by peer, padding to set to zero."""

    local: list[Copy]
    sends: dict[int, list[Copy]]
    receives: dict[int, list[Copy]]
    padding: list[tuple[Place, Ints]]


Held = dict[tuple[Ints, Ints], dict[int, tuple[str, Piece]]]
"""The distinct rectangles of a checkpoint tensor that ranks hold, by start and shape, each with the ranks that hold it:
local tensor and piece."""


def make_plan(holdings: Sequence[Holding], rank: int) -> Plan:
    """Return the part of ``rank``. Raises ValueError naming tensor and rectangle if no rank holds what a target needs.

    The target's own rank is preferred as the source, then ranks on its host; equal candidates take turns, so that no
    rank serves all others.
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
            # This rank neither sends nor receives it. In a large world that is so for most pieces, and planning cheap.
            if target_rank != rank and piece.name not in mine:
                continue
            for copy in _copies(index.get(piece.name, {}), tensor, piece, target_rank, turn, holdings):
                if copy.source.rank == target_rank == rank:
                    plan.local.append(copy)
                elif target_rank == rank:
                    plan.receives.setdefault(copy.source.rank, []).append(copy)
                elif copy.source.rank == rank:
                    plan.sends.setdefault(target_rank, []).append(copy)
    return plan


def _pieces(layouts: list[TensorLayout]) -> Iterator[tuple[str, Piece]]:
    return ((layout.local_name, piece) for layout in layouts for piece in layout.pieces)


def _index(holdings: Sequence[Holding]) -> dict[str, Held]:
    """Return what ranks hold, by checkpoint tensor."""
    index: dict[str, Held] = defaultdict(lambda: defaultdict(dict))
    for rank, holding in enumerate(holdings):
        for tensor, piece in _pieces(holding.sources):
            index[piece.name][piece.start, piece.shape].setdefault(rank, (tensor, piece))
    return index


def _copies(
    held: Held, tensor: str, need: Piece, target_rank: int, turn: int, holdings: Sequence[Holding]
) -> Iterator[Copy]:
    """Cover the rectangle ``need`` by copies from what is ``held``."""
    todo = [(need.start, need.shape)]  # parts that no copy covers yet
    # rectangles of the target's own rank first; the sort is stable, so that all ranks make the same plan
    for rectangle, places in sorted(held.items(), key=lambda item: target_rank not in item[1]):
        rest = []
        for part in todo:
            common = _intersection(part, rectangle)
            if common is None:
                rest.append(part)
                continue
            rest += _difference(*part, *common)
            source_rank = _choose(places, target_rank, turn, holdings)
            source_tensor, piece = places[source_rank]
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
    """Return where the checkpoint position ``start`` lies in the local tensor that ``piece`` belongs to."""
    return tuple(local + at - first for local, at, first in zip(piece.local, start, piece.start))


def _intersection(a: tuple[Ints, Ints], b: tuple[Ints, Ints]) -> tuple[Ints, Ints] | None:
    if a == b:
        return a
    low = tuple(map(max, a[0], b[0]))
    high = tuple(min(i + m, j + n) for i, m, j, n in zip(*a, *b))
    extent = tuple(end - begin for begin, end in zip(low, high))
    return (low, extent) if min(extent) > 0 else None


def _difference(start: Ints, shape: Ints, hole_start: Ints, hole_shape: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Yield disjoint rectangles that together are the rectangle without a hole inside it.

    Dimension by dimension: the slabs before and after the hole, which in the dimensions before are as wide as the hole
    (the rest there is in earlier slabs) and in those after as wide as the whole rectangle."""
    for dim, (first, size, hole, hole_size) in enumerate(zip(start, shape, hole_start, hole_shape)):
        for low, high in ((first, hole), (hole + hole_size, first + size)):
            if low < high:
                yield (
                    (*hole_start[:dim], low, *start[dim + 1 :]),
                    (*hole_shape[:dim], high - low, *shape[dim + 1 :]),
                )
