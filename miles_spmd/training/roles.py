"""The models of a run on one rank: the role of each, the checkpoint that it starts from, and whether the run has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from miles_spmd.algorithms.losses import ValueLoss, make_loss
from miles_spmd.config import Config
from miles_spmd.models import load_family
from miles_spmd.protocol.results import CheckpointResult, WeightsDigest
from miles_spmd.training.digests import to_host
from miles_spmd.training.network import Network
from miles_spmd.training.trainer import Trainer
from miles_spmd.types.role import Role


class Roles:
    """The actor, which is trained, and the models that its algorithm needs beside it.

    The reference policy and the old actor are snapshots of weights in host memory, with which the actor's network runs
    when it is asked for them. The teacher is a network of its own, whose weights are in host memory too. The critic is
    a second trainer.
    """

    def __init__(self, config: Config) -> None:
        source = config.model.hf_checkpoint
        family = load_family(source, value_head=config.run.mode == "rm")
        self.actor = Trainer(config, family, make_loss(config.run.mode, config.algorithm))
        self.critic = self._build_critic(config) if config.has_critic else None
        self._snapshots: dict[Role, dict[str, Tensor]] = {}
        self._teacher = self._build_teacher(config) if config.has_teacher else None
        if config.has_reference:
            self._snapshots[Role.REF] = self.actor.read_to_host(config.model.ref_load or source)
        if config.algorithm.keep_old_actor:
            self.snapshot(Role.OLD_ACTOR)
        self._saves_reference = config.has_reference and config.algorithm.ref_update_interval > 0

    def _build_critic(self, config: Config) -> Trainer:
        source = config.model.critic_load or config.model.hf_checkpoint
        loss = ValueLoss(config.algorithm)
        family = load_family(source, value_head=True)
        return Trainer(config.of_critic(), family, loss, source=source, beside=self.actor)

    def _build_teacher(self, config: Config) -> Network:
        source = config.model.teacher_load
        if source is None:
            raise ValueError("model.teacher_load is not set; set it to the teacher's checkpoint")
        teacher = Network(config, load_family(source), source, beside=self.actor)
        self._snapshots[Role.TEACHER] = teacher.move_to_host()
        return teacher

    def trainer(self, role: Role) -> Trainer:
        """Return the trainer of ``role``. Raises ValueError for a role that is not trained in this run."""
        trainer = {Role.ACTOR: self.actor, Role.CRITIC: self.critic}.get(role)
        if trainer is None:
            raise ValueError(f"this run trains no {role}")
        return trainer

    def move_out(self) -> int:
        """Offload all but the weights of the trainers to host memory; return the bytes that were released on the
        device."""
        return sum(trainer.offload.move_out() for trainer in self._trainers())

    def move_in(self) -> int:
        """Undo :meth:`move_out`; return the bytes that were allocated on the device."""
        return sum(trainer.offload.move_in() for trainer in self._trainers())

    @property
    def offloaded_bytes(self) -> int:
        """Return the bytes of device memory that :meth:`move_in` would allocate."""
        return sum(trainer.offload.offloaded_bytes for trainer in self._trainers())

    def memory(self) -> dict[str, int]:
        """Return the bytes that the trainers hold on the device now, by purpose, without activations."""
        critic = {"critic": sum(self.critic.offload.memory())} if self.critic else {}
        return self.actor.offload.memory()._asdict() | critic

    def _trainers(self) -> list[Trainer]:
        return [trainer for trainer in (self.actor, self.critic) if trainer is not None]

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
        self._snapshots[role] = self.actor.copy_to_host(self._snapshots.get(role))

    # ---- digests ----

    def weights_digest(self, role: Role) -> WeightsDigest:
        """Return digests of the role's weights. Raises ValueError where the run keeps no ledger."""
        digests = self.trainer(role).digests
        if digests is None:
            raise ValueError("this run keeps no ledger")
        return WeightsDigest(digests.of_weights, digests.of_updates, to_host(digests.weights()))

    def optimizer_digests(self) -> CheckpointResult:
        trainers = {Role.ACTOR: self.actor, Role.CRITIC: self.critic}
        return CheckpointResult({role: t.digests.optimizer_state() for role, t in trainers.items() if t and t.digests})

    # ---- checkpoints ----

    def save(self, path: str | Path) -> None:
        """Write the trainers, and a reference policy that may differ from its checkpoint, into folders under
        ``path``."""
        self.actor.save(Path(path, "actor"))
        if self.critic is not None:
            self.critic.save(Path(path, "critic"))
        if self._saves_reference:
            with self.network(Role.REF):
                self.actor.save_weights(Path(path, "ref"))

    def load(self, path: str | Path) -> None:
        """Continue from what :meth:`save` wrote. Raises TrainerCheckpointError."""
        if self._saves_reference:
            # by way of the actor's network, whose own weights are loaded next
            self.actor.load_weights(Path(path, "ref"))
            self.snapshot(Role.REF)
        self.actor.load(Path(path, "actor"))
        if self.critic is not None:
            self.critic.load(Path(path, "critic"))
        if Role.OLD_ACTOR in self._snapshots:
            self.snapshot(Role.OLD_ACTOR)  # the engine is given the newest weights, too
