"""Batched attention for SGLang on a CPU, in place of its ``torch_native`` backend, which takes one request at a time.

Requests are sorted into buckets by their own lengths, rounded up. A bucket is one call of
:mod:`miles_spmd.invariant.attention` over keys and values gathered from the cache and padded to the bucket's length.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from torch.nn.functional import pad

from miles_spmd.invariant import compiled
from miles_spmd.invariant.attention import ROWS, STEP, Tile, attend, make_tiles

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

_LARGEST = 2**22  # requests x rows x keys of one bucket: long prompts are not given gigabytes of mask


def register() -> None:
    """Have SGLang build this backend under the name ``torch_native``, by which it decides what must avoid Triton."""
    register_attention_backend("torch_native")(BatchedCpuAttention)


@dataclass
class Bucket:
    """n requests, each padded to the same number of queries and of keys; shared by all layers of a forward pass."""

    n: int
    queries: int
    keys: int
    gather: torch.Tensor  # int64 [n * queries]: row of each query in the flat batch; padding repeats a request's last
    real: torch.Tensor  # int64 [tokens]: which of ``gather`` are not padding
    slots: torch.Tensor  # int32 [n * keys]: cache slot of each key; padding points at slot 0, which SGLang leaves free
    tiles: list[Tile]  # of queries * heads of a group


class BatchedCpuAttention(TorchNativeAttnBackend):
    paged: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = (
        None  # what :func:`locate` found, for the compiled kernel
    )
    buckets: list[Bucket]  # where there is none

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__(model_runner)
        config, tp_size = model_runner.model_config, model_runner.ps.attn_tp_size
        self._heads = config.get_num_kv_heads(tp_size)
        self._dim = config.head_dim
        self._group = config.num_attention_heads // tp_size // self._heads

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        k_lens = forward_batch.seq_lens_cpu.tolist()
        decoding = forward_batch.forward_mode.is_decode_or_idle()
        q_lens = [1] * len(k_lens) if decoding else list(forward_batch.extend_seq_lens_cpu)
        table, rows = self.req_to_token_pool.req_to_token, forward_batch.req_pool_indices
        dtype = self.token_to_kv_pool.dtype
        if compiled.takes(dtype, table.device, self._dim):
            self.paged = locate(q_lens, k_lens, table, rows)
        else:
            self.buckets = list(make_buckets(q_lens, k_lens, table, rows, self._heads, self._group, dtype))

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
        if self.paged is not None:
            query_starts, key_starts, slots = self.paged
            query, (key, value) = q.view(len(q), -1, layer.head_dim), pool.get_kv_buffer(layer.layer_id)
            out = compiled.attention(query, key, value, query_starts, key_starts, layer.scaling, slots)
            return out.view(len(q), -1)
        keys, values = (buffer.flatten(1) for buffer in pool.get_kv_buffer(layer.layer_id))
        kv_heads, group, dim = layer.tp_k_head_num, self._group, layer.head_dim
        q = q.reshape(-1, kv_heads * group * dim)
        out = torch.empty_like(q)
        for b in self.buckets:
            cached = (b.n, b.keys, kv_heads, dim)
            bucket_k = keys.index_select(0, b.slots).view(cached).transpose(1, 2)
            bucket_v = values.index_select(0, b.slots).view(cached).transpose(1, 2)
            # The query heads that share a key head stand side by side like so many queries: no key is copied for them.
            bucket_q = q.index_select(0, b.gather).view(b.n, b.queries, kv_heads, group, dim).transpose(1, 2)
            bucket_q = bucket_q.reshape(b.n, kv_heads, b.queries * group, dim)
            attended = attend(bucket_q, bucket_k, bucket_v, b.tiles, layer.scaling)
            attended = attended.view(b.n, kv_heads, b.queries, group, dim).transpose(1, 2).reshape(len(b.gather), -1)
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


def locate(
    q_lens: list[int], k_lens: list[int], table: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where each request's queries and keys begin, int64 [requests + 1] each, and the cache slots of all keys, int32.
    Arguments as for :func:`make_buckets`."""
    seen = torch.arange(max(k_lens)) < torch.tensor(k_lens)[:, None]
    query_starts, key_starts = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (q_lens, k_lens))
    return query_starts, key_starts, table[rows, : seen.shape[1]].masked_select(seen)


def make_buckets(
    q_lens: list[int],
    k_lens: list[int],
    table: torch.Tensor,
    rows: torch.Tensor,
    heads: int,
    group: int,
    dtype: torch.dtype,
) -> Iterator[Bucket]:
    """Sort a batch into buckets.

    Request i brings ``q_lens[i]`` new tokens and has ``k_lens[i]`` in all; row ``rows[i]`` of ``table`` [requests,
    context] holds the cache slots of its tokens. ``group`` query heads share one of ``heads`` key heads; masks get
    ``dtype``.
    """
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    fewest = -(-ROWS // group)
    for i, (q_len, k_len) in enumerate(zip(q_lens, k_lens)):
        members[_padded(q_len, fewest), _padded(k_len, STEP)].append(i)
    starts = torch.tensor([0, *q_lens]).cumsum(0)
    q, k = torch.tensor(q_lens), torch.tensor(k_lens)
    for (queries, keys), together in members.items():
        most = max(1, _LARGEST // (queries * group * keys))
        for first in range(0, len(together), most):
            index = torch.tensor(together[first : first + most])
            gather, real, seen = _layout(queries, starts[index], q[index], k[index])
            slots = pad(table[rows[index], :keys], (0, max(0, keys - table.shape[1])))
            slots = slots.masked_fill(torch.arange(keys) >= k[index, None], 0)
            tiles = make_tiles(seen.repeat_interleave(group, 1), heads, keys, dtype)
            yield Bucket(len(index), queries, keys, gather, real, slots.flatten(), tiles)


def _layout(
    queries: int, start: torch.Tensor, q_len: torch.Tensor, k_len: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``gather`` and ``real`` of a :class:`Bucket`, and how many keys each query sees, [n, queries]."""
    query = torch.minimum(torch.arange(queries), q_len[:, None] - 1)
    real = (torch.arange(queries) < q_len[:, None]).flatten().nonzero().squeeze(1)
    return (start[:, None] + query).flatten(), real, (k_len - q_len + 1)[:, None] + query


@cache
def _padded(length: int, shortest: int) -> int:
    """``length`` rounded up to a multiple of a quarter of the next power of two, so that at most a third is padding."""
    step = max(shortest, (1 << (length - 1).bit_length()) // 4)
    return -(-length // step) * step
