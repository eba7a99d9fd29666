"""Ranks of a disaggregated run: trainers that refit, and engines that keep a device of their own, idle while the
trainers work."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from miles_spmd.config import Config
from miles_spmd.generation.engine import Engine
from miles_spmd.protocol.dealer import Dealer
from miles_spmd.protocol.messages import RefitResult
from miles_spmd.training.roles import Roles
from miles_spmd.worker.device_turns import make_refit
from miles_spmd.worker.engine_loop import Lockstep, run_rollout
from miles_spmd.worker.memory_account import MemoryAccount
from miles_spmd.worker.stopwatch import Stopwatch


class TrainerSide:
    """The part of a rank without engine in refits. ``everyone``: the group of all ranks."""

    def __init__(
        self, config: Config, roles: Roles, everyone: dist.ProcessGroup | None, watch: Stopwatch, ledger: MemoryAccount
    ) -> None:
        self._watch, self._ledger = watch, ledger
        with watch("refit_plan"):
            self._refit = make_refit(config, roles, None, everyone)

    def refit(self, version: int) -> RefitResult:
        """Give the engines the weights of now. Raises RefitError when a checksum differs."""
        with self._watch("copy"):
            counts = self._refit.run()
        self._ledger.record("refit")
        return RefitResult(version, counts.bytes_local, counts.bytes_received, counts.checksum_mismatches)


class EngineSide:
    """The engine of a rank without trainer: always resident, without weights until the first refit."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        engine_size: int,
        everyone: dist.ProcessGroup | None,
        watch: Stopwatch,
        ledger: MemoryAccount,
    ) -> None:
        self.engine, self._watch, self._ledger = engine, watch, ledger
        self._lockstep = Lockstep(engine_size)
        with watch("refit_plan"):
            self._refit = make_refit(config, None, engine, everyone)

    def refit(self, version: int) -> RefitResult:
        """Take the trainers' weights. Raises RefitError when a checksum differs."""
        with self._watch("copy"):
            counts = self._refit.run()
        self.engine.commit(version)
        self._ledger.record("refit")
        return RefitResult(version, counts.bytes_local, counts.bytes_received, counts.checksum_mismatches)

    def rollout(self, rank: int, dealer: Dealer, progress: Callable[[str], None]) -> None:
        """Raises RuntimeError when the engine has no weights."""
        if self.engine.weight_version < 0:
            raise RuntimeError("the engine has no weights: a rollout needs a refit before")
        retries = run_rollout(rank, self.engine, dealer, self._lockstep, self._watch, progress)
        self._ledger.note("rollout_retries", retries)
        self._ledger.record("rollout")
