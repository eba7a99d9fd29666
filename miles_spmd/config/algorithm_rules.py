"""Rules about what a run computes: batches, sampling, the algorithm and its models, learning rates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from miles_spmd.config.rules import CONTRADICTIONS, DOUBTS, checkpoint_shape, rule

COMPARE_GROUPS = ("grpo", "gspo", "cispo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline")


# --- batches and sampling --------------------------------------------------------------------------------------------


@rule(CONTRADICTIONS)
def _steps_divide_the_rollout(
    mode: str, rollout_batch_size: int, n_samples_per_prompt: int, global_batch_size: int | None
) -> Iterator[str]:
    samples = rollout_batch_size * n_samples_per_prompt
    if mode == "rl" and global_batch_size is not None and samples % global_batch_size:
        yield (
            f"train.global_batch_size: {global_batch_size} does not divide a rollout of {rollout_batch_size} prompts "
            f"x {n_samples_per_prompt} samples = {samples}"
        )


@rule(CONTRADICTIONS)
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


@rule(CONTRADICTIONS)
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


@rule(CONTRADICTIONS)
def _overlong_answers(overlong_buffer_len: int, rollout_max_response_len: int) -> Iterator[str]:
    if overlong_buffer_len > rollout_max_response_len:
        yield (
            f"algorithm.overlong_buffer_len: {overlong_buffer_len} is more than rollout_max_response_len "
            f"{rollout_max_response_len}"
        )


@rule(CONTRADICTIONS)
def _teacher(mode: str, opd_kl_coef: float, teacher_load: Path | None) -> Iterator[str]:
    if mode == "rl" and opd_kl_coef and teacher_load is None:
        yield "model.teacher_load: algorithm.opd_kl_coef needs a teacher's checkpoint"


@rule(CONTRADICTIONS)
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


@rule(CONTRADICTIONS)
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


@rule(CONTRADICTIONS)
def _critic_only_steps(advantage_estimator: str, num_critic_only_steps: int, num_rollout: int) -> Iterator[str]:
    if advantage_estimator == "ppo" and num_critic_only_steps >= num_rollout:
        yield f"train.num_critic_only_steps: {num_critic_only_steps} leave no step of the {num_rollout} for the policy"


@rule(CONTRADICTIONS)
def _canonical_reduction(
    reduction_leaves: int,
    overlap_grad_reduce: bool,
    expert_model_parallel_size: int,
) -> Iterator[str]:
    if reduction_leaves and expert_model_parallel_size > 1:
        yield "train.reduction_leaves: experts on several ranks see a whole group's tokens; no order of theirs is kept"
    if reduction_leaves & (reduction_leaves - 1):
        yield f"train.reduction_leaves: must be a power of two, got {reduction_leaves}"
    if reduction_leaves and overlap_grad_reduce:
        yield (
            "train.reduction_leaves: overlap_grad_reduce must be false; it adds up gradients before they are whole, in "
            "an order that depends on the number of ranks"
        )


@rule(CONTRADICTIONS)
def _leaves_fit(
    reduction_leaves: int, leaf_tokens: int, max_tokens_per_gpu: int, context_parallel_size: int
) -> Iterator[str]:
    if leaf_tokens and not reduction_leaves:
        yield "train.leaf_tokens: needs train.reduction_leaves"
    if leaf_tokens > (most := max_tokens_per_gpu * context_parallel_size):
        yield f"train.leaf_tokens: at most {most}, which is max_tokens_per_gpu x context_parallel_size"


@rule(CONTRADICTIONS)
def _top_k(rollout_top_k: int) -> Iterator[str]:
    if rollout_top_k == 0 or rollout_top_k < -1:
        yield f"rollout.rollout_top_k: must be -1 (the whole vocabulary) or positive, got {rollout_top_k}"


@rule(CONTRADICTIONS)
def _reward_is_known(rm_type: str) -> Iterator[str]:
    if rm_type not in ("math", "exact") and ":" not in rm_type:
        yield f"reward.rm_type: must be math, exact or `module:function`, got {rm_type!r}"


@rule(CONTRADICTIONS)
def _evaluation_has_data(eval_interval: int, eval_prompt_data: dict[str, str]) -> Iterator[str]:
    if eval_interval and not eval_prompt_data:
        yield f"eval.eval_prompt_data: is empty, but eval_interval is {eval_interval}"


@rule(CONTRADICTIONS)
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


@rule(CONTRADICTIONS)
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


@rule(CONTRADICTIONS)
def _learning_rate(lr: float | None, critic_lr: float | None, min_lr: float, lr_decay_style: str) -> Iterator[str]:
    for name, rate in (("megatron.lr", lr), ("train.critic_lr", critic_lr)):
        if rate is not None and min_lr > rate and lr_decay_style != "constant":
            yield f"train.min_lr: {min_lr} is larger than {name} {rate}"


@rule(CONTRADICTIONS)
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


# --- allowed, but doubtful -------------------------------------------------------------------------------------------


@rule(DOUBTS)
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
