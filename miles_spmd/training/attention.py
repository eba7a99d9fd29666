"""Causal attention over packed sequences, with grouped queries, rotary positions and context parallelism.

A micro-batch is one stream of tokens in which sequences lie end to end. Under context parallelism (zigzag) a sequence
is cut into ``2 * size`` equal chunks and rank r holds chunks r and 2 * size - 1 - r, so that every rank has the same
share of the causal triangle. Keys and values are gathered over the ranks; the queries of a chunk attend to the keys up
to the chunk's own end, which makes each chunk a causal block whose last query is aligned with its last key. Without
context parallelism a block is simply a sequence.

Shape suffixes: T tokens of this rank's stream, H query heads, G key-value heads, D head dimension, B blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, set_tensor_model_parallel_attributes
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

from miles_spmd.invariant.attention import Attention, packed_attention
from miles_spmd.invariant.flash import Longest, Starts, flash_attention
from miles_spmd.invariant.operators import rotate
from miles_spmd.invariant.split_attention import FEWEST
from miles_spmd.models import blocks
from miles_spmd.models.attention import PLAIN, Form
from miles_spmd.models.rope import Rope
from miles_spmd.training.megatron_config import NetworkConfig

# From query, key, value, where blocks start in the streams of queries and of keys (int32 [B + 1] each), the most
# queries and keys of a block, the scale of scores, the form and the sinks: as
# :func:`miles_spmd.invariant.flash.flash_attention`.
BlockAttention = Callable[[Tensor, Tensor, Tensor, Starts, Longest, float, Form, Tensor | None], Tensor]


def _varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Starts,
    longest: Longest,
    scale: float,
    form: Form,
    sinks: Tensor | None,
) -> Tensor:
    """torch's variable-length flash attention (CUDA). Its causal mask aligns the last query with the last key. It has
    neither soft-caps nor sinks: ours, which has, computes these."""
    from torch.nn.attention.varlen import varlen_attn  # takes grouped queries as they are

    if form.softcap or sinks is not None:
        return flash_attention(query, key, value, starts, longest, scale, form, sinks, split=FEWEST)
    tensors = query.contiguous(), key.contiguous(), value.contiguous()
    window = form.window - 1, 0  # keys before the query and behind it; -1: all
    return varlen_attn(*tensors, *starts, *longest, window_size=window, scale=scale)  # type: ignore[return-value]


@dataclass
class Blocks:
    """Where the causal blocks of a stream lie: sizes on the host, the index of keys on the device."""

    query_lengths: np.ndarray  # int64 [B], in stream order
    key_lengths: np.ndarray  # int64 [B], >= query_lengths
    key_index: Tensor | None  # int64 [sum of key_lengths], into the gathered keys; None: the stream itself
    kernel: Attention | None = None  # chosen when the first layer attends, then used by all layers

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        form: Form = PLAIN,
        sinks: Tensor | None = None,
        on_gpu: BlockAttention = _varlen_attention,
    ) -> Tensor:
        """Return [T, H, D] from ``query`` [T, H, D] and the blocks' keys and values [sum of key_lengths, G, D].

        ``form`` and ``sinks`` [H]: of this layer; ``on_gpu``: the attention of 16-bit numbers on a GPU.
        """
        if self.kernel is None:
            if query.is_cuda and query.dtype != torch.float32:  # flash attention takes 16-bit numbers only
                self.kernel = self._on_gpu(query.device, on_gpu)
            else:
                self.kernel = packed_attention(self.query_lengths, self.key_lengths, query, key)
        return self.kernel(query, key, value, scale, form, sinks)

    def _on_gpu(self, device: torch.device, attention: BlockAttention) -> Attention:
        lengths = self.query_lengths, self.key_lengths
        # copied to the device here, once per micro-batch: a copy in every layer would wait for the device
        query_starts, key_starts = (
            torch.from_numpy(np.concatenate([[0], np.cumsum(n)]).astype(np.int32)).to(device) for n in lengths
        )
        longest = int(lengths[0].max()), int(lengths[1].max())
        starts = query_starts, key_starts

        def attend(
            query: Tensor, key: Tensor, value: Tensor, scale: float, form: Form = PLAIN, sinks: Tensor | None = None
        ) -> Tensor:
            return attention(query, key, value, starts, longest, scale, form, sinks)

        return attend


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's packing parameters, and what is computed once per micro-batch instead of once per layer."""

    blocks: Blocks = None  # type: ignore[assignment]  # fields before it have defaults
    scored: Tensor = None  # type: ignore[assignment]  # int64 [S], positions of this rank's stream whose logits matter
    positions: Tensor = None  # type: ignore[assignment]  # int64 [T], of each token within its sequence
    # fp32 [longest, rotary_dim], see :func:`miles_spmd.invariant.rope.rotary_table`
    tables: dict[Rope, Tensor] = field(default_factory=dict)
    # fp32 [T, 1, D], rotary angles of each token; for Transformer Engine only
    angles: dict[Rope, Tensor] = field(default_factory=dict)


