"""Causal attention over packed sequences, with grouped queries, rotary positions and context parallelism.

A micro-batch is one stream of tokens in which sequences lie end to end. Under context parallelism (zigzag) a sequence
is cut into ``2 * size`` equal chunks and rank r holds chunks r and 2 * size - 1 - r, so that every rank has the same
share of the causal triangle. Keys and values are gathered over the ranks; the queries of a chunk attend to the keys up
to the chunk's own end, which makes each chunk a causal block aligned at its last token. Without context parallelism
a block is simply a sequence.

Shape suffixes: T tokens of this rank's stream, H query heads, G key-value heads, D head dimension, B blocks.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from miles_spmd.invariant import compiled
from miles_spmd.invariant.attention import ROWS, STEP, attend, make_tiles
from miles_spmd.invariant.flash import flash_attention
from miles_spmd.invariant.rotary import rotate


@dataclass
class Blocks:
    """Where the causal blocks of a stream lie: sizes on the host, what the device needs on the device."""

    query_lengths: np.ndarray  # int64 [B], in stream order
    key_lengths: np.ndarray  # int64 [B], >= query_lengths
    key_index: Tensor | None  # int64 [sum of key_lengths], into the gathered keys; None: the stream itself
    kernel: Callable[[Tensor, Tensor, Tensor, float], Tensor] | None = None  # chosen when the first layer attends

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, invariant: bool = False) -> Tensor:
        """``invariant``: as an engine attends that shares :mod:`miles_spmd.invariant`."""
        if self.kernel is None:
            flash = query.is_cuda and query.dtype != torch.float32  # which takes 16-bit numbers only
            if flash:
                self.kernel = (_InvariantKernel if invariant else _VarlenKernel)(self, query.device)
            elif compiled.takes(query.dtype, query.device, query.shape[-1]):
                self.kernel = _CompiledKernel(self)
            else:
                self.kernel = _PaddedBatches(self, query, key)
        return self.kernel(query, key, value, scale)


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's packing parameters, plus what is worth computing once per micro-batch instead of once per layer."""

    blocks: Blocks = None  # type: ignore[assignment]  # fields before it have defaults
    scored: Tensor = None  # type: ignore[assignment]  # int64 [S], positions of this rank's stream whose logits matter
    positions: Tensor = None  # type: ignore[assignment]  # int64 [T], of each token within its sequence
    table: Tensor = None  # type: ignore[assignment]  # fp32 [longest, D], see :func:`miles_spmd.invariant.rotary.table`
    angles: Tensor = None  # type: ignore[assignment]  # fp32 [T, 1, D], of the rotary positions: Transformer Engine wants these


