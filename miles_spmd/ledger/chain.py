"""The ledger's file: one entry a line, each with a hash over itself and the hash before it.

``chain.jsonl`` is only appended to, or truncated after a checkpoint. An entry that was being written when its run was
killed has no end of line and is ignored.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from miles_spmd.ledger.entries import Entry

FOLDER = "ledger"
FILE = "chain.jsonl"
START = "0" * 32  # the hash before the first entry


class LedgerError(RuntimeError):
    """A ledger that is missing, is inconsistent, or belongs to another run."""


class Link(msgspec.Struct, frozen=True):
    """One line of the file. ``end`` is the file's length up to and including it, in bytes."""

    hash: str
    entry: Entry
    end: int


class _Line(msgspec.Struct):
    hash: str
    entry: msgspec.Raw


_line = msgspec.json.Decoder(_Line)
_entry = msgspec.json.Decoder(Entry)


def links(run_dir: Path) -> Iterator[Link]:
    """Yield all entries in order. Raises LedgerError naming the first one that was changed."""
    path = run_dir / FOLDER / FILE
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise LedgerError(f"{run_dir} has no ledger: {path}: {error.strerror}") from None
    before, end, last = START, 0, "the beginning"
    for index, line in enumerate(lines):
        end += len(line)
        if not line.endswith(b"\n"):
            return
        broken = f"{path}: entry {index}, after {last}"
        try:
            read = _line.decode(line)
            if read.hash != _hash(before, bytes(read.entry)):
                raise LedgerError(f"{broken}: its hash does not follow from it and the hash before it")
            entry = _entry.decode(read.entry)
        except msgspec.DecodeError as error:
            raise LedgerError(f"{broken}: cannot be read: {error}") from None
        yield Link(read.hash, entry, end)
        before, last = read.hash, f"that of {type(entry).__name__.lower()} {entry.step}"


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
        content = msgspec.json.encode(entry)
        self.head = _hash(self.head, content)
        self._file.write(b'{"hash":"' + self.head.encode() + b'","entry":' + content + b"}\n")

    def sync(self) -> None:
        """Flush to disk; to be called before anything that refers to the ledger is written."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _hash(before: str, entry: bytes) -> str:
    return hashlib.blake2b(before.encode() + entry, digest_size=16).hexdigest()
