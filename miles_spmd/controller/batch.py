"""From scored samples to the sequences of each optimizer step: advantages, weights, denominators of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from miles_spmd.algorithms.advantages import compute_advantages
from miles_spmd.algorithms.aggregation import loss_weights
from miles_spmd.algorithms.corrections import correct
from miles_spmd.algorithms.rewards import shape_rewards
from miles_spmd.algorithms.rollout_batch import Arrays, RolloutBatch
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
) -> tuple[list[list[TrainSequence]], dict[str, float]]:
    """Fill in advantages, policy weights and global loss weights; cut the rollout into optimizer steps in submission
    order. Returns the steps and the algorithm's metrics. Raises ValueError where the algorithm lacks what it needs.
    """
    algorithm = config.algorithm
    batch = _rollout_batch(samples, sequences, config)
    estimate = compute_advantages(batch, algorithm)
    correction = correct(batch, algorithm)
    for i, sequence in enumerate(sequences):
        sequence.advantages = estimate.advantages[i]
        if correction is not None:
            sequence.policy_weights = correction.policy_weights[i]
    size = config.train.global_batch_size or len(sequences)
    steps = [list(sequences[start : start + size]) for start in range(0, len(sequences), size)]
    for step in steps:
        set_loss_weights(step, algorithm.loss_aggregation, config.rollout.rollout_max_response_len)
    metrics = estimate.metrics | (correction.metrics if correction else {})
    return steps, {f"rollout/{name}": value for name, value in metrics.items()}


def set_loss_weights(sequences: Sequence[TrainSequence], aggregation: str, max_response_len: int) -> None:
    """Turn the 0/1 masks in ``loss_weights`` into weights with the denominator of this optimizer step."""
    weights = loss_weights([s.loss_weights for s in sequences], aggregation, max_response_len=max_response_len)
    for sequence, weight in zip(sequences, weights):
        sequence.loss_weights = weight


def _rollout_batch(samples: Sequence[Sample], sequences: Sequence[TrainSequence], config: Config) -> RolloutBatch:
    uids = [sample.prompt.uid for sample in samples]

    def field(name: str) -> Arrays | None:
        arrays = [getattr(sequence, name) for sequence in sequences]
        return None if arrays[0] is None else arrays

    return RolloutBatch(
        rewards=shape_rewards(samples, config.algorithm, config.rollout.rollout_max_response_len),
        group_ids=np.unique(uids, return_inverse=True)[1],
        masks=[sequence.loss_weights for sequence in sequences],
        old_log_probs=field("old_log_probs"),
        rollout_log_probs=field("rollout_log_probs"),
        ref_log_probs=field("ref_log_probs"),
    )


def _after_prompt(sample: Sample, values: Sequence[float]) -> np.ndarray:
    aligned = np.zeros(len(sample.prompt.tokens) + len(sample.response), np.float32)
    aligned[len(sample.prompt.tokens) :] = values
    return aligned
