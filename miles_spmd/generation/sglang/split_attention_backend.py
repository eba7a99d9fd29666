"""Attention for SGLang on a GPU that splits keys as the trainer does, in place of SGLang's ``triton`` backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from sglang.srt.layers.attention.attention_registry import create_triton_backend, register_attention_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from torch import Tensor

from miles_spmd.generation.sglang.attention_form import form_of
from miles_spmd.invariant.split_attention import Keys, attend, decode, part_length

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner


def register(enabled: bool) -> None:
    """Make SGLang construct this backend under the name ``triton``, or, if not ``enabled``, its own again."""
    register_attention_backend("triton")(SplitAttention if enabled else create_triton_backend)


class SplitAttention(AttentionBackend):
    """Finds a request's keys through SGLang's own request-to-token table, so that CUDA graphs need no other tables."""

    needs_cpu_seq_lens = False

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        self._pool, self._table = runner.token_to_kv_pool, runner.req_to_token_pool.req_to_token
        self._longest = runner.model_config.context_len
        self._split = part_length(self._longest)
        # of the current batch: int32 [requests + 1], where a request's queries start; the most queries of a request
        self._starts, self._most = torch.zeros(1, dtype=torch.int32), 0
        self._slot_at = torch.zeros(1, dtype=torch.int64)  # [requests], where a request's slots start in the table

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None: ...

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        if forward_batch.forward_mode.is_decode_or_idle():
            return
        counts = np.asarray(forward_batch.extend_seq_lens_cpu)
        starts = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
        self._starts, self._most = torch.from_numpy(starts).to(self._table.device), int(counts.max())

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Compute once for all layers; part of the CUDA graph, so that a replay computes it again."""
        self._slot_at = forward_batch.req_pool_indices.long() * self._table.stride(0)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Write new k and v [tokens, kv_heads, dim] into the cache and attend; q and result [tokens, heads * dim].
        ``sinks`` [heads]."""
        if save_kv_cache:
            self._pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        keys, values = self._pool.get_kv_buffer(layer.layer_id)
        held = Keys(keys, values, forward_batch.seq_lens, self._table.view(-1), self._slot_at)
        query, what = q.view(len(q), -1, layer.head_dim), (layer.scaling, self._split, form_of(layer), sinks)
        if forward_batch.forward_mode.is_decode():
            return decode(query, held, self._longest, *what).flatten(1)
        return attend(query, held, self._starts, self._most, *what)[0].flatten(1)
