"""How trainer and engine are split over ranks: the parallel sizes of `[megatron]` and `[sglang]`.

Megatron itself refuses some combinations clearly, when a rank builds its configuration; they are not repeated here.
"""

from __future__ import annotations

from miles_spmd.config.rules import ERRORS, Messages, Settings, rule
from miles_spmd.models.hf_config import count_experts

# --- trainer ---------------------------------------------------------------------------------------------------------


@rule(ERRORS)
def _trainer_fills_its_ranks(s: Settings) -> Messages:
    tensor, pipeline, context = s.tensor_model_parallel_size, s.pipeline_model_parallel_size, s.context_parallel_size
    if s.trainer_ranks % (dense := tensor * pipeline * context):
        yield (
            f"megatron: tensor {tensor} x pipeline {pipeline} x context {context} = {dense} ranks do not divide the "
            f"{s.trainer_ranks} that train"
        )
    expert_tensor, expert = s.expert_tensor_parallel_size or tensor, s.expert_model_parallel_size
    if expert > 1 and s.trainer_ranks % (sparse := expert_tensor * pipeline * expert):
        yield (
            f"megatron: expert tensor {expert_tensor} x pipeline {pipeline} x expert {expert} = {sparse} ranks do not "
            f"divide the {s.trainer_ranks} that train"
        )


@rule(ERRORS)
def _sequence_parallel(s: Settings) -> Messages:
    if s.sequence_parallel and s.tensor_model_parallel_size == 1:
        yield "megatron.sequence_parallel: needs tensor_model_parallel_size > 1"
    if s.expert_model_parallel_size > 1 and s.tensor_model_parallel_size > 1 and not s.sequence_parallel:
        yield "megatron.sequence_parallel: must be true with both expert and tensor parallelism"


@rule(ERRORS)
def _virtual_stages(s: Settings) -> Messages:
    virtual, layers = s.virtual_pipeline_model_parallel_size, s.num_layers_per_virtual_pipeline_stage
    if (virtual or 1) > 1 and s.pipeline_model_parallel_size == 1:
        yield "megatron.virtual_pipeline_model_parallel_size: needs pipeline_model_parallel_size > 1"
    if layers is not None and virtual is not None:
        yield (
            "megatron.num_layers_per_virtual_pipeline_stage: means the same as virtual_pipeline_model_parallel_size; "
            "set one of them"
        )


@rule(ERRORS)
def _tensors_divide(s: Settings) -> Messages:
    size = s.tensor_model_parallel_size
    yield from _heads_divide("megatron.tensor_model_parallel_size", size, s)
    width = s.shape.get("intermediate_size")
    if width is not None and width % size:
        yield f"megatron.tensor_model_parallel_size: {size} does not divide the model's intermediate_size {width}"


@rule(ERRORS)
def _layers_divide(s: Settings) -> Messages:
    ends = s.num_layers_in_first_pipeline_stage, s.num_layers_in_last_pipeline_stage
    if any(uneven is not None for uneven in (*ends, s.pipeline_model_parallel_layout)):
        return
    stages, layers = s.pipeline_model_parallel_size, s.shape.get("num_hidden_layers")
    chunks = s.virtual_pipeline_model_parallel_size or s.num_layers_per_virtual_pipeline_stage or 1
    if layers is not None and layers % (stages * chunks):
        virtual = f" x {chunks} (virtual)" if chunks > 1 else ""
        yield (
            f"megatron.pipeline_model_parallel_size: {stages} stages{virtual} do not divide the model's {layers} layers"
        )


@rule(ERRORS)
def _experts_divide(s: Settings) -> Messages:
    size, experts = s.expert_model_parallel_size, count_experts(s.shape)
    if size > 1 and not experts:
        yield "megatron.expert_model_parallel_size: the model has no experts"
    elif experts and experts % size:
        yield f"megatron.expert_model_parallel_size: {size} does not divide {experts} experts"
    tensor = s.expert_tensor_parallel_size or s.tensor_model_parallel_size
    width = s.shape.get("moe_intermediate_size")
    if experts and width is not None and width % tensor:
        yield (
            f"megatron.expert_tensor_parallel_size: {tensor} does not divide the experts' moe_intermediate_size {width}"
        )


@rule(ERRORS)
def _recompute(s: Settings) -> Messages:
    if s.recompute_granularity == "full" and (s.recompute_method is None or s.recompute_num_layers is None):
        yield "megatron.recompute_granularity: 'full' needs recompute_method and recompute_num_layers"
    if s.recompute_granularity != "full" and s.recompute_method is not None:
        yield "megatron.recompute_method: needs recompute_granularity = 'full'"


@rule(ERRORS)
def _overlap(s: Settings) -> Messages:
    if s.overlap_param_gather and not (s.use_distributed_optimizer and s.overlap_grad_reduce):
        yield "megatron.overlap_param_gather: needs use_distributed_optimizer and overlap_grad_reduce"


# --- engine ----------------------------------------------------------------------------------------------------------


@rule(ERRORS)
def _engines_fill_their_ranks(s: Settings) -> Messages:
    if s.engine_ranks % s.tp_size:
        yield f"sglang.tp_size: engines of {s.tp_size} ranks do not divide the {s.engine_ranks} that generate"


@rule(ERRORS)
def _engine_heads(s: Settings) -> Messages:
    yield from _heads_divide("sglang.tp_size", s.tp_size, s)


def _heads_divide(name: str, size: int, s: Settings) -> Messages:
    heads, groups = s.shape.get("num_attention_heads"), s.shape.get("num_key_value_heads")
    if heads is not None and heads % size:
        yield f"{name}: {size} does not divide the model's {heads} attention heads"
    if groups is not None and groups % size and size % groups:
        yield f"{name}: {size} is not a multiple or divisor of the model's {groups} key-value heads"
