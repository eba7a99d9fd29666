"""Causal attention over packed sequences: on a CPU, and for numbers that no GPU kernel takes.

The compiled kernel takes packed streams and paged caches as they are. Where it is not there, the same is computed to
within rounding in tensor operations, over sequences of similar length that are padded to one.

What a query gets depends on the keys that it sees and on nothing behind them: in a padded batch those get a probability
of 0, of which any number may be added at the end of a sum. Products with values are summed over blocks of keys that
begin where they always begin, because the BLAS library cuts a long sum into parts by its length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from miles_spmd.invariant import compiled

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # of query, key, value and the scale of their products

ROWS = 4  # at least so many in a product: fewer take another path through the BLAS library
STEP = 32  # keys of a tile are a multiple of it
BLOCK = 128  # keys in one sum
MOST = 2**22  # scores of a tile, and of a batch's rows and keys: nobody is given gigabytes of mask


def packed_attention(
    query_lengths: Sequence[int] | np.ndarray,
    key_lengths: Sequence[int] | np.ndarray,
    query: Tensor,
    key: Tensor,
    slots: Tensor | None = None,
) -> Attention:
    """What attends over streams in which sequences of so many queries and keys lie end to end; for all layers.

    A sequence's last query sees all of its keys. ``query`` [T, H, D] and ``key`` [K, G, D] show what they will be like.
    ``slots``: int32, which row of the keys and values each key of the stream is; None: the rows in order. What is
    returned gives [T, H, D], which has a gradient.
    """
    lengths = np.asarray(query_lengths, np.int64), np.asarray(key_lengths, np.int64)
    if compiled.takes(query.dtype, query.device, query.shape[-1]):
        starts = (torch.from_numpy(np.concatenate([[0], np.cumsum(n)])) for n in lengths)
        return partial(compiled.attention, query_starts=next(starts), key_starts=next(starts), slots=slots)
    return PaddedAttention(*lengths, query, key, slots)


class PaddedAttention:
    """One call for many sequences: a call for each costs more than it computes. A batch takes sequences down to half
    its longest one's length, so that little is computed for padding."""

    def __init__(
        self, query_lengths: np.ndarray, key_lengths: np.ndarray, query: Tensor, key: Tensor, slots: Tensor | None
    ) -> None:
        lengths = np.stack([query_lengths, key_lengths])
        starts = np.cumsum(lengths, 1) - lengths
        self.batches: list[_Batch] = []
        position = np.empty(query_lengths.sum(), np.int64)  # of each query in the batches put end to end
        end = 0
        for members in _alike(lengths, query.shape[1] // key.shape[1]):
            batch = _Batch(starts[:, members], lengths[:, members], query, key, slots)
            self.batches.append(batch)
            rows = np.arange(batch.real.size).reshape(batch.real.shape)
            position[(starts[0, members, None] + np.arange(batch.real.shape[1]))[batch.real]] = end + rows[batch.real]
            end += rows.size
        self.position = torch.from_numpy(position).to(query.device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        outputs = [batch.attend(query, key, value, scale) for batch in self.batches]
        padded = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return padded.index_select(0, self.position)


class _Batch:
    """n sequences. Query heads that share a key head stand side by side like so many queries."""

    def __init__(
        self, starts: np.ndarray, lengths: np.ndarray, query: Tensor, key: Tensor, slots: Tensor | None
    ) -> None:
        heads, group = key.shape[1], query.shape[1] // key.shape[1]
        queries = np.arange(max(lengths[0].max(), -(-ROWS // group)))
        keys = np.arange(-(-lengths[1].max() // STEP) * STEP)
        self.real = queries < lengths[0][:, None]
        # padding repeats a sequence's last query and key
        at = [np.minimum(places, length[:, None] - 1) for places, length in zip((queries, keys), lengths)]
        seen = torch.from_numpy((lengths[1] - lengths[0] + 1)[:, None] + at[0]).to(query.device)
        self.tiles = make_tiles(seen.repeat_interleave(group, 1), heads, len(keys), query.dtype)
        of_query, of_key = (torch.from_numpy(start[:, None] + x).to(query.device) for start, x in zip(starts, at))
        self.index = of_query, of_key if slots is None else slots[of_key]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[n * padded length, H, D]"""
        of_query, of_key = self.index
        n, queries = of_query.shape
        heads, width = key.shape[1:]
        k, v = (
            x.index_select(0, of_key.flatten()).view(*of_key.shape, heads, width).transpose(1, 2) for x in (key, value)
        )
        q = query.index_select(0, of_query.flatten()).view(n, queries, heads, -1, width).transpose(1, 2)
        out = attend(q.flatten(2, 3), k, v, self.tiles, scale)
        return out.view(n, heads, queries, -1, width).transpose(1, 2).reshape(n * queries, -1, width)


def _alike(lengths: np.ndarray, group: int) -> Iterator[np.ndarray]:
    """Indices of sequences for a batch: neither of keys nor of queries has one more than twice as many as another."""
    for by_keys in _by_length(np.arange(lengths.shape[1]), lengths[1]):
        for members in _by_length(by_keys, lengths[0]):
            together = max(1, MOST // (group * int(lengths[0, members].max() * lengths[1, members].max())))
            yield from (members[first : first + together] for first in range(0, len(members), together))


def _by_length(members: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    order = members[np.argsort(-lengths[members], kind="stable")]
    while len(order):
        stop = int(np.searchsorted(-lengths[order], -lengths[order[0]] / 2, side="right"))
        yield np.sort(order[:stop])
        order = order[stop:]


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
