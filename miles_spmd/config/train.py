"""`[train]`: optimizer steps, their batches, learning rates, reduction order; and what keys of `[megatron]` need.

Megatron itself refuses some combinations clearly, when a rank builds its configuration; they are not repeated here.
"""

import importlib.util
from typing import Annotated, Literal

from miles_spmd.config.checks import ERRORS, MACHINE, TRAINING, Messages, Settings, heads_divide, rule
from miles_spmd.config.table import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Table,
    must_be,
    plug_point,
)
from miles_spmd.models.hf_config import count_experts, expert_width, head_dim
from miles_spmd.types.run_files import NO_ROWS


class TrainConfig(Table):
    global_batch_size: PositiveInt | None = None
    """Samples per optimizer step (`rl`; the default is one step per rollout), which are episodes where an environment
    has several trajectories, sequences (`sft`) or pairs (`dpo`, `rm`)."""
    max_tokens_per_gpu: PositiveInt = 8192
    """Token budget of one packed micro-batch on one rank (times context-parallel size)."""
    packing: Annotated[str, plug_point("balanced")] = "balanced"
    """Plug point: how sequences are divided into micro-batches. `balanced`: the longest one goes first into the
    micro-batch with the fewest tokens."""
    offload_train: bool = False
    """Put moments and main parameters into host memory, and free gradients, while the engine uses the device; the
    weights stay. This leaves more memory to the engine's cache, at the price of two transfers in each step."""
    memory_allowance: NonNegativeFloat = 0.25
    """How much more memory than planned (this fraction, and 2 GiB) is left to the trainer when the engine releases
    memory, and may be in use before a warning."""
    trainer_hook: Annotated[str, plug_point()] | None = None
    """Plug point: is called in every rank that trains, before and after each of its phases, with the weights."""
    max_skipped_steps: NonNegativeInt = 3
    """Number of consecutive steps with a non-finite loss or gradient before the run stops."""
    lr_warmup_iters: NonNegativeInt = 0
    """Number of optimizer steps over which the learning rate rises linearly to `megatron.lr`. The first of n steps has
    the rate lr / (n + 1), the one after the last has lr."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls from the end of the warm-up to the end of the run."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the decay."""
    critic_lr: PositiveFloat | None = None
    """Learning rate of the critic (`ppo`), which decays as the policy's does; the default is the policy's."""
    critic_lr_warmup_iters: NonNegativeInt = 0
    """`lr_warmup_iters` of the critic."""
    num_critic_only_steps: NonNegativeInt = 0
    """Number of rollouts at the beginning that train the critic alone."""
    reduction_leaves: Annotated[NonNegativeInt, must_be("a power of two", lambda leaves: not leaves & (leaves - 1))] = 0
    """Canonical reduction: sum gradients over a tree with this number of leaves (a power of two), each a fixed share of
    the batch. Gradients are then bitwise equal for every data-parallel size that divides it, and for every
    `max_tokens_per_gpu` from `leaf_tokens` on. 0: in the order in which sequences happen to be packed."""
    leaf_tokens: PositiveInt = 8192
    """Token budget of one micro-batch of a leaf; where `max_tokens_per_gpu` times context-parallel size is less, that.
    The result depends on it in its last bits."""


# --- batches ---------------------------------------------------------------------------------------------------------


@rule(TRAINING)
def _steps_divide_the_rollout(s: Settings) -> Messages:
    samples = s.rollout_batch_size * s.n_samples_per_prompt
    if s.mode == "rl" and s.global_batch_size is not None and samples % s.global_batch_size:
        yield (
            f"train.global_batch_size: {s.global_batch_size} does not divide a rollout of {s.rollout_batch_size} "
            f"prompts x {s.n_samples_per_prompt} samples = {samples}"
        )


@rule(ERRORS)
def _sequences_fit_a_micro_batch(s: Settings) -> Messages:
    longest = (s.rollout_max_prompt_len or 1) + s.rollout_max_response_len
    budget = s.max_tokens_per_gpu * s.context_parallel_size
    if s.mode == "rl" and s.prompt_data != NO_ROWS and longest > budget:
        yield (
            f"train.max_tokens_per_gpu: {s.max_tokens_per_gpu} x context_parallel_size {s.context_parallel_size} = "
            f"{budget} tokens cannot hold the longest sequence ({longest} tokens of prompt and response)"
        )


