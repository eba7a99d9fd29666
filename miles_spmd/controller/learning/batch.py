"""From scored samples to the sequences of each optimizer step: advantages, weights, denominators of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from miles_spmd.algorithms.advantages import compute_advantages
from miles_spmd.algorithms.aggregation import loss_weights
from miles_spmd.algorithms.corrections import correct
from miles_spmd.algorithms.rewards import shape_rewards
from miles_spmd.config import Config
from miles_spmd.controller.learning.scoring import Scores
from miles_spmd.data.preferences import PreferencePair
from miles_spmd.types.rollout_batch import Arrays, RolloutBatch
from miles_spmd.types.sample import Sample
from miles_spmd.types.train_sequence import TrainSequence


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


def pair_sequences(pairs: Sequence[PreferencePair]) -> list[TrainSequence]:
    """Preferred and rejected sequence of every pair in turn; the mask (as weights of 0 and 1) is on what counts."""
    return [
        TrainSequence(answer.tokens, answer.loss_mask, pair_signs=np.full(len(answer.tokens), sign, np.float32))
        for pair in pairs
        for answer, sign in ((pair.chosen, 1), (pair.rejected, -1))
    ]


def optimizer_steps(
    samples: Sequence[Sample], sequences: Sequence[TrainSequence], scores: Scores, config: Config
) -> tuple[list[list[TrainSequence]], dict[str, float]]:
    """Fill in advantages, policy weights and global loss weights; cut the rollout into optimizer steps in submission
    order. Returns the steps and the algorithm's metrics. Raises ValueError where the algorithm lacks what it needs.
    """
    algorithm = config.algorithm
    rollout_ids = _rollout_ids(samples)
    batch = RolloutBatch(
        rewards=shape_rewards(samples, algorithm, config.rollout.rollout_max_response_len),
        group_ids=np.unique([sample.prompt.uid for sample in samples], return_inverse=True)[1],
        masks=[sequence.loss_weights for sequence in sequences],
        rollout_ids=rollout_ids,
        rollout_log_probs=[s.rollout_log_probs for s in sequences if s.rollout_log_probs is not None],
        **scores,
    )
    estimate = compute_advantages(batch, algorithm)
    correction = correct(batch, algorithm)
    fields: dict[str, Arrays | None] = {
        "advantages": estimate.advantages,
        "policy_weights": correction.policy_weights if correction else None,
        "old_log_probs": batch.old_log_probs,
        "ref_log_probs": batch.ref_log_probs,
        "returns": estimate.returns,
        "old_values": batch.values,
    }
    for name, arrays in fields.items():
        for sequence, array in zip(sequences, arrays or ()):
            setattr(sequence, name, array)
    size = config.train.global_batch_size or len(samples)
    steps = []
    for start in range(0, int(rollout_ids.max()) + 1, size):
        inside = np.flatnonzero((start <= rollout_ids) & (rollout_ids < start + size))  # siblings stay together
        steps.append([sequences[i] for i in inside.tolist()])
        set_loss_weights(
            steps[-1], algorithm.loss_aggregation, config.rollout.rollout_max_response_len, rollout_ids[inside]
        )
    metrics = estimate.metrics | (correction.metrics if correction else {})
    return steps, {f"rollout/{name}": value for name, value in metrics.items()}


def set_loss_weights(
    sequences: Sequence[TrainSequence], aggregation: str, max_response_len: int, rollout_ids: np.ndarray | None = None
) -> None:
    """Turn the 0/1 masks in ``loss_weights`` into weights with the denominator of this optimizer step."""
    masks = [s.loss_weights for s in sequences]
    weights = loss_weights(masks, aggregation, max_response_len=max_response_len, rollout_ids=rollout_ids)
    for sequence, weight in zip(sequences, weights):
        sequence.loss_weights = weight


def _rollout_ids(samples: Sequence[Sample]) -> np.ndarray:
    """Numbers of the rollouts in order of submission, int64 [N]; siblings are samples of one prompt and one index."""
    numbers: dict[tuple[str, int], int] = {}
    return np.asarray([numbers.setdefault((s.prompt.uid, s.index), len(numbers)) for s in samples])


def _after_prompt(sample: Sample, values: Sequence[float]) -> np.ndarray:
    aligned = np.zeros(len(sample.prompt.tokens) + len(sample.response), np.float32)
    aligned[len(sample.prompt.tokens) :] = values
    return aligned
