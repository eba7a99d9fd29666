"""The order in which the items of a dataset are used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np

from miles_spmd.plugins.data import Curriculum
from miles_spmd.plugins.plug_point import PlugPoint
from miles_spmd.types.seeds import derive_seed

CURRICULA: PlugPoint[Curriculum] = PlugPoint("data.curriculum", {}, Curriculum)
Item = TypeVar("Item")  # a msgspec.Struct with a uid


class PromptSource(Generic[Item]):
    """An infinite sequence of epochs, each a seeded permutation of the items, with access to any position.

    It has no state: the items of a step depend on the seed and the step alone, so that a resumed or replayed run gets
    the same ones.
    """

    def __init__(self, items: Sequence[Item], seed: int, shuffle: bool = True, curriculum: str | None = None) -> None:
        """``curriculum``: the function that gives each epoch its order, in the place of ``shuffle``."""
        if not items:
            raise ValueError("a source requires at least one item")
        self._items, self._seed, self._shuffle, self._curriculum = items, seed, shuffle, curriculum
        self._order = lru_cache(maxsize=1)(self._order_of)  # a step after another needs the same epoch

    def of_step(self, step: int, count: int) -> list[Item]:
        """Return the ``count`` items of ``step``, which begin at position ``step * count``."""
        return self.at(step * count, count)

    def at(self, position: int, count: int) -> list[Item]:
        """Return ``count`` items from ``position`` on.

        If an item occurs again among them (after an epoch's end, or with fewer items than ``count``), its uid gets
        ``#2``, ``#3``, ...: uids must be unique within a step, because seeds are derived from them.
        """
        found = []
        seen: Counter[int] = Counter()
        for place in range(position, position + count):
            epoch, index = divmod(place, len(self._items))
            row = self._order(epoch)[index]
            seen[row] += 1
            item: Any = self._items[row]
            found.append(item if seen[row] == 1 else msgspec.structs.replace(item, uid=f"{item.uid}#{seen[row]}"))
        return found

    def _order_of(self, epoch: int) -> np.ndarray:
        if self._curriculum is not None:
            return self._order_by(self._curriculum, epoch)
        order = np.arange(len(self._items))
        if self._shuffle:
            np.random.default_rng(derive_seed("epoch", self._seed, epoch)).shuffle(order)
        return order

    def _order_by(self, name: str, epoch: int) -> np.ndarray:
        """Return what a user's curriculum returns. Raises PlugInError for something else than an order of the items."""
        count = len(self._items)
        returned = CURRICULA.resolve(name)(self._items, epoch, derive_seed("epoch", self._seed, epoch))
        order = np.asarray(returned) if isinstance(returned, Sequence | np.ndarray) else np.empty(0)
        if order.shape != (count,) or order.dtype.kind not in "iu" or not ((order >= 0) & (order < count)).all():
            raise CURRICULA.returned(name, returned, f"{count} indices from 0 to {count - 1}, one for each item")
        return order
