"""The ledger's file: one entry a line, each with a hash over itself and the hash before it.

``chain.jsonl`` is only appended to, or truncated after a checkpoint. A hash chain alone does not show that entries were
cut off its end, so ``seal.json`` beside it says how many entries there are at least, the hash of the last of them, and
which steps have their data on disk. It is replaced as a whole whenever one of these has changed. A run that is killed
leaves a seal that is one change behind at most: a whole entry after the sealed ones counts, an incomplete one, which
has no end of line, is ignored. Everything else is compared byte by byte.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from miles_spmd.ledger import step_data
from miles_spmd.ledger.entries import FOLDER, Context, Digests, Entry, LedgerError, Saved, Step
from miles_spmd.types.files import AppendedFile, write_whole

FILE, SEAL_FILE = "chain.jsonl", "seal.json"
START = "0" * 32  # the hash before the first entry


class Link(msgspec.Struct, frozen=True):
    """One line of the file. ``number`` and ``end`` are the file's length up to and including it, in entries and in
    bytes."""

    hash: str
    entry: Entry
    number: int
    end: int


class Seal(msgspec.Struct, frozen=True):
    """What a ledger has at least: ``entries``, the last of them with the hash ``head``, and the data of all steps in
    the ranges ``data``, each from its first to its last step."""

    entries: int
    head: str
    data: list[tuple[int, int]]


def links(run_dir: Path) -> Iterator[Link]:
    """Yield all entries in order. Raises LedgerError naming the first one that was changed or is missing."""
    path, sealed = run_dir / FOLDER / FILE, _read(run_dir / FOLDER / SEAL_FILE)  # first: a run may be adding entries
    content = _read(path)
    if content is None:
        raise LedgerError(f"{run_dir} has no ledger: {path} does not exist")
    *lines, _ = content.split(b"\n")
    hashes, end, last = [START], 0, "the beginning"
    for index, line in enumerate(lines):
        broken = f"{path}: entry {index}, after {last}"
        own = _content(line + b"\n", hashes[-1])
        if own is None:
            raise LedgerError(f"{broken}: its hash does not follow from it and the hash before it")
        try:
            entry = msgspec.json.decode(own, type=Entry)
        except msgspec.DecodeError as error:
            raise LedgerError(f"{broken}: cannot be read: {error}") from None
        end += len(line) + 1
        hashes.append(_hash(own, hashes[-1]))
        last = f"that of {type(entry).__name__.lower()} {entry.step}"
        yield Link(hashes[-1], entry, len(hashes) - 1, end)
    seal = _seal(run_dir, sealed)
    if len(lines) < seal.entries:
        raise LedgerError(
            f"{path}: entry {len(lines)}, after {last}: is missing or incomplete; {SEAL_FILE} counts {seal.entries} "
            "entries, so the end of the file was cut off or changed"
        )
    if hashes[seal.entries] != seal.head:
        raise LedgerError(
            f"{path}: entry {seal.entries - 1} is not the one that {SEAL_FILE} names: one of the files was exchanged"
        )


def _seal(run_dir: Path, file: bytes | None) -> Seal:
    """Return the seal in the content of its file. Raises LedgerError where it is missing or was changed."""
    path = run_dir / FOLDER / SEAL_FILE
    if file is None:
        raise LedgerError(
            f"{path} does not exist: without it nobody can tell whether entries were cut off the ledger; it was "
            "deleted, or the run was recorded by an older version, and resuming the run with checkpoint.resume=true "
            "writes it"
        )
    try:
        return msgspec.json.decode(_content(file) or b"", type=Seal)
    except msgspec.DecodeError:
        raise LedgerError(f"{path} was changed: its hash does not follow from it") from None


class Chain:
    """Appends entries to a run's ledger."""

    def __init__(self, run_dir: Path, last: Link | None) -> None:
        """Open the file and truncate it after the entry ``last``; None: to nothing."""
        self._folder = run_dir / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()  # the data's thread seals, too
        self._seal = Seal(last.number, last.hash, []) if last else Seal(0, START, [])
        self._write_seal()  # before the entries go that the former seal counts
        self._file = AppendedFile(self._folder / FILE)
        self._file.file.truncate(last.end if last else 0)

    @property
    def head(self) -> str:
        return self._seal.head

    def append(self, entry: Entry) -> None:
        content = msgspec.json.encode(entry)
        self._file.append(_line(content, self.head))
        self._write_seal(entries=self._seal.entries + 1, head=_hash(content, self.head))

    def seal_data(self, steps: Iterable[int]) -> None:
        """Record that the data of these steps, which are given in order, are on disk, and of no other steps."""
        ranges = []
        for _, run in itertools.groupby(enumerate(steps), key=lambda pair: pair[1] - pair[0]):
            own = [step for _, step in run]
            ranges.append((own[0], own[-1]))
        self._write_seal(data=ranges)

    def sync(self) -> None:
        """Flush to disk; to be called before anything that refers to the ledger is written."""
        self._file.sync()

    def close(self) -> None:
        self._file.close()

    def _write_seal(self, **changes: Any) -> None:
        path = self._folder / SEAL_FILE
        with self._lock:
            self._seal = msgspec.structs.replace(self._seal, **changes)
            write_whole(path, _line(msgspec.json.encode(self._seal)))


def _hash(content: bytes, before: str) -> str:
    return hashlib.blake2b(before.encode() + content, digest_size=16).hexdigest()


def _line(content: bytes, before: str = START) -> bytes:
    return b'{"hash":"%b","entry":%b}\n' % (_hash(content, before).encode(), content)


def _content(line: bytes, before: str = START) -> bytes | None:
    """Return what :func:`_line` made a line of, None where the line differs from that in any byte."""
    content = line[len(_line(b"")) - len(b"}\n") : -len(b"}\n")]
    return content if line == _line(content, before) else None


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LedgerError(f"{path} cannot be read: {error.strerror}") from None


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
        """Return what the entry of ``step`` has digests of; None if it is not on disk. Raises LedgerError where the
        file was changed."""
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
    """Do as :func:`read_record`, and raise LedgerError unless the data on disk match the entries' digests, and no data
    are missing that the seal lists."""
    record = read_record(run_dir)
    for first, last in _seal(run_dir, _read(run_dir / FOLDER / SEAL_FILE)).data:
        for number in range(first, last + 1):
            path = step_data.path_of(run_dir, number)
            if number in record.steps and not path.is_file():
                raise LedgerError(f"{path}: is missing; {SEAL_FILE} lists the data of steps {first} to {last}")
    for number, step in record.steps.items():
        recorded = record.data(number)
        if recorded is not None and (wrong := _mismatch(record, step, recorded)):
            raise LedgerError(f"{step_data.path_of(run_dir, number)}: {wrong}")
    return record


def _mismatch(record: Record, step: Step, recorded: step_data.StepData) -> str:
    """Describe how the data of ``step`` differ from the entry's digests; "" if they match."""
    seed = record.context(step.step).config["run"]["seed"]
    if (recorded.samples.digests(seed, step.step) if recorded.samples else None) != step.samples:
        return "the samples are not those of the ledger"
    if len(recorded.updates) != len(step.updates):
        return f"{len(recorded.updates)} updates, where the ledger has {len(step.updates)}"
    for index, (own, update) in enumerate(zip(recorded.updates, step.updates)):
        if wrong := [name for name, value in own.digests().items() if value != getattr(update, name)]:
            return f"{' and '.join(wrong)} of update {index} are not those of the ledger"
    return ""
