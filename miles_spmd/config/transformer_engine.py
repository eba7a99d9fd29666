"""Transformer Engine and FP8 in the trainer: what `megatron.transformer_impl` and `megatron.fp8` need."""

from __future__ import annotations

import importlib.util

from miles_spmd.config.model import has_experts
from miles_spmd.config.rules import ERRORS, FILES, Messages, Settings, rule
from miles_spmd.models.hf_config import head_dim

FP8_BLOCKS = {"blockwise": 128, "tensorwise": 16}  # what has to divide both dimensions of a matrix, by recipe


@rule(ERRORS)
def _transformer_engine(s: Settings) -> Messages:
    if s.transformer_impl == "inference_optimized":
        yield "megatron.transformer_impl: 'inference_optimized' cannot train; take 'local' or 'transformer_engine'"
    if s.transformer_impl != "transformer_engine":
        return
    if s.dtype != "bfloat16":
        yield f"megatron.transformer_impl: 'transformer_engine' needs model.dtype = 'bfloat16', not {s.dtype!r}"
    if s.reduction_leaves:
        yield (
            "train.reduction_leaves: needs megatron.transformer_impl = 'local'; the gradients of Transformer Engine's "
            "attention are summed in an order that varies"
        )
    if s.tp_comm_overlap:
        yield "megatron.tp_comm_overlap: must be false; the trainer sets up no communication buffers for it"
    if s.fp4:
        yield "megatron.fp4: is not supported; take fp8"


@rule(FILES)
def _transformer_engine_is_installed(s: Settings) -> Messages:
    if s.transformer_impl == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        yield (
            "megatron.transformer_impl: the package transformer_engine is not installed; docs/gpu.md describes how to "
            "install it, and 'local' does not need it"
        )


@rule(ERRORS)
def _fp8(s: Settings) -> Messages:
    if not s.fp8:
        return
    if s.transformer_impl != "transformer_engine":
        yield "megatron.fp8: needs megatron.transformer_impl = 'transformer_engine'"
    if s.fp8_recipe == "delayed":
        yield (
            "megatron.fp8_recipe: 'delayed' makes log-probs depend on what was computed before, with other weights; "
            "take 'blockwise' or 'tensorwise'"
        )
    elif s.fp8_recipe not in FP8_BLOCKS:
        yield f"megatron.fp8_recipe: {s.fp8_recipe!r} is not supported; take 'blockwise' or 'tensorwise'"
    for name in ("fp8_param", "fp8_param_gather"):
        if s[name]:
            yield f"megatron.{name}: must be false; the engine receives the weights in model.dtype"
    for name in ("fp8_dot_product_attention", "fp8_multi_head_attention"):
        if s[name]:
            yield f"megatron.{name}: must be false; attention over packed sequences is computed in bfloat16"


@rule(ERRORS)
def _fp8_blocks_divide(s: Settings) -> Messages:
    if not s.fp8 or s.fp8_recipe not in FP8_BLOCKS:
        return
    if has_experts(s):
        yield "megatron.fp8: is not supported for models with experts"
        return
    tp, block = s.tensor_model_parallel_size, FP8_BLOCKS[s.fp8_recipe]
    heads, head = s.shape.get("num_attention_heads", 0), head_dim(s.shape)
    groups = s.shape.get("num_key_value_heads") or heads
    for what, size in (
        ("hidden_size", s.shape.get("hidden_size", 0)),
        (f"query heads' width / {tp}", heads * head // tp),
        (f"query, key and value heads' width / {tp}", (heads + 2 * groups) * head // tp),
        (f"intermediate_size / {tp}", s.shape.get("intermediate_size", 0) // tp),
    ):
        if size % block:
            yield f"megatron.fp8: with recipe {s.fp8_recipe!r} {block} must divide the model's {what}, which is {size}"
