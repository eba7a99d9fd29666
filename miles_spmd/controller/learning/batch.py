"""From samples, examples and pairs to the sequences of each optimizer step, with advantages and loss weights.

Whatever needs the whole batch is computed here, on plain arrays, so that it is the same for every layout of ranks.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from miles_spmd.algorithms.advantages import compute_advantages
from miles_spmd.algorithms.aggregation import loss_weights
from miles_spmd.algorithms.corrections import correct
from miles_spmd.algorithms.rewards import shape_rewards
from miles_spmd.config import Config
from miles_spmd.data.examples import PreferencePair, SftExample
from miles_spmd.types.rollout_batch import Arrays, Baselines, RolloutBatch
from miles_spmd.types.sample import Sample
from miles_spmd.types.train_sequence import TrainSequence

Scores = dict[str, Arrays]  # of a rollout, computed before the update, by the names of RolloutBatch's fields


def to_sequences(samples: Sequence[Sample]) -> list[TrainSequence]:
    """Return tokens, loss mask and the engine's log-probs of each sample, aligned over prompt and response. The mask
    stands in ``loss_weights`` as 0 and 1 until :func:`optimizer_steps` knows the denominators."""
    return [
        TrainSequence(
            tokens=np.asarray(sample.sequence, np.int32),
            loss_weights=_after_prompt(sample, sample.loss_mask),
            rollout_log_probs=_after_prompt(sample, sample.rollout_log_probs),
        )
        for sample in samples
    ]


def example_sequences(examples: Sequence[SftExample]) -> list[TrainSequence]:
    """Return the sequences of supervised examples, weighted to the mean over their trained tokens."""
    batch = [TrainSequence(example.tokens, example.loss_mask) for example in examples]
    set_loss_weights(batch, "token_mean", max_response_len=0)
    return batch


def pair_sequences(pairs: Sequence[PreferencePair]) -> list[TrainSequence]:
    """Return the preferred and the rejected sequence of every pair in turn, with their masks in ``loss_weights``."""
    return [
        TrainSequence(side.tokens, side.loss_mask, pair_signs=np.full(len(side.tokens), sign, np.float32))
        for pair in pairs
        for side, sign in ((pair.chosen, 1), (pair.rejected, -1))
    ]


class OptimizerSteps(NamedTuple):
    """A rollout, cut into optimizer steps."""

    batches: list[list[TrainSequence]]
    metrics: dict[str, float]  # of the algorithm
    baselines: Baselines  # for the next rollout


def optimizer_steps(
    samples: Sequence[Sample],
    sequences: Sequence[TrainSequence],
    scores: Scores,
    config: Config,
    baselines: Baselines | None = None,
) -> OptimizerSteps:
    """Cut a rollout into optimizer steps of ``global_batch_size`` episodes in the order of submission.

    Sets advantages, policy weights and loss weights in ``sequences``, which belong to ``samples`` one to one.
    ``baselines``: what the steps of the rollout before have returned. Raises ValueError where the algorithm requires
    scores that are missing.
    """
    algorithm = config.algorithm
    rollout_ids = _numbers(sample.rollout for sample in samples)
    batch = RolloutBatch(
        rewards=shape_rewards(samples, algorithm, config.rollout.rollout_max_response_len),
        group_ids=_numbers((sample.prompt.uid, sample.role) for sample in samples),
        masks=[sequence.loss_weights for sequence in sequences],
        rollout_ids=rollout_ids,
        rollout_log_probs=[s.rollout_log_probs for s in sequences if s.rollout_log_probs is not None],
        turn_rewards=_turn_rewards(samples),
        players=[(sample.game, sample.role) for sample in samples],
        baselines=baselines or {},
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
    steps, episode_ids = [], _numbers((sample.prompt.uid, sample.index) for sample in samples)
    # Siblings are parts of one rollout, which a step's denominator counts once, and the roles of an episode are players
    # of one game: all of them stay in one step.
    for start in range(0, int(episode_ids.max()) + 1, size):
        inside = np.flatnonzero((start <= episode_ids) & (episode_ids < start + size))
        steps.append([sequences[i] for i in inside.tolist()])
        set_loss_weights(
            steps[-1], algorithm.loss_aggregation, config.rollout.rollout_max_response_len, rollout_ids[inside]
        )
    metrics = estimate.metrics | (correction.metrics if correction else {})
    return OptimizerSteps(steps, {f"rollout/{name}": value for name, value in metrics.items()}, estimate.baselines)


def set_loss_weights(
    sequences: Sequence[TrainSequence], aggregation: str, max_response_len: int, rollout_ids: np.ndarray | None = None
) -> None:
    """Replace the 0/1 masks in ``loss_weights`` by weights that hold the denominator of this optimizer step."""
    masks = [s.loss_weights for s in sequences]
    weights = loss_weights(masks, aggregation, max_response_len=max_response_len, rollout_ids=rollout_ids)
    for sequence, weight in zip(sequences, weights):
        sequence.loss_weights = weight


def _numbers(names: Iterable[Hashable]) -> np.ndarray:
    """Number names in the order in which they come first, int64 [N]."""
    numbers: dict[Hashable, int] = {}
    return np.asarray([numbers.setdefault(name, len(numbers)) for name in names])


def _turn_rewards(samples: Sequence[Sample]) -> Arrays | None:
    """Return the reward of the turn that ends with each token, float64 [T] per sample; None where no turn has one."""
    if not any(sample.trajectory.turn_rewards for sample in samples):
        return None
    return [_after_prompt(sample, sample.trajectory.rewards, np.float64) for sample in samples]


def _after_prompt(sample: Sample, values: Sequence[float], dtype: type = np.float32) -> np.ndarray:
    """Return ``values`` of the response's tokens with 0 before them for the prompt's, [T]."""
    start = len(sample.trajectory.start)
    aligned: np.ndarray = np.zeros(start + len(values), dtype)
    aligned[start:] = values
    return aligned
