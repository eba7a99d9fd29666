"""Routers and experts of SGLang's models, computed with :mod:`miles_spmd.invariant` as the trainer's are.

SGLang's layers have settings that these functions do not have. When a model is built, each router and each layer of
experts is described as a trainer's would be. A layer that has no such description is an error then.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from sglang.srt.layers.linear import ReplicatedLinear, RowParallelLinear
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput, StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput, TopK, TopKOutputFormat
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from torch import Tensor
from torch.nn import Module

from miles_spmd.invariant import experts
from miles_spmd.invariant.expert_activation import Biases
from miles_spmd.invariant.linear import linear_fp32
from miles_spmd.invariant.shared_experts import gate_scores
from miles_spmd.models.blocks.experts import ClampedSwiGLU, Experts, Router

# Importing these classes would import their models. Gates that return logits in fp32:
GATES = {("sglang.srt.models.deepseek_v2", "MoEGate"), ("sglang.srt.models.glm4_moe", "Glm4MoeGate")}
# Layers that add the output of shared experts to that of the others before both are summed over ranks:
ADD_SHARED_FIRST = {
    ("sglang.srt.models.deepseek_v2", "DeepseekV2MoE"),
    ("sglang.srt.models.glm4_moe", "Glm4MoeSparseMoeBlock"),
    ("sglang.srt.models.qwen2_moe", "Qwen2MoeSparseMoeBlock"),
}


def describe(model: Module) -> None:
    """Describe all routers and experts of a model that was just built. Raises ValueError naming every layer that cannot
    be described, and why."""
    names = {module: name for name, module in model.named_modules()}
    blocks = [block for block in names if any(isinstance(child, TopK | FusedMoE) for child in block.children())]
    problems = [f"{names[block]}: {problem}" for block in blocks for problem in _describe_block(block)]
    if problems:
        raise ValueError("this engine has no function for layers of the model; " + "; ".join(problems))


def route(layer: TopK, hidden_states: Tensor, router_logits: Tensor, **_: Any) -> StandardTopKOutput:
    weights, chosen = experts.choose(router_logits, layer.form, layer.topk_config.correction_bias)
    return StandardTopKOutput(weights, chosen, router_logits)


def mix(layer: Any, dispatch_output: StandardDispatchOutput) -> StandardCombineInput:
    """Return the weighted sum over those of a token's experts that this rank holds."""
    weights, chosen, _ = dispatch_output.topk_output
    biases = None
    if layer.form.bias:  # ranks that share experts add the second bias once
        biases = Biases(layer.w13_weight_bias, layer.w2_weight_bias if layer.moe_tp_rank == 0 else None)
    hidden = dispatch_output.hidden_states
    mixed = experts.mix(hidden, chosen, weights, layer.w13_weight, layer.w2_weight, layer.form, biases)
    return StandardCombineInput(mixed)


def add_gated(hidden: Tensor, gate: Tensor, shared: Tensor, routed: Tensor) -> None:
    """Add the gated output of a shared expert to ``routed``, in place; ``gate`` [H]."""
    routed.add_(gate_scores(hidden, gate[None]) * shared)


def _describe_block(block: Any) -> Iterator[str]:
    """Describe the router and the experts among the children of ``block``. Yields why one cannot be described."""
    routers = [child for child in block.children() if isinstance(child, TopK)]
    mixtures = [child for child in block.children() if isinstance(child, FusedMoE)]
    if len(routers) != 1 or len(mixtures) != 1:
        yield f"{len(routers)} routers and {len(mixtures)} layers of experts, instead of one of each"
        return
    router, mixture = routers[0], mixtures[0]
    yield from _unknown_router(router)
    yield from _unknown_experts(mixture)
    yield from _unknown_shared_experts(block, mixture)
    yield from _unknown_scale(block, router, mixture)
    gate: Any = getattr(block, "gate", None) or getattr(block, "router", None)
    if _class_of(gate) not in GATES and not isinstance(gate, ReplicatedLinear):
        yield f"the gate is a {type(gate).__name__}"
        return
    mixture.form = _experts(mixture)
    try:
        router.form = _router(router, gate, mixture)
    except ValueError as error:
        yield str(error)
        return
    if router.form.logit_dtype == "fp32":
        gate.forward = partial(_logits, gate, mixture.w13_weight.dtype)
    if hasattr(gate, "_use_tinygemm"):  # gpt-oss: another kernel for few rows
        gate._use_tinygemm = False
    # The router's weights contain the factor; models multiply by it afterwards, or let their kernels do so.
    if hasattr(block, "routed_scaling_factor"):
        block.routed_scaling_factor = 1.0


