"""`[train]`: optimizer steps, their batches, learning rates and the order in which gradients are summed."""

from __future__ import annotations

from typing import Annotated, Literal

from miles_spmd.config.rules import ERRORS, Messages, Settings, rule
from miles_spmd.config.table import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Table, must_be


class TrainConfig(Table):
    global_batch_size: PositiveInt | None = None
    """Samples per optimizer step (`rl`; the default is one step per rollout), sequences (`sft`) or pairs (`dpo`, `rm`).
    """
    max_tokens_per_gpu: PositiveInt = 8192
    """Token budget of one packed micro-batch on one rank (times context-parallel size)."""
    offload_train: bool = False
    """Put moments and main parameters into host memory, and free gradients, while the engine uses the device; the
    weights stay. This leaves more memory to the engine's cache, at the price of two transfers in each step."""
    memory_allowance: NonNegativeFloat = 0.25
    """How much more memory than planned (this fraction, and 2 GiB) is left to the trainer when the engine releases
    memory, and may be in use before a warning."""
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
    `max_tokens_per_gpu`. 0: in the order in which sequences happen to be packed."""
    leaf_tokens: NonNegativeInt = 0
    """Pack the sequences of a leaf into micro-batches of this many tokens, at most `max_tokens_per_gpu` times
    context-parallel size. The result depends on this number in its last bits. 0: one sequence in each."""


# --- batches ---------------------------------------------------------------------------------------------------------


@rule(ERRORS)
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
    if s.mode == "rl" and longest > budget:
        yield (
            f"train.max_tokens_per_gpu: {s.max_tokens_per_gpu} x context_parallel_size {s.context_parallel_size} = "
            f"{budget} tokens cannot hold the longest sequence ({longest} tokens of prompt and response)"
        )


# --- learning rate ---------------------------------------------------------------------------------------------------


@rule(ERRORS)
def _learning_rate(s: Settings) -> Messages:
    for name, rate in (("megatron.lr", s.lr), ("train.critic_lr", s.critic_lr)):
        if rate is not None and s.min_lr > rate and s.lr_decay_style != "constant":
            yield f"train.min_lr: {s.min_lr} is larger than {name} {rate}"


@rule(ERRORS)
def _warmup_ends(s: Settings) -> Messages:
    samples = s.rollout_batch_size * s.n_samples_per_prompt
    updates = s.num_rollout * (samples // (s.global_batch_size or samples) if s.mode == "rl" else 1)
    if s.lr_warmup_iters >= max(updates, 1):
        yield f"train.lr_warmup_iters: {s.lr_warmup_iters} must be smaller than the run's {updates} optimizer steps"


@rule(ERRORS)
def _critic_only_steps(s: Settings) -> Messages:
    if s.advantage_estimator == "ppo" and s.num_critic_only_steps >= s.num_rollout:
        yield (
            f"train.num_critic_only_steps: {s.num_critic_only_steps} leave no step of the {s.num_rollout} to the policy"
        )


# --- canonical reduction ---------------------------------------------------------------------------------------------


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


@rule(ERRORS)
def _leaf_tokens(s: Settings) -> Messages:
    if s.leaf_tokens and not s.reduction_leaves:
        yield "train.leaf_tokens: needs train.reduction_leaves"
    if s.leaf_tokens > (most := s.max_tokens_per_gpu * s.context_parallel_size):
        yield f"train.leaf_tokens: must be at most {most}, which is max_tokens_per_gpu x context_parallel_size"
