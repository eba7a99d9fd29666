"""What stands in the way of an engine and a trainer that route and mix experts alike, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from miles_spmd.config.parity_rules import VECTOR
from miles_spmd.config.rules import PARITY, rule


@rule(PARITY)
def _same_routing(
    moe_router_dtype: str | None,
    moe_router_load_balancing_type: str | list[str],
    moe_router_num_groups: int | None,
    moe_router_group_topk: int | None,
    moe_router_topk_scaling_factor: float | None,
    moe_router_enable_expert_bias: bool,
    moe_router_force_load_balancing: bool,
    moe_router_fusion: bool,
    moe_enable_routing_replay: bool,
    moe_input_jitter_eps: float | None,
    moe_expert_capacity_factor: float | None,
    shape: dict[str, Any],
) -> Iterator[str]:
    if not _has_experts(shape):
        return
    for name, value in (
        ("moe_router_dtype", moe_router_dtype),
        ("moe_router_num_groups", moe_router_num_groups),
        ("moe_router_group_topk", moe_router_group_topk),
        ("moe_router_topk_scaling_factor", moe_router_topk_scaling_factor),
        ("moe_router_enable_expert_bias", moe_router_enable_expert_bias),
        ("moe_router_force_load_balancing", moe_router_force_load_balancing),
        ("moe_router_fusion", moe_router_fusion),
        ("moe_enable_routing_replay", moe_enable_routing_replay),
        ("moe_input_jitter_eps", moe_input_jitter_eps),
        ("moe_expert_capacity_factor", moe_expert_capacity_factor),
        ("moe_router_load_balancing_type", "sinkhorn" in moe_router_load_balancing_type),
    ):
        if value:
            yield f"megatron.{name}: leave it out for parity; the engine routes without"


@rule(PARITY)
def _same_mixtures(
    moe_runner_backend: str,
    moe_a2a_backend: str,
    ep_num_redundant_experts: int,
    enable_eplb: bool,
    shape: dict[str, Any],
) -> Iterator[str]:
    if not _has_experts(shape):
        return
    for name, value, default in (
        ("moe_runner_backend", moe_runner_backend, "auto"),
        ("moe_a2a_backend", moe_a2a_backend, "none"),
        ("ep_num_redundant_experts", ep_num_redundant_experts, 0),
        ("enable_eplb", enable_eplb, False),
    ):
        if value != default:
            yield f"sglang.{name}: parity needs {default!r}; the trainer mixes experts in another way"


@rule(PARITY)
def _same_cut_of_experts(
    tp_size: int,
    ep_size: int,
    tensor_model_parallel_size: int,
    expert_tensor_parallel_size: int | None,
    dtype: str,
    shape: dict[str, Any],
) -> Iterator[str]:
    if not _has_experts(shape):
        return
    if ep_size != tp_size:
        yield f"sglang.ep_size: parity needs tp_size, {tp_size}; ranks that cut experts add up in an order of their own"
    if (expert_tensor_parallel_size or tensor_model_parallel_size) > 1:
        yield "megatron.expert_tensor_parallel_size: parity needs 1; what ranks have of an expert is added up too early"
    width = shape.get("moe_intermediate_size", 0)
    if dtype == "float32" and width % VECTOR:
        yield (
            f"determinism.parity: must be 'off' in float32 for a moe_intermediate_size of {width}, which {VECTOR} does "
            "not divide; the engine rounds the width up"
        )


def _has_experts(shape: dict[str, Any]) -> bool:
    return bool(shape.get("num_experts") or shape.get("num_local_experts"))
