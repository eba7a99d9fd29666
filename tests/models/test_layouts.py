from __future__ import annotations

from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from miles_spmd.models import PADDING, Family, Piece, load_family
from miles_spmd.models.layout import check_filled, region
from tests.models import parallel, tiny


@pytest.fixture(scope="module", params=tiny.BY_HAND)
def model(request: pytest.FixtureRequest) -> tuple[Family, dict[str, Tensor]]:
    folder = tiny.checkpoint(request.param)
    return load_family(folder), load_file(folder / "model.safetensors")


def assemble(state: dict[str, Tensor], shape: tuple[int, ...], pieces: tuple[Piece, ...]) -> Tensor:
    tensor = torch.full(shape, torch.nan)
    for piece in pieces:
        value = state[piece.name][region((), piece.start, piece.shape)] if piece.name != PADDING else torch.zeros(())
        tensor[region(piece.lead, piece.local, piece.shape)] = value
    return tensor


@pytest.mark.parametrize("tp_size", [1, 2, 4])  # 4 > 2 KV heads: Megatron cuts a query group in two
@pytest.mark.parametrize("ep_size", [1, 2])
def test_megatron_rectangles(model: tuple[Family, dict[str, Tensor]], tp_size: int, ep_size: int) -> None:
    family, state = model
    experts = family.config.get("num_local_experts", 0)
    seen = set()
    for name in parallel.megatron_names(family, range(family.num_layers), experts > 0):
        for rank, ep_rank in product(range(tp_size), range(ep_size)):
            mine = range(ep_rank * experts // ep_size, (ep_rank + 1) * experts // ep_size)
            local = parallel.megatron_tensor(state, family, name, rank, tp_size, mine, rank, tp_size)
            place = {"tp_rank": rank, "tp_size": tp_size, "etp_rank": rank, "etp_size": tp_size}
            place |= {"ep_rank": ep_rank, "ep_size": ep_size}
            pieces = family.megatron_layout(name, tuple(local.shape), **place)
            check_filled(name, tuple(local.shape), pieces)
            assert torch.equal(assemble(state, tuple(local.shape), pieces), local), (name, rank, ep_rank)
            seen |= {piece.name for piece in pieces}
    assert seen - {PADDING} == set(state)


@pytest.mark.parametrize("tp_size", [1, 2, 4])  # 4 > 2 KV heads: two ranks hold the same KV head
def test_sglang_rectangles(model: tuple[Family, dict[str, Tensor]], tp_size: int) -> None:
    family, state = model
    seen = set()
    for name in parallel.sglang_names(family, "num_local_experts" in family.config):
        for rank in range(tp_size):
            local = parallel.sglang_tensor(state, family, name, rank, tp_size)
            pieces = family.sglang_layout(name, tuple(local.shape), rank, tp_size)
            check_filled(name, tuple(local.shape), pieces)
            assert torch.equal(assemble(state, tuple(local.shape), pieces), local), (name, rank)
            seen |= {piece.name for piece in pieces}
    assert seen - {PADDING} == set(state)


def test_sglang_experts_of_one_rank(model: tuple[Family, dict[str, Tensor]]) -> None:
    """With ``ep_size`` an engine's rank has whole experts, of which this is the second of two."""
    family, state = model
    if experts := family.config.get("num_local_experts", 0):
        for kind in ("w13", "w2"):
            name = f"model.layers.1.mlp.experts.{kind}_weight"
            local = parallel.sglang_tensor(state, family, name, 0, 1)[experts // 2 :]
            pieces = family.sglang_layout(name, tuple(local.shape), 1, 2)
            assert torch.equal(assemble(state, tuple(local.shape), pieces), local)


TRANSFORMER_ENGINE = {
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight", None),
    "mlp.linear_fc1.layer_norm_weight": ("pre_mlp_layernorm.weight", None),
    "mlp.experts.linear_fc1.weight1": ("mlp.experts.gate_up", (1, 48, 32)),
    "mlp.experts.linear_fc2.weight1": ("mlp.experts.down", (1, 32, 24)),
}


@pytest.mark.parametrize("name", TRANSFORMER_ENGINE)
def test_transformer_engine_names(name: str) -> None:
    """Experts 2 and 3 of 4 are here, of which the second is meant."""
    folder = tiny.checkpoint("qwen3_moe")
    family, state = load_family(folder), load_file(folder / "model.safetensors")
    local_name, stacked = TRANSFORMER_ENGINE[name]
    local = parallel.megatron_tensor(state, family, "decoder.layers.1." + local_name, 0, 1, range(3, 4))
    local = local if stacked is None else local.view(stacked)[0]
    place = {"tp_rank": 0, "tp_size": 1, "ep_rank": 1, "ep_size": 2}
    pieces = family.megatron_layout("decoder.layers.1." + name, tuple(local.shape), **place)
    assert torch.equal(assemble(state, tuple(local.shape), pieces), local)


@pytest.mark.parametrize(
    ("name", "shape", "tp_size", "message"),
    [
        ("decoder.layers.0.mlp.linear_fc1.weight", (96, 32), 2, r"has shape \(96, 32\).*rank 0 of 2.*needs \(48, 32\)"),
        ("decoder.layers.0.mlp.linear_fc1.weight", (32, 32), 5, "48 is not divisible by a tensor-parallel size of 5"),
        ("decoder.layers.4.mlp.linear_fc1.weight", (96, 32), 1, "no counterpart"),
        ("decoder.layers.0.mlp.experts.gate_up", (4, 2, 24, 32), 1, "no counterpart"),
        ("decoder.layers.0.self_attention.linear_qkv.bias", (128,), 1, "no counterpart in a qwen3 checkpoint"),
        ("decoder.layers.0.rotary.weight", (3,), 1, "no counterpart"),
        ("embedding.word_embeddings.weight", (40, 32), 2, "2 times 40 rows are too few for a vocabulary of 97"),
    ],
)
def test_megatron_refuses(name: str, shape: tuple[int, ...], tp_size: int, message: str) -> None:
    family = load_family(tiny.build("qwen3").config.to_dict())
    with pytest.raises(ValueError, match=message):
        family.megatron_layout(name, shape, tp_rank=0, tp_size=tp_size)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([((0, 0), (2, 4)), ((2, 0), (1, 4))], "filled in 12 of its 16 elements"),
        ([((0, 0), (2, 4)), ((1, 0), (2, 4)), ((3, 3), (1, 1))], "filled twice"),
        ([((0, 0), (4, 3)), ((1, 2), (2, 2))], "filled twice"),
        ([((0, 0), (5, 4))], "does not hold its piece"),
        ([((0,), (4,))], "does not hold its piece"),
    ],
)
def test_layouts_that_do_not_fill_their_tensor(pieces: list, message: str) -> None:
    described = tuple(Piece("w", start, start, shape) for start, shape in pieces)
    with pytest.raises(ValueError, match=message):
        check_filled("weight", (4, 4), described)
