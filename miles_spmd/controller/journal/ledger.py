"""The observer that writes the ledger of a run: digests of what each step read and computed."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

import miles_spmd
from miles_spmd.config import Config
from miles_spmd.controller.journal import events
from miles_spmd.ledger.chain import Chain, LedgerError, Link, links
from miles_spmd.ledger.entries import Context, Digests, Samples, Saved, Step, Update, digests, unpack
from miles_spmd.ledger.rectangles import Rectangle, sum_digests
from miles_spmd.ledger.step_data import DataStore, SampleData, StepData, UpdateData
from miles_spmd.models.blocks.experts import is_trained
from miles_spmd.protocol.results import CheckpointResult, WeightsDigest
from miles_spmd.telemetry.environment import read_environment
from miles_spmd.types.engine_group import in_group
from miles_spmd.types.rollout_batch import Baselines
from miles_spmd.types.secrets import scrub

# Settings that decide where files are written and when to stop waiting, not what is computed.
WITHOUT_EFFECT: dict[str, Any] = {
    "telemetry": True,
    "deadlines": True,
    "slurm": True,
    "run": {"name", "output_dir", "overwrite", "kernel_cache"},
    "reward": {"reward_timeout", "reward_memory_gib", "reward_workers"},
    "refit": {"refit_checksums", "refit_bucket_mib"},
    "checkpoint": True,
    "determinism": {"ledger", "ledger_data_gib"},
    "rollout": {"durable"},
}
OF_UPDATE = ("grad_norm", "lr", "skipped_steps")  # metrics that have fields of their own


@dataclass(frozen=True)
class Start:
    """Where a run begins: the first step to do. The rest describes a checkpoint of the run itself."""

    step: int = 0
    ledger: str = ""  # hash of the entry after which the checkpoint was written
    results: Mapping[str, Sequence[CheckpointResult]] = field(default_factory=dict)  # by policy, of its ranks
    saved: Saved | None = None  # the digests that it was saved with
    baselines: Baselines = field(default_factory=dict)  # of the advantage estimator; of another run's checkpoint, too


class LedgerRecorder:
    """Writes the ledger of the run that ``config`` describes, from ``start`` on. Nothing is written before
    :meth:`begin`; close it at the end.

    ``weights`` are those before the first step, of every trainer rank, by model: its role, of a second policy
    ``second_policy/ROLE``. The ledger of a checkpoint of this same
    run is continued; without one, the new ledger replaces one that exists. Raises LedgerError where a ledger to be
    continued is broken, or its weights and optimizer states are not those that were loaded.
    """

    def __init__(
        self, config: Config, start: Start, ranks: int, weights: Mapping[str, Sequence[WeightsDigest]]
    ) -> None:
        self._config = config
        self._of_weights = {role: [w.of_weights for w in ranks] for role, ranks in weights.items()}
        self._of_updates = {role: [w.of_updates for w in ranks] for role, ranks in weights.items()}
        self._weights: dict[str, Digests] = {
            role: _sum(self._of_weights[role], [w.weights for w in ranks]) for role, ranks in weights.items()
        }
        context = Context(
            step=start.step,
            config=scrub(config.model_dump(mode="json", exclude=WITHOUT_EFFECT)),
            code=_code_digest(),
            environment=_environment(config.run_dir, ranks),
            tensors={role: sorted({part.name for part in chain(*ranks)}) for role, ranks in self._of_weights.items()},
            weights=self._weights,
        )
        last, known = _find(config.run_dir, start.ledger) if start.ledger else (None, None)
        # the ledger has an entry for a checkpoint that the configuration asked for, and its word counts more
        saved = last.entry if last is not None and isinstance(last.entry, Saved) else start.saved
        if saved is not None:
            self._check(saved, self.saved(start.step, start.results), context)
        # a resumed run under the same conditions has the very entries of one that never stopped
        self._context = context if known is None or _conditions(known) != _conditions(context) else None
        self._last, self._first = last, start.step
        self._samples: Samples | None = None  # of the step that is under way, like the next two
        self._updates: list[Update] = []
        self._step_data = StepData(None, [])

    def begin(self) -> None:
        """Cut off the entries and the data of the steps that are repeated, and write under which conditions they are.
        Raises OSError."""
        self._chain = Chain(self._config.run_dir, self._last)
        if self._context is not None:
            self._chain.append(self._context)
        room = int(self._config.determinism.ledger_data_gib * 2**30)
        self._data = DataStore(self._config.run_dir, self._first, room, self._chain.seal_data)

    @property
    def head(self) -> str:
        """The hash of the last entry."""
        return self._chain.head

    @property
    def weights(self) -> dict[str, Digests]:
        """The newest weights of every model."""
        return self._weights

    def sync(self) -> None:
        """Return when all entries are on disk, and the data of all steps."""
        self._data.wait()
        self._chain.sync()

    def observe(self, event: events.Event) -> None:
        match event:
            case events.RolloutFinished():
                self._step_data.samples = SampleData.of(list(chain(*event.groups)), event.dropped)
                self._samples = self._step_data.samples.digests(self._config.run.seed, event.step)
            case events.UpdateFinished():
                self._add_update(event)
            case events.StepFinished(step):
                self._chain.append(Step(step, self._samples, self._updates))
                self._data.write(step, self._step_data)
                self._samples, self._updates, self._step_data = None, [], StepData(None, [])
            case events.CheckpointTaken(_, Saved() as entry):
                self._chain.append(entry)

    def _add_update(self, event: events.UpdateFinished) -> None:
        role = in_group(event.policy, event.role)
        own = [result.digests for result in event.results if result.digests is not None]
        self._weights[role] = _sum(self._of_weights[role], [d.weights for d in own])
        data = UpdateData.of(event.batch, event.log_probs)
        reported = event.results[0]
        update = Update(
            role=role,
            **data.digests(),
            sums={n: _finite(value) for n, value in sorted(event.metrics.items()) if not n.endswith(OF_UPDATE)},
            gradient=_sum(self._of_updates[role], [d.gradient for d in own]),
            grad_norm=_finite(reported.grad_norm),
            lr=reported.lr,
            skipped=reported.skipped,
            weights=self._weights[role],
        )
        self._updates.append(update)
        self._step_data.updates.append(data)

    def saved(self, step: int, results: Mapping[str, Sequence[CheckpointResult]]) -> Saved:
        """Return the entry of a checkpoint before ``step``, from the results of every trainer rank, by policy."""
        optimizers: dict[str, dict[str, Digests]] = {}
        for policy, ranks in results.items():
            for role, kinds in ranks[0].optimizers.items():
                name = in_group(policy, role)
                per_kind = {kind: [r.optimizers[role][kind] for r in ranks] for kind in kinds}
                optimizers[name] = {kind: _sum(self._of_updates[name], sums) for kind, sums in per_kind.items()}
        return Saved(step, dict(self._weights), optimizers)

    def close(self) -> None:
        try:
            self._data.close()
        finally:
            self._chain.close()

    # --- inside ------------------------------------------------------------------------------------------------------

    @staticmethod
    def _check(saved: Saved, loaded: Saved, context: Context) -> None:
        """Raise LedgerError unless the loaded digests equal the saved ones."""
        for role, names in context.tensors.items():
            if role not in saved.weights:
                continue
            before = {"weights": saved.weights[role], **saved.optimizers.get(role, {})}
            now = {"weights": loaded.weights[role], **loaded.optimizers.get(role, {})}
            for kind in before:
                held = names if kind == "weights" else [name for name in names if is_trained(name)]
                pairs = zip(held, unpack(before[kind]), unpack(now[kind]), strict=True)
                if changed := [name for name, a, b in pairs if a != b]:
                    raise LedgerError(
                        f"the checkpoint of step {saved.step} is not what was saved: {kind} of the {role} differ from "
                        f"the ledger's in {len(changed)} of {len(held)} tensors, such as {changed[0]}; choose another "
                        "checkpoint, or start a new run from this one with checkpoint.load"
                    )


def _find(run_dir: Path, head: str) -> tuple[Link, Context]:
    """Return the entry with this hash, and the last context before it. Raises LedgerError where there is none."""
    context = None
    try:
        for link in links(run_dir):
            context = link.entry if isinstance(link.entry, Context) else context
            if link.hash == head and context is not None:
                return link, context
    except LedgerError as error:
        remedy = "put the ledger back, or set determinism.ledger=false to go on without one"
        raise LedgerError(f"{error}; {remedy}") from None
    raise LedgerError(
        f"the checkpoint was written after an entry with hash {head}, which is not in the ledger of {run_dir}: one of "
        "them belongs to another run or was changed; choose another checkpoint"
    )


def _sum(rectangles: Sequence[Sequence[Rectangle]], sums: Sequence[np.ndarray]) -> Digests:
    """Return the digests of whole tensors from those of every rank's ``rectangles``."""
    return digests(sum_digests(zip(rectangles, sums, strict=True))[0].values())


def _conditions(context: Context) -> tuple[Any, ...]:
    return context.config, context.code, context.environment, context.tensors


@functools.cache
def _code_digest() -> str:
    """Return the digest of every code file of this package, compiled or not: of what really runs, committed or not."""
    root = Path(miles_spmd.__file__).parent
    state = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".so")):
        state.update(f"{path.relative_to(root)}\0".encode() + hashlib.blake2b(path.read_bytes()).digest())
    return state.hexdigest()


def _environment(run_dir: Path, ranks: int) -> dict[str, Any]:
    """Return the content of `environment.json` without what differs between identical machines, each GPU model once."""
    found = read_environment(run_dir)
    if found is None:
        return {"ranks": ranks}
    names = {"gpus": sorted({gpu.name for gpu in found.gpus}), "python": found.python, "cpu": found.cpu}
    return {"ranks": ranks, **names, "packages": found.packages}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
