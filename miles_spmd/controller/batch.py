"""From scored samples to the sequences of each optimizer step: advantages, weights, denominators of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from miles_spmd.algorithms.advantages import grpo_advantages, whiten
from miles_spmd.algorithms.aggregation import loss_weights
from miles_spmd.algorithms.kl import kl_estimate
from miles_spmd.config.schema import Config
from miles_spmd.data.sample import Sample, TrainSequence


def to_sequences(samples: Sequence[Sample]) -> list[TrainSequence]:
    """Tokens, the mask (as weights of 0 and 1 for now) and the engine's log-probs, aligned over prompt + response."""
    return [
        TrainSequence(
            tokens=np.asarray(sample.sequence, np.int32),
            loss_weights=_after_prompt(sample, sample.loss_mask),
            rollout_log_probs=_after_prompt(sample, sample.rollout_log_probs),
        )
        for sample in samples
    ]


def optimizer_steps(
    samples: Sequence[Sample], sequences: Sequence[TrainSequence], config: Config
) -> list[list[TrainSequence]]:
    """Fill in advantages and global loss weights, and cut the rollout into optimizer steps in submission order.

    With ``kl_coef`` every sequence needs ``old_log_probs`` and ``ref_log_probs``: the estimated KL of a sample, summed
    over its tokens, is taken off its reward before groups are compared.
    """
    algorithm = config.algorithm
    masks = [sequence.loss_weights for sequence in sequences]
    rewards = np.asarray([sample.reward for sample in samples], np.float64)
    if algorithm.kl_coef:
        rewards = rewards - algorithm.kl_coef * np.asarray([_kl(s, algorithm.kl_loss_type) for s in sequences])
    advantages = grpo_advantages(
        rewards, config.rollout.n_samples_per_prompt, std_normalization=algorithm.grpo_std_normalization
    )
    per_token = [(value * mask).astype(np.float32) for value, mask in zip(advantages, masks)]
    if algorithm.normalize_advantages:
        per_token = whiten(per_token, masks)
    for sequence, values in zip(sequences, per_token):
        sequence.advantages = values
    size = config.train.global_batch_size or len(sequences)
    steps = [list(sequences[start : start + size]) for start in range(0, len(sequences), size)]
    for step in steps:
        set_loss_weights(step, algorithm.loss_aggregation, config.rollout.rollout_max_response_len)
    return steps


def set_loss_weights(sequences: Sequence[TrainSequence], aggregation: str, max_response_len: int) -> None:
    """Turn the 0/1 masks in ``loss_weights`` into weights with the denominator of this optimizer step."""
    weights = loss_weights([s.loss_weights for s in sequences], aggregation, max_response_len=max_response_len)
    for sequence, weight in zip(sequences, weights):
        sequence.loss_weights = weight


def _after_prompt(sample: Sample, values: Sequence[float]) -> np.ndarray:
    aligned = np.zeros(len(sample.prompt.tokens) + len(sample.response), np.float32)
    aligned[len(sample.prompt.tokens) :] = values
    return aligned


def _kl(sequence: TrainSequence, kind: str) -> float:
    if sequence.old_log_probs is None or sequence.ref_log_probs is None:
        raise ValueError("KL in the reward needs the log-probs of the current and the reference policy")
    mask = sequence.loss_weights
    estimate = kl_estimate(sequence.old_log_probs.astype(np.float64), sequence.ref_log_probs.astype(np.float64), kind)
    return float((estimate * mask).sum())
