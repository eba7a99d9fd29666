"""One rank: its models and its engine, and what each command does with them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist

from miles_spmd.config import Config
from miles_spmd.generation.engine import FACTORIES, Engine
from miles_spmd.planning.kv_cache import needed_tokens
from miles_spmd.platform.determinism import deterministic_kernels
from miles_spmd.protocol import messages
from miles_spmd.protocol.dealer import Dealer
from miles_spmd.training.roles import Roles
from miles_spmd.worker.bisect import bisect
from miles_spmd.worker.device_turns import DeviceTurns
from miles_spmd.worker.memory_account import MemoryAccount
from miles_spmd.worker.sides import EngineSide, TrainerSide
from miles_spmd.worker.stopwatch import Stopwatch
from miles_spmd.worker.world import Side


def make_engine(config: Config) -> Engine:
    """Build this rank's part of the engine that ``rollout.engine`` names; SGLang is imported only for "sglang"."""
    table = dict(config.sglang)
    if config.determinism.deterministic and torch.cuda.is_available():
        table["enable_deterministic_inference"] = True  # responses do not depend on what else is computed
    context_length = table.pop("context_length", None)
    if config.rollout.engine != "sglang":
        factory = FACTORIES.resolve(config.rollout.engine)
        return factory(config.model.hf_checkpoint, dtype=config.model.dtype, context_length=context_length)
    from miles_spmd.generation.sglang.engine import SglangEngine

    return SglangEngine(
        config.model.hf_checkpoint,
        dtype=config.model.dtype,
        server_args=table,
        context_length=context_length,
        cache_tokens=needed_tokens(config, dist.get_world_size()),
        invariant=config.determinism.parity == "bitwise",
        sum_terms=config.sum_terms,
    )


class Worker:
    """Builds what ``task`` needs on this rank's ``side``; torch.distributed is initialised. ``watch`` is told how long
    each part took, then where the time of each command went; ``ledger`` who holds the memory."""

    def __init__(
        self,
        config: Config,
        task: str,
        side: Side,
        rank: int,
        dealer: Dealer,
        watch: Stopwatch,
        ledger: MemoryAccount,
        progress: Callable[[str], None],
    ) -> None:
        self.ledger = ledger
        self._config, self._rank, self._dealer, self._watch, self._progress = config, rank, dealer, watch, progress
        self._roles: Roles | None = None
        if side.trains:
            with watch("trainer"):
                self._roles = Roles(config)
            ledger.trainer = self._roles.memory
            ledger.record("trainer built")
        self._generation = self._build_generation(side) if config.generates(task) else None

    def _build_generation(self, side: Side) -> DeviceTurns | EngineSide | TrainerSide:
        """This rank's part in rollouts and refits."""
        config, watch = self._config, self._watch
        if not side.generates:
            return TrainerSide(config, self.roles, side.everyone, watch, self.ledger)
        if config.train.offload_train:
            self.roles.move_out()  # so that the engine makes its cache as large as it may be
        with watch("engine"):
            engine = make_engine(config)
        self.ledger.built(engine.memory)
        self.ledger.record("engine built")
        if not side.trains:
            return EngineSide(config, engine, engine.size, side.everyone, watch, self.ledger)
        return DeviceTurns(config, engine, engine.size, self.roles, watch, self.ledger)

    @property
    def trainer_rank(self) -> messages.TrainerRank | None:
        if self._roles is None:
            return None
        actor = self._roles.actor
        return messages.TrainerRank(actor.data_parallel_rank, actor.data_parallel_size, actor.reports)

    @property
    def engine_rank(self) -> messages.EngineRank | None:
        if not isinstance(self._generation, DeviceTurns | EngineSide):
            return None
        engine, place = divmod(dist.get_rank(), self._generation.engine.size)
        return messages.EngineRank(engine, leader=place == 0)

    @property
    def roles(self) -> Roles:
        if self._roles is None:
            raise RuntimeError("this rank has no trainer: it only generates")
        return self._roles

    @property
    def engine(self) -> DeviceTurns | EngineSide:
        if not isinstance(self._generation, DeviceTurns | EngineSide):
            raise RuntimeError("this rank has no engine: it only trains")
        return self._generation

    def do(self, body: messages.Body) -> messages.Result:
        """One command; raises whatever its part raises."""
        trains = isinstance(body, messages.ComputeLogProbs | messages.ComputeValues | messages.TrainStep)
        with deterministic_kernels() if trains and self._config.determinism.deterministic else nullcontext():
            return self._do(body)

    def _do(self, body: messages.Body) -> messages.Result:
        match body:
            case messages.Generate():
                self.engine.rollout(self._rank, self._dealer, self._progress)
            case messages.ComputeLogProbs(micro_batches, role, top_k):
                self._release_engine()
                with self.roles.network(role) as network, self.ledger.work("log-probs"):
                    return network.log_probs(micro_batches, top_k)
            case messages.ComputeValues(micro_batches, role):
                self._release_engine()
                with self.roles.network(role) as network, self.ledger.work("values"):
                    return network.values(micro_batches)
            case messages.TrainStep(micro_batches, role):
                self._release_engine()
                with self.ledger.work("optimizer step"):
                    return self.roles.trainer(role).train_step(micro_batches)
            case messages.Bisect():
                return bisect(body, self.engine.engine, self.roles.actor)
            case messages.SnapshotWeights(role):
                self.roles.snapshot(role)
            case messages.RefitEngine(version):
                if self._generation is None:
                    raise RuntimeError("this run has no engine: it neither generates nor evaluates")
                return self._generation.refit(version)
            case messages.DigestWeights(role):
                return self.roles.weights_digest(role)
            case messages.SaveCheckpoint(path):
                with self._whole_trainer():
                    self.roles.save(path)
                    return self.roles.optimizer_digests()
            case messages.LoadCheckpoint(path):
                with self._whole_trainer():
                    self.roles.load(path)
                    return self.roles.optimizer_digests()
            case messages.ExportModel(path):
                self.roles.actor.export(path, self._config.model.hf_checkpoint)
            case _:
                raise TypeError(f"{type(body).__name__} is not for a worker outside a rollout")
        return messages.Ok()

    def _whole_trainer(self) -> AbstractContextManager[None]:
        """Where optimizer states have left the device they come back for a while, and the engine gives way."""
        turns = self._generation
        if isinstance(turns, DeviceTurns) and self._config.train.offload_train:
            return turns.lent()
        return nullcontext()

    def _release_engine(self) -> None:
        if isinstance(self._generation, DeviceTurns):
            self._generation.release()
