"""Causal attention over packed sequences: on a CPU, and for dtypes that no GPU kernel supports.

The compiled kernel reads packed streams and paged caches as they are. Where it was not built, tensor operations compute
the same to within rounding, over batches of sequences of similar length that are padded to one length.

A query's result depends on the keys that it sees and on no others: in a padded batch these have a probability of 0, and
zeros in a sum do not change it. Products with values are summed in blocks of keys that always
begin at the same positions, because the BLAS library divides a long sum into parts by its length.

Shape suffixes: T queries and K keys of the stream, H query heads, G key-value heads, D head_dim of queries and keys, V
of values; n sequences of a batch, R rows of it, which are queries times the query heads that share a key-value head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from miles_spmd.invariant import compiled
from miles_spmd.models.attention import PLAIN, Form


class Attention(Protocol):
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        form: Form = PLAIN,
        sinks: Tensor | None = None,
        /,
    ) -> Tensor:
        """Return [T, H, V] from ``query`` [T, H, D], ``key`` [K, G, D] and ``value`` [K, G, V].

        ``scale``: of scores; ``form``: of this layer; ``sinks`` [H], of any floating dtype: a score of every row that
        has no value, which only makes the other probabilities smaller (https://arxiv.org/abs/2508.10925).
        """
        ...


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
    stream lies; None: the rows in order. The attention has gradients where ``slots`` is None.
    """
    lengths = np.asarray(query_lengths, np.int64), np.asarray(key_lengths, np.int64)
    if compiled.takes(query.dtype, query.device, query.shape[-1]):
        return compiled.CompiledAttention(*lengths, slots)
    return PaddedAttention(*lengths, query, key, slots)


class PaddedAttention:
    """Attention over padded batches of sequences: a call for each sequence costs more than it computes. A batch has
    sequences down to half the length of its longest one, which limits what is computed for padding."""

    def __init__(
        self, query_lengths: np.ndarray, key_lengths: np.ndarray, query: Tensor, key: Tensor, slots: Tensor | None
    ) -> None:
        self.lengths = np.stack([query_lengths, key_lengths])
        self.starts = np.cumsum(self.lengths, 1) - self.lengths
        self.query, self.key, self.slots = query.new_empty(0, *query.shape[1:]), key.new_empty(0, *key.shape[1:]), slots
        group = query.shape[1] // key.shape[1]
        self.members = [*_batches(self.lengths, group)]
        self.batches: dict[int, list[_Batch]] = {}  # by window: layers take turns with few
        # Batches take sequences out of order and pad them. ``position``: where each query of the stream is in the
        # batches' padded outputs, put end to end.
        position = np.empty(query_lengths.sum(), np.int64)
        end = 0
        for members in self.members:
            real = _real_queries(self.lengths[0, members], group)
            rows = np.arange(real.size).reshape(real.shape)
            position[(self.starts[0, members, None] + np.arange(real.shape[1]))[real]] = end + rows[real]
            end += rows.size
        self.position = torch.from_numpy(position).to(query.device)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, form: Form = PLAIN, sinks: Tensor | None = None
    ) -> Tensor:
        if form.window not in self.batches:
            self.batches[form.window] = [self._batch(members, form.window) for members in self.members]
        outputs = [batch.attend(query, key, value, scale, form, sinks) for batch in self.batches[form.window]]
        padded = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return padded.index_select(0, self.position)

    def _batch(self, members: np.ndarray, window: int) -> _Batch:
        where = self.starts[:, members], self.lengths[:, members]
        return _Batch(*where, self.query, self.key, self.slots, window)


