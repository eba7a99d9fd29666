"""The models of a run on one rank: the role of each, the checkpoint that it starts from, and whether the run has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from miles_spmd.algorithms.losses import ValueLoss, make_loss
from miles_spmd.config import Config
from miles_spmd.models import load_family
from miles_spmd.protocol.results import CheckpointResult, SaveProgress, WeightsDigest
from miles_spmd.training.background_save import BackgroundSave
from miles_spmd.training.checkpoint import Content, TrainerCheckpointError
from miles_spmd.training.digests import to_host
from miles_spmd.training.network import Network
from miles_spmd.training.trainer import Trainer
from miles_spmd.types.cell import Cell
from miles_spmd.types.role import Role

if TYPE_CHECKING:
    from miles_spmd.training.cells.member import CellMember


class Roles:
    """The actor, which is trained, and the models that its algorithm needs beside it.

    The reference policy and the old actor are snapshots of weights in host memory, with which the actor's network runs
    when it is asked for them. The teacher is a network of its own, whose weights are in host memory too. The critic is
    a second trainer. With a ``cell`` trainers make their updates together with those of the other cells.
    """

    def __init__(self, config: Config, cell: Cell | None = None) -> None:
        source = config.model.hf_checkpoint
        family = load_family(source, value_head=config.run.mode == "rm")
        build: Callable[..., Trainer] = Trainer
        if cell is not None:
            from miles_spmd.training.cells.trainer import CellTrainer  # torchft takes a second, which only cells need

            build = partial(CellTrainer, parts=cell.cells)
        self.actor = build(config, family, make_loss(config.run.mode, config.algorithm))
        self._trainers = {Role.ACTOR: self.actor}
        if config.has_critic:
            loss, critic = ValueLoss(config.algorithm), config.model.critic_load or source
            values = load_family(critic, value_head=True)
            self._trainers[Role.CRITIC] = build(config.of_critic(), values, loss, source=critic, beside=self.actor)
        self._snapshots: dict[Role, dict[str, Tensor]] = {}
        self._teacher: Network | None = None
        if config.has_teacher and (teacher := config.model.teacher_load):
            self._teacher = Network(config, load_family(teacher), teacher, beside=self.actor)
            self._snapshots[Role.TEACHER] = self._teacher.move_to_host()
        if config.has_reference:
            self._snapshots[Role.REF] = self.actor.read_to_host(config.model.ref_load or source)
        if config.algorithm.keep_old_actor:
            self.snapshot(Role.OLD_ACTOR)
        self._saving = BackgroundSave()
        self._moved_out: dict[Role, dict[str, np.ndarray]] = {}  # digests of the optimizers when they were moved out
        self._saves_reference = config.saves_reference
        self._member: CellMember | None = None
        if cell is not None:
            from miles_spmd.training.cells.member import CellMember

            snapshots, settle = self.changing_snapshots, self._saving.wait_for_borrowed
            self._member = CellMember(cell, config.resilience, self._trainers, snapshots, settle)

    @property
    def in_cell(self) -> CellMember:
        """What these models do together with other cells. Raises ValueError where the run has none."""
        if self._member is None:
            raise ValueError("this run has no cells")
        return self._member

    def trainer(self, role: Role) -> Trainer:
        """Return the trainer of ``role``. Raises ValueError for a role that is not trained in this run."""
        if role not in self._trainers:
            raise ValueError(f"this run trains no {role}")
        return self._trainers[role]

    def move_out(self) -> int:
        """Offload all but the weights of the trainers to host memory; return the bytes that were released on the
        device."""
        if not self.offloaded_bytes:
            self._saving.wait_for_borrowed()
            self._moved_out = self._optimizer_digests()
        return sum(trainer.offload.move_out() for trainer in self._trainers.values())

    def move_in(self) -> int:
        """Undo :meth:`move_out`; return the bytes that were allocated on the device."""
        return sum(trainer.offload.move_in() for trainer in self._trainers.values())

    @property
    def offloaded_bytes(self) -> int:
        """Return the bytes of device memory that :meth:`move_in` would allocate."""
        return sum(trainer.offload.offloaded_bytes for trainer in self._trainers.values())

    def memory(self) -> dict[str, int]:
        """Return the bytes that the trainers hold on the device now, by purpose, without activations."""
        others = {role: sum(t.offload.memory().values()) for role, t in self._trainers.items() if t is not self.actor}
        return self.actor.offload.memory() | others

    @contextmanager
    def network(self, role: Role) -> Iterator[Network]:
        """Provide the network of ``role``, ready to run forward. Raises ValueError if this run has none."""
        if role in (Role.ACTOR, Role.CRITIC):
            yield self.trainer(role)
            return
        network = self._teacher if role is Role.TEACHER else self.actor
        if network is None or role not in self._snapshots:
            raise ValueError(f"this run has no {role}")
        with network.replaced_by(self._snapshots[role]):
            yield network

    def snapshot(self, role: Role) -> None:
        """Copy the actor's present weights to host memory as those of ``role``."""
        if role is Role.REF:
            self._saving.wait_for_borrowed()
        self._snapshots[role] = self.actor.copy_to_host(self._snapshots.get(role))

    def changing_snapshots(self) -> list[Tensor]:
        """Return the weights of snapshots that may differ from what a start of the run has."""
        roles = [Role.REF] if self._saves_reference else []
        roles += [Role.OLD_ACTOR] if Role.OLD_ACTOR in self._snapshots else []
        return [weight for role in roles for weight in self._snapshots[role].values()]

    # ---- digests ----

    def weights_digest(self, role: Role) -> WeightsDigest:
        """Return digests of the role's weights. Raises ValueError where the run keeps no ledger."""
        digests = self.trainer(role).digests
        if digests is None:
            raise ValueError("this run keeps no ledger")
        return WeightsDigest(digests.of_weights, digests.of_updates, to_host(digests.weights()))

    def _optimizer_digests(self) -> dict[Role, dict[str, np.ndarray]]:
        if self.offloaded_bytes:
            return self._moved_out  # the device computes them, and the state is not there now
        return {role: t.digests.optimizer_state() for role, t in self._trainers.items() if t.digests}

    # ---- checkpoints ----

    def reserve(self) -> None:
        """Begin to allocate the host memory of a save. Collective."""
        self._saving.reserve(self._contents())

    def settle_save(self) -> None:
        """Return when the trainers may change their state: a save has its copies, and :meth:`reserve` has the memory
        for them. Raises what went wrong."""
        self._saving.settle()

    def save(self, path: str | Path) -> CheckpointResult:
        """Begin to write the trainers, and a reference policy that may differ from its checkpoint, into folders under
        ``path`` ("": into none); return when training may go on."""
        digests = self._optimizer_digests()  # before the copies, behind which they would wait for the device
        if path:
            self._saving.start(Path(path), self._contents())
        return CheckpointResult(digests)

    def save_progress(self, *, wait: bool) -> SaveProgress:
        """Return how far the save is; with ``wait``, when it is done."""
        return self._saving.progress(wait=wait)

    @property
    def save_bytes(self) -> int:
        """Return the host memory that is kept for saves."""
        return self._saving.host_bytes

    def load(self, path: str | Path, digests: Mapping[str, Sequence[str]]) -> CheckpointResult:
        """Continue from what was saved; ``digests`` are those of every rank's progress. The trainers are on the device.

        A checkpoint that cannot be loaded is not an error of this rank: the result says why.
        """
        self.settle_save()
        try:
            if self._saves_reference:
                self.actor.checkpoint.load_weights(
                    Path(path, Role.REF), self._snapshots[Role.REF], digests.get(Role.REF, ())
                )
            for role, trainer in self._trainers.items():
                trainer.checkpoint.load(Path(path, role), digests.get(role, ()))
        except TrainerCheckpointError as error:
            return CheckpointResult({}, str(error))
        if Role.OLD_ACTOR in self._snapshots:
            self.snapshot(Role.OLD_ACTOR)  # the engine is given the newest weights, too
        return CheckpointResult(self._optimizer_digests())

    def _contents(self) -> dict[str, Content]:
        contents = {str(role): trainer.checkpoint.content() for role, trainer in self._trainers.items()}
        if self._saves_reference:
            contents[Role.REF] = self.actor.checkpoint.content_of(self._snapshots[Role.REF])
        return contents
