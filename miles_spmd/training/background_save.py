"""A checkpoint that is written while the training goes on.

A thread copies what training will overwrite into host memory first, which is kept from save to save and pinned where
there is a GPU; then it digests, writes and flushes this rank's files. The rank goes on meanwhile, and waits for the
copies only where the trainer's state is about to change. Of what several ranks hold, each writes a part.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from miles_spmd.protocol.results import SaveProgress
from miles_spmd.training.checkpoint import Content, Held
from miles_spmd.weights.sharded_files import Share, Written, split, write

CHUNK_BYTES = 1 << 30  # a power of two, to which torch rounds what it pins
ALIGNMENT = 64
IN_FLIGHT = 64  # copies that a GPU is given at a time


class HostMemory:
    """Memory for copies of tensors, which is kept. It consists of chunks, because torch rounds what it pins up to a
    power of two."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._next, self._used = 0, 0  # the chunk that is being filled, and its bytes that are taken

    @property
    def nbytes(self) -> int:
        return sum(chunk.numel() for chunk in self._chunks)

    def clear(self) -> None:
        self._next, self._used = 0, 0

    def take(self, nbytes: int, rest: int) -> Tensor:
        """Return memory for ``nbytes``, uint8, until :meth:`clear`; ``rest`` bytes will be taken from here on."""
        while self._next < len(self._chunks):
            chunk, start = self._chunks[self._next], self._used
            if start + nbytes <= chunk.numel():
                self._used = start + -(-nbytes // ALIGNMENT) * ALIGNMENT
                return chunk[start : start + nbytes]
            self._next, self._used = self._next + 1, 0
        size = 1 << (max(nbytes, min(rest, CHUNK_BYTES)) - 1).bit_length()
        self._chunks.append(torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available()))
        return self.take(nbytes, rest)


class _Moment(NamedTuple):
    """What a GPU has been given to do so far."""

    device: int
    event: torch.cuda.Event

    @classmethod
    def now(cls) -> _Moment | None:
        """Return this moment of this thread's current stream, None without a GPU."""
        if not torch.cuda.is_available():
            return None
        return cls(torch.cuda.current_device(), torch.cuda.current_stream().record_event())

    def stream(self) -> torch.cuda.Stream:
        """Return a stream for another thread whose work begins after that."""
        torch.cuda.set_device(self.device)  # that of a new thread is the first one
        stream = torch.cuda.Stream()
        stream.wait_event(self.event)
        return stream


