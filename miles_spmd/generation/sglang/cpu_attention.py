"""Attention for SGLang on a CPU, in place of its ``torch_native`` backend, which computes one request at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from miles_spmd.generation.sglang.attention_form import form_of
from miles_spmd.invariant.attention import Attention, packed_attention

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner


def register() -> None:
    """Make SGLang construct this backend under the name ``torch_native``, for which it avoids Triton elsewhere."""
    register_attention_backend("torch_native")(BatchedCpuAttention)


class BatchedCpuAttention(TorchNativeAttnBackend):
    attention: Attention  # of the current batch, over slots of the cache

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__(model_runner)
        config, tp_size = model_runner.model_config, model_runner.ps.attn_tp_size
        self._heads = config.num_attention_heads // tp_size, config.get_num_kv_heads(tp_size)
        self._dim = config.head_dim

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        k_lens = forward_batch.seq_lens_cpu.tolist()
        decoding = forward_batch.forward_mode.is_decode_or_idle()
        q_lens = [1] * len(k_lens) if decoding else list(forward_batch.extend_seq_lens_cpu)
        table = self.req_to_token_pool.req_to_token  # int32 [requests, context]: cache slots of the requests' tokens
        in_use = torch.arange(max(k_lens)) < forward_batch.seq_lens_cpu[:, None]
        slots = table[forward_batch.req_pool_indices, : in_use.shape[1]].masked_select(in_use)
        dtype = self.token_to_kv_pool.dtype
        query, key = (torch.empty(0, heads, self._dim, dtype=dtype) for heads in self._heads)
        self.attention = packed_attention(q_lens, k_lens, query, key, slots)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write new k and v [tokens, kv_heads, dim] into the cache and attend; q and result [tokens, heads * dim].

        ``layer`` is causal self-attention, of one of the forms: the families refuse everything else. ``sinks`` [heads].
        """
        pool = self.token_to_kv_pool
        if save_kv_cache:
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        keys, values = pool.get_kv_buffer(layer.layer_id)
        query = q.view(len(q), -1, layer.head_dim)
        return self.attention(query, keys, values, layer.scaling, form_of(layer), sinks).flatten(1)
