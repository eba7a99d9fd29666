"""Routers and experts that an engine has no function for are errors when it is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from miles_spmd.platform import cpu

cpu.install()

import torch  # noqa: E402

from tests.invariant import moe_blocks  # noqa: E402
from tests.models import tiny  # noqa: E402
from tests.ranks import Ranks  # noqa: E402

# a path from the layer, and the value there -> what the message says
REFUSED: list[tuple[str, str, Any, str]] = [
    ("qwen2_moe", "topk.topk_config.scoring_func", "sqrtsoftplus", "scoring_func 'sqrtsoftplus'"),
    ("qwen2_moe", "topk.topk_config.custom_routing_function", max, "a routing function of the model's own"),
    ("qwen2_moe", "topk.topk_config.correction_bias", torch.zeros(8), "correction_bias with scoring_func 'softmax'"),
    ("qwen2_moe", "topk.topk_config.num_fused_shared_experts", 1, "num_fused_shared_experts 1"),
    ("qwen2_moe", "topk.topk_config.routed_scaling_factor", 2.0, ""),
    ("glm4_moe", "topk.topk_config.routed_scaling_factor", 2.0, "routed_scaling_factor 2.0 of the router, 2.5 of the"),
    ("glm4_moe", "topk.topk_config.apply_routed_scaling_factor_on_output", True, "scaling_factor_on_output"),
    ("deepseek_v3", "topk.topk_config.topk_group", 5, "2 experts cannot be chosen from 5 of 4 groups of 2"),
    ("qwen2_moe", "experts.moe_runner_config.activation", "gelu", "activation 'gelu'"),
    ("qwen2_moe", "experts.moe_runner_config.is_gated", False, "activation 'silu' without a gate"),
    ("qwen2_moe", "experts.moe_runner_config.apply_router_weight_on_input", True, "apply_router_weight_on_input"),
    ("qwen2_moe", "experts.moe_runner_config.swiglu_limit", 10.0, "swiglu_limit 10.0"),
    ("gpt_oss", "experts.moe_runner_config.gemm1_clamp_limit", None, "gemm1_alpha 1.702 with gemm1_clamp_limit None"),
    ("gpt_oss", "experts.quant_method", torch.nn.Identity(), "experts are computed by Identity"),
    ("minimax_m2", "gate", torch.nn.Linear(2, 2), "the gate is a Linear"),
    ("minimax_m2", "shared_experts", torch.nn.Linear(2, 2), "shared experts in a MiniMaxM2MoE"),
    ("qwen2_moe", "shared_expert.down_proj.reduce_results", True, "shared experts that are not split over ranks"),
    ("minimax_m2", "topk", torch.nn.Identity(), "0 routers and 1 layers of experts"),
]


def messages(folder: str) -> list[str]:
    """Return what is said of a layer of each kind with one value changed."""
    from miles_spmd.generation.sglang import process_groups
    from miles_spmd.generation.sglang.expert_layers import describe

    found = []
    for kind, path, value, _ in REFUSED:
        try:
            model = moe_blocks.build_engine_layer(moe_blocks.kinds()[kind], folder, 1, 1)
        finally:
            process_groups.leave()
        *parts, name = path.split(".")
        owner: Any = model.mlp
        for part in parts:
            owner = getattr(owner, part)
        setattr(owner, name, value)
        try:
            describe(model)
            found.append("")
        except ValueError as error:
            found.append(str(error))
    return found


def test_what_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    (found,) = ranks.run(1, messages, moe_blocks.write_config(tmp_path))
    for message, (_, path, value, expected) in zip(found, REFUSED, strict=True):
        assert bool(message) == bool(expected), (path, value, message)
        assert expected in message
        if message:
            assert message.startswith("this engine has no function for layers of the model; mlp: ")


def build_with_another_router(folder: str) -> str:
    from functools import partial

    from sglang.srt.layers.moe.topk import TopK
    from sglang.srt.models import qwen3_moe

    from miles_spmd.generation.sglang import process_groups
    from miles_spmd.generation.sglang.engine import SglangEngine

    qwen3_moe.TopK = partial(TopK, scoring_func="sqrtsoftplus")
    try:
        SglangEngine(folder, dtype="float32", context_length=32)
    except ValueError as error:
        return str(error)
    finally:
        qwen3_moe.TopK = TopK
        process_groups.leave()
    return ""


def test_an_engine_names_the_layers(ranks: Ranks) -> None:
    (message,) = ranks.run(1, build_with_another_router, str(tiny.checkpoint("qwen3_moe")))
    for layer in range(tiny.COMMON["num_hidden_layers"]):
        assert f"model.layers.{layer}.mlp: scoring_func 'sqrtsoftplus'" in message