def make_blocks(lengths: Sequence[int] | np.ndarray, cp_rank: int, cp_size: int, device: torch.device) -> Blocks:
    """Blocks of a stream of sequences of ``lengths`` tokens, each a multiple of ``2 * cp_size`` if ``cp_size > 1``."""
    whole = np.asarray(lengths, np.int64)
    if cp_size == 1:
        return Blocks(whole, whole, None)
    chunk = whole // (2 * cp_size)
    last_chunks = (cp_rank, 2 * cp_size - 1 - cp_rank)
    key_lengths = np.stack([chunk * (c + 1) for c in last_chunks], 1).ravel()
    # where token p of a sequence lies after all ranks' streams are put end to end
    local_starts = np.concatenate([[0], np.cumsum(whole // cp_size)])
    key_index = []
    for start, size, length in zip(local_starts, chunk, whole):
        number, offset = np.divmod(np.arange(length), size)
        owner = np.minimum(number, 2 * cp_size - 1 - number)
        gathered = owner * local_starts[-1] + start + offset + size * (number >= cp_size)
        key_index += [gathered[: size * (c + 1)] for c in last_chunks]
    return Blocks(np.repeat(chunk, 2), key_lengths, torch.from_numpy(np.concatenate(key_index)).to(device))


class PackedAttention(MegatronModule):
    """Megatron's ``core_attention`` for packed streams. Turns queries and keys by their rotary positions itself,
    because Megatron does it with one slice and one table per sequence and layer."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        self.cp_group = pg_collection.cp  # type: ignore[union-attr]
        self.scale = softmax_scale or config.kv_channels**-0.5  # type: ignore[operator]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        *,
        packed_seq_params: PackedSequences,
    ) -> Tensor:
        """``query`` [T, H, D], ``key`` and ``value`` [T, G, D] -> [T, H * D]."""
        blocks = packed_seq_params.blocks
        query, key = (rotate(x, packed_seq_params.table, packed_seq_params.positions) for x in (query, key))
        if blocks.key_index is not None:
            pair = gather_from_sequence_parallel_region(torch.stack((key, value), 1), group=self.cp_group)
            key, value = pair.index_select(0, blocks.key_index).unbind(1)
        return blocks.attend(query, key, value, self.scale, self.config.batch_invariant_mode).flatten(1)


# --- the two ways to compute it: a kernel that takes packed streams, and batches padded for one that does not ---------


class _CompiledKernel:
    """The engine's attention on a CPU."""

    def __init__(self, blocks: Blocks) -> None:
        self.query_starts, self.key_starts = (
            torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
            for lengths in (blocks.query_lengths, blocks.key_lengths)
        )

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return compiled.attention(query, key, value, self.query_starts, self.key_starts, scale)


class _PackedKernel:
    """Where blocks begin in the streams of queries and keys, and the most that one has of them."""

    def __init__(self, blocks: Blocks, device: torch.device) -> None:
        def starts(lengths: np.ndarray) -> Tensor:
            return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device)

        self.query_starts, self.key_starts = starts(blocks.query_lengths), starts(blocks.key_lengths)
        self.max_query, self.max_key = int(blocks.query_lengths.max()), int(blocks.key_lengths.max())


class _InvariantKernel(_PackedKernel):
    """The engine's attention."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        starts, longest = (self.query_starts, self.key_starts), (self.max_query, self.max_key)
        return flash_attention(query, key, value, starts, longest, scale)


class _VarlenKernel(_PackedKernel):
    """torch's variable-length flash attention (CUDA). Its causal mask is aligned at the last key, as blocks are."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        kernel, options = _varlen_attn()
        return kernel(
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            self.query_starts,
            self.key_starts,
            self.max_query,
            self.max_key,
            window_size=(-1, 0),
            scale=scale,
            **options,
        )


@functools.cache
def _varlen_attn() -> tuple[Callable[..., Any], dict[str, bool]]:
    """The kernel, and how this torch wants to be told of grouped queries (2.11 takes them as they come)."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return varlen_attn, {"enable_gqa": True} if grouped else {}


class _PaddedBatches:
    """:mod:`miles_spmd.invariant.attention` (CPU; fp32 anywhere) on blocks of similar length, padded at their end.

    One call for many sequences: a call per sequence costs more than it computes. A batch takes blocks down to half its
    longest one's length, so that little is computed for padding. Causality hides padded keys from real queries.
    """

    def __init__(self, blocks: Blocks, query: Tensor, key: Tensor) -> None:
        query_starts = np.cumsum(blocks.query_lengths) - blocks.query_lengths
        key_starts = np.cumsum(blocks.key_lengths) - blocks.key_lengths
        self.batches: list[_Batch] = []
        position = np.empty(blocks.query_lengths.sum(), np.int64)  # of each query in the batches put end to end
        end = 0
        for members in _by_length(blocks.key_lengths):
            starts, lengths = (
                (query_starts[members], key_starts[members]),
                (blocks.query_lengths[members], blocks.key_lengths[members]),
            )
            batch = _Batch(starts, lengths, query, key)
            self.batches.append(batch)
            rows = np.arange(batch.real.size).reshape(batch.real.shape)
            position[(starts[0][:, None] + np.arange(batch.real.shape[1]))[batch.real]] = end + rows[batch.real]
            end += rows.size
        self.position = torch.from_numpy(position).to(query.device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        outputs = [batch.attend(query, key, value, scale) for batch in self.batches]
        padded = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return padded.index_select(0, self.position)


class _Batch:
    """n blocks. Query heads that share a key head stand side by side like so many queries."""

    def __init__(
        self,
        starts: tuple[np.ndarray, np.ndarray],
        lengths: tuple[np.ndarray, np.ndarray],
        query: Tensor,
        key: Tensor,
    ) -> None:
        heads, group = key.shape[1], query.shape[1] // key.shape[1]
        queries = np.arange(max(lengths[0].max(), -(-ROWS // group)))
        keys = np.arange(-(-lengths[1].max() // STEP) * STEP)
        self.real = queries < lengths[0][:, None]
        behind = np.minimum(queries, lengths[0][:, None] - 1)
        seen = torch.from_numpy((lengths[1] - lengths[0] + 1)[:, None] + behind).to(query.device)
        self.tiles = make_tiles(seen.repeat_interleave(group, 1), heads, len(keys), query.dtype)
        self.index = [
            torch.from_numpy(np.where(offset < length[:, None], start[:, None] + offset, 0)).to(query.device)
            for offset, start, length in zip((queries, keys), starts, lengths)
        ]

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


def _by_length(lengths: np.ndarray) -> list[np.ndarray]:
    """Indices grouped so that the longest of a group is at most twice its shortest."""
    order = np.argsort(-lengths, kind="stable")
    groups, start = [], 0
    while start < len(order):
        stop = start + int(np.searchsorted(-lengths[order[start:]], -lengths[order[start]] / 2, side="right"))
        groups.append(np.sort(order[start:stop]))
        start = stop
    return groups