class _Batch:
    """n sequences, padded to one number of queries and one of keys. Query heads that share a key head become rows side
    by side, as if they were further queries, so that one product serves them all."""

    def __init__(
        self,
        starts: np.ndarray,
        lengths: np.ndarray,
        query: Tensor,
        key: Tensor,
        slots: Tensor | None,
        window: int,
    ) -> None:
        heads, group = key.shape[1], query.shape[1] // key.shape[1]
        queries = np.arange(_real_queries(lengths[0], group).shape[1])
        keys = np.arange(-(-lengths[1].max() // STEP) * STEP)
        # query i of a sequence sees the keys before the sequence's queries, and i + 1 more
        before = lengths[1] - lengths[0]
        # Padding repeats a sequence's last query and key, and keys before all windows are the first key of one: these
        # are finite, where other memory may hold NaN, and the mask takes the keys out.
        first = np.maximum(before + 1 - window, 0) if window else np.zeros_like(before)
        at_query = np.minimum(queries, lengths[0, :, None] - 1)
        at_key = np.clip(keys, first[:, None], lengths[1, :, None] - 1)
        seen = torch.from_numpy((before + 1)[:, None] + at_query).to(query.device)
        self.tiles = make_tiles(seen.repeat_interleave(group, 1), heads, len(keys), query.dtype, window)
        of_query, of_key = (
            torch.from_numpy(start[:, None] + x).to(query.device) for start, x in zip(starts, (at_query, at_key))
        )
        self.index = of_query, of_key if slots is None else slots[of_key]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, form: Form, sinks: Tensor | None
    ) -> Tensor:
        """Return the result for every padded query, [n * padded length, H, V]."""
        of_query, of_key = self.index
        n, queries = of_query.shape
        heads, width = key.shape[1:]
        k, v = (
            x.index_select(0, of_key.flatten()).view(*of_key.shape, heads, -1).transpose(1, 2) for x in (key, value)
        )
        q = query.index_select(0, of_query.flatten()).view(n, queries, heads, -1, width).transpose(1, 2)
        if sinks is not None:
            sinks = sinks.float().view(heads, 1, -1).expand(-1, queries, -1).flatten(1)
        out = attend(q.flatten(2, 3), k, v, self.tiles, scale, form.softcap, sinks)
        return out.view(n, heads, queries, -1, value.shape[2]).transpose(1, 2).reshape(n * queries, -1, value.shape[2])


def _real_queries(lengths: np.ndarray, group: int) -> np.ndarray:
    """Return which queries of a padded batch are those of its sequences, bool [n, padded length]."""
    return np.arange(max(lengths.max(), -(-ROWS // group))) < lengths[:, None]


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


def make_tiles(seen: Tensor, heads: int, keys: int, dtype: torch.dtype, window: int = 0) -> list[Tile]:
    """Cut n sequences of R rows into tiles. Row r sees the first ``seen[n, r]`` of ``keys`` keys, or the last
    ``window`` of these if not 0; int64 [n, R]."""
    n, rows = seen.shape
    height = max(ROWS, MOST // (n * heads * keys) // ROWS * ROWS)
    tiles = []
    for first in range(0, rows, height):
        # the last tile may begin before ``first``, and repeat rows of the one before, so that it has ROWS rows
        part = slice(min(first, max(rows - ROWS, 0)), min(first + height, rows))
        most = int(seen[:, part].max())
        width = min(-(-most // STEP) * STEP, keys)
        place, behind = torch.arange(width, device=seen.device), seen[:, part, None]
        hidden = place >= behind
        if window:
            hidden |= place < behind - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=seen.device).masked_fill_(hidden, float("-inf"))
        tiles.append(Tile(part, width, mask[:, None]))
    return tiles


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: list[Tile],
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return [n, G, R, V] from ``query`` [n, G, R, D] of ``R >= ROWS`` rows, ``key`` [n, G, K, D], ``value``
    [n, G, K, V] and ``sinks`` [G, R]."""
    return _Attend.apply(query, key, value, sinks, tiles, scale, softcap)


class _Attend(torch.autograd.Function):
    """The backward pass recomputes the probabilities, which would take more memory than everything else together."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        tiles: list[Tile],
        scale: float,
        softcap: float,
    ) -> Tensor:
        out = query.new_empty(*query.shape[:3], value.shape[3])
        for tile in tiles:
            p, _ = _probabilities(_scores(query, key, tile, scale, softcap), tile, sinks)
            # One product over all keys would have a reduction order that depends on how many keys the tile has.
            parts = [
                p[..., k : k + BLOCK] @ value[:, :, k : min(k + BLOCK, tile.keys)] for k in range(0, tile.keys, BLOCK)
            ]
            total = parts[0]
            for part in parts[1:]:
                total += part
            out[:, :, tile.rows] = total
        ctx.save_for_backward(query, key, value, sinks, out)
        ctx.tiles, ctx.scale, ctx.softcap = tiles, scale, softcap
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, sinks, out = ctx.saved_tensors
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        grad_sinks = None if sinks is None else torch.empty_like(sinks)
        done = 0
        for tile in ctx.tiles:
            # rows that the tile repeats were counted before: probabilities are of all its rows, gradients of new ones
            rows, keys = slice(max(done, tile.rows.start), tile.rows.stop), slice(0, tile.keys)
            new = slice(rows.start - tile.rows.start, None)
            scores = _scores(query, key, tile, ctx.scale, ctx.softcap)
            # d tanh(x) = 1 - tanh(x)^2
            slope = 1 - (scores[:, :, new] / ctx.softcap).square_() if ctx.softcap else None
            p, of_sinks = _probabilities(scores, tile, sinks)
            p, g, q, k, v = p[:, :, new], gradient[:, :, rows], query[:, :, rows], key[:, :, keys], value[:, :, keys]
            grad_value[:, :, keys] += p.transpose(2, 3) @ g
            # Of softmax: d score = p (d p - sum of p d p), and the sum equals g . out (https://arxiv.org/abs/2205.14135).
            shift = (g * out[:, :, rows]).sum(-1, keepdim=True)
            grad_scores = (g @ v.transpose(2, 3)).sub_(shift).mul_(p).mul_(ctx.scale)
            if slope is not None:
                grad_scores *= slope
            if grad_sinks is not None and of_sinks is not None:  # a sink has no value: its d p is 0
                grad_sinks[:, rows] = -(of_sinks[:, :, new] * shift).sum(0).squeeze(-1)
            grad_query[:, :, rows] = grad_scores @ k
            grad_key[:, :, keys] += grad_scores.transpose(2, 3) @ q
            done = rows.stop
        return grad_query, grad_key, grad_value, grad_sinks, None, None, None


def _scores(query: Tensor, key: Tensor, tile: Tile, scale: float, softcap: float) -> Tensor:
    scores = (query[:, :, tile.rows] @ key[:, :, : tile.keys].transpose(2, 3)).mul_(scale)
    return scores.div_(softcap).tanh_().mul_(softcap) if softcap else scores


def _probabilities(scores: Tensor, tile: Tile, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the softmax over keys of ``scores`` [n, G, R, K], to which it adds the mask, and that of sinks,
    [n, G, R, 1]."""
    p = scores.add_(tile.mask).softmax(-1)
    if sinks is None:
        return p, None
    # The softmax over keys alone is a function of the keys that a row sees, and one element more is not: its place in
    # the sum would follow from the tile. The largest probability is the reciprocal of the sum of exponentials. In
    # float64, because vector and scalar code of exp must agree after the result is rounded.
    most, largest = scores.amax(-1, keepdim=True).double(), p.amax(-1, keepdim=True).double()
    of_keys = 1 / (1 + largest * (sinks[:, tile.rows, None].double() - most).exp())
    return p.mul_(of_keys.to(p.dtype)), (1 - of_keys).to(p.dtype)
