"""One rank: its models and its engine, and one handler for each command."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, singledispatchmethod

import torch
import torch.distributed as dist

from miles_spmd.config import Config
from miles_spmd.generation.engine import FACTORIES, Engine
from miles_spmd.invariant.operator_outputs import first_difference, operators
from miles_spmd.models import load_family
from miles_spmd.planning.memory_estimate import needed_tokens
from miles_spmd.planning.release import GIB
from miles_spmd.platform.determinism import deterministic_kernels
from miles_spmd.protocol import commands, results
from miles_spmd.protocol.messages import EngineRank, OwnWork, TrainerRank
from miles_spmd.training.network import Network
from miles_spmd.training.passes import PASSES
from miles_spmd.training.roles import Roles
from miles_spmd.types.cell import Cell
from miles_spmd.types.engine_group import JUDGE, POLICY, EngineGroup
from miles_spmd.types.run_files import newest_config
from miles_spmd.types.train_sequence import MicroBatch
from miles_spmd.weights.hugging_face import load
from miles_spmd.worker.device_turns import DeviceTurns
from miles_spmd.worker.effective import append_values
from miles_spmd.worker.hook import Hook
from miles_spmd.worker.memory_account import MemoryAccount
from miles_spmd.worker.stopwatch import Stopwatch
from miles_spmd.worker.world import Side


def make_engine(config: Config, name: str = POLICY, *, refits: bool = True) -> Engine:
    """Build an engine of the group ``name``, of the kind that ``rollout.engine`` names; the modules of the other are
    not imported. Where no trainer gives it its weights (``refits``) it has those of its checkpoint."""
    group = config.engine_group(name)
    engine = _without_weights(config, group, refits)
    if not refits:
        load(group.hf_checkpoint, engine.weights(), engine.layout(), load_family(group.hf_checkpoint))
        engine.commit(0)
    return engine


def _without_weights(config: Config, group: EngineGroup, refits: bool) -> Engine:
    table = dict(group.server_args)
    if config.determinism.deterministic and torch.cuda.is_available():
        table["enable_deterministic_inference"] = True  # a response does not depend on the rest of its batch
    context_length = table.pop("context_length", None)
    if config.rollout.engine != "sglang":
        factory = FACTORIES.resolve(config.rollout.engine)
        return factory(group.hf_checkpoint, dtype=config.model.dtype, context_length=context_length)
    from miles_spmd.generation.sglang.engine import SglangEngine

    return SglangEngine(
        group.hf_checkpoint,
        dtype=config.model.dtype,
        server_args=table,
        context_length=context_length,
        # one without a trainer has a device of its own, and takes what it has
        cache_tokens=needed_tokens(config, dist.get_world_size()) if refits else None,
        # which compares a policy with its trainer; whether responses depend on the batch is decided above
        invariant=group.name != JUDGE and config.determinism.parity == "bitwise",
        sum_terms=config.sum_terms if group.name != JUDGE else group.tp_size,
    )


def bisect(command: commands.Bisect, engine: Engine, network: Network) -> results.Bisection:
    """Run one request in the engine and then in the trainer, and return the first operator whose outputs differ.

    Compare on every rank, each in its own part of the model. The engine has weights and runs without CUDA graphs,
    which would hide its operators.

    Raises ValueError for an engine whose operators cannot be traced.
    """
    from miles_spmd.generation.sglang.engine import SglangEngine
    from miles_spmd.generation.sglang.operators import traced
    from miles_spmd.training.operator_outputs import operator_outputs

    if not isinstance(engine, SglangEngine):
        raise ValueError("rollout.engine: only the operators of 'sglang' can be compared with the trainer's")
    engine.flush()  # cached prefixes would skip the prefill that has to be traced
    with traced(engine) as of_engine:
        engine.submit([command.request])
        outputs = []
        while not engine.idle:
            outputs += engine.step()
    response = outputs[0].output_ids
    of_trainer = operator_outputs(network, [*command.request.input_ids, *response])
    found = first_difference(of_engine, of_trainer, network.family.num_layers, command.tokens)
    if found is None:
        return results.Bisection(response)
    what = (
        f"differs for {found.tokens} of {found.compared} tokens, first for number {found.token} of the sequence, by up "
        f"to {found.largest:.3g}"
    )
    return results.Bisection(response, found.operator, operators(network.family.num_layers).index(found.operator), what)


def _own(network: Network, micro_batches: Sequence[MicroBatch]) -> OwnWork:
    return OwnWork(network.work.take(), float(sum(len(s.tokens) for batch in micro_batches for s in batch)))


class Worker:
    """Builds what ``task`` needs on this rank's ``side``; torch.distributed is initialised. ``watch`` measures the time
    of each part of the start and of each command, ``memory`` the use of the device. With a ``cell`` this rank is one of
    a replica that trains together with others."""

    def __init__(
        self,
        config: Config,
        task: str,
        side: Side,
        rank: int,
        watch: Stopwatch,
        memory: MemoryAccount,
        cell: Cell | None = None,
    ) -> None:
        self.memory, self.group = memory, side.group
        self._config, self._rank, self._in_cell = config, rank, cell is not None
        self._own: OwnWork | None = None
        self._hook = Hook(config.train.trainer_hook if side.trains else None)
        self._begun = -1  # number of the update that this rank of a cell has begun last
        self._saves_to = ""  # folder of the checkpoint that was begun last
        self._roles: Roles | None = None
        if side.trains:
            with watch("trainer"):
                self._roles = Roles(config, cell)
            memory.trainer = self._roles.memory
            memory.record("trainer built")
        self._engine: Engine | None = None
        if side.generates and config.generates(task):
            if self._roles is not None and config.train.offload_train:
                self._roles.move_out()  # the engine sizes its KV cache by what is free while it is built
            with watch("engine"):
                self._engine = make_engine(config, self.group, refits=side.refits)
            memory.built(self._engine.memory)
            memory.record("engine built")
        if self._roles is not None and task == "train" and config.saves and torch.cuda.is_available():
            self._roles.reserve()  # not before: while graphs are captured no other thread may pin memory
        self._refits = side.refits
        refits = side.refits and config.generates(task)
        self.turns = DeviceTurns(config, self._engine, self._roles, watch, memory, side.everyone, refits)

    @property
    def trainer_rank(self) -> TrainerRank | None:
        if self._roles is None:
            return None
        where = self._roles.actor.where
        return TrainerRank(where.dp_rank, where.dp_size, where.reports, where.waits_with)

    @property
    def engine_rank(self) -> EngineRank | None:
        if self._engine is None:
            return None
        engine, place = divmod(dist.get_rank(), self._engine.size)
        longest = getattr(self._engine, "longest_request", None)  # another engine has none
        return EngineRank(engine, place == 0, self._engine.cache_tokens, longest)

    def describe(self) -> None:
        """Append the values of the backends to the run's config.toml, from the first rank that has each."""
        file = newest_config(self._config.run_dir)
        if self._rank == 0 and self._roles is not None:
            append_values(file, "megatron", "Megatron-core", self._roles.actor.backend_values)
        args = getattr(self._engine, "server_args", None)  # another engine has none
        if args is not None and (self._rank if self._in_cell else dist.get_rank()) == 0:
            tables = {POLICY: "sglang", JUDGE: "reward.judge_sglang"}  # a second policy has the first one's values
            if self.group in tables:
                append_values(file, tables[self.group], "SGLang", [args])

    @property
    def roles(self) -> Roles:
        if self._roles is None:
            raise RuntimeError("this rank has no trainer: it only generates")
        return self._roles

    def close_rollout(self, steps: int, seconds: float, retries: int) -> None:
        """Account for a rollout whose requests are finished: steps of the engine, how long they took, and how often
        memory did not suffice."""
        self._own = OwnWork(seconds, float(steps))
        self.memory.note("rollout_retries", retries)
        self.memory.record("rollout")

    def take_own(self) -> OwnWork | None:
        """Return the work of the last command, once."""
        own, self._own = self._own, None
        return own

    # --- commands ----------------------------------------------------------------------------------------------------

    @singledispatchmethod
    def execute(self, command: commands.Command) -> results.Result:
        """Execute one command by the handler of its type; raises whatever that raises."""
        raise TypeError(f"{type(command).__name__} is not for a worker outside a rollout")

    @execute.register
    def _generate(self, command: commands.Generate) -> results.Ok:
        self.turns.open_rollout()
        return results.Ok()

    @execute.register
    def _refit(self, command: commands.RefitEngine) -> results.RefitResult:
        return self.turns.refit(command.version)

    @execute.register
    def _load_weights(self, command: commands.LoadWeights) -> results.Ok:
        try:
            self.turns.load(command.path, command.version)
        except ValueError as error:  # on all ranks at once, before any engine has changed
            return results.Ok({"problem": str(error)})
        self.memory.record("weights loaded")
        return results.Ok()

    @execute.register
    def _replace(self, command: commands.ReplaceEngines) -> results.Ok:
        self.turns.replace_engine(partial(make_engine, self._config, self.group, refits=self._refits))
        self.memory.record("engine replaced")
        return results.Ok()

    @execute.register
    def _log_probs(self, command: commands.ComputeLogProbs) -> results.LogProbsResult:
        passes = len(command.micro_batches)
        with self._training(passes), self.roles.network(command.role) as network, self.memory.work("log-probs"):
            with self._hook.around("log_probs", command.role, network):
                result = network.log_probs(command.micro_batches, command.top_k)
            self._own = _own(network, command.micro_batches)
            return result

    @execute.register
    def _values(self, command: commands.ComputeValues) -> results.ValuesResult:
        passes = len(command.micro_batches)
        with self._training(passes), self.roles.network(command.role) as network, self.memory.work("values"):
            with self._hook.around("values", command.role, network):
                values = network.values(command.micro_batches)
            self._own = _own(network, command.micro_batches)
            return values

    @execute.register
    def _train(self, command: commands.TrainStep) -> results.TrainResult:
        trainer = self.roles.trainer(command.role)
        with self._training(len(command.micro_batches)), self.memory.work("optimizer step"):
            with self._hook.around("train", command.role, trainer):
                result = trainer.train_step(command.micro_batches)
            self._own = _own(trainer, command.micro_batches)
            return result

    @execute.register
    def _compute_part(self, command: commands.ComputePart) -> results.PartResult:
        trainer = self.roles.in_cell.trainer(command.role)
        if (kept := trainer.kept(command.update, command.part)) is not None:
            return kept
        with self._training(len(command.micro_batches)), self.memory.work("gradient"):
            if command.update != self._begun:  # else it computes another part, too
                self._begun = command.update
                self._hook.call("train", command.role, trainer, ends=False)
            result = trainer.compute_part(command.update, command.part, command.micro_batches)
            self.memory.note("kept_gradients", trainer.kept_bytes / GIB)
            self._own = _own(trainer, command.micro_batches)
            return result

    @execute.register
    def _make_update(self, command: commands.MakeUpdate) -> results.UpdateResult:
        with self._training(), self.memory.work("optimizer step"):
            result = self.roles.in_cell.make_update(command.role, command.update)
            if not result.lost:
                self._hook.call("train", command.role, self.roles.in_cell.trainer(command.role), ends=True)
            return result

    @execute.register
    def _meet(self, command: commands.MeetCells) -> results.MeetResult:
        with self._training(), self.memory.work("meeting of cells"):
            return self.roles.in_cell.meet(founds=command.founds)

    @execute.register
    def _snapshot(self, command: commands.SnapshotWeights) -> results.Ok:
        self.roles.snapshot(command.role)
        return results.Ok()

    @execute.register
    def _bisect(self, command: commands.Bisect) -> results.Bisection:
        return bisect(command, self.turns.engine, self.roles.actor)

    @execute.register
    def _digest(self, command: commands.DigestWeights) -> results.WeightsDigest:
        return self.roles.weights_digest(command.role)

    @execute.register
    def _save(self, command: commands.SaveCheckpoint) -> results.CheckpointResult:
        result = self.roles.save(command.path)
        self._saves_to = command.path
        self.memory.note("save_buffers", self.roles.save_bytes / GIB)
        return result

    @execute.register
    def _finish_save(self, command: commands.FinishSave) -> results.SaveProgress:
        if command.path and command.path != self._saves_to:
            return results.SaveProgress(done=True, lost=True)
        return self.roles.save_progress(wait=command.wait)

    @execute.register
    def _load(self, command: commands.LoadCheckpoint) -> results.CheckpointResult:
        self.turns.release()
        return self.roles.load(command.path, command.digests)

    @execute.register
    def _export(self, command: commands.ExportModel) -> results.Ok:
        stop = self._config.rollout.rollout_stop_token_ids if self._config.run.mode == "rl" else ()
        try:
            self.roles.actor.export(command.path, self._config.model.hf_checkpoint, stop)
        except ValueError as error:  # on all ranks at once: they can still save what could not be exported
            return results.Ok({"problem": str(error)})
        return results.Ok()

    # --- the device --------------------------------------------------------------------------------------------------

    @contextmanager
    def _training(self, passes: int = 0) -> Iterator[None]:
        """The trainer's turn on the device for so many forward passes, with kernels in a fixed order where the run is
        deterministic."""
        with deterministic_kernels() if self._config.determinism.deterministic else nullcontext():
            self.roles.settle_save()
            self.turns.release()
            PASSES.begin(passes)
            try:
                yield
            finally:
                PASSES.end()
