"""Causal attention over packed sequences: on a CPU, and for dtypes that no GPU kernel supports.

The compiled kernel reads packed streams and paged caches as they are. Where it was not built, tensor operations compute
the same to within rounding, over batches of sequences of similar length that are padded to one length.

A query's result depends on the keys that it sees and on nothing behind them: in a padded batch those have a probability
of 0, and zeros at the end of a sum do not change it. Products with values are summed in blocks of keys that always
begin at the same positions, because the BLAS library divides a long sum into parts by its length.

Shape suffixes: T queries and K keys of the stream, H query heads, G key-value heads, D head_dim; n sequences of a
batch, R rows of it, which are queries times the query heads that share a key-value head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from miles_spmd.invariant import compiled

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # from query, key, value and the scale of scores

ROWS = 4  # least rows of a product: fewer take another path through the BLAS library
STEP = 32  # the number of keys of a tile is a multiple of it
BLOCK = 128  # keys in one sum
MOST = 2**22  # most scores of a tile, and of a batch's rows times keys: masks would take gigabytes otherwise


def packed_attention(
    query_lengths: Sequence[int] | np.ndarray,
    key_lengths: Sequence[int] | np.ndarray,
    query: Tensor,
    key: Tensor,
    slots: Tensor | None = None,
) -> Attention:
    """Return the attention over streams in which sequences of the given lengths lie end to end, for all layers.

    A sequence's last query sees all of its keys. ``query`` [T, H, D] and ``key`` [K, G, D] are examples of later
    arguments: only shape, dtype and device count. ``slots``: int32, the row of keys and values where each key of the
    stream lies; None: the rows in order. The attention returns [T, H, D], with a gradient where ``slots`` is None.
    """
    lengths = np.asarray(query_lengths, np.int64), np.asarray(key_lengths, np.int64)
    if compiled.takes(query.dtype, query.device, query.shape[-1]):
        of_query, of_key = (torch.from_numpy(np.concatenate([[0], np.cumsum(n)])) for n in lengths)
        return partial(compiled.attention, starts=(of_query, of_key), slots=slots)
    return PaddedAttention(*lengths, query, key, slots)


class PaddedAttention:
    """Attention over padded batches of sequences: a call for each sequence costs more than it computes. A batch has
    sequences down to half the length of its longest one, which limits what is computed for padding."""

    def __init__(
        self, query_lengths: np.ndarray, key_lengths: np.ndarray, query: Tensor, key: Tensor, slots: Tensor | None
    ) -> None:
        lengths = np.stack([query_lengths, key_lengths])
        starts = np.cumsum(lengths, 1) - lengths
        self.batches: list[_Batch] = []
        # Batches take sequences out of order and pad them. ``position``: where each query of the stream is in the
        # batches' padded outputs, put end to end.
        position = np.empty(query_lengths.sum(), np.int64)
        end = 0
        for members in _batches(lengths, query.shape[1] // key.shape[1]):
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
    """n sequences, padded to one number of queries and one of keys. Query heads that share a key head become rows side
    by side, as if they were further queries, so that one product serves them all."""

    def __init__(
        self, starts: np.ndarray, lengths: np.ndarray, query: Tensor, key: Tensor, slots: Tensor | None
    ) -> None:
        heads, group = key.shape[1], query.shape[1] // key.shape[1]
        queries = np.arange(max(lengths[0].max(), -(-ROWS // group)))
        keys = np.arange(-(-lengths[1].max() // STEP) * STEP)
        self.real = queries < lengths[0][:, None]
        # Padding repeats a sequence's last query and key: these are finite, where other memory may hold NaN, and the
        # mask takes the keys out.
        at = [np.minimum(places, length[:, None] - 1) for places, length in zip((queries, keys), lengths)]
        # query i of a sequence sees the keys before the sequence's queries, and i + 1 more
        seen = torch.from_numpy((lengths[1] - lengths[0] + 1)[:, None] + at[0]).to(query.device)
        self.tiles = make_tiles(seen.repeat_interleave(group, 1), heads, len(keys), query.dtype)
        of_query, of_key = (torch.from_numpy(start[:, None] + x).to(query.device) for start, x in zip(starts, at))
        self.index = of_query, of_key if slots is None else slots[of_key]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Return the result for every padded query, [n * padded length, H, D]."""
        of_query, of_key = self.index
        n, queries = of_query.shape
        heads, width = key.shape[1:]
        k, v = (
            x.index_select(0, of_key.flatten()).view(*of_key.shape, heads, width).transpose(1, 2) for x in (key, value)
        )
        q = query.index_select(0, of_query.flatten()).view(n, queries, heads, -1, width).transpose(1, 2)
        out = attend(q.flatten(2, 3), k, v, self.tiles, scale)
        return out.view(n, heads, queries, -1, width).transpose(1, 2).reshape(n * queries, -1, width)


