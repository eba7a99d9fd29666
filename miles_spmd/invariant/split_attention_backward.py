"""Gradients of attention on a GPU for scores with a soft-cap, in Triton: the backward pass of FlashAttention that torch
has computes none. Windows and sinks are supported as in :mod:`miles_spmd.invariant.split_attention`.

Probabilities are computed again from the log of each row's sum of exponentials (https://arxiv.org/abs/2307.08691). One
kernel has a program for a tile of rows and sums over keys, the other one for a tile of keys and sums over rows, so that
no two programs add to one number, and the same inputs have the same gradients.

Shape suffixes as there: T queries of all blocks, K keys, H query heads, G key-value heads, D head_dim.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from miles_spmd.invariant.split_attention import _tanh
from miles_spmd.models.attention import Form

# Rows of a tile (queries times the query heads that share a key), keys of a tile, warps; by the largest head_dim.
TILES = {64: (64, 64, 4), 128: (64, 32, 8), math.inf: (32, 32, 8)}
TILE_OF_FP32 = 32, 16, 8


def backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scale: float,
    form: Form,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``query``, ``key`` and ``value`` from that of the attention's output.

    ``gradient``, ``query`` and ``out`` [T, H, D], ``key`` and ``value`` [K, G, D], contiguous; ``lse`` fp32 [H, T], of
    the scores and the sinks; ``starts`` int32 [B + 1], where the queries and the keys of each block begin; ``longest``:
    the most queries and keys of a block.
    """
    (tokens, heads, width), groups = query.shape, key.shape[1]
    rows, keys, warps = (
        TILE_OF_FP32 if query.dtype == torch.float32 else next(TILES[most] for most in TILES if width <= most)
    )
    shift = (gradient.float() * out.float()).sum(-1).T.contiguous()  # [H, T], sum of p d p
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    inputs = gradient, query, key, value, lse, shift, *starts
    inner, outer = (scale / form.softcap, form.softcap) if form.softcap else (1.0, scale)
    numbers = heads, groups, tokens, inner, outer / math.log(2), scale
    fixed = {
        "GROUP": heads // groups, "WIDTH": width, "DIM": max(16, triton.next_power_of_2(width)), "ROWS": rows,
        "KEYS": keys, "WINDOW": form.window, "CAPPED": form.softcap > 0, "num_warps": warps, "num_stages": 2,
    }  # fmt: skip
    blocks = len(starts[0]) - 1
    _of_rows[(triton.cdiv(longest[0] * heads // groups, rows), blocks, groups)](
        *inputs, gradients[0], *numbers, **fixed
    )
    _of_keys[(triton.cdiv(longest[1], keys), blocks, groups)](*inputs, *gradients[1:], *numbers, **fixed)
    return gradients


@triton.jit
def _of_scores(  # type: ignore[no-untyped-def]
    gradient, query, key, value, lse, shift, limit, place, last, inner, outer, scale,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Return the probabilities of a tile [ROWS, KEYS] and the gradients of its products of queries and keys."""
    product = tl.dot(query, tl.trans(key), input_precision="ieee")
    slope = scale
    if CAPPED:  # d tanh(x) = 1 - tanh(x)^2
        product = _tanh(product * inner)
        slope = scale * (1.0 - product * product)
    seen = (place[None, :] <= limit[:, None]) & (place < last)[None, :]
    if WINDOW:
        seen = seen & (place[None, :] > limit[:, None] - WINDOW)
    p = tl.where(seen, tl.exp2(product * outer - lse[:, None] * 1.4426950408889634), 0.0)
    # d score = p (d p - sum of p d p)
    return p, p * (tl.dot(gradient, tl.trans(value), input_precision="ieee") - shift[:, None]) * slope


@triton.jit
def _rows_of(  # type: ignore[no-untyped-def]
    gradient, query, lse, shift, begin, row, queries, head, heads, tokens,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Return what there is of rows, zeros behind the last one, and where they lie."""
    number, column = row // GROUP, tl.arange(0, DIM)
    inside = number < queries
    of_query = head * GROUP + row % GROUP
    at = ((begin + number).to(tl.int64) * heads + of_query)[:, None] * WIDTH + column[None, :]
    mask = inside[:, None] & (column < WIDTH)[None, :]
    per_row = of_query.to(tl.int64) * tokens + begin + number
    return (
        tl.load(gradient + at, mask=mask, other=0.0), tl.load(query + at, mask=mask, other=0.0),
        tl.load(lse + per_row, mask=inside, other=0.0), tl.load(shift + per_row, mask=inside, other=0.0), at, mask,
    )  # fmt: skip


@triton.jit
def _where(key_begin, place, keys, head, groups, WIDTH: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return where keys and values lie, and which of these are there."""
    column = tl.arange(0, DIM)
    at = ((key_begin + place).to(tl.int64) * groups + head)[:, None] * WIDTH + column[None, :]
    return at, (place < keys)[:, None] & (column < WIDTH)[None, :]


@triton.jit(do_not_specialize=["tokens"])
def _of_rows(  # type: ignore[no-untyped-def]
    gradient, query, key, value, lse, shift, starts, key_starts, of_query, heads, groups, tokens, inner, outer, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    tile, block, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin, key_begin = tl.load(starts + block), tl.load(key_starts + block)
    queries, keys = tl.load(starts + block + 1) - begin, tl.load(key_starts + block + 1) - key_begin
    if tile * ROWS < queries * GROUP:
        row = tile * ROWS + tl.arange(0, ROWS)
        g, q, row_lse, row_shift, at, mask = _rows_of(
            gradient, query, lse, shift, begin, row, queries, head, heads, tokens, GROUP, WIDTH, DIM
        )
        # the last query sees all keys, or the last ones of them
        limit = keys - queries + row // GROUP
        last = tl.minimum(keys, keys - queries + (tile * ROWS + ROWS - 1) // GROUP + 1)
        low = keys - keys
        if WINDOW:
            low = tl.maximum(keys - queries + tile * ROWS // GROUP - WINDOW + 1, 0) // KEYS * KEYS
        total = tl.zeros([ROWS, DIM], tl.float32)
        for first in range(low, last, KEYS):
            place = first + tl.arange(0, KEYS)
            where, there = _where(key_begin, place, keys, head, groups, WIDTH, DIM)
            k, v = tl.load(key + where, mask=there, other=0.0), tl.load(value + where, mask=there, other=0.0)
            _, of_score = _of_scores(
                g, q, k, v, row_lse, row_shift, limit, place, keys, inner, outer, scale, WINDOW, CAPPED
            )
            total = tl.dot(of_score.to(k.dtype), k, total, input_precision="ieee")
        tl.store(of_query + at, total, mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _of_keys(  # type: ignore[no-untyped-def]
    gradient, query, key, value, lse, shift, starts, key_starts, of_key, of_value, heads, groups, tokens, inner, outer,
    scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    tile, block, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin, key_begin = tl.load(starts + block), tl.load(key_starts + block)
    queries, keys = tl.load(starts + block + 1) - begin, tl.load(key_starts + block + 1) - key_begin
    if tile * KEYS < keys:
        place = tile * KEYS + tl.arange(0, KEYS)
        where, there = _where(key_begin, place, keys, head, groups, WIDTH, DIM)
        k, v = tl.load(key + where, mask=there, other=0.0), tl.load(value + where, mask=there, other=0.0)
        # the rows from the first one that sees any of the keys to the last one
        first_row = tl.maximum(tile * KEYS - (keys - queries), 0) * GROUP // ROWS * ROWS
        end = queries * GROUP
        if WINDOW:
            end = tl.minimum(end, (tile * KEYS + KEYS - 1 + WINDOW - (keys - queries)) * GROUP)
        of_k, of_v = tl.zeros([KEYS, DIM], tl.float32), tl.zeros([KEYS, DIM], tl.float32)
        for first in range(first_row, end, ROWS):
            row = first + tl.arange(0, ROWS)
            g, q, row_lse, row_shift, _, _ = _rows_of(
                gradient, query, lse, shift, begin, row, queries, head, heads, tokens, GROUP, WIDTH, DIM
            )
            limit = keys - queries + row // GROUP
            p, of_score = _of_scores(
                g, q, k, v, row_lse, row_shift, limit, place, keys, inner, outer, scale, WINDOW, CAPPED
            )
            of_v = tl.dot(tl.trans(p.to(g.dtype)), g, of_v, input_precision="ieee")
            of_k = tl.dot(tl.trans(of_score.to(q.dtype)), q, of_k, input_precision="ieee")
        tl.store(of_key + where, of_k, mask=there)
        tl.store(of_value + where, of_v, mask=there)
