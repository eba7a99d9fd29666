"""What parity asks of a model with experts beside what it asks of all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from miles_spmd.config.load import load_config
from tests.config.test_load import errors, recipe  # noqa: F401  (a fixture)


def reshaped(recipe: Path, shape: dict[str, Any]) -> Path:  # noqa: F811
    file = recipe.parent / "checkpoint" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | shape))
    return recipe


EXPERTS = {"num_experts": 8, "moe_intermediate_size": 40}
SP = "megatron.sequence_parallel=true"


def test_nothing_objects_to_experts(recipe: Path) -> None:  # noqa: F811
    load_config(reshaped(recipe, EXPERTS), ["parity=bitwise", "megatron.expert_model_parallel_size=2"], world_size=2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("megatron.moe_router_dtype=fp32", "megatron.moe_router_dtype: leave it out"),
        ("megatron.moe_router_topk_scaling_factor=2.5", "megatron.moe_router_topk_scaling_factor: leave it out"),
        ("megatron.moe_expert_capacity_factor=1.0", "megatron.moe_expert_capacity_factor: leave it out"),
        ("megatron.moe_router_load_balancing_type=sinkhorn", "load_balancing_type: leave it out"),
        ("sglang.moe_runner_backend=triton_kernel", "sglang.moe_runner_backend: parity needs 'auto'"),
        ("sglang.enable_eplb=true", "sglang.enable_eplb: parity needs False"),
        ("sglang.tp_size=2", "sglang.ep_size: parity needs tp_size, 2"),
        (f"megatron.tensor_model_parallel_size=2 {SP}", "megatron.expert_tensor_parallel_size: parity needs 1"),
        ("dtype=float32", "experts of width 40, which 32 does not divide"),
    ],
)
def test_an_obstacle_is_named(recipe: Path, overrides: str, message: str) -> None:  # noqa: F811
    found = errors(reshaped(recipe, EXPERTS), "parity=bitwise", *overrides.split(), world_size=2)
    assert any(message in error for error in found), found


def test_they_are_none_to_a_dense_model(recipe: Path) -> None:  # noqa: F811
    load_config(recipe, ["parity=bitwise", "megatron.moe_router_dtype=fp32", "sglang.enable_eplb=true"])
