"""Compares what the trainer sent with what the engine holds, by checksums that are computed where the data is and
depend on every bit and its position."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash

from miles_spmd.weights.transport import Bucket

MAX_NAMES = 8  # tensors that a message names per damaged bucket


class RefitError(RuntimeError):
    """Weights in the engine differ from those sent. ``mismatches``: number of damaged buckets on this rank."""

    def __init__(self, message: str, mismatches: int) -> None:
        super().__init__(message)
        self.mismatches = mismatches


class Comparisons:
    """The comparisons of one refit. They stay on the device and are read once, at the end, so that the host does not
    wait for every bucket."""

    def __init__(self) -> None:
        self._differs: list[torch.Tensor] = []
        self._buckets: list[tuple[Bucket, int]] = []

    def add(self, differs: torch.Tensor, buckets: Sequence[tuple[Bucket, int]]) -> None:
        """``differs``: bool, one per bucket of ``buckets``, which are pairs of a bucket and the rank of its sources."""
        self._differs.append(differs.reshape(-1))
        self._buckets += buckets

    def check(self) -> None:
        """Raise RefitError naming the tensors of every bucket whose checksums differ."""
        if not self._differs:
            return
        damaged = torch.cat(self._differs).nonzero().flatten().tolist()
        if damaged:
            lines = [_describe(*self._buckets[index]) for index in damaged]
            raise RefitError(f"refit: {len(damaged)} damaged bucket(s):\n" + "\n".join(lines), len(damaged))


def _describe(bucket: Bucket, source_rank: int) -> str:
    names = sorted({copy.name for copy in bucket.copies})
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    target_rank = bucket.copies[0].target.rank
    return f"  rank {source_rank} -> rank {target_rank}: one or more of {', '.join(names[:MAX_NAMES])}{more}"


def checksum(buffer: torch.Tensor) -> torch.Tensor:
    """Return an order-sensitive checksum of a flat uint8 buffer whose length is a multiple of 4, an int64 scalar on its
    device: xxh3 on a CPU, :func:`~miles_spmd.weights.copy_kernel.word_sum` on a GPU."""
    if buffer.device.type == "cpu":
        return torch.tensor(xxhash.xxh3_64_intdigest(buffer.numpy().data) - (1 << 63))
    from miles_spmd.weights.copy_kernel import word_sum  # needs Triton

    return word_sum(buffer)
