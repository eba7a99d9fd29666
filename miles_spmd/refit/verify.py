"""Did the engine get what the trainer sent? Checksums see every bit and its position, where the data lies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import xxhash

from miles_spmd.refit.transport import Bucket

CHUNK_WORDS = 1 << 20
CHUNKS_AT_ONCE = 16  # bounds the temporary of products to 128 MiB; a GPU's time goes to their number, not their size
CHUNK_FACTOR = 0x1E3779B97F4A7C15  # odd, no pattern in its bits
MAX_NAMES = 8  # tensors spelled out per damaged bucket


class RefitError(RuntimeError):
    """Weights in the engine differ from those sent. ``mismatches``: number of damaged buckets on this rank."""

    def __init__(self, message: str, mismatches: int) -> None:
        super().__init__(message)
        self.mismatches = mismatches


class Comparisons:
    """Checksums of one refit, compared on the device and looked at once, at the end."""

    def __init__(self) -> None:
        self._differs: list[torch.Tensor] = []
        self._buckets: list[tuple[Bucket, int]] = []

    def add(self, differs: torch.Tensor, buckets: Sequence[tuple[Bucket, int]]) -> None:
        """``differs``: bool, one per bucket. Buckets come with the rank that their sources are on."""
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
    """Order-sensitive checksum of a flat uint8 buffer whose length is a multiple of 4; int64 scalar on its device."""
    if buffer.device.type == "cpu":
        return torch.tensor(xxhash.xxh3_64_intdigest(buffer.numpy().data) - (1 << 63))
    return weighted_sum(buffer)


def weighted_sum(buffer: torch.Tensor) -> torch.Tensor:
    """The checksum in tensor operations, for devices that xxHash does not reach.

    Per chunk, the sum of 32-bit words times the odd number 2 * position + 1; over chunks, a polynomial; modulo 2^64.
    No change of a single word goes unseen, nor the exchange of two words of a chunk: both change the sum by a product
    that is smaller than 2^64 and not zero. Products modulo 2^32 would not do, because the low bits of weights such as
    1.0 are zero.
    """
    odd, words = _odd_numbers(buffer.device), buffer.view(torch.int32)
    count = words.numel() // CHUNK_WORDS
    whole, rest = words[: count * CHUNK_WORDS].view(count, CHUNK_WORDS), words[count * CHUNK_WORDS :]
    sums = [(chunks * odd).sum(1) for chunks in whole.split(CHUNKS_AT_ONCE)]
    if rest.numel():
        sums.append((rest * odd[: rest.numel()]).sum()[None])
    total = torch.cat(sums)
    return (total * _powers(total.numel(), buffer.device)).sum()


@cache
def _odd_numbers(device: torch.device) -> torch.Tensor:
    return torch.arange(CHUNK_WORDS, dtype=torch.int64, device=device) * 2 + 1


@cache
def _powers(count: int, device: torch.device) -> torch.Tensor:
    """Of CHUNK_FACTOR, from ``count - 1`` down to 0, modulo 2^64."""
    powers = [pow(CHUNK_FACTOR, exponent, 1 << 64) for exponent in reversed(range(count))]
    return torch.tensor([power - (power >> 63 << 64) for power in powers], dtype=torch.int64, device=device)
