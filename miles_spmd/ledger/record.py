"""A run's ledger, read back: its entries by step, and whether the data beside them match."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from miles_spmd.ledger import step_data
from miles_spmd.ledger.chain import LedgerError, links
from miles_spmd.ledger.entries import Context, Digests, Saved, Step


@dataclass
class Record:
    """All entries of the run in ``folder``."""

    folder: Path
    contexts: list[Context] = field(default_factory=list)
    steps: dict[int, Step] = field(default_factory=dict)
    saved: dict[int, Saved] = field(default_factory=dict)
    entries: int = 0

    def context(self, step: int) -> Context:
        """Return the conditions of ``step``."""
        return [context for context in self.contexts if context.step <= step][-1]

    def weights_before(self, step: int) -> dict[str, Digests]:
        """Return the digests of all weights before ``step``, by role."""
        weights = dict(self.context(step).weights)
        for done in sorted(s for s in self.steps if self.context(step).step <= s < step):
            weights |= {update.role: update.weights for update in self.steps[done].updates}
        return weights

    def data(self, step: int) -> step_data.StepData | None:
        """Return what the entry of ``step`` has digests of; None if it is not on disk."""
        return step_data.read(self.folder, step)


def read_record(run_dir: Path) -> Record:
    """Read all entries. Raises LedgerError if the chain is broken or empty."""
    record = Record(run_dir)
    for link in links(run_dir):
        record.entries += 1
        match link.entry:
            case Context() as context:
                record.contexts.append(context)
            case Step(step) as done:
                record.steps[step] = done
            case Saved(step) as saved:
                record.saved[step] = saved
    if not record.contexts:
        raise LedgerError(f"the ledger of {run_dir} is empty")
    return record


def verify(run_dir: Path) -> Record:
    """Do as :func:`read_record`, and raise LedgerError unless the data on disk match the entries' digests."""
    record = read_record(run_dir)
    for number, step in record.steps.items():
        if step_data.path_of(run_dir, number).is_file() and (wrong := _mismatch(record, step)):
            raise LedgerError(f"{step_data.path_of(run_dir, number)}: {wrong}")
    return record


def _mismatch(record: Record, step: Step) -> str:
    """Describe how the data of ``step`` differ from the entry's digests; "" if they match."""
    kept = record.data(step.step)
    if kept is None:
        return "cannot be read"
    seed = record.context(step.step).config["run"]["seed"]
    if (kept.samples.digests(seed, step.step) if kept.samples else None) != step.samples:
        return "the samples are not those of the ledger"
    if len(kept.updates) != len(step.updates):
        return f"{len(kept.updates)} updates, where the ledger has {len(step.updates)}"
    for index, (own, update) in enumerate(zip(kept.updates, step.updates)):
        if wrong := [name for name, value in own.digests().items() if value != getattr(update, name)]:
            return f"{' and '.join(wrong)} of update {index} are not those of the ledger"
    return ""
