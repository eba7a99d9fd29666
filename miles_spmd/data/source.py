"""The order in which the items of a dataset are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import msgspec
import numpy as np

from miles_spmd.types.seeds import derive_seed


class Identified(Protocol):
    @property
    def uid(self) -> str: ...


Item = TypeVar("Item", bound=Identified)


class PromptSource(Generic[Item]):
    """An infinite sequence of epochs, each a seeded permutation of the items, with access to any position.

    It has no state: the items of a step depend on the seed and the step alone, so that a resumed or replayed run gets
    the same ones.
    """

    def __init__(self, items: Sequence[Item], seed: int, shuffle: bool = True) -> None:
        if not items:
            raise ValueError("a source requires at least one item")
        self._items = items
        self._seed = seed
        self._shuffle = shuffle
        self._cached: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self._items)

    def of_step(self, step: int, count: int) -> list[Item]:
        """Return the ``count`` items of ``step``, which begin at position ``step * count``."""
        return self.at(step * count, count)

    def at(self, position: int, count: int) -> list[Item]:
        """Return ``count`` items from ``position`` on.

        If an item occurs again among them (after an epoch's end, or with fewer items than ``count``), its uid gets
        ``#2``, ``#3``, ...: uids must be unique within a step, because seeds are derived from them.
        """
        size = len(self._items)
        found = []
        seen: dict[int, int] = {}
        for place in range(position, position + count):
            row = int(self._order(place // size)[place % size])
            seen[row] = seen.get(row, 0) + 1
            item = self._items[row]
            found.append(item if seen[row] == 1 else _renamed(item, f"{item.uid}#{seen[row]}"))
        return found

    def _order(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            epoch = 0
        if self._cached[0] != epoch:
            size = len(self._items)
            seed = derive_seed("epoch", self._seed, epoch)
            self._cached = epoch, np.random.default_rng(seed).permutation(size) if self._shuffle else np.arange(size)
        return self._cached[1]


def _renamed(item: Any, uid: str) -> Any:
    return msgspec.structs.replace(item, uid=uid)
