from __future__ import annotations

import time
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_spmd.models import PADDING, Family, Piece, TensorLayout, load_family
from miles_spmd.models.layout import filled_shape, region, stack, whole
from miles_spmd.weights.copy_plan import Holding, Place, make_plan
from tests.models.parallel import megatron_names
from tests.models.published import QWEN3_MOE


def cuts(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    inner = draw(st.sets(st.integers(1, size - 1), max_size=2)) if size > 1 else set()
    return list(pairwise([0, *sorted(inner), size]))


@st.composite
def worlds(draw: st.DrawFn) -> tuple[dict[str, np.ndarray], list[Holding]]:
    """Tensors cut into a random grid, each cell on some ranks, some overlapping extras; targets are random windows."""
    size = draw(st.integers(1, 4))
    sources: list[list[TensorLayout]] = [[] for _ in range(size)]
    targets: list[list[TensorLayout]] = [[] for _ in range(size)]
    full = {}
    for number in range(draw(st.integers(1, 3))):
        name, shape = f"t{number}", tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=2)))
        full[name] = np.arange(np.prod(shape)).reshape(shape) + 1000 * (number + 1)
        for cell in product(*(cuts(draw, extent) for extent in shape)):
            for rank in draw(st.sets(st.integers(0, size - 1), min_size=1)):
                hold(sources[rank], name, cell, draw)
        for rank in draw(st.sets(st.integers(0, size - 1))):
            hold(sources[rank], name, random_window(draw, shape), draw)
        for rank in draw(st.lists(st.integers(0, size - 1), max_size=4)):
            hold(targets[rank], name, random_window(draw, shape), draw)
    for rank in draw(st.sets(st.integers(0, size - 1))):
        for layouts in (sources[rank], targets[rank]):
            layouts.append(TensorLayout(f"local{len(layouts)}", (Piece(PADDING, (0,), (1,), (2,)),)))
    hosts = draw(st.lists(st.sampled_from(["a", "b"]), min_size=size, max_size=size))
    return full, [Holding(host, s, t, {}) for host, s, t in zip(hosts, sources, targets)]


