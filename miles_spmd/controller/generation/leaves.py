"""Which of the trajectories that one rollout has come to the loss counts, where there are several."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from miles_spmd.plugins.environment import Leaf, LeafSelector
from miles_spmd.plugins.plug_point import PlugPoint


def every(leaves: Sequence[Leaf]) -> Sequence[int]:
    return range(len(leaves))


def longest(leaves: Sequence[Leaf]) -> Sequence[int]:
    """The one with most turns; of several, the first."""
    return [max(range(len(leaves)), key=lambda number: (leaves[number].trajectory.turns, -number))]


def last(leaves: Sequence[Leaf]) -> Sequence[int]:
    """The one whose last response was asked for behind those of all others."""
    return [max(range(len(leaves)), key=lambda number: leaves[number].order)]


LEAF_SELECTORS: PlugPoint[LeafSelector] = PlugPoint(
    "environment.trained_leaves", {"all": every, "longest": longest, "last": last}, LeafSelector
)


def chosen(name: str, leaves: Sequence[Leaf]) -> set[int]:
    """Return the numbers of the ``leaves`` of a rollout that ``name`` chooses, all where there is one. Raises
    PlugInError."""
    if len(leaves) == 1:
        return {0}
    returned = LEAF_SELECTORS.resolve(name)(leaves)
    try:  # what tells whether each is trained, as filters return it, would be numbers, too
        numbers = [] if any(isinstance(one, bool) for one in returned) else [*map(operator.index, returned)]
    except TypeError:
        numbers = []
    if not numbers or len({*numbers}) != len(numbers) or not {*numbers} <= {*range(len(leaves))}:
        expected = f"at least one of the numbers from 0 to {len(leaves) - 1}, each once"
        raise LEAF_SELECTORS.returned(name, returned, expected)
    return {*numbers}
