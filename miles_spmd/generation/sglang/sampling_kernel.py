"""Seeded sampling on a GPU for :mod:`miles_spmd.generation.sglang.sampler`, in one pass over the log-probs.

Tensor operations would write and read the noise of a whole vocabulary ten times, in float64. Here a block hashes its
tokens, adds the noise to their log-probs and writes its maximum only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from sglang.kernels.ops.sampling.murmur_hash import fmix32, murmur3_mix

PART, BLOCK = 8192, 1024  # tokens of the vocabulary that one block of threads covers, and covers at a time


def sample(log_probs: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the category of the largest sum of log-prob and standard Gumbel noise, int64 [rows]; for a row with NaN,
    any category. The noise, float64, is a function of a 32-bit hash of seed, position and category.

    SGLang's own noise is infinite for the largest hash, and that category is sampled whatever its log-prob: with a
    vocabulary of 150,000, one token in 28,000 would be sampled uniformly.

    ``log_probs`` fp32 [rows, categories] with contiguous rows; ``seeds`` int64 [rows]; ``positions`` [rows].
    """
    rows, categories = log_probs.shape
    parts = triton.cdiv(categories, PART)
    best = torch.empty(rows, parts, dtype=torch.float64, device=log_probs.device)
    where = torch.empty(rows, parts, dtype=torch.int64, device=log_probs.device)
    _best_of_part[(rows, parts)](
        log_probs, log_probs.stride(0), seeds, positions, best, where, categories, PART=PART, BLOCK=BLOCK
    )
    return where.gather(-1, best.argmax(-1, keepdim=True)).squeeze(-1)


@triton.jit
def _best_of_part(  # type: ignore[no-untyped-def]
    log_probs, stride, seeds, positions, best, where, categories, PART: tl.constexpr, BLOCK: tl.constexpr
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    seed = tl.load(seeds + row).to(tl.uint64, bitcast=True)
    begun: tl.uint32 = 0
    begun = murmur3_mix(begun, (seed & 0xFFFFFFFF).to(tl.uint32))
    begun = murmur3_mix(begun, (seed >> 32).to(tl.uint32))
    begun = murmur3_mix(begun, tl.load(positions + row).to(tl.uint32))
    lane = tl.arange(0, BLOCK)
    values = tl.full([BLOCK], float("-inf"), tl.float64)
    tokens = part * PART + lane
    for first in range(part * PART, min(part * PART + PART, categories), BLOCK):
        token = first + lane
        inside = token < categories
        hashed = fmix32(murmur3_mix(begun, token.to(tl.uint32)) ^ 16)
        uniform = (hashed.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
        noise = -tl.log(-tl.log(uniform))
        value = noise + tl.load(log_probs + row * stride + token, mask=inside, other=float("-inf")).to(tl.float64)
        better = inside & (value > values)
        values = tl.where(better, value, values)
        tokens = tl.where(better, token, tokens)
    value, at = tl.max(values, 0, return_indices=True)
    tl.store(best + row * tl.num_programs(1) + part, value)
    tl.store(where + row * tl.num_programs(1) + part, tl.sum(tl.where(lane == at, tokens, 0), 0).to(tl.int64))
