"""What a config.json may say of rotary positions, and what transformers takes where it says nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from miles_spmd.models import hf_config, load_family
from miles_spmd.models.hf_config import rope_parameters
from miles_spmd.models.rope import KINDS, Rope, rope_problems
from tests.models.published import LLAMA, QWEN3

COMMON = {"max_position_embeddings": 256}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.0],
    "long_factor": [2.0, 3],
}


def test_defaults_are_those_of_transformers() -> None:
    for table, ours in (
        ("rope_theta", hf_config.DEFAULT_THETA),
        ("partial_rotary_factor", hf_config.DEFAULT_PARTIAL),
    ):
        for model_type in {*ours, "llama", "mistral", "gemma2", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "olmo2"}:
            theirs = CONFIG_MAPPING[model_type](rope_parameters={"rope_type": "default"}).rope_parameters
            found = rope_parameters({"model_type": model_type, "rope_parameters": {"rope_type": "default"}})
            assert found[table] == theirs.get(table, 1), model_type
    assert CONFIG_MAPPING["phi3"]().original_max_position_embeddings == hf_config.DEFAULT_ORIGINAL["phi3"]


def test_layers_with_equal_positions_are_equal() -> None:
    one = Rope.of(COMMON | {"rope_theta": 10000}, 16)
    assert one == Rope.of(
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "max_position_embeddings": 8}, 16
    )
    assert len({one, Rope.of(COMMON, 16, interleaved=True), Rope.of(COMMON | {"partial_rotary_factor": 0.5}, 16)}) == 3
    assert Rope.of(COMMON | {"rope_scaling": LONGROPE}, 4).long_factor == (2.0, 3.0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_without_its_parameters(kind: str) -> None:
    problems = rope_problems(COMMON | {"rope_scaling": {"rope_type": kind, "mrope_section": [1]}}, 16)
    assert any(f"rope type {kind} has no mrope_section here" in problem for problem in problems)
    assert len(problems) == {"default": 1, "linear": 2, "dynamic": 2, "yarn": 2, "llama3": 4, "longrope": 3}[kind]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "su"}}, "rope type 'su' is not supported"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "rope type default has no factor here"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "the factor of rope type linear must be a positive"),
        ({"rope_scaling": {"rope_type": "dynamic"}, "head_dim": 2}, "dynamic is not supported for 2 dimensions"),
        (
            {"rope_scaling": YARN | {"beta_fast": -1}},
            "the beta_fast of rope type yarn must be a positive number, not -1",
        ),
        ({"rope_scaling": {"rope_type": "yarn"}}, "the factor of rope type yarn is missing"),
        ({"rope_scaling": YARN | {"truncate": 1}}, "truncate must be true or false, not 1"),
        ({"rope_scaling": YARN | {"attn_factor": 1.0}}, "rope type yarn has no attn_factor here"),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 32},
            "rope_scaling.original_max_position_embeddings is 64 and original_max_position_embeddings is 32",
        ),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 6.5}}, "must be an integer, not 6.5"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "the low_freq_factor of rope type llama3 must be"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4}}, "low_freq_factor and high_freq_factor must differ"),
        ({"rope_scaling": LONGROPE, "head_dim": 16}, "the short_factor of rope type longrope has 2 numbers for 8"),
        ({"rope_scaling": LONGROPE | {"long_factor": [1, 0]}}, r"must be a list of positive numbers, not \[1, 0\]"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5 of head_dim = 4 is not an even number"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25 of head_dim = 4 is not an even number"),
        ({"partial_rotary_factor": None}, "partial_rotary_factor must be a positive number, not None"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}, "partial_rotary_factor": 1},
            "rope_parameters.partial_rotary_factor is 0.5 and partial_rotary_factor is 1",
        ),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    config = COMMON | changes
    assert re.search(message, "; ".join(rope_problems(config, config.get("head_dim", 4))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "default"}}, "must have a table for each type of layer, not rope_type"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}, "rope_theta": 6.0},
            "rope_parameters.full_attention.rope_theta is 5.0 and rope_theta is 6.0",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}, "rope_scaling": YARN},
            r"rope_scaling and rope_parameters.full_attention differ in rope_type \('yarn' and 'default'\)",
        ),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate = false in a table by type of layer is not supported"),
    ],
)
def test_refused_by_type_of_layer(changes: dict[str, Any], message: str) -> None:
    assert re.search(message, "; ".join(rope_problems(COMMON | changes, 16, layer_type="full_attention")))
    sliding = COMMON | {"rope_parameters": {"sliding_attention": {"rope_theta": 5.0}}, "rope_local_base_freq": 6.0}
    (problem,) = rope_problems(sliding, 16, layer_type="sliding_attention")
    assert problem.startswith("rope_parameters.sliding_attention.rope_theta is 5.0 and rope_local_base_freq is 6.0")


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, 8192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"rope_type": "longrope", "original_max_position_embeddings": 4096}, 4096),
        ({"rope_type": "longrope", "original_max_position_embeddings": 16384}, 8192),
    ],
)
def test_no_sequence_has_other_positions_than_in_transformers(scaling: dict[str, Any], longest: int) -> None:
    factors = {name: [2.0] * 64 for name in ("short_factor", "long_factor") if scaling["rope_type"] == "longrope"}
    family = load_family(LLAMA | {"max_position_embeddings": 8192, "rope_scaling": scaling | factors})
    assert family.max_sequence_length == longest
    assert {family.rope(layer) for layer in range(family.num_layers)} == {family.rope(0)}


def test_published_yarn_recipe() -> None:
    """Qwen's, by the older name of the kind."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    rope = load_family(QWEN3 | {"rope_scaling": scaling}).rope(0)
    assert (rope.kind, rope.factor, rope.original_length, rope.beta_fast, rope.beta_slow) == ("yarn", 4.0, 32768, 32, 1)
    assert rope.attention_factor == pytest.approx(1.1386294361119891)
