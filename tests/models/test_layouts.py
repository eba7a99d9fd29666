from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from miles_spmd.models import PADDING, Family, Piece, load_family
from miles_spmd.models.layout import check_filled, region
from tests.models import parallel, tiny


@pytest.fixture(scope="module", params=tiny.CONFIGS)
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
def test_megatron_rectangles(model: tuple[Family, dict[str, Tensor]], tp_size: int) -> None:
    family, state = model
    experts = range(family.config.get("num_local_experts", 0))
    seen = set()
    for name in parallel.megatron_names(family, range(family.num_layers), experts):
        for rank in range(tp_size):
            local = parallel.megatron_tensor(state, family, name, rank, tp_size, rank, tp_size)
            place = {"tp_rank": rank, "tp_size": tp_size, "etp_rank": rank, "etp_size": tp_size}
            pieces = family.megatron_layout(name, tuple(local.shape), **place)
            check_filled(name, tuple(local.shape), pieces)
            assert torch.equal(assemble(state, tuple(local.shape), pieces), local), (name, rank)
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


TRANSFORMER_ENGINE = {
    "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.1.input_layernorm.weight",
    "decoder.layers.1.mlp.linear_fc1.layer_norm_weight": "decoder.layers.1.pre_mlp_layernorm.weight",
    "decoder.layers.1.mlp.experts.linear_fc1.weight3": "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight",
    "decoder.layers.1.mlp.experts.linear_fc2.weight3": "decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight",
}


@pytest.mark.parametrize("name", TRANSFORMER_ENGINE)
def test_transformer_engine_names(name: str) -> None:
    family = load_family(tiny.build("qwen3_moe").config.to_dict())
    shape = {"fc1.weight3": (48, 32), "fc2.weight3": (32, 24)}.get(name.rpartition("linear_")[2], (32,))
    place = {"tp_rank": 0, "tp_size": 1}
    expected = family.megatron_layout(TRANSFORMER_ENGINE[name], shape, **place)
    assert family.megatron_layout(name, shape, **place) == expected


@pytest.mark.parametrize(
    ("name", "shape", "tp_size", "message"),
    [
        ("decoder.layers.0.mlp.linear_fc1.weight", (96, 32), 2, r"has shape \(96, 32\).*rank 0 of 2.*needs \(48, 32\)"),
        ("decoder.layers.0.mlp.linear_fc1.weight", (32, 32), 5, "48 is not divisible by a tensor-parallel size of 5"),
        ("decoder.layers.4.mlp.linear_fc1.weight", (96, 32), 1, "no counterpart"),
        ("decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight", (96, 32), 1, "no counterpart"),
        ("decoder.layers.0.self_attention.linear_qkv.bias", (128,), 1, "no counterpart in a qwen3 checkpoint"),
        ("decoder.layers.0.rotary.weight", (3,), 1, "no counterpart"),
        ("embedding.word_embeddings.weight", (40, 32), 2, "2 times 40 rows do not hold a vocabulary of 97"),
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