def _unknown_router(layer: TopK) -> Iterator[str]:
    config = layer.topk_config
    if config.custom_routing_function is not None:
        yield "a routing function of the model's own"
    if config.scoring_func not in ("softmax", "sigmoid"):
        yield f"scoring_func {config.scoring_func!r}"
    elif config.scoring_func == "softmax" and config.correction_bias is not None and not config.use_grouped_topk:
        yield "correction_bias with scoring_func 'softmax', which SGLang's kernels ignore"
    if config.num_fused_shared_experts:
        yield f"num_fused_shared_experts {config.num_fused_shared_experts}"
    if config.apply_routed_scaling_factor_on_output:
        yield "apply_routed_scaling_factor_on_output"
    if config.output_format not in (None, TopKOutputFormat.STANDARD):
        yield f"output_format {config.output_format.name}"


def _router(layer: TopK, gate: Any, mixture: FusedMoE) -> Router:
    """Raises ValueError for numbers that do not fit together."""
    config = layer.topk_config
    groups = (config.num_expert_group or 1) if config.use_grouped_topk else 1
    bias = config.correction_bias is not None
    # SGLang's choice by groups with a correction bias is DeepSeek-V3's, whatever scoring_func is
    softmax = config.scoring_func == "softmax" and not bias
    logits_last = softmax and config.renormalize and groups == 1
    own_dtype = _class_of(gate) not in GATES and gate.weight.dtype == mixture.w13_weight.dtype
    return Router(
        count=mixture.num_experts,
        per_token=config.top_k,
        scores="softmax" if softmax else "sigmoid",
        softmax_first=not logits_last,
        bias=bias,
        normalize=config.renormalize and not logits_last,
        groups=groups,
        groups_per_token=config.topk_group if groups > 1 else 1,
        best_of_group=2 if groups > 1 and bias else 1,
        scale=config.routed_scaling_factor or 1.0,
        logit_dtype="model" if own_dtype else "fp32",
        logit_bias=getattr(gate, "bias", None) is not None,
    )


def _unknown_experts(layer: FusedMoE) -> Iterator[str]:
    config = layer.moe_runner_config
    if type(layer.quant_method) is not UnquantizedFusedMoEMethod:
        yield f"experts are computed by {type(layer.quant_method).__name__}"
    if config.activation != "silu" or not config.is_gated:
        yield f"activation {config.activation!r}" + ("" if config.is_gated else " without a gate")
    if (config.gemm1_alpha is None) != (config.gemm1_clamp_limit is None):
        yield f"gemm1_alpha {config.gemm1_alpha} with gemm1_clamp_limit {config.gemm1_clamp_limit}"
    for name in ("apply_router_weight_on_input", "no_combine", "swiglu_limit", "num_fused_shared_experts"):
        if getattr(config, name):
            yield f"{name} {getattr(config, name)}"
    for name in ("use_triton_kernels", "use_flashinfer_trtllm_moe", "use_deep_gemm", "use_flashinfer_cutlass"):
        if getattr(layer.quant_method, name, False):
            yield f"{name}, for which weights are in another order"


def _experts(layer: FusedMoE) -> Experts:
    config = layer.moe_runner_config
    if config.gemm1_alpha is None or config.gemm1_clamp_limit is None:
        return Experts(bias=layer.with_bias)
    activation = ClampedSwiGLU(config.gemm1_alpha, config.gemm1_clamp_limit)
    return Experts(activation, layer.with_bias, config.gate_up_interleaved)


def _unknown_shared_experts(block: Any, mixture: FusedMoE) -> Iterator[str]:
    shared = getattr(block, "shared_expert", None) or getattr(block, "shared_experts", None)
    if shared is None:
        return
    if not {(kind.__module__, kind.__name__) for kind in type(block).__mro__} & ADD_SHARED_FIRST:
        yield f"shared experts in a {type(block).__name__}"
    for layer in shared.modules():
        if isinstance(layer, RowParallelLinear) and (layer.reduce_results or layer.tp_size != block.tp_size):
            yield "shared experts that are not split over ranks as other experts are"
    if mixture.reduce_results:
        yield "shared experts beside experts that sum over ranks themselves"


def _unknown_scale(block: Any, router: TopK, mixture: FusedMoE) -> Iterator[str]:
    own = router.topk_config.routed_scaling_factor or 1.0
    for of, value in (
        ("the layer", getattr(block, "routed_scaling_factor", None)),
        ("the experts", mixture.moe_runner_config.routed_scaling_factor),
    ):
        if value not in (None, own):
            yield f"routed_scaling_factor {own} of the router, {value} of {of}"


def _class_of(module: Any) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def _logits(gate: Any, dtype: torch.dtype, hidden: Tensor, *_: Any, **__: Any) -> Any:
    """Return what ``gate`` does: logits in fp32. Weights in fp32 are copies of the trainer's, of the model's
    ``dtype``."""
    logits = linear_fp32(hidden.to(dtype), gate.weight.to(dtype), getattr(gate, "bias", None))
    return (logits, None) if isinstance(gate, ReplicatedLinear) else logits
