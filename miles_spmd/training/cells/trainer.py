"""A trainer whose batches are shared between cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from miles_spmd.algorithms.losses import Loss
from miles_spmd.config import Config
from miles_spmd.models import Family
from miles_spmd.protocol.results import PartResult, TrainResult, UpdateResult
from miles_spmd.training.cells.exchange import LostUpdateError
from miles_spmd.training.cells.link import CellLink
from miles_spmd.training.network import Network
from miles_spmd.training.reduction import PartSum
from miles_spmd.training.trainer import Trainer
from miles_spmd.types.train_sequence import MicroBatch


class CellTrainer(Trainer):
    """The trainer of a cell. A batch has ``parts``, as many as cells are planned, and its gradient is their sum along
    the tree of the canonical reduction. Which cell computes which part is decided by whoever calls; the bits of an
    update do not depend on it.
    """

    def __init__(
        self,
        config: Config,
        family: Family,
        loss_function: Loss,
        *,
        parts: int,
        source: str | Path | None = None,
        beside: Network | None = None,
    ) -> None:
        self.parts = parts
        super().__init__(config, family, loss_function, source=source, beside=beside)
        self._of_update = -1  # the number of the update that the kept parts belong to
        self._results: dict[int, PartResult] = {}

    def _reduction(self, leaves: int) -> PartSum:
        self._total = PartSum(self._chunks, leaves, self.parts)
        return self._total

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> TrainResult:
        raise TypeError("a cell makes no update from its own micro-batches alone")

    def kept(self, update: int, part: int) -> PartResult | None:
        """Return what came of a part whose gradient is kept."""
        return self._results.get(part) if update == self._of_update else None

    @property
    def kept_bytes(self) -> int:
        """Host memory of gradients that are kept."""
        return self._total.kept_bytes

    def compute_part(self, update: int, part: int, micro_batches: Sequence[MicroBatch]) -> PartResult:
        """Compute ``part`` of the batch of the update with this number, and keep its gradient until the update is made.
        Parts of other updates are forgotten."""
        self._begin(update)
        self._total.begin(part)
        self._clear_gradient()
        batches = self._pack(micro_batches)
        self._results[part] = PartResult(*self._scored(batches, self._accumulate(batches)))
        return self._results[part]

    def make_update(self, update: int, link: CellLink) -> UpdateResult:
        """Make the update with the cells that have just met: sum the parts that are kept here and there. Raises
        LostUpdateError; what was not overwritten is kept for the next attempt then."""
        self._begin(update)
        try:
            link.exchange(self._total.combine, self._total.kept)
            link.commit()
        except LostUpdateError as error:
            if not error.missing:  # then nothing was exchanged
                error.overwritten = self._total.forget_overwritten()
                for part in error.overwritten:
                    del self._results[part]
            raise
        self._total.spread()  # not before: the sums over this cell's ranks change what is kept for another attempt
        sums = [leaf for part in self._results.values() for leaf in part.sums]
        self.forget()
        made = self._update().result(sums, None)
        return UpdateResult(made.grad_norm, made.lr, made.skipped, made.digests)

    def forget(self) -> None:
        """Parts that are kept belong to no update any more."""
        self._total.forget()
        self._results.clear()

    def _begin(self, update: int) -> None:
        if update != self._of_update:
            self.forget()
            self._of_update = update
