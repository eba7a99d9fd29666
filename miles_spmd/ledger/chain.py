"""The ledger's file: one entry a line, each with a hash over itself and the hash before it.

``chain.jsonl`` is only appended to, or truncated after a checkpoint. An entry that was being written when its run was
killed has no end of line and is ignored.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from miles_spmd.ledger import step_data
from miles_spmd.ledger.entries import FOLDER, Context, Digests, Entry, Saved, Step

FILE = "chain.jsonl"
START = "0" * 32  # the hash before the first entry


class LedgerError(RuntimeError):
    """A ledger that is missing, is inconsistent, or belongs to another run."""


class Link(msgspec.Struct, frozen=True):
    """One line of the file. ``end`` is the file's length up to and including it, in bytes."""

    hash: str
    entry: Entry
    end: int


def links(run_dir: Path) -> Iterator[Link]:
    """Yield all entries in order. Raises LedgerError naming the first one that was changed."""
    path = run_dir / FOLDER / FILE
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except OSError as error:
        raise LedgerError(f"{run_dir} has no ledger: {path}: {error.strerror}") from None
    before, end, last = START, 0, "the beginning"
    for index, line in enumerate(lines):
        broken = f"{path}: entry {index}, after {last}"
        content = line[len(_line("", b"")[1]) - 2 : -1]
        before, expected = _line(before, content)
        if line + b"\n" != expected:
            raise LedgerError(f"{broken}: its hash does not follow from it and the hash before it")
        try:
            entry = msgspec.json.decode(content, type=Entry)
        except msgspec.DecodeError as error:
            raise LedgerError(f"{broken}: cannot be read: {error}") from None
        end += len(expected)
        last = f"that of {type(entry).__name__.lower()} {entry.step}"
        yield Link(before, entry, end)


def _line(before: str, content: bytes) -> tuple[str, bytes]:
    """Return the hash of the entry ``content`` after the hash ``before``, and its line."""
    own = hashlib.blake2b(before.encode() + content, digest_size=16).hexdigest()
    return own, b'{"hash":"%b","entry":%b}\n' % (own.encode(), content)


class Chain:
    """Appends entries to a run's ledger."""

    def __init__(self, run_dir: Path, last: Link | None) -> None:
        """Open the file and truncate it after the entry ``last``; None: to nothing."""
        path = run_dir / FOLDER / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        self.head = last.hash if last else START
        self._file = path.open("ab", buffering=0)
        self._file.truncate(last.end if last else 0)

    def append(self, entry: Entry) -> None:
        self.head, line = _line(self.head, msgspec.json.encode(entry))
        self._file.write(line)

    def sync(self) -> None:
        """Flush to disk; to be called before anything that refers to the ledger is written."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


# --- read back -------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """All entries of the run in ``folder``."""

    folder: Path
    contexts: list[Context]
    steps: dict[int, Step]
    saved: dict[int, Saved]
    entries: int

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
    entries = [link.entry for link in links(run_dir)]
    contexts = [entry for entry in entries if isinstance(entry, Context)]
    if not contexts:
        raise LedgerError(f"the ledger of {run_dir} is empty")
    steps = {entry.step: entry for entry in entries if isinstance(entry, Step)}
    saved = {entry.step: entry for entry in entries if isinstance(entry, Saved)}
    return Record(run_dir, contexts, steps, saved, len(entries))


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
