"""Finished responses on disk as they come, so that a run that is killed loses none of them.

An environment is a user's code, which cannot be suspended. A run that goes on after it was killed calls it anew, and
gives it its responses from here. A response is a function of its request, the weights, and how the engine computes:
where one of these is another, it is sampled anew.

There is one file for each step, to which records are appended. A record begins with a mark and a digest, so that those
around one that is damaged, or was cut off, can be read. A file is removed once a checkpoint is complete from which its
step is not done again.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
import threading
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

import msgspec

from miles_spmd.config import Config
from miles_spmd.controller.generation.unfinished import Response, engine_settings, key
from miles_spmd.controller.journal import events
from miles_spmd.protocol.last_words import warn
from miles_spmd.telemetry.environment import read_environment
from miles_spmd.types.files import AppendedFile, with_remedy
from miles_spmd.types.request import Output, Request
from miles_spmd.types.run_files import TURNS

SYNC_EVERY = 1.0  # seconds after which what was written is on the disk itself
CLOSE_SECONDS = 10.0  # for which the end of a run waits for what is not written yet
_MARK = b"\xd7trn"
_HEADER = struct.Struct("<4sI16s")  # mark, number of bytes of the record, their digest


class Record(msgspec.Struct, frozen=True, array_like=True):
    name: str  # digest of the request
    conditions: bytes  # digest of all else that decides the response
    uid: str  # of the prompt
    index: int  # of the episode among those of its prompt
    output: msgspec.Raw


class DurableTurns:
    """Those of a run. What cannot be read or written is a warning: a run that is killed then samples more again."""

    def __init__(self, config: Config) -> None:
        self._folder = config.run_dir / TURNS
        self._weights: Callable[[], Mapping[str, bytes]] = dict
        self._engine = msgspec.json.encode((engine_settings(config), _machine(config.run_dir)))
        self._conditions = b""  # under which the engines sample
        self._orders: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._file: AppendedFile | None = None  # this, and all below, is the thread's
        self._failed = -1  # step whose responses cannot be written
        self._unsynced = False
        self._thread = threading.Thread(target=self._work, name="durable turns", daemon=True)
        self._thread.start()

    def begin(self, step: int, weights: Callable[[], Mapping[str, bytes]]) -> None:
        """The run goes on with ``step``. ``weights`` returns digests of the newest weights of all models."""
        self._weights = weights
        self._orders.put(partial(self._remove_before, step))

    def observe(self, event: events.Event) -> None:
        match event:
            case events.EngineRefitted():
                self._conditions = _digest(self._engine + b"".join(self._weights().values()))
            case events.CheckpointCompleted(step):
                self._orders.put(partial(self._remove_before, step))

    def rollout(self, step: int) -> DurableRollout:
        """Return the responses of ``step``: those that an attempt before this one has left, to which others can be
        added."""
        path, found, stale = self._path(step), dict[str, Record](), 0
        try:
            data = path.read_bytes()
        except OSError as error:
            data = b""
            if not isinstance(error, FileNotFoundError):
                warn(f"step {step}: the responses on disk cannot be read: {path}: {error.strerror}")
        records, damaged = read(data)
        if damaged:
            warn(f"{path}: {damaged} of {len(data)} bytes are damaged, or were cut off; what they had is sampled anew")
        for record in records:
            if record.conditions == self._conditions:
                found[record.name] = record
            else:
                stale += 1
        if stale:
            warn(
                f"step {step}: {stale} responses on disk were sampled with other weights, or by an engine that "
                "computed differently; they are sampled anew"
            )
        return DurableRollout(found, partial(self._add, step, self._conditions))

    def _add(self, step: int, conditions: bytes, request: Request, output: Output, uid: str, index: int) -> None:
        self._orders.put(lambda: self._write(step, conditions, request, output, uid, index))

    def remove(self) -> None:
        """The run is complete: remove everything."""
        self._orders.put(lambda: shutil.rmtree(self._folder, ignore_errors=True))

    def close(self) -> None:
        """Write what is to be written."""
        self._orders.put(None)
        self._thread.join(CLOSE_SECONDS)

    def _path(self, step: int) -> Path:
        return self._folder / f"step_{step:09d}"

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        synced = time.monotonic()
        while True:
            try:
                order = self._orders.get(timeout=SYNC_EVERY if self._unsynced else None)
            except Empty:
                order = self._sync
            if order is None:
                break
            self._do(order)
            if self._unsynced and time.monotonic() > synced + SYNC_EVERY:
                self._do(self._sync)
                synced = time.monotonic()
        self._do(self._close_file)

    def _do(self, order: Callable[[], None]) -> None:
        try:
            order()
        except OSError as error:
            self._unsynced = False
            warn(with_remedy(f"{error}; the run goes on, and samples more again if it is killed"))

    def _write(self, step: int, conditions: bytes, request: Request, output: Output, uid: str, index: int) -> None:
        """Raises OSError for the first response of a step that cannot be written; the others are left out."""
        if step == self._failed:
            return
        record = Record(key(request), conditions, uid, index, msgspec.Raw(msgspec.msgpack.encode(output)))
        body = msgspec.msgpack.encode(record)
        try:
            if self._file is None or self._file.path != self._path(step):
                self._close_file()
                self._file = AppendedFile(self._path(step))
            self._file.append(_HEADER.pack(_MARK, len(body), _digest(body)) + body)
        except OSError:
            self._failed = step
            raise
        self._unsynced = True

    def _remove_before(self, step: int) -> None:
        """Remove what the steps before ``step`` have left."""
        for path in self._folder.glob("step_*"):
            if path.name < self._path(step).name:
                path.unlink(missing_ok=True)

    def _sync(self) -> None:
        self._unsynced = False
        if self._file is not None:
            self._file.sync()

    def _close_file(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.sync()
            file.close()


class DurableRollout:
    """The responses of one rollout on disk, and those that are added."""

    def __init__(self, found: Mapping[str, Record], add: Callable[[Request, Output, str, int], None]) -> None:
        self._found, self.add = found, add
        self._used = set[str]()

    def __len__(self) -> int:
        """Number of those that were there before."""
        return len(self._found)

    @property
    def used(self) -> int:
        """Number of those that were asked for."""
        return len(self._used)

    def get(self, name: str) -> Response | None:
        """Return the response to the request of that digest."""
        if (record := self._found.get(name)) is None:
            return None
        self._used.add(name)
        return Response(msgspec.msgpack.decode(record.output, type=Output))

    def unused(self, ended: Collection[tuple[str, int]]) -> int:
        """Return how many of the episodes that have ended were not asked for: uid and index of each."""
        return sum((one.uid, one.index) in ended for name, one in self._found.items() if name not in self._used)


def read(data: bytes) -> tuple[list[Record], int]:
    """Return the records in the bytes of a file that are whole, and how many bytes are of none."""
    found, place, damaged = list[Record](), 0, 0
    while place < len(data):
        if (body := _body_at(data, place)) is not None:
            found.append(msgspec.msgpack.decode(body, type=Record))
            place += _HEADER.size + len(body)
            continue
        following = data.find(_MARK, place + 1)
        following = following if following >= 0 else len(data)
        damaged, place = damaged + following - place, following
    return found, damaged


def _body_at(data: bytes, place: int) -> bytes | None:
    start = place + _HEADER.size
    if start > len(data):
        return None
    mark, size, digest = _HEADER.unpack_from(data, place)
    body = data[start : start + size]
    return body if mark == _MARK and _digest(body) == digest else None


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _machine(run_dir: Path) -> tuple[list[str], dict[str, str]]:
    """Return what computes: GPUs, or else the CPU, and the versions of packages."""
    found = read_environment(run_dir)
    if found is None:
        return [], {}
    return sorted({gpu.name for gpu in found.gpus}) or [found.cpu], found.packages
