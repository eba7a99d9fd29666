"""A layer's attention on ranks, with a window, a soft-cap and sinks, against one sequence at a time in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from miles_spmd.invariant.operators import rotate
from miles_spmd.invariant.rope import frequencies, rotary_table
from miles_spmd.models.attention import PLAIN, Form
from miles_spmd.models.blocks import Attention
from miles_spmd.models.rope import Rope
from miles_spmd.training.attention import PackedAttention, PackedSequences, make_blocks
from miles_spmd.training.megatron_config import NetworkConfig
from miles_spmd.training.parallel import initialize
from tests.invariant import attention_oracle
from tests.ranks import Ranks
from tests.training.cases import CP2, TP2
from tests.training.test_packing import zigzag

LENGTHS, HEADS, DIM = [12, 40, 4], (4, 2), 8
STARTS = [0, *itertools.accumulate(LENGTHS)]
ROPE = Rope(10000.0, DIM)
TABLE = rotary_table(frequencies(ROPE, max(LENGTHS)), max(LENGTHS), 1.0)
SINKS = Attention(32, *HEADS, DIM, ROPE, sinks=True)


def stream() -> list[Tensor]:
    """Queries, keys, values, the gradient of the result and sinks."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(STARTS[-1], heads, DIM, generator=generator) for heads in (*HEADS, HEADS[1], HEADS[0])]
    return [*tensors, torch.randn(HEADS[0], generator=generator)]


def attend(layout: dict[str, Any], forms: list[Form]) -> tuple[Any, ...]:
    """Return this rank's tokens and first heads; of each form results and gradients; and what a checkpoint has."""
    config = NetworkConfig(
        num_layers=1, hidden_size=32, num_attention_heads=HEADS[0], num_query_groups=HEADS[1], kv_channels=DIM,
        use_cpu_initialization=True, **layout,
    )  # fmt: skip
    where = initialize(config, 0)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layer = PackedAttention(config, groups, SINKS)
    mine = zigzag(STARTS, where.cp_rank, where.cp_size)
    *tensors, sinks = stream()
    shares = [x.shape[1] // where.tp_size for x in tensors]
    query, key, value, gradient = (
        x[mine, where.tp_rank * share : (where.tp_rank + 1) * share] for x, share in zip(tensors, shares)
    )
    firsts = [share * where.tp_rank for share in shares]
    layer.softmax_offset.data.copy_(sinks[firsts[0] : firsts[0] + shares[0]])
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[mine]
    blocks = make_blocks(LENGTHS, where.cp_rank, where.cp_size, torch.device("cpu"))
    packed = PackedSequences(blocks=blocks, positions=positions, tables={ROPE: TABLE})
    inputs = [query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), layer.softmax_offset]
    found = []
    for layer.form in forms:  # of layers that share a batch
        out = layer(query, key, value, packed_seq_params=packed)
        gradients = torch.autograd.grad(out, inputs, gradient.flatten(1))
        found.append([x.detach().numpy() for x in (out.view(gradient.shape), *gradients)])
    (saved,) = layer.sharded_state_dict("attention.").values()
    return mine.numpy(), firsts, found, (saved.key, saved.global_shape, saved.global_offset)


@pytest.mark.parametrize("layout", [{}, CP2, TP2], ids=["one", "CP2", "TP2"])
def test_forms_on_ranks(ranks: Ranks, layout: dict[str, Any]) -> None:
    forms = [Form(9), Form(0, 2.0), PLAIN, Form(9, 2.0)]
    per_rank = ranks.run(2 if layout else 1, attend, layout, forms)
    *tensors, sinks = stream()
    inputs = [x.double().requires_grad_() for x in (*tensors[:3], sinks)]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    for number, form in enumerate(forms):
        query, key = (rotate(x, TABLE.double(), positions) for x in inputs[:2])
        parts = zip(*(x.split(LENGTHS) for x in (query, key, inputs[2])))
        out = torch.cat([attention_oracle.attention(*part, DIM**-0.5, form, inputs[3])[0] for part in parts])
        expected = [out.detach(), *torch.autograd.grad(out, inputs, tensors[3].double())]
        sums = [np.zeros(x.shape) for x in expected]
        for mine, firsts, found, _ in per_rank:
            for total, first, x in zip(sums[:4], [firsts[0], *firsts[:3]], found[number]):
                total[mine, first : first + x.shape[1]] += x
            sums[4][firsts[0] : firsts[0] + len(found[number][4])] += found[number][4]
        for ours, theirs in zip(sums, expected):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6)
    offsets = [(0,), (2,)] if layout == TP2 else [(0,)] * len(per_rank)
    assert [saved for *_, saved in per_rank] == [("attention.softmax_offset", (4,), offset) for offset in offsets]


def test_sinks_exist_where_they_are_asked_for(ranks: Ranks) -> None:
    assert ranks.run(1, names_of_parameters) == [([], [])]


def names_of_parameters() -> tuple[list[str], list[str]]:
    config = NetworkConfig(num_layers=1, hidden_size=32, num_attention_heads=4, use_cpu_initialization=True)
    initialize(config, 0)
    without = replace(SINKS, sinks=False)
    layer = PackedAttention(config, ProcessGroupCollection.use_mpu_process_groups(), without)
    return [*layer.state_dict()], [*layer.sharded_state_dict()]
