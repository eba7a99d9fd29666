"""One rank's trainer and engine on its device: refits from one into the other, and who holds the memory when.

On ranks that have both (colocated) they take turns:

- train, log-probs: the trainer is resident; the engine has released what the trainer needs room for: nothing, its KV
  cache and CUDA graphs, or its weights as well
- refit: the trainer moves out, except for its weights, where ``train.offload_train`` is set; the engine resumes its
  weights, receives the trainer's values, and resumes cache and graphs
- rollout: the engine is resident, with the weights of the last refit

On ranks that have one of them (disaggregated) it keeps the device to itself, and a refit is only the copy. An engine
that no trainer gives its weights (a judge) has them from the start.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
import torch.distributed as dist

from miles_spmd.config import Config
from miles_spmd.generation.engine import Engine
from miles_spmd.planning.release import Release
from miles_spmd.protocol.results import RefitResult
from miles_spmd.training.roles import Roles
from miles_spmd.weights.hugging_face import read_whole
from miles_spmd.weights.refit import Refit
from miles_spmd.weights.transport import raise_together
from miles_spmd.worker.memory_account import MemoryAccount
from miles_spmd.worker.stopwatch import Stopwatch


class DeviceTurns:
    """An engine, a trainer (``roles``), or both, and the refit between them where there is one (``refits``).
    ``everyone``: the group of all ranks of the policy.

    A new engine is resident and, where refits give it weights, has none. With ``update_weights_interval`` > 1 the
    engine keeps its weights while the trainer works, because the trainer no longer has these older weights. ``watch``
    measures the time of each part, ``memory`` its holders.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine | None,
        roles: Roles | None,
        watch: Stopwatch,
        memory: MemoryAccount,
        everyone: dist.ProcessGroup | None = None,
        refits: bool = True,
    ) -> None:
        self._engine, self._roles, self._watch, self._memory = engine, roles, watch, memory
        self._shared = roles if engine is not None else None  # the trainer that the engine takes turns with
        self._offloads = config.train.offload_train
        self._refits = refits
        self._version: int | None = None if refits else 0  # of the engine's weights; None: it has none
        self._released: Release | None = None  # by the engine, while the trainer has the device; None: it is resident
        self._config, self._everyone = config, everyone
        if refits:
            self._plan_refit()

    def _plan_refit(self) -> None:
        """Collective over all ranks."""
        roles, engine, refit = self._roles, self._engine, self._config.refit
        with self._watch("refit_plan"):
            self._refit = Refit(
                roles.actor.weights() if roles else {},
                roles.actor.layout() if roles else [],
                engine.weights() if engine else {},
                engine.layout() if engine else [],
                bucket_bytes=refit.refit_bucket_mib << 20,
                checksums=refit.refit_checksums,
                group=self._everyone,
            )

    def replace_engine(self, build: Callable[[], Engine]) -> None:
        """Close the engine, whatever its state, and take the one that ``build`` returns. Collective over all ranks that
        refits concern, also those without an engine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
            gc.unfreeze()  # what the start has frozen refers to the engine in cycles
            gc.collect()
            self._move_trainer_out()
            with self._watch("engine"):
                self._engine = build()
            gc.freeze()
            self._memory.built(self._engine.memory)
        self._released = None
        if self._refits:
            self._version = None
            self._plan_refit()

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("this rank has no engine: it only trains")
        return self._engine

    def release(self) -> None:
        """Leave the device to the trainer. Collective over the engine's ranks; does nothing on ranks with only one."""
        if self._shared is None:
            return
        if self._released is None:
            with self._watch("release"):
                self._released = self._memory.release(self._shared.offloaded_bytes)
                if self._released is not Release.NOTHING:
                    self.engine.release(keep_weights=self._released is Release.KV_CACHE)
            if self._released is Release.ALL:
                self._version = None
            self._memory.record(f"engine released {self._released}")
        if self._shared.offloaded_bytes:
            with self._watch("onload"):
                self._shared.move_in()
            self._memory.record("trainer moved in")

    def refit(self, version: int) -> RefitResult:
        """Copy the trainers' weights of now into the engines. Collective. Raises RefitError when a checksum differs."""
        # The trainer moves out first: on a full device its optimizer states and the engine's weights do not fit
        # together. The cache comes last, for the same reason: the copy needs buffers.
        self._move_trainer_out()
        if self._released is Release.ALL:
            with self._watch("resume_weights"):
                self.engine.resume_weights()
            self._memory.record("weights resumed")
        with self._watch("copy"):
            counts = self._refit.run()
        self._resume()
        if self._engine is not None:
            self._engine.commit(version)
        self._memory.record("refit")
        self._version = version
        return RefitResult(version, counts.bytes_local, counts.bytes_received, counts.checksum_mismatches)

    def load(self, path: str, version: int) -> None:
        """Give the engine, whose memory is resident, the weights of a Hugging Face checkpoint; requests in flight go on
        with them. Collective over all ranks with an engine. Raises ValueError on all of them where one cannot read its
        part, or where it is another model: nothing has changed then."""
        engine, problem = self.engine, ""
        read: dict[str, torch.Tensor] = {}
        try:
            with self._watch("read"):
                read = read_whole(path, engine.weights(), engine.layout(), self._config.model.hf_checkpoint)
        except (ValueError, OSError, MemoryError) as error:
            problem = str(error) or type(error).__name__
        raise_together(problem, None)
        engine.pause()  # a batch may still run on the GPU
        with torch.no_grad(), self._watch("copy"):
            for name, weight in engine.weights().items():
                weight.copy_(read[name])
        engine.commit(version)
        engine.unpause()
        self._version = version

    def open_rollout(self) -> None:
        """Make the engine ready for requests. Raises RuntimeError when it has no weights.

        The prefix cache is emptied: entries of an evaluation would change which tokens of a prompt are prefilled
        together, and with that the rounding of their log-probs.
        """
        if self._version is None:
            raise RuntimeError("the engine has no weights: a rollout needs a refit after the last training phase")
        self._resume()
        self.engine.flush()

    def _move_trainer_out(self) -> None:
        if self._shared is not None and self._offloads and not self._shared.offloaded_bytes:
            with self._watch("offload"):
                self._shared.move_out()
            self._memory.record("trainer moved out")

    def _resume(self) -> None:
        if self._released is None:
            return
        self._move_trainer_out()
        if self._released is not Release.NOTHING:
            with self._watch("resume"):
                self.engine.resume()
            self._memory.record("engine resumed")
        self._released = None
