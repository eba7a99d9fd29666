"""One rank: its models and its engine, and one handler for each command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import singledispatchmethod

import torch
import torch.distributed as dist

from miles_spmd.config import Config
from miles_spmd.generation.engine import FACTORIES, Engine
from miles_spmd.planning.memory_estimate import needed_tokens
from miles_spmd.platform.determinism import deterministic_kernels
from miles_spmd.protocol.commands import (
    Bisect,
    Command,
    ComputeLogProbs,
    ComputeValues,
    DigestWeights,
    ExportModel,
    Generate,
    LoadCheckpoint,
    RefitEngine,
    SaveCheckpoint,
    SnapshotWeights,
    TrainStep,
)
from miles_spmd.protocol.dealer import Dealer
from miles_spmd.protocol.messages import EngineRank, TrainerRank
from miles_spmd.protocol.results import (
    Bisection,
    CheckpointResult,
    LogProbsResult,
    Ok,
    RefitResult,
    Result,
    TrainResult,
    ValuesResult,
    WeightsDigest,
)
from miles_spmd.training.roles import Roles
from miles_spmd.worker.bisect import bisect
from miles_spmd.worker.device_turns import DeviceTurns
from miles_spmd.worker.memory_account import MemoryAccount
from miles_spmd.worker.stopwatch import Stopwatch
from miles_spmd.worker.world import Side


def make_engine(config: Config) -> Engine:
    """Build the engine that ``rollout.engine`` names; the modules of the other are not imported."""
    table = dict(config.sglang)
    if config.determinism.deterministic and torch.cuda.is_available():
        table["enable_deterministic_inference"] = True  # a response does not depend on the rest of its batch
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
    """Builds what ``task`` needs on this rank's ``side``; torch.distributed is initialised. ``watch`` measures the time
    of each part of the start and of each command, ``memory`` the use of the device."""

    def __init__(
        self,
        config: Config,
        task: str,
        side: Side,
        rank: int,
        dealer: Dealer,
        watch: Stopwatch,
        memory: MemoryAccount,
        progress: Callable[[str], None],
    ) -> None:
        self.memory = memory
        self._config, self._rank, self._dealer, self._watch, self._progress = config, rank, dealer, watch, progress
        self._roles: Roles | None = None
        if side.trains:
            with watch("trainer"):
                self._roles = Roles(config)
            memory.trainer = self._roles.memory
            memory.record("trainer built")
        self._turns = self._build_turns(side) if config.generates(task) else None

    def _build_turns(self, side: Side) -> DeviceTurns:
        """Build this rank's part in rollouts and refits, with an engine on ranks that generate."""
        config, engine = self._config, None
        if side.generates:
            if config.train.offload_train:
                self.roles.move_out()  # the engine sizes its KV cache by what is free while it is built
            with self._watch("engine"):
                engine = make_engine(config)
            self.memory.built(engine.memory)
            self.memory.record("engine built")
        return DeviceTurns(config, engine, self._roles, self._watch, self.memory, side.everyone)

    @property
    def trainer_rank(self) -> TrainerRank | None:
        if self._roles is None:
            return None
        actor = self._roles.actor
        return TrainerRank(actor.data_parallel_rank, actor.data_parallel_size, actor.reports)

    @property
    def engine_rank(self) -> EngineRank | None:
        if self._turns is None or not self._turns.generates:
            return None
        engine, place = divmod(dist.get_rank(), self._turns.engine.size)
        return EngineRank(engine, leader=place == 0)

    @property
    def roles(self) -> Roles:
        if self._roles is None:
            raise RuntimeError("this rank has no trainer: it only generates")
        return self._roles

    @property
    def turns(self) -> DeviceTurns:
        if self._turns is None:
            raise RuntimeError("this run has no engine: it neither generates nor evaluates")
        return self._turns

    # --- commands ----------------------------------------------------------------------------------------------------

    @singledispatchmethod
    def execute(self, command: Command) -> Result:
        """Execute one command by the handler of its type; raises whatever that raises."""
        raise TypeError(f"{type(command).__name__} is not for a worker outside a rollout")

    @execute.register
    def _generate(self, command: Generate) -> Ok:
        self.turns.rollout(self._rank, self._dealer, self._progress)
        return Ok()

    @execute.register
    def _refit(self, command: RefitEngine) -> RefitResult:
        return self.turns.refit(command.version)

    @execute.register
    def _log_probs(self, command: ComputeLogProbs) -> LogProbsResult:
        with self._training(), self.roles.network(command.role) as network, self.memory.work("log-probs"):
            return network.log_probs(command.micro_batches, command.top_k)

    @execute.register
    def _values(self, command: ComputeValues) -> ValuesResult:
        with self._training(), self.roles.network(command.role) as network, self.memory.work("values"):
            return network.values(command.micro_batches)

    @execute.register
    def _train(self, command: TrainStep) -> TrainResult:
        with self._training(), self.memory.work("optimizer step"):
            return self.roles.trainer(command.role).train_step(command.micro_batches)

    @execute.register
    def _snapshot(self, command: SnapshotWeights) -> Ok:
        self.roles.snapshot(command.role)
        return Ok()

    @execute.register
    def _bisect(self, command: Bisect) -> Bisection:
        return bisect(command, self.turns.engine, self.roles.actor)

    @execute.register
    def _digest(self, command: DigestWeights) -> WeightsDigest:
        return self.roles.weights_digest(command.role)

    @execute.register
    def _save(self, command: SaveCheckpoint) -> CheckpointResult:
        with self._whole_trainer():
            self.roles.save(command.path)
            return self.roles.optimizer_digests()

    @execute.register
    def _load(self, command: LoadCheckpoint) -> CheckpointResult:
        with self._whole_trainer():
            self.roles.load(command.path)
            return self.roles.optimizer_digests()

    @execute.register
    def _export(self, command: ExportModel) -> Ok:
        stop = self._config.rollout.rollout_stop_token_ids if self._config.run.mode == "rl" else ()
        self.roles.actor.export(command.path, self._config.model.hf_checkpoint, stop)
        return Ok()

    # --- the device --------------------------------------------------------------------------------------------------

    @contextmanager
    def _training(self) -> Iterator[None]:
        """The trainer's turn on the device, with kernels in a fixed order where the run is deterministic."""
        with deterministic_kernels() if self._config.determinism.deterministic else nullcontext():
            if self._turns is not None:
                self._turns.release()
            yield

    def _whole_trainer(self) -> AbstractContextManager[None]:
        return nullcontext() if self._turns is None else self._turns.whole_trainer()
