"""What settings may not say together. One small function per rule.

A rule's parameters are leaf names of our tables or keys of `[megatron]` and `[sglang]` (leaf names are unique), or
``shape`` (the checkpoint's config.json) or ``world_size``. A rule is left out when one of them is unknown or faulty. It
yields messages that begin with the setting to change.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from miles_spmd.config.backends import BackendMissingError, backend_fields
from miles_spmd.config.schema import Config, Table
from miles_spmd.models.random import NO_WEIGHTS

Rule = Callable[..., Iterator[str]]
_contradictions: list[Rule] = []
_warnings: list[Rule] = []
_files: list[Rule] = []

FP8_BLOCKS = {"blockwise": 128, "tensorwise": 16}  # what has to divide the sides of a matrix, by recipe
COMPARE_GROUPS = ("grpo", "gspo", "cispo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline")


def contradictions(config: Config, *, world_size: int | None = None, ignore: Collection[str] = ()) -> list[str]:
    """Why this configuration cannot run. ``ignore`` names leaves that are known to be faulty."""
    return _apply(_contradictions, config, world_size, ignore)


def doubts(config: Config) -> list[str]:
    """What is allowed but probably not meant."""
    return _apply(_warnings, config, None, ())


def missing_files(config: Config, *, ignore: Collection[str] = ()) -> list[str]:
    """Checkpoint folders, data files and packages that are not there."""
    return _apply(_files, config, None, ignore)


def _apply(rules: list[Rule], config: Config, world_size: int | None, ignore: Collection[str]) -> list[str]:
    values = {name: value for name, value in settings(config).items() if name not in ignore}
    if world_size is not None:
        values["world_size"] = world_size
    shape = None if "hf_checkpoint" in ignore else checkpoint_shape(config.model.hf_checkpoint)
    if shape is not None:
        values["shape"] = shape
    messages: list[str] = []
    for rule in rules:
        names = inspect.signature(rule).parameters
        if all(name in values for name in names):
            messages += rule(**{name: values[name] for name in names})
    return messages


def settings(config: Config) -> dict[str, Any]:
    """Every leaf by its own name: ours, Megatron's and SGLang's, with the defaults of those that were not set."""
    values: dict[str, Any] = {}
    for table in ("sglang", "megatron"):
        try:
            values |= {name: field.default for name, field in backend_fields(table).items()}
        except BackendMissingError:
            continue
        values |= getattr(config, table)
    for name in Config.model_fields:
        table = getattr(config, name)
        if isinstance(table, Table):
            values |= {leaf: getattr(table, leaf) for leaf in type(table).model_fields}
    return values


def checkpoint_shape(folder: Path) -> dict[str, Any] | None:
    """The checkpoint's config.json, or None where there is none to read."""
    try:
        shape = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return shape if isinstance(shape, dict) else None


def _rule(rules: list[Rule]) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        rules.append(function)
        return function

    return register


# --- batches and sampling --------------------------------------------------------------------------------------------


@_rule(_contradictions)
def _steps_divide_the_rollout(
    mode: str, rollout_batch_size: int, n_samples_per_prompt: int, global_batch_size: int | None
) -> Iterator[str]:
    samples = rollout_batch_size * n_samples_per_prompt
    if mode == "rl" and global_batch_size is not None and samples % global_batch_size:
        yield (
            f"train.global_batch_size: {global_batch_size} does not divide a rollout of {rollout_batch_size} prompts "
            f"x {n_samples_per_prompt} samples = {samples}"
        )


@_rule(_contradictions)
def _groups_can_differ(
    mode: str, advantage_estimator: str, n_samples_per_prompt: int, rollout_temperature: float, rollout_top_k: int
) -> Iterator[str]:
    if mode != "rl" or advantage_estimator not in COMPARE_GROUPS:
        return
    if n_samples_per_prompt == 1:
        yield f"rollout.n_samples_per_prompt: {advantage_estimator} compares the answers to a prompt; take at least 2"
    if rollout_temperature == 0:
        yield "rollout.rollout_temperature: at 0 all samples of a group are the same and nothing is learnt"
    if rollout_top_k == 1:
        yield "rollout.rollout_top_k: at 1 all samples of a group are the same and nothing is learnt"