# --- learning rate ---------------------------------------------------------------------------------------------------


@rule(TRAINING)
def _learning_rate(s: Settings) -> Messages:
    for name, rate in (("megatron.lr", s.lr), ("train.critic_lr", s.critic_lr)):
        if rate is not None and s.min_lr > rate and s.lr_decay_style != "constant":
            yield f"train.min_lr: {s.min_lr} is larger than {name} {rate}"


@rule(TRAINING)
def _warmup_ends(s: Settings) -> Messages:
    samples = s.rollout_batch_size * s.n_samples_per_prompt
    updates = s.num_rollout * (samples // (s.global_batch_size or samples) if s.mode == "rl" else 1)
    if s.lr_warmup_iters >= max(updates, 1):
        yield f"train.lr_warmup_iters: {s.lr_warmup_iters} must be smaller than the run's {updates} optimizer steps"


@rule(TRAINING)
def _critic_only_steps(s: Settings) -> Messages:
    if s.advantage_estimator == "ppo" and s.num_critic_only_steps >= s.num_rollout:
        yield (
            f"train.num_critic_only_steps: {s.num_critic_only_steps} leave no step of the {s.num_rollout} to the policy"
        )


# --- canonical reduction ---------------------------------------------------------------------------------------------


@rule(ERRORS)
def _leaves_are_packed_alone(s: Settings) -> Messages:
    if s.reduction_leaves and s.packing != "balanced":
        yield (
            "train.packing: must be 'balanced' with reduction_leaves, whose leaves are shares of the batch in its order"
        )


@rule(ERRORS)
def _canonical_reduction(s: Settings) -> Messages:
    if s.reduction_leaves and s.expert_model_parallel_size > 1:
        yield (
            "train.reduction_leaves: is not supported with expert_model_parallel_size > 1; an expert's rank sees the "
            "tokens of a whole group, and their order is not kept"
        )
    if s.reduction_leaves and s.overlap_grad_reduce:
        yield (
            "train.reduction_leaves: overlap_grad_reduce must be false; it sums gradients before they are complete, in "
            "an order that depends on the number of ranks"
        )


@rule(ERRORS)
def _leaves_divide(s: Settings) -> Messages:
    dense = s.tensor_model_parallel_size * s.pipeline_model_parallel_size * s.context_parallel_size
    replicas, rest = divmod(s.trainer_ranks, dense)
    if s.reduction_leaves and not rest and s.reduction_leaves % replicas:
        yield f"train.reduction_leaves: {s.reduction_leaves} is not a multiple of the data-parallel size {replicas}"


# --- parallel sizes --------------------------------------------------------------------------------------------------


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
    yield from heads_divide("megatron.tensor_model_parallel_size", size, s.shape)
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
    if experts and (width := expert_width(s.shape)) % tensor:
        yield f"megatron.expert_tensor_parallel_size: {tensor} does not divide the experts' width {width}"


@rule(ERRORS)
def _recompute(s: Settings) -> Messages:
    if s.recompute_granularity == "full" and (s.recompute_method is None or s.recompute_num_layers is None):
        yield "megatron.recompute_granularity: 'full' needs recompute_method and recompute_num_layers"
    if s.recompute_granularity != "full" and s.recompute_method is not None:
        yield "megatron.recompute_method: needs recompute_granularity = 'full'"


@rule(ERRORS)
def _optimizer(s: Settings) -> Messages:
    if s.optimizer not in ("adam", "sgd"):
        yield f"megatron.optimizer: must be 'adam' or 'sgd', got {s.optimizer!r}"


@rule(ERRORS)
def _overlap(s: Settings) -> Messages:
    if s.overlap_param_gather and not (s.use_distributed_optimizer and s.overlap_grad_reduce):
        yield "megatron.overlap_param_gather: needs use_distributed_optimizer and overlap_grad_reduce"


# --- Transformer Engine and FP8 --------------------------------------------------------------------------------------

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


@rule(MACHINE)
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
    if count_experts(s.shape):
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
