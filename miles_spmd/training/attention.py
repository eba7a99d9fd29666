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

from miles_spmd.invariant.attention import Attention, packed_attention
from miles_spmd.invariant.flash import flash_attention
from miles_spmd.invariant.rotary import rotate
from miles_spmd.invariant.split_attention import split_attention

EngineAttention = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], tuple[int, int], float], Tensor]


@dataclass
class Blocks:
    """Where the causal blocks of a stream lie: sizes on the host, what the device needs on the device."""

    query_lengths: np.ndarray  # int64 [B], in stream order
    key_lengths: np.ndarray  # int64 [B], >= query_lengths
    key_index: Tensor | None  # int64 [sum of key_lengths], into the gathered keys; None: the stream itself
    kernel: Attention | None = None  # chosen when the first layer attends

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, engines: EngineAttention | None = None
    ) -> Tensor:
        """``engines``: how an engine attends that shares :mod:`miles_spmd.invariant`."""
        if self.kernel is None:
            if query.is_cuda and query.dtype != torch.float32:  # flash attention takes 16-bit numbers only
                self.kernel = (
                    _EngineKernel(self, query.device, engines) if engines else _VarlenKernel(self, query.device)
                )
            else:
                self.kernel = packed_attention(self.query_lengths, self.key_lengths, query, key)
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
        self.engines: EngineAttention | None = None
        if config.batch_invariant_mode:
            split = config.split_keys
            self.engines = functools.partial(split_attention, split=split) if split else flash_attention

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
        return blocks.attend(query, key, value, self.scale, self.engines).flatten(1)


# --- on a GPU --------------------------------------------------------------------------------------------------------


class _PackedKernel:
    """Where blocks begin in the streams of queries and keys, and the most that one has of them."""

    def __init__(self, blocks: Blocks, device: torch.device) -> None:
        def starts(lengths: np.ndarray) -> Tensor:
            return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device)

        self.query_starts, self.key_starts = starts(blocks.query_lengths), starts(blocks.key_lengths)
        self.max_query, self.max_key = int(blocks.query_lengths.max()), int(blocks.key_lengths.max())


class _EngineKernel(_PackedKernel):
    def __init__(self, blocks: Blocks, device: torch.device, attention: EngineAttention) -> None:
        super().__init__(blocks, device)
        self.attention = attention

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        starts, longest = (self.query_starts, self.key_starts), (self.max_query, self.max_key)
        return self.attention(query, key, value, starts, longest, scale)


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
