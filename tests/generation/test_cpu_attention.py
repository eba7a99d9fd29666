"""Batched attention against a plain loop in float64, over SGLang's own cache."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from miles_spmd.invariant.attention import PaddedAttention
from miles_spmd.models.attention import PLAIN, Form
from tests.generation.conformance import engine_of
from tests.invariant import attention_oracle
from tests.invariant.both_ways import both_ways, kernels
from tests.ranks import Ranks

Lengths = list[tuple[int, int]]  # (already cached, new) per request


def attend(runner: Any, lengths: Lengths, decoding: bool, form: Form = PLAIN, with_sinks: bool = False) -> None:
    """Random queries, keys and values; request i owns scattered cache slots, like after hours of traffic."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    layer, backend, pool = runner.model.model.layers[1].self_attn.attn, runner.attn_backend, runner.token_to_kv_pool
    layer.sliding_window_size, layer.logit_cap = form.window - 1, form.softcap  # SGLang's do not count the query
    heads, kv_heads, dim = layer.tp_q_head_num, layer.tp_k_head_num, layer.head_dim
    table = runner.req_to_token_pool.req_to_token
    generator = torch.Generator().manual_seed(len(lengths))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    totals = [cached + new for cached, new in lengths]
    slots = (torch.randperm(sum(totals), generator=generator) + 1).split(totals)
    rows = torch.randperm(table.shape[0], generator=generator)[: len(lengths)]
    k, v = ([random(total, kv_heads, dim) for total in totals] for _ in range(2))
    buffers = pool.get_kv_buffer(layer.layer_id)
    for buffer in buffers:
        buffer.fill_(torch.nan)  # what is not this batch's must not matter
        buffer[0].zero_()
    for row, mine, (cached, _), keys, values in zip(rows, slots, lengths, k, v):
        table[row] = torch.randint(1, buffers[0].shape[0], table[row].shape, generator=generator)
        table[row, : len(mine)] = mine
        for buffer, tensor in zip(buffers, (keys, values)):
            buffer[mine[:cached]] = tensor[:cached]
    batch = SimpleNamespace(
        forward_mode=ForwardMode.DECODE if decoding else ForwardMode.EXTEND,
        seq_lens=torch.tensor(totals),
        seq_lens_cpu=torch.tensor(totals),
        extend_seq_lens_cpu=[new for _, new in lengths],
        req_pool_indices=rows,
        out_cache_loc=torch.cat([mine[cached:] for mine, (cached, _) in zip(slots, lengths)]),
    )
    q = random(sum(new for _, new in lengths), heads * dim)
    new_k, new_v = (torch.cat([t[cached:] for t, (cached, _) in zip(tensors, lengths)]) for tensors in (k, v))
    sinks = random(heads).bfloat16() if with_sinks else None  # SGLang's dtype of them
    backend.init_forward_metadata(batch)
    out = backend.forward(q, new_k, new_v, layer, batch, **({"sinks": sinks} if with_sinks else {}))

    queries = q.view(-1, heads, dim).split([new for _, new in lengths])
    expected = [attention_oracle.attention(*part, layer.scaling, form, sinks)[0] for part in zip(queries, k, v)]
    torch.testing.assert_close(out.view(-1, heads, dim).double(), torch.cat(expected), atol=2e-6, rtol=0)


EXTENDS: list[Lengths] = [
    [(0, 1)],
    [(0, 40)],
    [(0, 5), (0, 33), (0, 64), (0, 5)],
    [(37, 1), (0, 1), (36, 2), (3, 90), (0, 31), (120, 7)],
    [(i, 3) for i in range(0, 60, 4)],
]
FORMS = [(Form(1), False), (Form(33), True), (Form(0, 2.0), False), (Form(500, 2.0), True)]  # and whether with sinks
DECODES: list[Lengths] = [[(0, 1)], [(i, 1) for i in range(70)], [(159, 1), (31, 1), (32, 1), (63, 1), (64, 1)]]


def attend_all(folders: list[Path], with_kernels: bool) -> None:
    from miles_spmd.generation.sglang.cpu_attention import BatchedCpuAttention

    with kernels(with_kernels), engine_of("sglang", folders[0], max_running_requests=70) as engine:
        runner = engine._scheduler.tp_worker.model_runner
        assert isinstance(runner.attn_backend, BatchedCpuAttention)
        for lengths in EXTENDS:
            attend(runner, lengths, decoding=False)
        for lengths in DECODES:
            attend(runner, lengths, decoding=True)
        for layer in FORMS:
            attend(runner, EXTENDS[-2], False, *layer)
            attend(runner, DECODES[-1], True, *layer)
        assert isinstance(runner.attn_backend.attention, PaddedAttention) != with_kernels


@both_ways
def test_attention_of_every_token(ranks: Ranks, folders: list[Path], with_kernels: bool) -> None:
    ranks.run(1, attend_all, folders, with_kernels)
