"""Every model that a run has on one rank: what each is for, what it starts from, and when it is there at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from miles_spmd.algorithms.losses import ValueLoss, make_loss
from miles_spmd.config.schema import Config
from miles_spmd.models import load_family
from miles_spmd.protocol.results import CheckpointResult, WeightsDigest
from miles_spmd.training.digests import to_host
from miles_spmd.training.network import Network
from miles_spmd.training.trainer import Trainer
from miles_spmd.types.role import Role


class Roles:
    """The actor, which is trained, and what its algorithm needs beside it.

    The reference policy and the old actor are weights in host memory that the actor's network runs with for a while.
    The teacher is a network of its own, whose weights are in host memory too. The critic is a second trainer.
    """

    def __init__(self, config: Config) -> None:
        source = config.model.hf_checkpoint
        family = load_family(source, value_head=config.run.mode == "rm")
        self.actor = Trainer(config, family, make_loss(config.run.mode, config.algorithm))
        self.critic = self._critic(config) if config.has_critic else None
        self._copies: dict[Role, dict[str, Tensor]] = {}
        self._teacher = self._build_teacher(config) if config.has_teacher else None
        if config.has_reference:
            self._copies[Role.REF] = self.actor.read_to_host(config.model.ref_load or source)
        if config.algorithm.keep_old_actor:
            self.keep(Role.OLD_ACTOR)
        self._saves_reference = config.has_reference and config.algorithm.ref_update_interval > 0

    def _critic(self, config: Config) -> Trainer:
        source = config.model.critic_load or config.model.hf_checkpoint
        loss = ValueLoss(config.algorithm)
        family = load_family(source, value_head=True)
        return Trainer(config.of_critic(), family, loss, source=source, beside=self.actor)

    def _build_teacher(self, config: Config) -> Network:
        source = config.model.teacher_load
        if source is None:
            raise ValueError("model.teacher_load names no checkpoint for the teacher")
        teacher = Network(config, load_family(source), source, beside=self.actor)
        self._copies[Role.TEACHER] = teacher.move_to_host()
        return teacher

    def trainer(self, role: Role) -> Trainer:
        """Raises ValueError for a role that does not train in this run."""
        trainer = {Role.ACTOR: self.actor, Role.CRITIC: self.critic}.get(role)
        if trainer is None:
            raise ValueError(f"this run trains no {role}")
        return trainer

    def move_out(self) -> int:
        """Put all but the weights of what is trained into host memory; returns the bytes that the device got back."""
        return sum(trainer.move_out() for trainer in self._trainers())

    def move_in(self) -> int:
        """The reverse."""
        return sum(trainer.move_in() for trainer in self._trainers())

    @property
    def away(self) -> int:
        """Bytes that :meth:`move_in` would take."""
        return sum(trainer.away for trainer in self._trainers())

    def memory(self) -> dict[str, int]:
        """Bytes that they hold on the device now, by what for; activations not counted."""
        critic = {"critic": sum(self.critic.memory())} if self.critic else {}
        return self.actor.memory()._asdict() | critic

    def _trainers(self) -> list[Trainer]:
        return [trainer for trainer in (self.actor, self.critic) if trainer is not None]

    @contextmanager
    def network(self, role: Role) -> Iterator[Network]:
        """The network of ``role``, ready to run forward. Raises ValueError if this run has none."""
        if role in (Role.ACTOR, Role.CRITIC):
            yield self.trainer(role)
            return
        network = self._teacher if role is Role.TEACHER else self.actor
        if network is None or role not in self._copies:
            raise ValueError(f"this run has no {role}")
        with network.replaced_by(self._copies[role]):
            yield network

    def keep(self, role: Role) -> None:
        """Make the actor's weights of now those of ``role``."""
        self._copies[role] = self.actor.copy_to_host(self._copies.get(role))

    # ---- digests ----

    def weights_digest(self, role: Role) -> WeightsDigest:
        """Raises ValueError where no ledger is kept."""
        digests = self.trainer(role).digests
        if digests is None:
            raise ValueError("this run keeps no ledger")
        return WeightsDigest(digests.of_weights, digests.of_updates, to_host(digests.weights()))

    def optimizer_digests(self) -> CheckpointResult:
        trainers = {Role.ACTOR: self.actor, Role.CRITIC: self.critic}
        return CheckpointResult({role: t.digests.optimizer_state() for role, t in trainers.items() if t and t.digests})

    # ---- checkpoints ----

    def save(self, path: str | Path) -> None:
        """Write what is trained, and a reference that is not a checkpoint's any more, into folders under ``path``."""
        self.actor.save(Path(path, "actor"))
        if self.critic is not None:
            self.critic.save(Path(path, "critic"))
        if self._saves_reference:
            with self.network(Role.REF):
                self.actor.save_weights(Path(path, "ref"))

    def load(self, path: str | Path) -> None:
        """Continue from what :meth:`save` wrote. Raises CheckpointError."""
        if self._saves_reference:
            self.actor.load_weights(Path(path, "ref"))
            self.keep(Role.REF)
        self.actor.load(Path(path, "actor"))
        if self.critic is not None:
            self.critic.load(Path(path, "critic"))
        if Role.OLD_ACTOR in self._copies:
            self.keep(Role.OLD_ACTOR)  # the engine is given the newest weights, too
