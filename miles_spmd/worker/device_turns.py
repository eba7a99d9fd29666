"""The engine's turns on a device that it shares with the trainer.

- train, log-probs: the trainer is resident; the engine gives up what it has to for that: nothing, its cache and graphs,
  or its weights, too
- refit: the trainer moves out, all but its weights, if the run says so; the engine's weights are resumed and given the
  trainer's values; cache and graphs are resumed
- rollout: the engine is resident, with the weights of the last refit
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from miles_spmd.config import Config
from miles_spmd.generation.engine import Engine
from miles_spmd.planning.release import Release
from miles_spmd.protocol.dealer import Dealer
from miles_spmd.protocol.messages import RefitResult
from miles_spmd.training.roles import Roles
from miles_spmd.weights.refit import Refit
from miles_spmd.worker.engine_loop import Lockstep, run_rollout
from miles_spmd.worker.memory_account import MemoryAccount
from miles_spmd.worker.stopwatch import Stopwatch


class DeviceTurns:
    """An engine, the refit that fills it, and whether it has memory and weights now.

    A new engine is resident, without weights. Where rollouts lag behind, it keeps the weights that it has while the
    trainer works: the trainer has newer ones. ``watch`` is told where the time goes, ``ledger`` who has the memory.
    """

    def __init__(
        self, config: Config, engine: Engine, engine_size: int, roles: Roles, watch: Stopwatch, ledger: MemoryAccount
    ) -> None:
        self.engine = engine
        self._roles, self._offloads, self._watch, self._ledger = roles, config.train.offload_train, watch, ledger
        self._version = -1
        self._resident, self._filled = True, False
        self._released = Release.NOTHING
        self._lockstep = Lockstep(engine_size)
        with watch("refit_plan"):
            self._refit = make_refit(config, roles, engine)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """The memory is the trainer's for a while, then the engine's as before, if it had weights."""
        filled = self._filled
        self.release()
        yield
        if filled and not self._filled:
            self.refit(self._version)

    def release(self) -> None:
        """Leave the memory to the trainer."""
        if self._resident:
            with self._watch("release"):
                self._released = self._ledger.release(self._roles.offloaded_bytes)
                if self._released is not Release.NOTHING:
                    self.engine.release(keep_weights=self._released is Release.KV_CACHE)
            self._resident = False
            self._filled &= self._released is not Release.ALL
            self._ledger.record(f"engine gave up {self._released}")
        if self._roles.offloaded_bytes:
            with self._watch("onload"):
                self._roles.move_in()
            self._ledger.record("trainer moved in")

    def refit(self, version: int) -> RefitResult:
        """Raises RefitError when a checksum differs."""
        self._move_trainer_out()
        if self._released is Release.ALL:
            with self._watch("resume_weights"):
                self.engine.resume_weights()
            self._ledger.record("weights resumed")
        with self._watch("copy"):
            counts = self._refit.run()
        self._resume()
        self.engine.commit(version)
        self._ledger.record("refit")
        self._filled, self._version = True, version
        return RefitResult(version, counts.bytes_local, counts.bytes_received, counts.checksum_mismatches)

    def rollout(self, rank: int, dealer: Dealer, progress: Callable[[str], None]) -> None:
        """Raises RuntimeError when the engine has no weights."""
        if not self._filled:
            raise RuntimeError("the engine has no weights: a rollout needs a refit after the last training phase")
        self._resume()
        retries = run_rollout(rank, self.engine, dealer, self._lockstep, self._watch, progress)
        self._ledger.note("rollout_retries", retries)
        self._ledger.record("rollout")

    def _move_trainer_out(self) -> None:
        if self._offloads and not self._roles.offloaded_bytes:
            with self._watch("offload"):
                self._roles.move_out()
            self._ledger.record("trainer moved out")

    def _resume(self) -> None:
        if not self._resident:
            self._move_trainer_out()
            if self._released is not Release.NOTHING:
                with self._watch("resume"):
                    self.engine.resume()
                self._ledger.record("engine resumed")
            self._resident, self._released = True, Release.NOTHING


def make_refit(
    config: Config, roles: Roles | None, engine: Engine | None, everyone: dist.ProcessGroup | None = None
) -> Refit:
    """From the actor of ``roles`` to ``engine``, of which this rank may have but one. Collective over ``everyone``."""
    return Refit(
        roles.actor.weights() if roles else {},
        roles.actor.layout() if roles else [],
        engine.weights() if engine else {},
        engine.layout() if engine else [],
        bucket_bytes=config.refit.refit_bucket_mib << 20,
        checksums=config.refit.refit_checksums,
        group=everyone,
    )
