"""Replies of a service in a file, by request, so that a run can be repeated without the service."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any, BinaryIO

import msgspec


class RecordingError(ValueError):
    """A file that is not a recording. The message names file and line."""


class _Entry(msgspec.Struct):
    request: Any
    reply: Any


class Recording:
    """A JSON-lines file with a ``request`` and its ``reply`` in each line. Several processes may add to it at the same
    time: the first reply to a request that is in the file counts for all of them."""

    def __init__(self, path: str | Path, *, adds: bool) -> None:
        """``adds``: the file is created where it does not exist. Raises OSError, and RecordingError for a file that
        has something else."""
        self.path = Path(path).expanduser()
        self._replies: dict[bytes, Any] = {}
        self._end = self._lines = 0  # bytes and lines that have been read
        with self.path.open("a+b" if adds else "rb") as file:
            self._read(file)

    def __contains__(self, request: Any) -> bool:
        return _key(request) in self._replies

    def __getitem__(self, request: Any) -> Any:
        """Return the reply to ``request``. Raises KeyError."""
        return self._replies[_key(request)]

    def add(self, request: Any, reply: Any) -> Any:
        """Record a reply, and return the one that counts: that of another process where it came first."""
        with self.path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
            self._read(file)
            if request not in self:
                file.seek(self._end)
                file.truncate()  # half a line of a process that was killed
                line = msgspec.json.encode(_Entry(request, reply)) + b"\n"
                file.write(line)
                file.flush()
                self._take(line)
        return self[request]

    def _read(self, file: BinaryIO) -> None:
        """Take the lines that other processes have added."""
        if os.fstat(file.fileno()).st_size <= self._end:
            return
        file.seek(self._end)
        for line in file:
            if not line.endswith(b"\n"):
                break
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            entry = msgspec.json.decode(line, type=_Entry)
        except msgspec.DecodeError as error:
            raise RecordingError(f"{self.path}:{self._lines + 1}: not a recorded request and reply: {error}") from error
        self._replies.setdefault(_key(entry.request), entry.reply)
        self._end, self._lines = self._end + len(line), self._lines + 1


def _key(request: Any) -> bytes:
    return msgspec.json.encode(request, order="deterministic")
