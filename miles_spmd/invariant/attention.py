"""Causal attention in tensor operations: on a CPU, and for numbers that no kernel takes.

What a query gets depends on the keys that it sees and on nothing behind them: those get a probability of 0, of which
any number may be added at the end of a sum. Products with values are summed over blocks of keys that begin where they
always begin, because the BLAS library cuts a long sum into parts by its length.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

ROWS = 4  # at least so many in a product: fewer take another path through the BLAS library
STEP = 32  # keys of a tile are a multiple of it
BLOCK = 128  # keys in one sum
MOST = 2**22  # scores of a tile


class Tile(NamedTuple):
    """Neighbouring rows, and the keys that any of them sees."""

    rows: slice
    keys: int
    mask: Tensor  # added to the scores, [n, 1, rows, keys]: 0, or -inf


def make_tiles(seen: Tensor, heads: int, keys: int, dtype: torch.dtype) -> list[Tile]:
    """Cuts n sequences of R rows, of which row r sees the first ``seen[n, r]`` of ``keys`` keys; int64 [n, R]."""
    n, rows = seen.shape
    height = max(ROWS, MOST // (n * heads * keys) // ROWS * ROWS)
    tiles = []
    for first in range(0, rows, height):
        part = slice(min(first, max(rows - ROWS, 0)), min(first + height, rows))  # the last one may begin before
        most = int(seen[:, part].max())
        width = min(-(-most // STEP) * STEP, keys)
        hidden = torch.arange(width, device=seen.device) >= seen[:, part, None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=seen.device).masked_fill_(hidden, float("-inf"))
        tiles.append(Tile(part, width, mask[:, None]))
    return tiles


def attend(query: Tensor, key: Tensor, value: Tensor, tiles: list[Tile], scale: float) -> Tensor:
    """``query`` [n, G, R, D] of ``R >= ROWS`` rows, ``key`` and ``value`` [n, G, K, D] -> [n, G, R, D]."""
    return _Attend.apply(query, key, value, tiles, scale)


class _Attend(torch.autograd.Function):
    """The backward pass makes the probabilities again, which are many more numbers than all others."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiles: list[Tile], scale: float) -> Tensor:
        out = torch.empty_like(query)
        for tile in tiles:
            p = _probabilities(query, key, tile, scale)
            parts = [
                p[..., k : k + BLOCK] @ value[:, :, k : min(k + BLOCK, tile.keys)] for k in range(0, tile.keys, BLOCK)
            ]
            total = parts[0]
            for part in parts[1:]:
                total += part
            out[:, :, tile.rows] = total
        ctx.save_for_backward(query, key, value, out)
        ctx.tiles, ctx.scale = tiles, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out = ctx.saved_tensors
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        done = 0
        for tile in ctx.tiles:
            rows, keys = slice(max(done, tile.rows.start), tile.rows.stop), slice(0, tile.keys)
            p = _probabilities(query, key, tile, ctx.scale)[:, :, rows.start - tile.rows.start :]
            g, q, k, v = gradient[:, :, rows], query[:, :, rows], key[:, :, keys], value[:, :, keys]
            of_value[:, :, keys] += p.transpose(2, 3) @ g
            shift = (g * out[:, :, rows]).sum(-1, keepdim=True)
            of_scores = (g @ v.transpose(2, 3)).sub_(shift).mul_(p).mul_(ctx.scale)
            of_query[:, :, rows] = of_scores @ k
            of_key[:, :, keys] += of_scores.transpose(2, 3) @ q
            done = rows.stop
        return of_query, of_key, of_value, None, None


def _probabilities(query: Tensor, key: Tensor, tile: Tile, scale: float) -> Tensor:
    scores = query[:, :, tile.rows] @ key[:, :, : tile.keys].transpose(2, 3)
    return scores.mul_(scale).add_(tile.mask).softmax(-1)
