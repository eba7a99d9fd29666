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
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor


@dataclass
class Blocks:
    """Where the causal blocks of a stream lie: sizes on the host, what the device needs on the device."""

    query_lengths: np.ndarray  # int64 [B], in stream order
    key_lengths: np.ndarray  # int64 [B], >= query_lengths
    key_index: Tensor | None  # int64 [sum of key_lengths], into the gathered keys; None: the stream itself
    kernel: Callable[[Tensor, Tensor, Tensor, float], Tensor] | None = None  # chosen when the first layer attends

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if self.kernel is None:
            flash = query.is_cuda and query.dtype != torch.float32  # which takes 16-bit numbers only
            self.kernel = _VarlenKernel(self, query.device) if flash else _PaddedBatches(self, query.device)
        return self.kernel(query, key, value, scale)


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's packing parameters, plus what is worth computing once per micro-batch instead of once per layer."""

    blocks: Blocks = None  # type: ignore[assignment]  # fields before it have defaults
    scored: Tensor = None  # type: ignore[assignment]  # int64 [S], positions of this rank's stream whose logits matter
    angles: Tensor = None  # type: ignore[assignment]  # fp32 [T, 1, D], of the rotary positions
    cos: Tensor | None = None  # of the angles, in the model's dtype
    sin: Tensor | None = None


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
        query = _Rotate.apply(query, packed_seq_params.cos, packed_seq_params.sin)
        key = _Rotate.apply(key, packed_seq_params.cos, packed_seq_params.sin)
        if blocks.key_index is not None:
            pair = gather_from_sequence_parallel_region(torch.stack((key, value), 1), group=self.cp_group)
            key, value = pair.index_select(0, blocks.key_index).unbind(1)
        return blocks.attend(query, key, value, self.scale).flatten(1)


class _Rotate(torch.autograd.Function):
    """x * cos + rotate_half(x) * sin. The backward pass is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotate(gradient, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half] -= x[..., half:] * sin[..., :half]
    out[..., half:] += x[..., :half] * sin[..., half:]
    return out


# --- the two ways to compute it: a kernel that takes packed streams, and batches padded for one that does not ---------


class _VarlenKernel:
    """torch's variable-length flash attention (CUDA). Its causal mask is aligned at the last key, as blocks are."""

    def __init__(self, blocks: Blocks, device: torch.device) -> None:
        def starts(lengths: np.ndarray) -> Tensor:
            return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device)

        self.query_starts, self.key_starts = starts(blocks.query_lengths), starts(blocks.key_lengths)
        self.max_query, self.max_key = int(blocks.query_lengths.max()), int(blocks.key_lengths.max())

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
    """scaled_dot_product_attention (CPU; fp32 anywhere) on blocks of similar length, padded at their end.

    One call for many sequences: a call per sequence costs more than it computes. A batch takes blocks down to half its
    longest one's length, so that little is computed for padding. Causality hides padded keys from real queries.
    """

    def __init__(self, blocks: Blocks, device: torch.device) -> None:
        query_starts = np.cumsum(blocks.query_lengths) - blocks.query_lengths
        key_starts = np.cumsum(blocks.key_lengths) - blocks.key_lengths
        self.batches: list[_Batch] = []
        position = np.empty(blocks.query_lengths.sum(), np.int64)  # of each query in the batches put end to end
        end = 0
        for members in _by_length(blocks.key_lengths):
            batch = _Batch(
                query_starts[members], blocks.query_lengths[members], key_starts[members], blocks.key_lengths[members]
            )
            self.batches.append(batch)
            rows = np.arange(batch.query_index.numel()).reshape(batch.query_index.shape)
            position[batch.query_index[batch.real].numpy()] = end + rows[batch.real.numpy()]
            end += rows.size
            batch.move(device)
        self.position = torch.from_numpy(position).to(device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        outputs = [batch.attend(query, key, value, scale) for batch in self.batches]
        padded = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return padded.index_select(0, self.position)


class _Batch:
    def __init__(
        self, query_starts: np.ndarray, query_lengths: np.ndarray, key_starts: np.ndarray, key_lengths: np.ndarray
    ) -> None:
        query_offsets, key_offsets = np.arange(query_lengths.max()), np.arange(key_lengths.max())
        real = query_offsets < query_lengths[:, None]
        self.real = torch.from_numpy(real)
        self.query_index = torch.from_numpy(np.where(real, query_starts[:, None] + query_offsets, 0))
        self.key_index = torch.from_numpy(
            np.where(key_offsets < key_lengths[:, None], key_starts[:, None] + key_offsets, 0)
        )
        self.mask: Tensor | None = None
        if not np.array_equal(query_lengths, key_lengths):
            last_key = query_offsets + (key_lengths - query_lengths)[:, None]
            self.mask = torch.from_numpy(key_offsets <= last_key[:, :, None])[:, None]

    def move(self, device: torch.device) -> None:
        self.query_index, self.key_index = self.query_index.to(device), self.key_index.to(device)
        self.mask = None if self.mask is None else self.mask.to(device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[blocks * padded length, H, D]"""
        q, k, v = (
            x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)
            for x, index in ((query, self.query_index), (key, self.key_index), (value, self.key_index))
        )
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask, is_causal=self.mask is None, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(0, 1)


def _by_length(lengths: np.ndarray) -> list[np.ndarray]:
    """Indices grouped so that the longest of a group is at most twice its shortest."""
    order = np.argsort(-lengths, kind="stable")
    groups, start = [], 0
    while start < len(order):
        stop = start + int(np.searchsorted(-lengths[order[start:]], -lengths[order[start]] / 2, side="right"))
        groups.append(np.sort(order[start:stop]))
        start = stop
    return groups