@_rule(_contradictions)
def _corrections(
    use_tis: bool,
    use_rollout_logprobs: bool,
    tis_clip: float,
    tis_clip_low: float,
    tis_upper_bound: float,
    tis_lower_bound: float | None,
    rs_upper_bound: float | None,
    rs_lower_bound: float | None,
) -> Iterator[str]:
    if use_tis and use_rollout_logprobs:
        yield "algorithm.use_tis: use_rollout_logprobs makes both policies the same, nothing is left to correct"
    for low, high, name in (
        (tis_clip_low, tis_clip, "tis_clip_low"),
        (tis_lower_bound, tis_upper_bound, "tis_lower_bound"),
        (rs_lower_bound, rs_upper_bound, "rs_lower_bound"),
    ):
        if low is not None and high is not None and low > high:
            yield f"algorithm.{name}: {low} is above the upper bound {high}"


@_rule(_contradictions)
def _overlong_answers(overlong_buffer_len: int, rollout_max_response_len: int) -> Iterator[str]:
    if overlong_buffer_len > rollout_max_response_len:
        yield (
            f"algorithm.overlong_buffer_len: {overlong_buffer_len} is more than rollout_max_response_len "
            f"{rollout_max_response_len}"
        )


@_rule(_contradictions)
def _teacher(mode: str, opd_kl_coef: float, teacher_load: Path | None) -> Iterator[str]:
    if mode == "rl" and opd_kl_coef and teacher_load is None:
        yield "model.teacher_load: algorithm.opd_kl_coef needs a teacher's checkpoint"


@_rule(_contradictions)
def _other_models_fit(
    ref_load: Path | None, critic_load: Path | None, teacher_load: Path | None, shape: dict[str, Any]
) -> Iterator[str]:
    for name, folder in (("ref_load", ref_load), ("critic_load", critic_load), ("teacher_load", teacher_load)):
        other = checkpoint_shape(folder) if folder is not None else None
        if other is None:
            continue
        # a reference runs in the policy's own network, any other has to understand its tokens
        keys = ("vocab_size",) if name != "ref_load" else ("vocab_size", "hidden_size", "num_hidden_layers")
        for key in keys:
            if other.get(key) != shape.get(key):
                yield f"model.{name}: {folder} has {key} {other.get(key)}, model.hf_checkpoint has {shape.get(key)}"


@_rule(_contradictions)
def _lagging_rollouts(
    update_weights_interval: int,
    keep_old_actor: bool,
    use_rollout_logprobs: bool,
    save_interval: int,
    eval_interval: int,
) -> Iterator[str]:
    for name, interval in (("checkpoint.save_interval", save_interval), ("eval.eval_interval", eval_interval)):
        if interval % update_weights_interval:
            yield (
                f"{name}: {interval} is no multiple of update_weights_interval {update_weights_interval}; both happen "
                "with the newest weights in the engine, which would then come earlier than they should"
            )
    if keep_old_actor and update_weights_interval == 1:
        yield "algorithm.keep_old_actor: with update_weights_interval = 1 the newest weights are those that generated"
    if keep_old_actor and use_rollout_logprobs:
        yield "algorithm.keep_old_actor: use_rollout_logprobs already takes the old policy's log-probs from the engine"


@_rule(_contradictions)
def _critic_only_steps(advantage_estimator: str, num_critic_only_steps: int, num_rollout: int) -> Iterator[str]:
    if advantage_estimator == "ppo" and num_critic_only_steps >= num_rollout:
        yield f"train.num_critic_only_steps: {num_critic_only_steps} leave no step of the {num_rollout} for the policy"


@_rule(_contradictions)
def _canonical_reduction(
    reduction_leaves: int,
    use_distributed_optimizer: bool,
    overlap_grad_reduce: bool,
    expert_model_parallel_size: int,
) -> Iterator[str]:
    if reduction_leaves and expert_model_parallel_size > 1:
        yield "train.reduction_leaves: experts on several ranks see a whole group's tokens; no order of theirs is kept"
    if reduction_leaves & (reduction_leaves - 1):
        yield f"train.reduction_leaves: must be a power of two, got {reduction_leaves}"
    if reduction_leaves and (use_distributed_optimizer or overlap_grad_reduce):
        yield (
            "train.reduction_leaves: use_distributed_optimizer and overlap_grad_reduce must be false; they add up "
            "shards of gradients, and their norm, in an order that depends on the number of ranks"
        )


