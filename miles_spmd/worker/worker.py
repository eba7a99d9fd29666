"""One rank: its models and its engine, and what each command does with them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from miles_spmd.config.schema import Config
from miles_spmd.messaging import wire
from miles_spmd.messaging.dealer import Dealer
from miles_spmd.platform import fixed_order
from miles_spmd.rollout.engine import Engine
from miles_spmd.training.roles import Roles
from miles_spmd.worker.phases import EngineTurns
from miles_spmd.worker.stopwatch import Stopwatch


def make_engine(config: Config) -> Engine:
    """The kind that ``rollout.engine`` names; imports no other."""
    table = dict(config.sglang)
    if config.determinism.deterministic and torch.cuda.is_available():
        table.setdefault("enable_deterministic_inference", True)  # answers do not depend on what else is computed
    context_length = table.pop("context_length", None)
    if config.rollout.engine == "torch":
        from miles_spmd.rollout.torch_engine import TorchEngine

        return TorchEngine(config.model.hf_checkpoint, dtype=config.model.dtype, context_length=context_length)
    from miles_spmd.rollout.sglang_engine import SglangEngine

    return SglangEngine(
        config.model.hf_checkpoint, dtype=config.model.dtype, server_args=table, context_length=context_length
    )


class Worker:
    """Builds what ``task`` needs; torch.distributed is initialised. ``watch`` is told how long each part took, then
    where the time of each command went."""

    def __init__(
        self, config: Config, task: str, rank: int, dealer: Dealer, watch: Stopwatch, progress: Callable[[str], None]
    ) -> None:
        self._config, self._rank, self._dealer, self._watch, self._progress = config, rank, dealer, watch, progress
        with watch("trainer"):
            self.roles = Roles(config)
        self.engine_size = 1 if config.rollout.engine == "torch" else int(config.sglang.get("tp_size", 1))
        self._engine: EngineTurns | None = None
        if config.generates(task):
            if config.train.offload_train:
                self.roles.move_out()  # so that the engine makes its cache as large as it may be
            with watch("engine"):
                engine = make_engine(config)
            self._engine = EngineTurns(config, engine, self.engine_size, self.roles, watch)

    @property
    def engine(self) -> EngineTurns:
        if self._engine is None:
            raise RuntimeError("this run has no engine: it neither generates nor evaluates")
        return self._engine

    def do(self, body: wire.Body) -> wire.Result:
        """One command; raises whatever its part raises."""
        trains = isinstance(body, wire.ComputeLogProbs | wire.ComputeValues | wire.Train)
        with fixed_order.kernels() if trains and self._config.determinism.deterministic else nullcontext():
            return self._do(body)

    def _do(self, body: wire.Body) -> wire.Result:
        match body:
            case wire.Generate():
                self.engine.rollout(self._rank, self._dealer, self._progress)
            case wire.ComputeLogProbs(micro_batches, role, top_k):
                self._release_engine()
                with self.roles.network(role) as network:
                    return network.log_probs(micro_batches, top_k)
            case wire.ComputeValues(micro_batches, role):
                self._release_engine()
                with self.roles.network(role) as network:
                    return network.values(micro_batches)
            case wire.Train(micro_batches, role):
                self._release_engine()
                return self.roles.trainer(role).train_step(micro_batches)
            case wire.Keep(role):
                self.roles.keep(role)
            case wire.Refit(version):
                return self.engine.refit(version)
            case wire.SaveCheckpoint(path):
                with self._whole_trainer():
                    self.roles.save(path)
            case wire.LoadCheckpoint(path):
                with self._whole_trainer():
                    self.roles.load(path)
            case wire.ExportModel(path):
                self.roles.actor.export(path, self._config.model.hf_checkpoint)
            case _:
                raise TypeError(f"{type(body).__name__} is not for a worker outside a rollout")
        return wire.Ok()

    def _whole_trainer(self) -> AbstractContextManager[None]:
        """Where optimizer states have left the device they come back for a while, and the engine gives way."""
        offloads = self._engine is not None and self._config.train.offload_train
        return self.engine.lent() if offloads else nullcontext()

    def _release_engine(self) -> None:
        if self._engine is not None:
            self._engine.release()