def random_window(draw: st.DrawFn, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    return [tuple(sorted(draw(st.sets(st.integers(0, n), min_size=2, max_size=2)))) for n in shape]


def hold(layouts: list[TensorLayout], name: str, window: list[tuple[int, int]], draw: st.DrawFn) -> None:
    """A local tensor with this window somewhere inside: behind a margin, or in a stack."""
    start, shape = tuple(low for low, _ in window), tuple(high - low for low, high in window)
    margin = tuple(draw(st.integers(0, 2)) for _ in shape)
    lead = tuple(draw(st.lists(st.integers(0, 2), max_size=1)))
    layouts.append(TensorLayout(f"local{len(layouts)}", (Piece(name, start, margin, shape, lead),)))


def without_padding(layouts: list[TensorLayout]) -> list[TensorLayout]:
    return [layout for layout in layouts if layout.pieces[0].name != PADDING]


def local_tensors(layouts: list[TensorLayout]) -> dict[str, np.ndarray]:
    return {layout.local_name: np.full(filled_shape(layout.pieces), -1) for layout in layouts}


@settings(max_examples=300, deadline=None)
@given(worlds())
def test_every_element_of_every_target_is_right(world: tuple[dict[str, np.ndarray], list[Holding]]) -> None:
    full, holdings = world
    held = [local_tensors(holding.sources) for holding in holdings]
    wanted = [local_tensors(holding.targets) for holding in holdings]
    for tensors, holding in zip(held, holdings):
        for layout in without_padding(holding.sources):
            (piece,) = layout.pieces
            place = region(piece.lead, piece.local, piece.shape)
            tensors[layout.local_name][place] = full[piece.name][region((), piece.start, piece.shape)]
    plans = [make_plan(holdings, rank) for rank in range(len(holdings))]
    writes = [{name: np.zeros_like(t) for name, t in tensors.items()} for tensors in wanted]
    for rank, plan in enumerate(plans):
        for copy in [*plan.local, *(c for copies in plan.receives.values() for c in copies)]:
            assert copy.target.rank == rank
            place = region(copy.target.lead, copy.target.start, copy.shape)
            taken = region(copy.source.lead, copy.source.start, copy.shape)
            wanted[rank][copy.target.tensor][place] = held[copy.source.rank][copy.source.tensor][taken]
            writes[rank][copy.target.tensor][place] += 1
        for source, copies in plan.receives.items():
            assert plans[source].sends[rank] == copies
        assert rank not in plan.receives
        padding = [layout for layout in holdings[rank].targets if layout not in without_padding(holdings[rank].targets)]
        assert plan.padding == [(Place(rank, layout.local_name, (), (1,)), (2,)) for layout in padding]
    for rank, holding in enumerate(holdings):
        for layout in without_padding(holding.targets):
            (piece,) = layout.pieces
            place = region(piece.lead, piece.local, piece.shape)
            expected = full[piece.name][region((), piece.start, piece.shape)]
            np.testing.assert_array_equal(wanted[rank][layout.local_name][place], expected)
            assert (writes[rank][layout.local_name][place] == 1).all()
            assert writes[rank][layout.local_name].sum() == expected.size


@settings(max_examples=100, deadline=None)
@given(worlds())
def test_what_a_rank_holds_it_does_not_receive(world: tuple[dict[str, np.ndarray], list[Holding]]) -> None:
    full, holdings = world
    for rank, holding in enumerate(holdings):
        own = {name: np.zeros(tensor.shape, bool) for name, tensor in full.items()}
        for layout in without_padding(holding.sources):
            for piece in layout.pieces:
                own[piece.name][region((), piece.start, piece.shape)] = True
        start_of = {layout.local_name: layout.pieces[0] for layout in holding.targets}
        for copies in make_plan(holdings, rank).receives.values():
            for copy in copies:
                piece = start_of[copy.target.tensor]
                at = tuple(s + t - p for s, t, p in zip(piece.start, copy.target.start, piece.local))
                assert not own[copy.name][region((), at, copy.shape)].any()


def test_what_nobody_holds_is_named() -> None:
    sources = [TensorLayout("local", stack([("w", 0, 3)], (4,)))]
    targets = [TensorLayout("fused", whole("w", (5, 4)))]
    with pytest.raises(
        ValueError, match=r"part of w that starts at \(3, 0\) with shape \(2, 4\), needed for fused on rank 0"
    ):
        make_plan([Holding("a", sources, targets, {})], 0)


def test_equal_holders_take_turns_and_the_same_host_comes_first() -> None:
    everything = [TensorLayout(f"l{i}", whole(f"w{i}", (2,))) for i in range(6)]
    hosts = ["a", "a", "b", "b", "b", "a"]
    holdings = [Holding(host, everything if rank < 4 else [], [], {}) for rank, host in enumerate(hosts)]
    targets = [TensorLayout(layout.local_name, layout.pieces) for layout in everything]
    for wanting, servers in ((4, {2: 3, 3: 3}), (5, {0: 3, 1: 3})):
        asked = [Holding(h.host, h.sources, targets if r == wanting else [], {}) for r, h in enumerate(holdings)]
        assert {r: len(copies) for r, copies in make_plan(asked, wanting).receives.items()} == servers


def test_a_thirty_billion_moe_on_eight_ranks_is_planned_in_seconds() -> None:
    """Qwen3-30B-A3B, trainer TP2 x DP4 with EP8, engine TP8: 19k checkpoint tensors, 150k target rectangles."""
    family = load_family(QWEN3_MOE)
    holdings = [Holding("a", trainer_rank(family, rank), engine_rank(family, rank), {}) for rank in range(8)]
    began = time.process_time()
    plan = make_plan(holdings, 3)
    assert time.process_time() - began < 10
    assert len(plan.receives) == 7
    received = sum(np.prod(copy.shape) for copies in plan.receives.values() for copy in copies)
    experts = 48 * 128 * 3 * 2048 * 768
    assert received >= experts // 8 * 7 // 8  # all of its share of the experts but those it trains itself
    assert received < family.num_parameters() // 8


def trainer_rank(family: Family, rank: int) -> list[TensorLayout]:
    shapes = {
        "embedding": (75968, 2048),
        "output_layer": (75968, 2048),
        "router": (128, 2048),
        "linear_proj": (2048, 2048),
    }
    shapes |= {"linear_qkv": (2560, 2048), "experts.gate_up": (16, 2, 768, 2048), "experts.down": (16, 2048, 768)}
    shapes |= {"q_layernorm": (128,), "k_layernorm": (128,)}
    layouts = []
    place = {"tp_rank": rank % 2, "tp_size": 2, "ep_rank": rank, "ep_size": 8}
    for name in megatron_names(family, range(48), experts=True):
        shape = next((s for key, s in shapes.items() if key in name), (2048,))
        layouts.append(TensorLayout(name, family.megatron_layout(name, shape, **place)))
    return layouts


def engine_rank(family: Family, rank: int) -> list[TensorLayout]:
    shapes = {"model.embed_tokens.weight": (18992, 2048), "lm_head.weight": (18992, 2048), "model.norm.weight": (2048,)}
    for layer in range(48):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (2048,),
            f"{prefix}post_attention_layernorm.weight": (2048,),
            f"{prefix}self_attn.qkv_proj.weight": (768, 2048),
            f"{prefix}self_attn.o_proj.weight": (2048, 512),
            f"{prefix}self_attn.q_norm.weight": (128,),
            f"{prefix}self_attn.k_norm.weight": (128,),
            f"{prefix}mlp.gate.weight": (128, 2048),
            f"{prefix}mlp.experts.w13_weight": (128, 192, 2048),
            f"{prefix}mlp.experts.w2_weight": (128, 2048, 96),
        }
    return [TensorLayout(name, family.sglang_layout(name, shape, rank, 8)) for name, shape in shapes.items()]
