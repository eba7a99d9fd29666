"""Files of one JSON object per line, which stay readable whenever their run is killed or the disk is full."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from miles_spmd.types.files import AppendedFile, naming, write_whole
from miles_spmd.types.secrets import scrub

T = TypeVar("T")


class Lines(Generic[T]):
    """The lines of the file ``path`` as values of ``kind``, and what is wrong with the others.

    ``problem`` is "" where every line can be read. A file that does not exist has no lines.
    """

    def __init__(self, path: Path, kind: type[T]) -> None:
        content = path.read_bytes() if path.exists() else b""
        self.values: list[T] = []
        *lines, rest = content.split(b"\n")
        damaged = []
        for number, line in enumerate([*lines, rest] if rest else lines, 1):
            try:
                self.values.append(msgspec.json.decode(line, type=kind))
            except (msgspec.DecodeError, UnicodeError):
                damaged.append(number)
        named = ", ".join(map(str, damaged[:8])) + (", ..." if len(damaged) > 8 else "")
        count = len(lines) + bool(rest)
        self.problem = f"{path}: {len(damaged)} of {count} lines cannot be read: line {named}" if damaged else ""
        if rest and damaged and damaged[-1] == count:
            self.problem += "; the last one is incomplete: the run was stopped, or the disk was full, while it wrote"


class _Step(msgspec.Struct):
    step: float


def cut(path: Path, step: int) -> None:
    """Remove the lines of later steps than ``step`` from a file, where there is one. Lines without a step, and those
    that cannot be read, stay. Raises OSError; the file is then as it was."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if _step(line) <= step]
    if len(kept) < len(lines):
        write_whole(path, b"".join(kept), sync=True)


def last_step(path: Path) -> int:
    """Return the step of the last line that can be read and has one; 0 where there is none. Raises OSError."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return next((int(step) for line in reversed(lines) if (step := _step(line))), 0)


def _step(line: bytes) -> float:
    try:
        return msgspec.json.decode(line, type=_Step).step
    except (msgspec.DecodeError, UnicodeError):
        return 0


class LineWriter:
    """Appends to the file ``path``, in place of an incomplete line at its end. Every line reaches the file at once, and
    as a whole or not at all, and without secrets; raises OSError where the disk is full."""

    def __init__(self, path: Path) -> None:
        self._file = AppendedFile(path)
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    with naming(path):
                        self._file.file.truncate(path.read_bytes().rfind(b"\n") + 1)

    def write(self, value: Any) -> None:
        self._file.append(msgspec.json.encode(scrub(msgspec.to_builtins(value))) + b"\n")

    def close(self) -> None:
        self._file.close()