@_rule(_contradictions)
def _top_k(rollout_top_k: int) -> Iterator[str]:
    if rollout_top_k == 0 or rollout_top_k < -1:
        yield f"rollout.rollout_top_k: must be -1 (the whole vocabulary) or positive, got {rollout_top_k}"


@_rule(_contradictions)
def _reward_is_known(rm_type: str) -> Iterator[str]:
    if rm_type not in ("math", "exact") and ":" not in rm_type:
        yield f"reward.rm_type: must be math, exact or `module:function`, got {rm_type!r}"


@_rule(_contradictions)
def _evaluation_has_data(eval_interval: int, eval_prompt_data: dict[str, str]) -> Iterator[str]:
    if eval_interval and not eval_prompt_data:
        yield f"eval.eval_prompt_data: is empty, but eval_interval is {eval_interval}"


@_rule(_contradictions)
def _sequences_fit_a_micro_batch(
    mode: str,
    rollout_max_prompt_len: int | None,
    rollout_max_response_len: int,
    max_tokens_per_gpu: int,
    context_parallel_size: int,
) -> Iterator[str]:
    longest, budget = (
        (rollout_max_prompt_len or 1) + rollout_max_response_len,
        max_tokens_per_gpu * context_parallel_size,
    )
    if mode == "rl" and longest > budget:
        yield (
            f"train.max_tokens_per_gpu: {max_tokens_per_gpu} x context_parallel_size {context_parallel_size} = {budget}"
            f" tokens cannot hold the longest sequence ({longest} tokens of prompt and response)"
        )


@_rule(_contradictions)
def _answers_fit_the_context(
    mode: str,
    rollout_max_prompt_len: int | None,
    rollout_max_response_len: int,
    eval_interval: int,
    eval_max_response_len: int | None,
    shape: dict[str, Any],
) -> Iterator[str]:
    context = shape.get("max_position_embeddings")
    if context is None:
        return
    prompt = rollout_max_prompt_len or 1
    lengths = {"rollout.rollout_max_response_len": rollout_max_response_len} if mode == "rl" else {}
    if eval_interval and eval_max_response_len is not None:
        lengths["eval.eval_max_response_len"] = eval_max_response_len
    for name, response in lengths.items():
        if prompt + response > context:
            yield f"{name}: {prompt} prompt + {response} response tokens exceed the model's context of {context}"


# --- learning rate ---------------------------------------------------------------------------------------------------


@_rule(_contradictions)
def _learning_rate(lr: float | None, critic_lr: float | None, min_lr: float, lr_decay_style: str) -> Iterator[str]:
    for name, rate in (("megatron.lr", lr), ("train.critic_lr", critic_lr)):
        if rate is not None and min_lr > rate and lr_decay_style != "constant":
            yield f"train.min_lr: {min_lr} is larger than {name} {rate}"


