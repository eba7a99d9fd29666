"""Batched attention for SGLang on a CPU, in place of its ``torch_native`` backend, which takes one request at a time.

Requests are sorted into buckets by their own lengths, rounded up. A bucket is one call of PyTorch's attention over keys
and values gathered from the cache and padded to the bucket's length. A request's bucket depends on nothing but itself,
and PyTorch's kernel treats every row of a batch alike, so the result does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from torch.nn.functional import scaled_dot_product_attention

_SHORTEST = 32  # keys are padded to at least this many
_LARGEST = 2**22  # requests x queries x keys of one bucket: long prompts are not given gigabytes of mask


def register() -> None:
    """Have SGLang build this backend under the name ``torch_native``, by which it decides what must avoid Triton."""
    register_attention_backend("torch_native")(BatchedCpuAttention)


class Size(NamedTuple):
    """Padded size of every request of a bucket."""

    queries: int
    keys: int
    fresh: bool  # nothing is cached yet, so that causal masking needs no mask


@dataclass
class Bucket:
    """n requests of one size; shared by all layers of a forward pass."""

    n: int
    size: Size
    gather: torch.Tensor  # int64 [n * queries]: row of each query in the flat batch; padding repeats a request's last
    real: torch.Tensor | None  # int64: which of ``gather`` are not padding; None: all
    slots: torch.Tensor  # int32 [n * keys]: cache slot of each key; padding points at slot 0, which SGLang leaves free
    mask: torch.Tensor | None  # additive, [n, 1, queries, keys]; None: causal


class BatchedCpuAttention(TorchNativeAttnBackend):
    buckets: list[Bucket]

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        k_lens = forward_batch.seq_lens_cpu.tolist()
        decode = forward_batch.forward_mode.is_decode_or_idle()
        q_lens = [1] * len(k_lens) if decode else list(forward_batch.extend_seq_lens_cpu)
        table = self.req_to_token_pool.req_to_token
        dtype = self.token_to_kv_pool.dtype
        self.buckets = list(make_buckets(q_lens, k_lens, table, forward_batch.req_pool_indices, dtype))

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        if not _is_plain(layer):
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        if not _is_plain(layer):
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
    ) -> torch.Tensor:
        """q [tokens, heads * dim] -> the same; new k and v [tokens, kv_heads, dim] enter the cache first."""
        pool = self.token_to_kv_pool
        if save_kv_cache and k is not None:
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc), k, v)
        keys, values = (buffer.flatten(1) for buffer in pool.get_kv_buffer(layer.layer_id))
        heads, kv_heads, dim = layer.tp_q_head_num, layer.tp_k_head_num, layer.head_dim
        q = q.reshape(-1, heads * dim)
        out = torch.empty_like(q)
        for b in self.buckets:
            cached = (b.n, b.size.keys, kv_heads, dim)
            bucket_k = keys.index_select(0, b.slots).view(cached).transpose(1, 2)
            bucket_v = values.index_select(0, b.slots).view(cached).transpose(1, 2)
            bucket_q = q.index_select(0, b.gather)
            if b.size.queries == 1:  # a group's heads are as good as several queries, and spare copies of the keys
                bucket_q = bucket_q.view(b.n, kv_heads, heads // kv_heads, dim)
            else:
                bucket_q = bucket_q.view(b.n, b.size.queries, heads, dim).transpose(1, 2)
            attended = scaled_dot_product_attention(
                bucket_q,
                bucket_k.to(q.dtype),
                bucket_v.to(q.dtype),
                attn_mask=b.mask,
                is_causal=b.mask is None,
                scale=layer.scaling,
                enable_gqa=bucket_q.shape[1] != kv_heads,
            )
            if b.size.queries > 1:
                attended = attended.transpose(1, 2)
            attended = attended.reshape(-1, heads * dim)
            if b.real is None:
                out.index_copy_(0, b.gather, attended)
            else:
                out.index_copy_(0, b.gather[b.real], attended[b.real])
        return out


def _is_plain(layer: RadixAttention) -> bool:
    """Causal self-attention over everything before, without extras: the rest is left to SGLang's own loop."""
    return (
        layer.attn_type == AttentionType.DECODER
        and not layer.is_cross_attention
        and layer.sliding_window_size == -1
        and layer.logit_cap == 0
        and layer.qk_head_dim == layer.v_head_dim
    )


def make_buckets(
    q_lens: list[int], k_lens: list[int], table: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype
) -> Iterator[Bucket]:
    """Sort a batch into buckets.

    Request i brings ``q_lens[i]`` new tokens and ``k_lens[i]`` in all; row ``rows[i]`` of ``table`` [requests, context]
    holds the cache slots of its tokens. Masks get ``dtype``, the queries'.
    """
    groups: dict[Size, list[int]] = defaultdict(list)
    for i, (q_len, k_len) in enumerate(zip(q_lens, k_lens)):
        keys = min(_padded(k_len, _SHORTEST), table.shape[1])
        groups[Size(_padded(q_len, 1), keys, fresh=q_len == k_len > 1)].append(i)
    starts = torch.tensor([0, *q_lens]).cumsum(0)
    q, k = torch.tensor(q_lens), torch.tensor(k_lens)
    for size, members in groups.items():
        most = max(1, _LARGEST // (max(size.queries, _SHORTEST) * size.keys))
        for first in range(0, len(members), most):
            index = torch.tensor(members[first : first + most])
            yield _bucket(size, starts[index], q[index], k[index], table, rows[index], dtype)


def _bucket(
    size: Size,
    start: torch.Tensor,
    q_len: torch.Tensor,
    k_len: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    dtype: torch.dtype,
) -> Bucket:
    n = len(start)
    query, key = torch.arange(size.queries), torch.arange(size.keys)
    gather = start[:, None] + torch.minimum(query, q_len[:, None] - 1)
    real = (query < q_len[:, None]).flatten()
    outside = key >= k_len[:, None]
    slots = table[rows, : size.keys].masked_fill(outside, 0)
    mask = None
    if not size.fresh:
        position = (k_len - q_len)[:, None] + query
        hidden = outside[:, None, :] | (key > position[:, :, None])
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf")).unsqueeze(1)
    return Bucket(
        n=n,
        size=size,
        gather=gather.flatten(),
        real=None if bool(real.all()) else real.nonzero().squeeze(1),
        slots=slots.flatten(),
        mask=mask,
    )


def _padded(length: int, shortest: int) -> int:
    """``length`` rounded up to a multiple of a quarter of the next power of two, so that at most a third is padding."""
    step = max(shortest, (1 << (length - 1).bit_length()) // 4)
    return -(-length // step) * step