def make_blocks(lengths: Sequence[int] | np.ndarray, cp_rank: int, cp_size: int, device: torch.device) -> Blocks:
    """Return the blocks of a context-parallel rank's part of a stream of sequences of ``lengths`` tokens, padding
    included. With ``cp_size > 1`` each length is a multiple of ``2 * cp_size``."""
    whole = np.asarray(lengths, np.int64)
    if cp_size == 1:
        return Blocks(whole, whole, None)
    chunk = whole // (2 * cp_size)  # tokens of a chunk, by sequence
    own_chunks = (cp_rank, 2 * cp_size - 1 - cp_rank)  # their numbers within a sequence
    # chunk c sees chunks 0 .. c; blocks alternate between a sequence's two own chunks, as the stream does
    key_lengths = np.stack([chunk * (c + 1) for c in own_chunks], 1).ravel()
    # Gathering puts all ranks' streams end to end, each as long as the others. A chunk's owner is given by the zigzag;
    # within the owner's stream a sequence's later chunk (number >= cp_size) lies behind its earlier one.
    local_starts = np.concatenate([[0], np.cumsum(whole // cp_size)])
    key_index = []
    for start, size, length in zip(local_starts, chunk, whole):
        number, offset = np.divmod(np.arange(length), size)
        owner = np.minimum(number, 2 * cp_size - 1 - number)
        gathered = owner * local_starts[-1] + start + offset + size * (number >= cp_size)
        key_index += [gathered[: size * (c + 1)] for c in own_chunks]
    return Blocks(np.repeat(chunk, 2), key_lengths, torch.from_numpy(np.concatenate(key_index)).to(device))


class PackedAttention(MegatronModule):
    """Megatron's ``core_attention`` for packed streams, which also applies rotary positions to queries and keys.

    Megatron would apply them with one slice and one table per sequence and layer. ``form``: what the layer's attention
    computes; ``softmax_offset`` [heads of this rank]: its sinks, a parameter of Megatron's name.
    """

    def __init__(
        self, config: NetworkConfig, pg_collection: ProcessGroupCollection, attention: blocks.Attention, **_: Any
    ) -> None:
        super().__init__(config)
        self.rope, self.scale, self.form = attention.rope, attention.score_scale, attention.form
        self.cp_group, self.tp_group = pg_collection.cp, pg_collection.tp
        self.register_parameter("softmax_offset", None)
        if attention.sinks:
            self.softmax_offset = torch.nn.Parameter(
                torch.zeros(
                    attention.num_heads // self.tp_group.size(),
                    dtype=config.params_dtype,
                    device=None if config.use_cpu_initialization else torch.cuda.current_device(),
                )
            )
            set_tensor_model_parallel_attributes(self.softmax_offset, is_parallel=True, dim=0, stride=1)
        self.on_gpu: BlockAttention = _varlen_attention
        if config.invariant:  # the attention that an engine with :mod:`miles_spmd.invariant` shares
            self.on_gpu = functools.partial(flash_attention, split=config.split_keys)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: PackedSequences, **__: Any
    ) -> Tensor:
        """``query`` [T, H, D], ``key`` and ``value`` [T, G, D] -> [T, H * D]."""
        blocks = packed_seq_params.blocks
        if rope := self.rope:
            table, positions = packed_seq_params.tables[rope], packed_seq_params.positions
            query, key = (rotate(x, table, positions, rope.interleaved) for x in (query, key))
        if blocks.key_index is not None:
            # Keys and values in one collective. Its backward pass is a reduce-scatter, which sums over the ranks the
            # gradients of the keys that they all have read.
            pair = gather_from_sequence_parallel_region(torch.stack((key, value), 1), group=self.cp_group)
            key, value = pair.index_select(0, blocks.key_index).unbind(1)
        return blocks.attend(query, key, value, self.scale, self.form, self.softmax_offset, self.on_gpu).flatten(1)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the sinks as a checkpoint stores them: cut over tensor-parallel ranks."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
