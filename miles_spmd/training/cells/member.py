"""What a cell does together with the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from miles_spmd.config.resilience import ResilienceConfig
from miles_spmd.protocol.results import MeetResult, UpdateResult
from miles_spmd.training.cells.exchange import LostUpdateError
from miles_spmd.training.cells.link import CellLink, Limits
from miles_spmd.training.cells.live_state import LiveState
from miles_spmd.training.cells.trainer import CellTrainer
from miles_spmd.training.trainer import Trainer
from miles_spmd.types.cell import Cell
from miles_spmd.types.role import Role


class CellMember:
    """The ``trainers`` of one cell, and the one link of all of them to the others: the cell is behind with all of them,
    or with none.

    ``snapshots`` and ``settle`` as for :class:`LiveState`. Collective over the ranks of the cell.
    """

    def __init__(
        self,
        cell: Cell,
        config: ResilienceConfig,
        trainers: Mapping[Role, Trainer],
        snapshots: Callable[[], Iterable[Tensor]],
        settle: Callable[[], None],
    ) -> None:
        self.trainers = {role: trainer for role, trainer in trainers.items() if isinstance(trainer, CellTrainer)}
        self.state = LiveState([trainer.checkpoint for trainer in self.trainers.values()], snapshots, settle)
        self.link = CellLink(cell, self.state, Limits.of(config))

    def trainer(self, role: Role) -> CellTrainer:
        """Return the trainer of ``role``. Raises ValueError for a role that is not trained in this run."""
        if role not in self.trainers:
            raise ValueError(f"this run trains no {role}")
        return self.trainers[role]

    def meet(self, *, founds: bool = False) -> MeetResult:
        """Agree with the other cells on who is there, and catch up with them. ``founds``: the run begins with what this
        cell has."""
        if founds:
            self.link.found()
        problem = ""
        try:
            self._begin("meet")
        except LostUpdateError as error:
            problem = str(error)
        return MeetResult(self.link.updates, self.state.received, problem)

    def make_update(self, role: Role, update: int) -> UpdateResult:
        """Make the update number ``update`` with the other cells, from the parts that all of them have kept."""
        trainer = self.trainer(role)
        try:
            self._begin(f"make update {update} of the {role}")
            return trainer.make_update(update, self.link)
        except LostUpdateError as error:
            return UpdateResult(lost=str(error), missing=error.missing, overwritten=error.overwritten)

    def _begin(self, purpose: str) -> None:
        try:
            self.link.begin(purpose)
        finally:
            if self.link.changed:  # what was computed before belongs to weights that this cell has not any more
                for trainer in self.trainers.values():
                    trainer.forget()
