"""Kernel for the checksum of a buffer on a GPU, in one pass over it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK, BLOCKS = 2048, 16  # words in a block, and blocks that a program sums


def word_sum(buffer: torch.Tensor) -> torch.Tensor:
    """Return the sum of a flat uint8 buffer's 32-bit words times (2 * position + 1), modulo 2^64, as an int64 scalar on
    its device.

    In buffers of less than 8 GiB it detects every change of one word and every exchange of two: both change the sum by
    a non-zero product smaller than 2^64. Products modulo 2^32 would not, because the low bits of weights such as 1.0
    are zero.
    """
    words = buffer.view(torch.int32)
    total = torch.zeros(1, dtype=torch.int64, device=buffer.device)
    _add_words[(max(1, triton.cdiv(words.numel(), BLOCK * BLOCKS)),)](
        words, words.numel(), total, BLOCK=BLOCK, BLOCKS=BLOCKS, num_warps=8
    )
    return total[0]


@triton.jit
def _add_words(words, count, total, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both factors of a product have 32 bits: a product of wider ones takes several instructions."""
    own = tl.zeros([BLOCK], tl.uint64)
    first = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS)
    for block in range(BLOCKS):
        at = first + block * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(words + at, mask=at < count, other=0).to(tl.uint32, bitcast=True)
        own += values.to(tl.uint64) * (2 * at.to(tl.uint32) + 1).to(tl.uint64)
    tl.atomic_add(total, tl.sum(own, 0).to(tl.int64, bitcast=True))
