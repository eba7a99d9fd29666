"""Frequencies and tables of rotary positions against transformers and SGLang, and rotations against float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma3TextConfig, GlmConfig, LlamaConfig, Phi3Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from miles_spmd.invariant.operators import rotate
from miles_spmd.invariant.rope import frequencies, rotary_table
from miles_spmd.models.rope import Rope, rope_problems
from tests.ranks import Ranks

D, ORIGINAL, LONGEST = 64, 128, 512
COMMON = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": D, "max_position_embeddings": LONGEST}
SCALED = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
FACTORS = {"short_factor": [1 + i / 100 for i in range(D // 2)], "long_factor": [2.5 + i / 7 for i in range(D // 2)]}
TABLES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.1},
    "llama3": SCALED | {"rope_type": "llama3", "low_freq_factor": 1.5, "high_freq_factor": 5.0, "rope_theta": 5e5},
    "yarn": SCALED | {"rope_type": "yarn"},
    "yarn, every constant": SCALED
    | {"rope_type": "yarn", "beta_fast": 20, "beta_slow": 2, "truncate": False, "rope_theta": 15e4},
    "yarn, mscale": SCALED | {"rope_type": "yarn", "mscale": 0.7, "mscale_all_dim": 1.1},
    "yarn, own factor": SCALED | {"rope_type": "yarn", "attention_factor": 1.3},
    "yarn of the lengths": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": ORIGINAL},
    "longrope": FACTORS | {"rope_type": "longrope", "original_max_position_embeddings": ORIGINAL},
    "longrope, own factor": FACTORS | SCALED | {"rope_type": "longrope", "attention_factor": 1.2},
}


def of_transformers(module: torch.nn.Module, length: int, **options: Any) -> Tensor:
    """The table of a rotary module of transformers: it has every cosine and sine twice."""
    cos, sin = module(torch.zeros(1), torch.arange(length)[None], **options)
    return torch.cat([cos[0, :, : cos.shape[-1] // 2], sin[0, :, : sin.shape[-1] // 2]], -1)


def ours(config: dict[str, Any], context: int, length: int = 0, **options: Any) -> Tensor:
    assert rope_problems(config, D, layer_type=options.get("layer_type", "")) == []
    rope = Rope.of(config, D, **options)
    return rotary_table(frequencies(rope, context), length or context, rope.attention_factor)


def llama(table: dict[str, Any]) -> LlamaRotaryEmbedding:
    return LlamaRotaryEmbedding(LlamaConfig(**COMMON, rope_parameters=dict(table)))


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("context", [ORIGINAL, LONGEST])
def test_tables_are_those_of_transformers(table: dict[str, Any], context: int) -> None:
    """Bitwise: frequencies, cosines and sines are of the same operations on the same CPU."""
    assert torch.equal(ours(COMMON | {"rope_parameters": table}, context), of_transformers(llama(table), context))


def test_kinds_by_length_have_one_table() -> None:
    """Where transformers has another one for another length, it is that of the context."""
    longrope, dynamic = (COMMON | {"rope_parameters": TABLES[name]} for name in ("longrope", "dynamic"))
    theirs = llama(TABLES["longrope"])
    short, long = of_transformers(theirs, ORIGINAL), of_transformers(theirs, ORIGINAL + 1)
    assert torch.equal(ours(longrope, ORIGINAL, 100), short[:100])
    assert torch.equal(ours(longrope, ORIGINAL + 1, 100), long[:100])
    assert Rope.of(longrope, D).exact_length == ORIGINAL
    assert Rope.of(dynamic, D).exact_length == LONGEST
    # transformers computes the growing theta in fp32, for a length that is a tensor there
    torch.testing.assert_close(
        ours(dynamic, LONGEST + 88), of_transformers(llama(TABLES["dynamic"]), LONGEST + 88), rtol=0, atol=2e-4
    )
    assert Rope.of(COMMON, D).exact_length is None


def test_partial_and_interleaved_models() -> None:
    for config, module in (
        (GlmConfig(**COMMON), GlmRotaryEmbedding),
        (GlmConfig(**COMMON, partial_rotary_factor=0.25, rope_theta=77.0), GlmRotaryEmbedding),
        (Phi3Config(**COMMON, partial_rotary_factor=0.75), Phi3RotaryEmbedding),
    ):
        assert torch.equal(ours(config.to_dict(), LONGEST), of_transformers(module(config), LONGEST))
    assert Rope.of({"model_type": "glm"}, D).rotary_dim == D // 2


GEMMA = COMMON | {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}


@pytest.mark.parametrize(
    "spelled",
    [
        {},
        {"rope_theta": 5e5, "rope_local_base_freq": 5e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {
            "rope_parameters": {
                "full_attention": SCALED | {"rope_type": "yarn", "rope_theta": 2e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
            }
        },
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2}}, "rope_theta": 4e5},
    ],
    ids=["defaults", "older", "today's", "one table"],
)
def test_tables_by_type_of_layer(spelled: dict[str, Any]) -> None:
    config = Gemma3TextConfig(**GEMMA, **copy.deepcopy(spelled))
    module = Gemma3RotaryEmbedding(config)
    for layer_type in ("full_attention", "sliding_attention"):
        expected = of_transformers(module, LONGEST, layer_type=layer_type)
        for source in (GEMMA | spelled, config.to_dict()):
            assert torch.equal(ours(source, LONGEST, layer_type=layer_type), expected)


def compare_with_sglang() -> list[str]:
    """Return the kinds whose tables are bitwise those of SGLang; its rotations are, of any."""
    from sglang.srt.layers.rotary_embedding import get_rope
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", device="cpu"))
    equal = []
    for kind, table in TABLES.items():
        for width, neighbours in ((D, False), (D // 2, True)):
            if kind.startswith(("dynamic", "longrope")) or "factor" in kind or "lengths" in kind:
                continue
            module = get_rope(
                D, width, LONGEST, table.get("rope_theta", 1e4), not neighbours, dict(table), torch.float32
            )
            found = ours(COMMON | {"rope_parameters": table | {"partial_rotary_factor": width / D}}, LONGEST)
            theirs = module.cos_sin_cache[:LONGEST]
            equal += [kind] * torch.equal(found, theirs)
            torch.testing.assert_close(found, theirs, rtol=0, atol=6e-5)  # an ulp of an angle of up to 512

            positions = torch.arange(40).mul(11) % LONGEST
            x = torch.randn(40, 3 * D, generator=torch.Generator().manual_seed(0))
            expected, _ = module.forward_native(positions, x.clone(), x.clone())
            assert torch.equal(rotate(x.view(40, 3, D), theirs, positions, neighbours).flatten(1), expected)
    return equal


def test_tables_are_those_of_sglang(ranks: Ranks) -> None:
    """Bitwise, except that SGLang divides places by a linear factor where transformers divides frequencies. Its tables
    of dynamic and longrope are others (of a multiple of the context, and of two lengths), and it has no attention
    factor of a model's own."""
    (equal,) = ranks.run(1, compare_with_sglang)
    assert set(equal) == {"default", "llama3", "yarn", "yarn, every constant", "yarn, mscale"}
    assert all(equal.count(kind) == 2 for kind in equal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [D, D // 2, 6])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation(dtype: torch.dtype, width: int, interleaved: bool) -> None:
    """Forward and backward, against complex numbers in float64 and their gradient."""
    generator = torch.Generator().manual_seed(width)
    wide = torch.randn(30, 5, D, generator=generator).to(dtype)
    x = wide[:, 1:4].detach().requires_grad_()  # a slice, as queries are of one product
    gradient = torch.randn(x.shape, generator=generator).to(dtype)
    positions = torch.randperm(50, generator=generator)[:30]
    steps = frequencies(Rope(1e4, width), 50)
    y = rotate(x, rotary_table(steps, 50, 1.2), positions, interleaved)
    y.backward(gradient)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert torch.equal(y[..., width:], x[..., width:])

    exact = x.detach().double().requires_grad_()
    side = -1 if interleaved else -2
    pairs = exact[..., :width].unflatten(-1, (-1, 2) if interleaved else (2, -1))
    angles = (positions[:, None].float() * steps).double()[:, None]  # which are rounded to fp32
    turned = torch.complex(*pairs.unbind(side)) * torch.polar(torch.full_like(angles, 1.2), angles)
    expected = torch.stack([turned.real, turned.imag], side).flatten(-2)
    expected = torch.cat([expected, exact[..., width:]], -1)
    expected.backward(gradient.double())
    tolerance = 2e-6 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=0, atol=tolerance)
