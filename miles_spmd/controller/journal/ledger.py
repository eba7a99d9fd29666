"""What the loop tells the ledger of a run."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import miles_spmd
from miles_spmd.config import Config
from miles_spmd.ledger.chain import Chain, LedgerError, Link, links
from miles_spmd.ledger.entries import Context, Digests, Samples, Saved, Step, Update, tensor_digests, unpack
from miles_spmd.ledger.rectangles import Rectangle, sum_digests
from miles_spmd.ledger.step_data import DataStore, SampleData, StepData, UpdateData
from miles_spmd.protocol.results import CheckpointResult, TrainResult, WeightsDigest
from miles_spmd.telemetry.environment import read_environment
from miles_spmd.types.role import Role
from miles_spmd.types.sample import Sample
from miles_spmd.types.train_sequence import TrainSequence

# Settings that decide where things are written or when one gives up, not what is computed.
WITHOUT_EFFECT: dict[str, set[str]] = {
    "run": {"name", "output_dir"},
    "reward": {"reward_timeout", "reward_memory_gib", "reward_workers"},
    "refit": {"refit_checksums", "refit_bucket_mib"},
    "checkpoint": {"save_interval", "save_final", "export_final", "export_dir", "load", "resume"},
    "determinism": {"ledger", "ledger_data_gib"},
}
OF_UPDATE = ("grad_norm", "lr", "skipped_steps")  # metrics that have fields of their own
TABLES_WITHOUT_EFFECT = ("telemetry", "deadlines")


class Recorder:
    """The ledger of the run of so many ``ranks`` that ``config`` describes, from step ``first`` on.

    ``weights`` are those before it, of every trainer rank, by role. Raises LedgerError where a ledger that is to be
    continued does not hold together, or has other weights.
    """

    def __init__(
        self,
        config: Config,
        first: int,
        ranks: int,
        weights: Mapping[Role, Sequence[WeightsDigest]],
        *,
        continues: str = "",
        optimizers: Sequence[CheckpointResult] = (),
    ) -> None:
        """``continues``: the hash by which a checkpoint of this same run names the entry that it was written after,
        with the ``optimizers`` that were loaded from it; else a ledger that is there is replaced."""
        self._config = config
        self._of_weights = {role: [w.of_weights for w in ranks] for role, ranks in weights.items()}
        self._of_updates = {role: [w.of_updates for w in ranks] for role, ranks in weights.items()}
        totals = {role: self._total(self._of_weights[role], [w.weights for w in ws]) for role, ws in weights.items()}
        self._weights: dict[str, Digests] = {role: tensor_digests(total) for role, total in totals.items()}
        context = Context(
            step=first,
            config=_settings(config),
            code=_code_digest(),
            environment=_environment(config.run_dir, ranks),
            tensors={role: sorted(total) for role, total in totals.items()},
            weights=self._weights,
        )
        last, known = _find(config.run_dir, continues) if continues else (None, None)
        if last is not None and isinstance(last.entry, Saved):
            self._check(last.entry, self._saved(first, optimizers), context)
        self._chain = Chain(config.run_dir, last)
        if known is None or _conditions(known) != _conditions(context):
            self._chain.append(context)
        self._data = DataStore(config.run_dir, first, int(config.determinism.ledger_data_gib * 2**30))
        self._forget_step()

    def _forget_step(self) -> None:
        self._samples: Samples | None = None
        self._updates: list[Update] = []
        self._kept = StepData(None, [])

    @property
    def head(self) -> str:
        """The hash of the last entry, which is on disk when this returns."""
        self._chain.sync()
        return self._chain.head

    def samples(self, step: int, groups: Iterable[Sequence[Sample]], dropped: int) -> None:
        """The rollout of ``step``; a filter has ``dropped`` so many groups beside."""
        self._kept.samples = SampleData.of([sample for group in groups for sample in group], dropped)
        self._samples = self._kept.samples.digests(self._config.run.seed, step)

    def update(
        self,
        role: Role,
        batch: Sequence[TrainSequence],
        results: Sequence[TrainResult],
        log_probs: Sequence[np.ndarray],
        metrics: Mapping[str, float],
    ) -> None:
        """An optimizer step: every trainer rank's results, ``log_probs`` (or values) in the order of the batch, and
        what the step's metrics say of all ranks."""
        own = [result.digests for result in results if result.digests is not None]
        gradient = self._total(self._of_updates[role], [d.gradient for d in own])
        self._weights[role] = tensor_digests(self._total(self._of_weights[role], [d.weights for d in own]))
        kept = UpdateData.of(batch, log_probs)
        update = Update(
            role=role,
            **kept.digests(),
            sums={name: _number(metrics[name]) for name in sorted(metrics) if not name.endswith(OF_UPDATE)},
            gradient=tensor_digests(gradient),
            grad_norm=_number(results[0].grad_norm),
            lr=results[0].lr,
            skipped=results[0].skipped,
            weights=self._weights[role],
        )
        self._updates.append(update)
        self._kept.updates.append(kept)

    def step(self, step: int) -> None:
        """All of ``step`` was told."""
        self._chain.append(Step(step, self._samples, self._updates))
        self._data.write(step, self._kept)
        self._forget_step()

    def saved(self, step: int, results: Sequence[CheckpointResult]) -> None:
        """The ranks have written a checkpoint."""
        self._chain.append(self._saved(step, results))

    def close(self) -> None:
        self._data.close()
        self._chain.close()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _saved(self, step: int, results: Sequence[CheckpointResult]) -> Saved:
        optimizers: dict[str, dict[str, Digests]] = {}
        for role, kinds in results[0].optimizers.items() if results else ():
            per_kind = {kind: [r.optimizers[role][kind] for r in results] for kind in kinds}
            totals = {kind: self._total(self._of_updates[role], sums) for kind, sums in per_kind.items()}
            optimizers[role] = {kind: tensor_digests(total) for kind, total in totals.items()}
        return Saved(step, dict(self._weights), optimizers)

    @staticmethod
    def _total(rectangles: Sequence[Sequence[Rectangle]], sums: Sequence[np.ndarray]) -> dict[str, int]:
        return sum_digests(zip(rectangles, sums, strict=True))[0]

    @staticmethod
    def _check(saved: Saved, loaded: Saved, context: Context) -> None:
        """Raise LedgerError unless what was loaded is what was saved."""
        for role, names in context.tensors.items():
            before = {"weights": saved.weights[role], **saved.optimizers[role]}
            now = {"weights": loaded.weights[role], **loaded.optimizers[role]}
            for kind in before:
                pairs = zip(names, unpack(before[kind]), unpack(now[kind]), strict=True)
                if changed := [name for name, a, b in pairs if a != b]:
                    raise LedgerError(
                        f"the checkpoint of step {saved.step} is not what was saved: {kind} of the {role} differ from "
                        f"the ledger's in {len(changed)} of {len(names)} tensors, such as {changed[0]}; choose another "
                        "checkpoint, or load this one into a run of its own with checkpoint.load"
                    )


