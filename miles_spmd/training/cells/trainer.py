"""A trainer whose batches are shared between cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from miles_spmd.algorithms.losses import Loss
from miles_spmd.config import Config
from miles_spmd.models import Family
from miles_spmd.protocol.results import TrainResult
from miles_spmd.training.cells.link import CellLink
from miles_spmd.training.cells.live_state import LiveState
from miles_spmd.training.network import Network
from miles_spmd.training.reduction import PartSum
from miles_spmd.training.trainer import Scores, Sums, Trainer
from miles_spmd.types.train_sequence import MicroBatch


class PartResult(NamedTuple):
    """What came of one part of a batch."""

    sums: Sums
    scores: Scores


class CellTrainer(Trainer):
    """The trainer of a cell. A batch has ``parts``, as many as cells are planned, and its gradient is their sum along
    the tree of the canonical reduction. Which cell computes which part is decided by whoever calls; the bits of an
    update do not depend on it.

    ``join`` returns the link to the other cells for the state of this trainer.
    """

    def __init__(
        self,
        config: Config,
        family: Family,
        loss_function: Loss,
        *,
        parts: int,
        join: Callable[[LiveState], CellLink],
        source: str | Path | None = None,
        beside: Network | None = None,
    ) -> None:
        self._parts = parts
        super().__init__(config, family, loss_function, source=source, beside=beside)
        self.link = join(LiveState(self.checkpoint))
        self._update_number = -1  # of the parts that are kept
        self._results: dict[int, PartResult] = {}

    def _reduction(self, leaves: int) -> PartSum:
        self._total = PartSum(self._chunks, leaves, self._parts)
        return self._total

    def agree(self) -> int:
        """Meet the other cells before an update, and catch up with them; return the number of updates so far. Raises
        LostUpdateError."""
        self.link.begin()
        return self.link.updates

    def train_parts(self, parts: Mapping[int, Sequence[MicroBatch]]) -> tuple[TrainResult, dict[int, PartResult]]:
        """Make the update on which :meth:`agree` has agreed: compute ``parts`` of the batch, and fetch the others from
        the cells that have them. Return the result of this cell's parts in order, and each of them.

        Raises LostUpdateError where it cannot be made. What was computed is kept for the next attempt at the same
        update, which then needs only what was missing.
        """
        total = self._total
        if self._update_number != self.link.updates:
            self.forget()
            self._update_number = self.link.updates
        self._clear_gradient()
        for part, micro_batches in sorted(parts.items()):
            total.begin(part)
            batches = self._pack(micro_batches)
            self._results[part] = PartResult(*self._scored(batches, self._accumulate(batches)))
        self.link.exchange(total.combine, total.kept)
        total.spread()
        self.link.commit()
        results = dict(sorted(self._results.items()))
        self.forget()
        made = self._update()
        sums = [leaf for part in results.values() for leaf in part.sums]
        scores = [score for part in results.values() for score in part.scores or ()] if self.where.reports else None
        return made.result(sums, scores), results

    def forget(self) -> None:
        """Parts that were kept belong to no update any more."""
        self._total.kept.clear()
        self._results.clear()