@_rule(_contradictions)
def _warmup_ends(
    mode: str,
    lr_warmup_iters: int,
    num_rollout: int,
    rollout_batch_size: int,
    n_samples_per_prompt: int,
    global_batch_size: int | None,
) -> Iterator[str]:
    samples = rollout_batch_size * n_samples_per_prompt
    updates = num_rollout * (samples // (global_batch_size or samples) if mode == "rl" else 1)
    if lr_warmup_iters >= max(updates, 1):
        yield f"train.lr_warmup_iters: {lr_warmup_iters} must be smaller than the run's {updates} optimizer steps"


# --- parallel layout of the trainer ----------------------------------------------------------------------------------


@_rule(_contradictions)
def _leaves_divide(
    reduction_leaves: int,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    context_parallel_size: int,
    world_size: int,
) -> Iterator[str]:
    dense = tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size
    if reduction_leaves and not world_size % dense and reduction_leaves % (world_size // dense):
        yield (
            f"train.reduction_leaves: {reduction_leaves} is no multiple of the data-parallel size {world_size // dense}"
        )


@_rule(_contradictions)
def _trainer_fills_the_world(
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    context_parallel_size: int,
    expert_model_parallel_size: int,
    expert_tensor_parallel_size: int | None,
    world_size: int,
) -> Iterator[str]:
    dense = tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size
    if world_size % dense:
        yield (
            f"megatron: tensor {tensor_model_parallel_size} x pipeline {pipeline_model_parallel_size} x context "
            f"{context_parallel_size} = {dense} ranks do not divide the {world_size} of this run"
        )
    expert_tensor = expert_tensor_parallel_size or tensor_model_parallel_size
    expert = expert_tensor * pipeline_model_parallel_size * expert_model_parallel_size
    if expert_model_parallel_size > 1 and world_size % expert:
        yield (
            f"megatron: expert tensor {expert_tensor} x pipeline {pipeline_model_parallel_size} x expert "
            f"{expert_model_parallel_size} = {expert} ranks do not divide the {world_size} of this run"
        )


@_rule(_contradictions)
def _sequence_parallel(
    sequence_parallel: bool, tensor_model_parallel_size: int, expert_model_parallel_size: int
) -> Iterator[str]:
    if sequence_parallel and tensor_model_parallel_size == 1:
        yield "megatron.sequence_parallel: needs tensor_model_parallel_size > 1"
    if expert_model_parallel_size > 1 and tensor_model_parallel_size > 1 and not sequence_parallel:
        yield "megatron.sequence_parallel: must be true when expert and tensor parallelism meet"


@_rule(_contradictions)
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


@_rule(_contradictions)
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


@_rule(_contradictions)
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


@_rule(_contradictions)
def _experts_divide(expert_model_parallel_size: int, shape: dict[str, Any]) -> Iterator[str]:
    experts = shape.get("num_experts") or shape.get("num_local_experts")
    if expert_model_parallel_size > 1 and not experts:
        yield "megatron.expert_model_parallel_size: the model has no experts"
    elif experts and experts % expert_model_parallel_size:
        yield f"megatron.expert_model_parallel_size: {expert_model_parallel_size} does not divide {experts} experts"


@_rule(_contradictions)
def _recompute(
    recompute_granularity: str | None, recompute_method: str | None, recompute_num_layers: int | None
) -> Iterator[str]:
    if recompute_granularity == "full" and (recompute_method is None or recompute_num_layers is None):
        yield "megatron.recompute_granularity: 'full' needs recompute_method and recompute_num_layers"
    if recompute_granularity != "full" and recompute_method is not None:
        yield "megatron.recompute_method: needs recompute_granularity = 'full'"


@_rule(_contradictions)
def _overlap(overlap_param_gather: bool, overlap_grad_reduce: bool, use_distributed_optimizer: bool) -> Iterator[str]:
    if overlap_param_gather and not (use_distributed_optimizer and overlap_grad_reduce):
        yield "megatron.overlap_param_gather: needs use_distributed_optimizer and overlap_grad_reduce"


# --- Transformer Engine ----------------------------------------------------------------------------------------------


@_rule(_contradictions)
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


@_rule(_contradictions)
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


@_rule(_contradictions)
def _fp8_blocks_divide(
    fp8: str | None, fp8_recipe: str, tensor_model_parallel_size: int, shape: dict[str, Any]
) -> Iterator[str]:
    if not fp8 or fp8_recipe not in FP8_BLOCKS:
        return
    if shape.get("num_experts") or shape.get("num_local_experts"):
        yield "megatron.fp8: is not supported for models with experts"
        return
    tp, block = tensor_model_parallel_size, FP8_BLOCKS[fp8_recipe]
    hidden, heads = shape.get("hidden_size", 0), shape.get("num_attention_heads", 0)
    groups = shape.get("num_key_value_heads") or heads
    head = shape.get("head_dim") or (hidden // heads if heads else 0)
    for what, size in (
        ("hidden_size", hidden),
        (f"query heads' width / {tp}", heads * head // tp),
        (f"query, key and value heads' width / {tp}", (heads + 2 * groups) * head // tp),
        (f"intermediate_size / {tp}", shape.get("intermediate_size", 0) // tp),
    ):
        if size % block:
            yield f"megatron.fp8: with recipe {fp8_recipe!r} {block} must divide the model's {what}, which is {size}"


# --- engine ----------------------------------------------------------------------------------------------------------


@_rule(_contradictions)
def _engines_fill_the_world(tp_size: int, world_size: int) -> Iterator[str]:
    if world_size % tp_size:
        yield f"sglang.tp_size: engines of {tp_size} ranks do not divide the {world_size} of this run"


@_rule(_contradictions)
def _engine_heads(tp_size: int, shape: dict[str, Any]) -> Iterator[str]:
    heads, groups = shape.get("num_attention_heads"), shape.get("num_key_value_heads")
    if heads is not None and heads % tp_size:
        yield f"sglang.tp_size: {tp_size} does not divide the model's {heads} attention heads"
    if groups is not None and groups % tp_size and tp_size % groups:
        yield f"sglang.tp_size: {tp_size} is no multiple or divisor of the model's {groups} key-value heads"


# --- environment -----------------------------------------------------------------------------------------------------


@_rule(_contradictions)
def _wandb_is_there(use_wandb: bool) -> Iterator[str]:
    if use_wandb and importlib.util.find_spec("wandb") is None:
        yield "telemetry.use_wandb: the package wandb is not installed"


@_rule(_files)
def _checkpoint(hf_checkpoint: Path) -> Iterator[str]:
    yield from _checkpoint_faults("model.hf_checkpoint", hf_checkpoint)


@_rule(_files)
def _other_models(ref_load: Path | None, critic_load: Path | None, teacher_load: Path | None) -> Iterator[str]:
    for name, folder in (("ref_load", ref_load), ("critic_load", critic_load), ("teacher_load", teacher_load)):
        if folder is not None:
            yield from _checkpoint_faults(f"model.{name}", folder)


def _checkpoint_faults(name: str, folder: Path) -> Iterator[str]:
    if not folder.is_dir():
        yield f"{name}: no folder {folder}"
        return
    if checkpoint_shape(folder) is None:
        yield f"{name}: {folder} has no readable config.json"
    if not any(folder.glob("*.safetensors")) and not (folder / NO_WEIGHTS).is_file():
        yield f"{name}: {folder} has no safetensors files"


@_rule(_files)
def _transformer_engine_is_there(transformer_impl: str) -> Iterator[str]:
    if transformer_impl == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        yield (
            "megatron.transformer_impl: the package transformer_engine is not installed (docs/gpu.md says how); "
            "'local' does without it"
        )


@_rule(_files)
def _resumable(load: Path | None) -> Iterator[str]:
    if load is not None and not load.is_dir():
        yield f"checkpoint.load: no folder {load}"


@_rule(_files)
def _data(prompt_data: str, eval_prompt_data: dict[str, str]) -> Iterator[str]:
    named = {"data.prompt_data": prompt_data} | {f"eval.eval_prompt_data.{k}": v for k, v in eval_prompt_data.items()}
    for name, path in named.items():
        file = re.sub(r"@\[[^\]]*\]$", "", path)
        if not Path(file).is_file():
            yield f"{name}: no file {file}"


# --- allowed, but doubtful -------------------------------------------------------------------------------------------


@_rule(_warnings)
def _unused_models(
    mode: str,
    advantage_estimator: str,
    kl_coef: float,
    kl_loss_coef: float,
    opd_kl_coef: float,
    ref_load: Path | None,
    critic_load: Path | None,
    teacher_load: Path | None,
) -> Iterator[str]:
    rl = mode == "rl"
    if ref_load is not None and not (mode == "dpo" or (rl and (kl_coef or kl_loss_coef))):
        yield "model.ref_load: nothing uses the reference policy while kl_coef and kl_loss_coef are 0"
    if critic_load is not None and not (rl and advantage_estimator == "ppo"):
        yield "model.critic_load: only advantage_estimator = ppo has a critic"
    if teacher_load is not None and not (rl and opd_kl_coef):
        yield "model.teacher_load: nothing uses the teacher while opd_kl_coef is 0"
