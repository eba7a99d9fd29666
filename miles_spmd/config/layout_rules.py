"""Rules about how trainer and engine are cut over ranks, and what the trainer's layers can do there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from miles_spmd.config.rules import CONTRADICTIONS, rule
from miles_spmd.models.attention import head_dim

FP8_BLOCKS = {"blockwise": 128, "tensorwise": 16}  # what has to divide the sides of a matrix, by recipe


# --- trainers and engines --------------------------------------------------------------------------------------------


@rule(CONTRADICTIONS)
def _both_sides_have_ranks(rollout_num_gpus: int, world_size: int) -> Iterator[str]:
    if rollout_num_gpus >= world_size:
        yield f"rollout.rollout_num_gpus: {rollout_num_gpus} of {world_size} ranks leave none to train"


@rule(CONTRADICTIONS)
def _engines_have_work(rollout_num_gpus: int, mode: str, eval_interval: int) -> Iterator[str]:
    if rollout_num_gpus and (mode in ("dpo", "rm") or (mode == "sft" and not eval_interval)):
        yield f"rollout.rollout_num_gpus: must be 0, because this run of mode {mode!r} generates nothing"


@rule(CONTRADICTIONS)
def _nobody_to_make_room_for(rollout_num_gpus: int, offload_train: bool, offload_rollout: str) -> Iterator[str]:
    if rollout_num_gpus and offload_train:
        yield "train.offload_train: must be false with rollout_num_gpus; no engine needs the trainers' memory"
    if rollout_num_gpus and offload_rollout not in ("auto", "nothing"):
        yield "rollout.offload_rollout: must be 'nothing' or 'auto' with rollout_num_gpus; no trainer needs the memory"


# --- parallel layout of the trainer ----------------------------------------------------------------------------------


@rule(CONTRADICTIONS)
def _leaves_divide(
    reduction_leaves: int,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    context_parallel_size: int,
    trainer_ranks: int,
) -> Iterator[str]:
    dense = tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size
    replicas, rest = divmod(trainer_ranks, dense)
    if reduction_leaves and not rest and reduction_leaves % replicas:
        yield f"train.reduction_leaves: {reduction_leaves} is no multiple of the data-parallel size {replicas}"


@rule(CONTRADICTIONS)
def _trainer_fills_its_ranks(
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    context_parallel_size: int,
    expert_model_parallel_size: int,
    expert_tensor_parallel_size: int | None,
    trainer_ranks: int,
) -> Iterator[str]:
    dense = tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size
    if trainer_ranks % dense:
        yield (
            f"megatron: tensor {tensor_model_parallel_size} x pipeline {pipeline_model_parallel_size} x context "
            f"{context_parallel_size} = {dense} ranks do not divide the {trainer_ranks} that train"
        )
    expert_tensor = expert_tensor_parallel_size or tensor_model_parallel_size
    expert = expert_tensor * pipeline_model_parallel_size * expert_model_parallel_size
    if expert_model_parallel_size > 1 and trainer_ranks % expert:
        yield (
            f"megatron: expert tensor {expert_tensor} x pipeline {pipeline_model_parallel_size} x expert "
            f"{expert_model_parallel_size} = {expert} ranks do not divide the {trainer_ranks} that train"
        )


@rule(CONTRADICTIONS)
def _sequence_parallel(
    sequence_parallel: bool, tensor_model_parallel_size: int, expert_model_parallel_size: int
) -> Iterator[str]:
    if sequence_parallel and tensor_model_parallel_size == 1:
        yield "megatron.sequence_parallel: needs tensor_model_parallel_size > 1"
    if expert_model_parallel_size > 1 and tensor_model_parallel_size > 1 and not sequence_parallel:
        yield "megatron.sequence_parallel: must be true when expert and tensor parallelism meet"


@rule(CONTRADICTIONS)
def _virtual_stages(
    virtual_pipeline_model_parallel_size: int | None,
    num_layers_per_virtual_pipeline_stage: int | None,
    pipeline_model_parallel_size: int,
) -> Iterator[str]:
    if (virtual_pipeline_model_parallel_size or 1) > 1 and pipeline_model_parallel_size == 1:
        yield "megatron.virtual_pipeline_model_parallel_size: needs pipeline_model_parallel_size > 1"
    if num_layers_per_virtual_pipeline_stage is not None and virtual_pipeline_model_parallel_size is not None:
        yield (
            "megatron.num_layers_per_virtual_pipeline_stage: says the same as virtual_pipeline_model_parallel_size; "
            "give one of them"
        )


@rule(CONTRADICTIONS)
def _tensors_divide(tensor_model_parallel_size: int, shape: dict[str, Any]) -> Iterator[str]:
    tp, heads = tensor_model_parallel_size, shape.get("num_attention_heads")
    if heads is not None and heads % tp:
        yield f"megatron.tensor_model_parallel_size: {tp} does not divide the model's {heads} attention heads"
    groups = shape.get("num_key_value_heads")
    if groups is not None and groups % tp and tp % groups:
        yield f"megatron.tensor_model_parallel_size: {tp} is no multiple or divisor of {groups} key-value heads"
    width = shape.get("intermediate_size")
    if width is not None and width % tp:
        yield f"megatron.tensor_model_parallel_size: {tp} does not divide the model's intermediate_size {width}"


@rule(CONTRADICTIONS)
def _layers_divide(
    pipeline_model_parallel_size: int,
    virtual_pipeline_model_parallel_size: int | None,
    num_layers_per_virtual_pipeline_stage: int | None,
    num_layers_in_first_pipeline_stage: int | None,
    num_layers_in_last_pipeline_stage: int | None,
    pipeline_model_parallel_layout: Any,
    shape: dict[str, Any],
) -> Iterator[str]:
    uneven = num_layers_in_first_pipeline_stage, num_layers_in_last_pipeline_stage, pipeline_model_parallel_layout
    layers = shape.get("num_hidden_layers")
    chunks = virtual_pipeline_model_parallel_size or num_layers_per_virtual_pipeline_stage or 1
    if layers is not None and all(u is None for u in uneven) and layers % (pipeline_model_parallel_size * chunks):
        yield (
            f"megatron.pipeline_model_parallel_size: {pipeline_model_parallel_size} stages"
            f"{f' x {chunks} (virtual)' if chunks > 1 else ''} do not divide the model's {layers} layers"
        )


@rule(CONTRADICTIONS)
def _experts_divide(
    expert_model_parallel_size: int,
    expert_tensor_parallel_size: int | None,
    tensor_model_parallel_size: int,
    shape: dict[str, Any],
) -> Iterator[str]:
    experts = shape.get("num_experts") or shape.get("num_local_experts")
    if expert_model_parallel_size > 1 and not experts:
        yield "megatron.expert_model_parallel_size: the model has no experts"
    elif experts and experts % expert_model_parallel_size:
        yield f"megatron.expert_model_parallel_size: {expert_model_parallel_size} does not divide {experts} experts"
    etp, width = expert_tensor_parallel_size or tensor_model_parallel_size, shape.get("moe_intermediate_size")
    if experts and width is not None and width % etp:
        yield f"megatron.expert_tensor_parallel_size: {etp} does not divide the experts' moe_intermediate_size {width}"


@rule(CONTRADICTIONS)
def _recompute(
    recompute_granularity: str | None, recompute_method: str | None, recompute_num_layers: int | None
) -> Iterator[str]:
    if recompute_granularity == "full" and (recompute_method is None or recompute_num_layers is None):
        yield "megatron.recompute_granularity: 'full' needs recompute_method and recompute_num_layers"
    if recompute_granularity != "full" and recompute_method is not None:
        yield "megatron.recompute_method: needs recompute_granularity = 'full'"


@rule(CONTRADICTIONS)
def _overlap(overlap_param_gather: bool, overlap_grad_reduce: bool, use_distributed_optimizer: bool) -> Iterator[str]:
    if overlap_param_gather and not (use_distributed_optimizer and overlap_grad_reduce):
        yield "megatron.overlap_param_gather: needs use_distributed_optimizer and overlap_grad_reduce"


# --- Transformer Engine ----------------------------------------------------------------------------------------------


@rule(CONTRADICTIONS)
def _transformer_engine(
    transformer_impl: str, dtype: str, reduction_leaves: int, tp_comm_overlap: bool, fp4: str | None
) -> Iterator[str]:
    if transformer_impl == "inference_optimized":
        yield "megatron.transformer_impl: 'inference_optimized' cannot train; take 'local' or 'transformer_engine'"
    if transformer_impl != "transformer_engine":
        return
    if dtype != "bfloat16":
        yield f"megatron.transformer_impl: 'transformer_engine' needs model.dtype = 'bfloat16', not {dtype!r}"
    if reduction_leaves:
        yield (
            "train.reduction_leaves: needs megatron.transformer_impl = 'local'; the gradients of Transformer Engine's "
            "attention are summed in no fixed order"
        )
    if tp_comm_overlap:
        yield "megatron.tp_comm_overlap: must be false; the trainer sets up no communication buffers for it"
    if fp4:
        yield "megatron.fp4: is not supported; take fp8"


@rule(CONTRADICTIONS)
def _fp8(
    fp8: str | None,
    fp8_recipe: str,
    transformer_impl: str,
    fp8_param: bool,
    fp8_param_gather: bool,
    fp8_dot_product_attention: bool,
    fp8_multi_head_attention: bool,
) -> Iterator[str]:
    if not fp8:
        return
    if transformer_impl != "transformer_engine":
        yield "megatron.fp8: needs megatron.transformer_impl = 'transformer_engine'"
    if fp8_recipe == "delayed":
        yield (
            "megatron.fp8_recipe: 'delayed' makes log-probs depend on what was computed before, with other weights "
            "too; take 'blockwise' or 'tensorwise'"
        )
    elif fp8_recipe not in FP8_BLOCKS:
        yield f"megatron.fp8_recipe: {fp8_recipe!r} is not supported; take 'blockwise' or 'tensorwise'"
    for name, wanted in (("fp8_param", fp8_param), ("fp8_param_gather", fp8_param_gather)):
        if wanted:
            yield f"megatron.{name}: must be false; the engine is given the weights in model.dtype"
    for name, wanted in (
        ("fp8_dot_product_attention", fp8_dot_product_attention),
        ("fp8_multi_head_attention", fp8_multi_head_attention),
    ):
        if wanted:
            yield f"megatron.{name}: must be false; attention over packed sequences is computed in bfloat16"


@rule(CONTRADICTIONS)
def _fp8_blocks_divide(
    fp8: str | None, fp8_recipe: str, tensor_model_parallel_size: int, shape: dict[str, Any]
) -> Iterator[str]:
    if not fp8 or fp8_recipe not in FP8_BLOCKS:
        return
    if shape.get("num_experts") or shape.get("num_local_experts"):
        yield "megatron.fp8: is not supported for models with experts"
        return
    tp, block = tensor_model_parallel_size, FP8_BLOCKS[fp8_recipe]
    heads, head = shape.get("num_attention_heads", 0), head_dim(shape)
    groups = shape.get("num_key_value_heads") or heads
    for what, size in (
        ("hidden_size", shape.get("hidden_size", 0)),
        (f"query heads' width / {tp}", heads * head // tp),
        (f"query, key and value heads' width / {tp}", (heads + 2 * groups) * head // tp),
        (f"intermediate_size / {tp}", shape.get("intermediate_size", 0) // tp),
    ):
        if size % block:
            yield f"megatron.fp8: with recipe {fp8_recipe!r} {block} must divide the model's {what}, which is {size}"


# --- engine ----------------------------------------------------------------------------------------------------------


@rule(CONTRADICTIONS)
def _engines_fill_their_ranks(tp_size: int, engine_ranks: int) -> Iterator[str]:
    if engine_ranks % tp_size:
        yield f"sglang.tp_size: engines of {tp_size} ranks do not divide the {engine_ranks} that generate"


@rule(CONTRADICTIONS)
def _engine_heads(tp_size: int, shape: dict[str, Any]) -> Iterator[str]:
    heads, groups = shape.get("num_attention_heads"), shape.get("num_key_value_heads")
    if heads is not None and heads % tp_size:
        yield f"sglang.tp_size: {tp_size} does not divide the model's {heads} attention heads"
    if groups is not None and groups % tp_size and tp_size % groups:
        yield f"sglang.tp_size: {tp_size} is no multiple or divisor of the model's {groups} key-value heads"