class BackgroundSave:
    """The save of one rank. At most one is under way."""

    def __init__(self) -> None:
        self._memory = HostMemory()
        self._reserving: Future[None] | None = None
        self._writes: dict[str, np.ndarray] = {}  # by model: whether this rank writes what it holds, bool [held]
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()  # all that the trainer will change is copied
        self._copied.set()
        self._borrows = False  # the thread reads memory that is not its own
        self._written: dict[str, Written] = {}
        self._problem = ""

    @property
    def host_bytes(self) -> int:
        """The host memory that is kept for copies."""
        return self._memory.nbytes

    def reserve(self, contents: Mapping[str, Content]) -> None:
        """Begin to allocate the host memory of a save, so that the first one need not: a second for every 4 to 12 GiB
        that are pinned. Collective."""
        sizes = [share.values.nbytes for share, stays in chain(*self._own(contents).values()) if not stays]
        device = torch.cuda.current_device() if torch.cuda.is_available() else None

        def allocate() -> None:
            if device is not None:
                torch.cuda.set_device(device)  # that of a new thread is the first one
            self._memory.clear()
            rest = sum(sizes)
            for nbytes in sizes:
                self._memory.take(nbytes, rest)
                rest -= nbytes

        background = ThreadPoolExecutor(1, "save buffers")
        self._reserving = background.submit(allocate)
        background.shutdown(wait=False)

    def settle(self) -> None:
        """Return when what is copied may change: the copies are complete, and so is :meth:`reserve`. Raises what went
        wrong in the latter; a copy that fails is a problem of the save."""
        if self._reserving is not None:
            self._reserving.result()
            self._reserving = None
        self._copied.wait()

    def start(self, folder: Path, contents: Mapping[str, Content]) -> None:
        """Save ``contents`` into folders of their names in ``folder``. They may change after :meth:`settle`.

        Collective. The save before has to be done.
        """
        self.wait()
        self.settle()
        self._written, self._problem = {}, ""
        own = self._own(contents)
        self._borrows = any(held.stays for of_model in own.values() for held in of_model)
        on_device = _Moment.now()
        notes = {name: content.notes for name, content in contents.items()}
        rank, ranks = dist.get_rank(), dist.get_world_size()
        self._copied.clear()

        def run() -> None:
            try:
                try:
                    shares = self._copy(own, on_device)
                finally:
                    own.clear()  # what the trainer frees must not be kept
                    self._copied.set()
                for name, of_model in shares.items():
                    self._written[name] = write(folder / name, rank, ranks, of_model, notes[name])
            except Exception as error:
                self._problem = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def _copy(self, own: Mapping[str, list[Held]], on_device: _Moment | None) -> dict[str, list[Share]]:
        """Return the shares in host memory, into which those are copied that do not stay as they are."""
        self._memory.clear()
        rest, shares = _copied_bytes(own), dict[str, list[Share]]()
        stream = None if on_device is None else on_device.stream()
        with torch.cuda.stream(stream):
            for number, (name, (share, stays)) in enumerate(
                (n, held) for n, of_model in own.items() for held in of_model
            ):
                if not stays:
                    values = share.values
                    memory = self._memory.take(values.nbytes, rest).view(values.dtype).view(values.shape)
                    share = share._replace(values=memory.copy_(values, non_blocking=True))
                    rest -= values.nbytes
                    if stream is not None and number % IN_FLIGHT == 0:
                        stream.synchronize()  # beyond a thousand, whatever the rank launches would wait, too
                shares.setdefault(name, []).append(share)
        if stream is not None:
            stream.synchronize()
        return shares

    def progress(self, *, wait: bool) -> SaveProgress:
        """Return how far the save is; with ``wait``, when it is done."""
        if wait:
            self.wait()
        if self._thread is not None and self._thread.is_alive():
            return SaveProgress(done=False)
        written = self._written.values()
        return SaveProgress(
            done=True,
            problem=self._problem,
            digests={name: one.digest for name, one in self._written.items()},
            nbytes=sum(one.nbytes for one in written),
            seconds=sum(one.seconds for one in written),
        )

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def wait_for_borrowed(self) -> None:
        """Return when memory that was not copied, because it stays what it is until now, may be overwritten, too."""
        self.settle()
        if self._borrows:
            self.wait()

    def _own(self, contents: Mapping[str, Content]) -> dict[str, list[Held]]:
        """Return what this rank writes of each model, in parts. Collective the first time."""
        own = {}
        for name, content in contents.items():
            parts = [Held(part, held.stays) for held in content.held for part in split(held.share)]
            if name not in self._writes:
                self._writes[name] = _chosen([_identity(part.share) for part in parts])
            own[name] = [part for part, chosen in zip(parts, self._writes[name], strict=True) if chosen]
        return own


def _copied_bytes(own: Mapping[str, list[Held]]) -> int:
    return sum(share.values.nbytes for share, stays in chain(*own.values()) if not stays)


def _identity(share: Share) -> int:
    return xxhash.xxh3_64_intdigest(f"{share.key} {share.row} {share.column} {[*share.values.shape]}".encode())


def _chosen(identities: list[int]) -> np.ndarray:
    """Choose one of the ranks that hold a share for each of them, so that all write about as much.

    ``identities`` are those of the shares that this rank holds. Return which of them it writes. Collective.
    """
    own = np.asarray(identities, np.uint64)
    everywhere: list[bytes] = [b""] * dist.get_world_size()
    dist.all_gather_object(everywhere, own.tobytes())
    of_ranks = [np.frombuffer(each, np.uint64) for each in everywhere]
    ranks = np.repeat(np.arange(len(of_ranks)), [len(each) for each in of_ranks])
    shares = np.concatenate(of_ranks)
    order = np.argsort(shares, kind="stable")  # the holders of a share side by side, by rank
    distinct, first, count = np.unique(shares[order], return_index=True, return_counts=True)
    writers = ranks[order][first + (distinct % count.astype(np.uint64)).astype(np.int64)]
    return writers[np.searchsorted(distinct, own)] == dist.get_rank()
