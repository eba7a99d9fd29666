"""Causal attention on a GPU that splits keys at fixed positions, in Triton: for GPUs without FlashAttention 3, and for
a head_dim for which it reads keys in other blocks in decode than in prefill.

A row's result is a chain over parts of a fixed number of keys: each part is computed alone, then merged into those
before it (online softmax, as in Flash-Decoding). In decode a request's parts are computed in parallel and merged by a
second kernel; in prefill and training one program computes and merges them one after the other. What is computed, in
which order and in tiles of which shape, is the same, so results are bitwise equal. Keys that a row does not see add
zeros, which change nothing, so neither its neighbours nor the keys behind it matter. Tiles and parts that lie before a
window are therefore left out. A sink (a score without a value) is what the chain begins with.

Scores are multiplied by log2(e), because exponentials are computed as powers of two.

Shape suffixes: T queries of all requests, B requests, H query heads, G key-value heads, D head_dim.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from miles_spmd.models.attention import PLAIN, Form

# Least keys of a part; most parts of the longest sequence, for all of which an engine has memory in decode.
FEWEST, PARTS = 1024, 8
# Rows of a tile (queries times the query heads that share a key), keys of a tile, warps; by the largest head_dim.
TILES = {64: (64, 64, 4), 128: (128, 64, 8), math.inf: (64, 32, 8)}
TILE_OF_FP32 = 32, 16, 8


def part_length(context: int) -> int:
    """Return the number of keys of a part where sequences may have ``context`` tokens."""
    return max(FEWEST, triton.next_power_of_2(triton.cdiv(context, PARTS)))


class Keys(NamedTuple):
    """Keys and values of B requests. The last query of a request sees all of its keys."""

    keys: Tensor  # [N, G, D]
    values: Tensor  # [N, G, D]
    lengths: Tensor  # int [B], number of keys of each request
    slots: Tensor  # int32, and
    slot_at: Tensor  # int64 [B]: the i-th key of a request lies in ``slots[slot_at[request] + i]``


def attend(
    query: Tensor,
    held: Keys,
    starts: Tensor,
    most: int,
    scale: float,
    split: int,
    form: Form = PLAIN,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the attention [T, H, D], and the log of each row's sum of exponentials with the sink's, fp32 [H, T].

    ``query`` [T, H, D]; ``starts`` int32 [B + 1], where each request's queries begin; ``most``: the most queries of a
    request; ``split``: keys of a part, 2^n; ``sinks`` [H]: a score of every row that has no value. Raises ValueError
    for values of another head_dim.
    """
    tokens, heads, _ = query.shape
    group = heads // held.keys.shape[1]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=query.device)
    tile = _tile(query, group)
    _attend[(triton.cdiv(most * group, tile["ROWS"]), len(held.lengths), held.keys.shape[1])](
        query.contiguous(), *held, sinks, out, lse, starts, held.keys.stride(0), heads, tokens,
        **_scores_of(scale, form), **_sizes(held, split), **tile,
    )  # fmt: skip
    return out, lse