def _find(run_dir: Path, head: str) -> tuple[Link, Context]:
    """The entry with this hash, and the last context before it. Raises LedgerError."""
    context = None
    for link in links(run_dir):
        context = link.entry if isinstance(link.entry, Context) else context
        if link.hash == head and context is not None:
            return link, context
    raise LedgerError(
        f"the checkpoint was written after an entry with hash {head}, which is not in the ledger of {run_dir}: one of "
        "them is another run's, or was changed"
    )


def _conditions(context: Context) -> tuple[Any, ...]:
    return context.config, context.code, context.environment, context.tensors


def _settings(config: Config) -> dict[str, Any]:
    """Those that can matter to a number."""
    tables = config.model_dump(mode="json", exclude=dict.fromkeys(TABLES_WITHOUT_EFFECT, True))
    return {
        name: {leaf: value for leaf, value in table.items() if leaf not in WITHOUT_EFFECT.get(name, ())}
        for name, table in tables.items()
    }


@functools.cache
def _code_digest() -> str:
    """Of every file of this package that is code, compiled or not: what really runs, whatever was committed."""
    root = Path(miles_spmd.__file__).parent
    state = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".so")):
        state.update(f"{path.relative_to(root)}\0".encode() + hashlib.blake2b(path.read_bytes()).digest())
    return state.hexdigest()


def _environment(run_dir: Path, ranks: int) -> dict[str, Any]:
    """As `environment.json` has it, without what differs between machines alike, and each kind of GPU once."""
    found = read_environment(run_dir)
    if found is None:
        return {"ranks": ranks}
    names = {"gpus": sorted({gpu.name for gpu in found.gpus}), "python": found.python, "cpu": found.cpu}
    return {"ranks": ranks, **names, "packages": found.packages}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