def _batches(lengths: np.ndarray, group: int) -> Iterator[np.ndarray]:
    """Yield the sequences of each batch by index: none has more than twice as many keys or queries as another."""
    for by_keys in _by_length(np.arange(lengths.shape[1]), lengths[1]):
        for members in _by_length(by_keys, lengths[0]):
            count = max(1, MOST // (group * int(lengths[0, members].max() * lengths[1, members].max())))
            yield from (members[first : first + count] for first in range(0, len(members), count))


def _by_length(members: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    order = members[np.argsort(-lengths[members], kind="stable")]
    while len(order):
        stop = int(np.searchsorted(-lengths[order], -lengths[order[0]] / 2, side="right"))
        yield np.sort(order[:stop])
        order = order[stop:]


class Tile(NamedTuple):
    """Rows that follow each other, and the keys that any of them sees."""

    rows: slice
    keys: int
    mask: Tensor  # added to the scores, [n, 1, rows, keys]: 0, or -inf


def make_tiles(seen: Tensor, heads: int, keys: int, dtype: torch.dtype) -> list[Tile]:
    """Cut n sequences of R rows into tiles. Row r sees the first ``seen[n, r]`` of ``keys`` keys; int64 [n, R]."""
    n, rows = seen.shape
    height = max(ROWS, MOST // (n * heads * keys) // ROWS * ROWS)
    tiles = []
    for first in range(0, rows, height):
        # the last tile may begin before ``first``, and repeat rows of the one before, so that it has ROWS rows
        part = slice(min(first, max(rows - ROWS, 0)), min(first + height, rows))
        most = int(seen[:, part].max())
        width = min(-(-most // STEP) * STEP, keys)
        hidden = torch.arange(width, device=seen.device) >= seen[:, part, None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=seen.device).masked_fill_(hidden, float("-inf"))
        tiles.append(Tile(part, width, mask[:, None]))
    return tiles


def attend(query: Tensor, key: Tensor, value: Tensor, tiles: list[Tile], scale: float) -> Tensor:
    """Return [n, G, R, D] from ``query`` [n, G, R, D] of ``R >= ROWS`` rows, ``key`` and ``value`` [n, G, K, D]."""
    return _Attend.apply(query, key, value, tiles, scale)


class _Attend(torch.autograd.Function):
    """The backward pass recomputes the probabilities, which would take more memory than everything else together."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiles: list[Tile], scale: float) -> Tensor:
        out = torch.empty_like(query)
        for tile in tiles:
            p = _probabilities(query, key, tile, scale)
            # One product over all keys would have a reduction order that depends on how many keys the tile has.
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
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        done = 0
        for tile in ctx.tiles:
            # rows that the tile repeats were counted before: probabilities are of all its rows, gradients of new ones
            rows, keys = slice(max(done, tile.rows.start), tile.rows.stop), slice(0, tile.keys)
            p = _probabilities(query, key, tile, ctx.scale)[:, :, rows.start - tile.rows.start :]
            g, q, k, v = gradient[:, :, rows], query[:, :, rows], key[:, :, keys], value[:, :, keys]
            grad_value[:, :, keys] += p.transpose(2, 3) @ g
            # Of softmax: d score = p (d p - sum of p d p), and the sum equals g . out (https://arxiv.org/abs/2205.14135).
            shift = (g * out[:, :, rows]).sum(-1, keepdim=True)
            grad_scores = (g @ v.transpose(2, 3)).sub_(shift).mul_(p).mul_(ctx.scale)
            grad_query[:, :, rows] = grad_scores @ k
            grad_key[:, :, keys] += grad_scores.transpose(2, 3) @ q
            done = rows.stop
        return grad_query, grad_key, grad_value, None, None


def _probabilities(query: Tensor, key: Tensor, tile: Tile, scale: float) -> Tensor:
    scores = query[:, :, tile.rows] @ key[:, :, : tile.keys].transpose(2, 3)
    return scores.mul_(scale).add_(tile.mask).softmax(-1)