def decode(
    query: Tensor,
    held: Keys,
    longest: int,
    scale: float,
    split: int,
    form: Form = PLAIN,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return the attention [B, H, D] of one query per request, ``query`` [B, H, D], which is the request's last token.

    ``longest``: the most keys that any request can have: the launch grid must not depend on the batch's own lengths,
    so that a CUDA graph can replay it. ``split``: keys of a part, 2^n. Other arguments as of :func:`attend`.
    """
    requests, heads, width = query.shape
    # as many parts as a window can touch, and all of them without one
    splits, groups = triton.cdiv(longest, split), held.keys.shape[1]
    if form.window:
        splits = min(splits, triton.cdiv(form.window - 1, split) + 1)
    # each allocated alone, hence aligned: Triton would compile another kernel for batches in which one is not
    peaks, totals = (torch.empty(requests, splits, heads, dtype=torch.float32, device=query.device) for _ in range(2))
    mixes = torch.empty(requests, splits, heads, width, dtype=torch.float32, device=query.device)
    sizes = _sizes(held, split)
    _attend_parts[(splits, requests, groups)](
        query.contiguous(), *held, peaks, totals, mixes, held.keys.stride(0), heads, splits,
        **_scores_of(scale, form), **sizes, **_tile(query, heads // groups),
    )  # fmt: skip
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _merge_parts[(requests, heads)](
        peaks, totals, mixes, sinks, out, held.lengths, heads, splits, WINDOW=form.window, num_warps=1, **sizes
    )
    return out


def _scores_of(scale: float, form: Form) -> dict[str, float]:
    """Return what makes scores of products. Exponentials are powers of two: the last factor has log2(e)."""
    inner, outer = (scale / form.softcap, form.softcap) if form.softcap else (1.0, scale)
    return {"inner": inner, "outer": outer / math.log(2), "WINDOW": form.window, "CAPPED": form.softcap > 0}


def _tile(query: Tensor, group: int) -> dict[str, int]:
    """Return the tile's shape. Both kernels must use the same, or their reduction orders would differ."""
    width = query.shape[-1]
    fits = TILE_OF_FP32 if query.dtype == torch.float32 else next(TILES[most] for most in TILES if width <= most)
    return {"GROUP": group} | dict(zip(("ROWS", "KEYS", "num_warps"), fits))


def _sizes(held: Keys, split: int) -> dict[str, int]:
    width = held.keys.shape[-1]
    if held.values.shape != held.keys.shape or held.values.stride(0) != held.keys.stride(0):
        raise ValueError(
            f"keys {list(held.keys.shape)} and values {list(held.values.shape)} must have one head_dim and one layout: "
            "values of another head_dim are not supported on a GPU"
        )
    return {"WIDTH": width, "DIM": max(16, triton.next_power_of_2(width)), "SPLIT": split}


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    """To a rounding or two (coefficients of Cephes' tanhf). Fused operations are explicit, as in :func:`_merge`."""
    size, square = tl.abs(x), x * x
    p = tl.fma(square, -5.70498872745e-3, 2.06390887954e-2)
    p = tl.fma(p, square, -5.37397155531e-2)
    p = tl.fma(p, square, 1.33314422036e-1)
    p = tl.fma(p, square, -3.33332819422e-1)
    small = tl.fma(p * square, x, x)
    e = tl.exp2(size * -2.8853900817779268)  # e^(-2 size)
    large = (1.0 - e) / (1.0 + e)
    return tl.where(size < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def _score(product, inner, outer, CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """From products of queries and keys to scores, times log2(e)."""
    if CAPPED:
        product = _tanh(product * inner)
    return product * outer


@triton.jit
def _part(  # type: ignore[no-untyped-def]
    query, keys, values, slots, first, last, low, limit, inner, outer, stride,
    WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """Return for each row, over keys ``first`` .. ``last - 1`` up to the row's ``limit``: the largest score, the sum of
    exponentials relative to it, and the sum of values weighted by these. No row sees keys before ``low``."""
    column = tl.arange(0, DIM)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIM], tl.float32)
    begin = first
    if WINDOW:
        begin = tl.maximum(first, low // KEYS * KEYS)
    for start in range(begin, last, KEYS):
        place = start + tl.arange(0, KEYS)
        there = place < last
        if WINDOW:
            there = there & (place >= low)
        slot = tl.load(slots + place, mask=there, other=0).to(tl.int64)
        at = slot[:, None] * stride + column[None, :]
        inside = there[:, None] & (column < WIDTH)[None, :]
        key = tl.load(keys + at, mask=inside, other=0.0)
        score = _score(tl.dot(query, tl.trans(key), input_precision="ieee"), inner, outer, CAPPED)
        seen = (place[None, :] <= limit[:, None]) & there[None, :]
        if WINDOW:
            seen = seen & (place[None, :] > limit[:, None] - WINDOW)
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        # a row that has seen no key yet has the peak -inf, and -inf - -inf would be NaN
        above = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - above[:, None])
        shrink = tl.exp2(peak - above)
        # an explicit fma: the compiler might fuse ``total * shrink + sum`` in one kernel and not in the other
        total = tl.fma(total, shrink, tl.sum(weight, 1))
        value = tl.load(values + at, mask=inside, other=0.0)
        mixed = tl.dot(weight.to(value.dtype), value, mixed * shrink[:, None], input_precision="ieee")
        peak = higher
    return peak, total, mixed


@triton.jit
def _begin(sinks, head, ROWS: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return what the parts of rows are merged into: nothing, or the score of a head's sink, without a value."""
    if sinks is None:
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
    else:
        peak = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634  # log2(e)
        total = tl.full([ROWS], 1.0, tl.float32)
    return peak, total, tl.zeros([ROWS, DIM], tl.float32)


@triton.jit
def _merge(peak, total, mixed, part_peak, part_total, part_mixed):  # type: ignore[no-untyped-def]
    """Merge a part into those before it. Fused operations are explicit, so that two kernels do not fuse differently."""
    higher = tl.maximum(peak, part_peak)
    above = tl.where(higher == float("-inf"), 0.0, higher)
    own, other = tl.exp2(peak - above), tl.exp2(part_peak - above)
    spread = tl.zeros_like(mixed) + own[:, None]
    return higher, tl.fma(total, own, part_total * other), tl.fma(mixed, spread, part_mixed * other[:, None])


@triton.jit(do_not_specialize=["tokens"])  # multiples of 16 would be compiled separately
def _attend(  # type: ignore[no-untyped-def]
    query, keys, values, lengths, slots, slot_at, sinks, out, lse, starts, stride, heads, tokens, inner, outer,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    SPLIT: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    block, request, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(starts + request)
    queries = tl.load(starts + request + 1) - begin
    length = tl.load(lengths + request).to(tl.int32)
    if block * ROWS < queries * GROUP:
        row = block * ROWS + tl.arange(0, ROWS)
        number, column = row // GROUP, tl.arange(0, DIM)
        inside = number < queries
        of_query = head * GROUP + row % GROUP
        at = ((begin + number).to(tl.int64) * heads + of_query)[:, None] * WIDTH + column[None, :]
        mask = inside[:, None] & (column < WIDTH)[None, :]
        turned = tl.load(query + at, mask=mask, other=0.0)
        # the last query sees all keys, so query ``number`` sees those up to ``limit``
        limit = length - queries + number
        last = tl.minimum(length, length - queries + (block * ROWS + ROWS - 1) // GROUP + 1)
        own = slots + tl.load(slot_at + request)
        peak, total, mixed = _begin(sinks, of_query, ROWS, DIM)
        low = length - length
        if WINDOW:
            low = tl.maximum(length - queries + block * ROWS // GROUP - WINDOW + 1, 0)
        for first in range(low // SPLIT * SPLIT, last, SPLIT):
            part_peak, part_total, part_mixed = _part(
                turned, keys + head * WIDTH, values + head * WIDTH, own, first, tl.minimum(first + SPLIT, last), low,
                limit, inner, outer, stride, WIDTH, DIM, ROWS, KEYS, WINDOW, CAPPED,
            )  # fmt: skip
            peak, total, mixed = _merge(peak, total, mixed, part_peak, part_total, part_mixed)
        tl.store(out + at, mixed / total[:, None], mask=mask)
        # back from powers of two to e: times log(2)
        natural = (peak + tl.log2(total)) * 0.6931471805599453
        tl.store(lse + of_query.to(tl.int64) * tokens + begin + number, natural, mask=inside)


@triton.jit
def _low(length, WINDOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the first key that the last query sees."""
    low = length - length
    if WINDOW:
        low = tl.maximum(length - WINDOW, 0)
    return low


@triton.jit
def _attend_parts(  # type: ignore[no-untyped-def]
    query, keys, values, lengths, slots, slot_at, peaks, totals, mixes, stride, heads, splits, inner, outer,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    SPLIT: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    # One program per part in the window, request and key-value head. Rows are the query heads of the one query, and the
    # rest of the tile is empty: as many rows as in :func:`_attend`, so that products have the same shape.
    split, request, head = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    length = tl.load(lengths + request).to(tl.int32)
    low = _low(length, WINDOW)
    first = (low // SPLIT + split) * SPLIT
    if first < length:
        row, column = tl.arange(0, ROWS), tl.arange(0, DIM)
        inside, wide = row < GROUP, (column < WIDTH)[None, :]
        of_query = head * GROUP + row
        at = (request * heads + of_query)[:, None] * WIDTH + column[None, :]
        turned = tl.load(query + at, mask=inside[:, None] & wide, other=0.0)
        limit = tl.zeros([ROWS], tl.int32) + length - 1
        peak, total, mixed = _part(
            turned, keys + head * WIDTH, values + head * WIDTH, slots + tl.load(slot_at + request), first,
            tl.minimum(first + SPLIT, length), low, limit, inner, outer, stride, WIDTH, DIM, ROWS, KEYS, WINDOW,
            CAPPED,
        )  # fmt: skip
        to = (request * splits + split) * heads + of_query
        tl.store(peaks + to, peak, mask=inside)
        tl.store(totals + to, total, mask=inside)
        tl.store(mixes + to[:, None] * WIDTH + column[None, :], mixed, mask=inside[:, None] & wide)


@triton.jit
def _merge_parts(  # type: ignore[no-untyped-def]
    peaks, totals, mixes, sinks, out, lengths, heads, splits,
    WIDTH: tl.constexpr, DIM: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    request, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + request).to(tl.int32)
    column = tl.arange(0, DIM)
    wide = (column < WIDTH)[None, :]
    peak, total, mixed = _begin(sinks, head + tl.arange(0, 1), 1, DIM)
    for split in range(tl.cdiv(length, SPLIT) - _low(length, WINDOW) // SPLIT):
        at = (request * splits + split) * heads + head + tl.arange(0, 1)
        part_mixed = tl.load(mixes + at[:, None] * WIDTH + column[None, :], mask=wide, other=0.0)
        peak, total, mixed = _merge(peak, total, mixed, tl.load(peaks + at), tl.load(totals + at), part_mixed)
    tl.store(out + (request * heads + head) * WIDTH + column[None, :], mixed / total[:, None], mask=wide)
