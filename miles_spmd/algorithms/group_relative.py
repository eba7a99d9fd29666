"""Estimators that compare the rollouts of a prompt with each other: all tokens of a rollout have the same advantage.

Shape suffixes: R rollouts of the batch, G of one group (groups may differ in size), T tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from miles_spmd.algorithms.kl import kl_penalties
from miles_spmd.config import AlgorithmConfig
from miles_spmd.types.rollout_batch import Estimate, RolloutBatch, masked

STD_EPSILON = 1e-6

Comparison = Callable[[np.ndarray], np.ndarray]  # rewards [G] -> advantages [G]; called for groups of at least two


def centred(rewards_G: np.ndarray) -> np.ndarray:
    """Return r_i - mean(r)."""
    return rewards_G - rewards_G.mean()


def standardised(rewards_G: np.ndarray) -> np.ndarray:
    """Return (r_i - mean(r)) / (std(r) + 1e-6), with the unbiased standard deviation."""
    return centred(rewards_G) / (rewards_G.std(ddof=1) + STD_EPSILON)


def leave_one_out(rewards_G: np.ndarray) -> np.ndarray:
    """Return r_i - mean of the other rewards."""
    return rewards_G - (rewards_G.sum() - rewards_G) / (len(rewards_G) - 1)


def within_groups(rewards_R: np.ndarray, group_ids_R: np.ndarray, compare: Comparison) -> tuple[np.ndarray, int]:
    """Apply ``compare`` to each group. Return float64 [R] and the number of groups without variance.

    Those, which include single rollouts, get exact zeros: a rounding error of their mean, divided by a standard
    deviation of about 0, would become a large advantage."""
    advantages_R = np.zeros(len(rewards_R))
    order = np.argsort(group_ids_R, kind="stable")
    without_variance = 0
    for members in np.split(order, np.flatnonzero(np.diff(group_ids_R[order])) + 1) if len(order) else ():
        rewards_G = rewards_R[members]
        if np.ptp(rewards_G) == 0:
            without_variance += 1
        else:
            advantages_R[members] = compare(rewards_G)
    return advantages_R, without_variance


def grpo(batch: RolloutBatch, algorithm: AlgorithmConfig) -> Estimate:
    """Estimate by GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1.2): rewards standardised within their group, only
    centred without ``grpo_std_normalization``. GSPO (arXiv 2507.18071) and CISPO (arXiv 2506.13585) do the same.

    With ``kl_coef`` the KL of a rollout, summed over its tokens, is subtracted from its reward first.
    """
    return _sequence_level(batch, algorithm, standardised if algorithm.grpo_std_normalization else centred)


def dr_grpo(batch: RolloutBatch, algorithm: AlgorithmConfig) -> Estimate:
    """Estimate by Dr.GRPO (arXiv 2503.20783): centred, never divided. Its loss is aggregated by ``constant``."""
    return _sequence_level(batch, algorithm, centred)


def rloo(batch: RolloutBatch, algorithm: AlgorithmConfig) -> Estimate:
    """Estimate by RLOO (arXiv 2402.14740): reward - mean reward of the group's others; ``kl_coef`` as in GRPO."""
    return _sequence_level(batch, algorithm, leave_one_out)


def reinforce_plus_plus_baseline(batch: RolloutBatch, algorithm: AlgorithmConfig) -> Estimate:
    """Estimate by REINFORCE++-baseline (arXiv 2501.03262): centred reward - ``kl_coef`` x KL; then whitened."""
    rollouts = batch.rollouts
    advantages_R, flat_groups = within_groups(rollouts.rewards, rollouts.group_ids, centred)
    return _spread(batch, advantages_R, flat_groups, penalties=kl_penalties(batch, algorithm))


def _sequence_level(batch: RolloutBatch, algorithm: AlgorithmConfig, compare: Comparison) -> Estimate:
    rollouts = batch.rollouts
    penalties_N = np.asarray([penalty.sum() for penalty in kl_penalties(batch, algorithm)])
    rewards_R = rollouts.rewards - np.bincount(rollouts.of_sample, penalties_N, minlength=len(rollouts.rewards))
    return _spread(batch, *within_groups(rewards_R, rollouts.group_ids, compare))


def _spread(
    batch: RolloutBatch, advantages_R: np.ndarray, without_variance: int, penalties: list[np.ndarray] | None = None
) -> Estimate:
    """Return for every token its rollout's advantage minus the token's own penalty."""
    advantages_N = advantages_R[batch.rollouts.of_sample]
    advantages = [masked(np.full(m.shape, a), m) for a, m in zip(advantages_N, batch.masks)]
    if penalties is not None:
        advantages = [a - penalty for a, penalty in zip(advantages, penalties)]
    return Estimate(advantages, metrics={"zero_std_groups": float(without_variance)})
