"""Estimators with a reward and an advantage per token: PPO's generalised advantages and REINFORCE++'s returns.

Masked tokens are not transitions: they have no reward, and neither discount nor trace decays across them. A truncated
response ends like a finished one, with value 0 (no bootstrap).
"""

from __future__ import annotations

import numpy as np

from miles_spmd.algorithms.kl import kl_penalties
from miles_spmd.config import AlgorithmConfig
from miles_spmd.types.rollout_batch import Arrays, Estimate, RolloutBatch, flat


def gae(rewards: Arrays, values: Arrays, masks: Arrays, gamma: float, lambd: float) -> tuple[Arrays, Arrays]:
    """Compute advantages A and returns A + V, float64 [T] per sample, 0 where masked (arXiv 1506.02438, eq. 16).

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1}, where t runs over a sample's trained
    tokens from the last one backwards. The order of operations does not depend on the rest of the batch.
    """
    # [N, K]: the K transitions of each sample, aligned at their ends, so that one loop over K serves all samples
    chosen = [np.flatnonzero(mask > 0) for mask in masks]
    longest = max((len(places) for places in chosen), default=0)
    reward_NK, value_NK, next_value_NK = np.zeros((3, len(masks), longest))
    for i, places in enumerate(chosen):
        reward_NK[i, longest - len(places) :] = rewards[i][places]
        value_NK[i, longest - len(places) :] = values[i][places]
    next_value_NK[:, :-1] = value_NK[:, 1:]
    delta_NK = reward_NK + gamma * next_value_NK - value_NK
    advantage_KN = np.ascontiguousarray(delta_NK.T)  # contiguous rows for the loop
    for k in reversed(range(longest - 1)):
        advantage_KN[k] += gamma * lambd * advantage_KN[k + 1]
    advantage_NK = np.ascontiguousarray(advantage_KN.T)
    advantages, returns = ([np.zeros(mask.shape) for mask in masks] for _ in range(2))
    for i, places in enumerate(chosen):
        advantages[i][places] = advantage_NK[i, longest - len(places) :]
        returns[i][places] = advantages[i][places] + values[i][places]
    return advantages, returns


def ppo(batch: RolloutBatch, algorithm: AlgorithmConfig) -> Estimate:
    """Estimate by PPO with a critic (arXiv 1707.06347): GAE with ``gamma`` and ``lambd`` over the token rewards."""
    values = batch.required("values", "advantage_estimator ppo")
    advantages, returns = gae(token_rewards(batch, algorithm), values, batch.masks, algorithm.gamma, algorithm.lambd)
    trained = flat(batch.masks) > 0
    return Estimate(advantages, returns, {"value_explained_variance": _explained(flat(returns), flat(values), trained)})


def reinforce_plus_plus(batch: RolloutBatch, algorithm: AlgorithmConfig) -> Estimate:
    """Estimate by REINFORCE++ (arXiv 2501.03262): the discounted sum of the token rewards that follow; then whitened.

    That is GAE without a critic and with lambda = 1. Others let ``gamma`` decay over masked tokens too, which makes a
    turn's advantage depend on the length of its tools' output.
    """
    no_values = [np.zeros(mask.shape) for mask in batch.masks]
    advantages, returns = gae(token_rewards(batch, algorithm), no_values, batch.masks, algorithm.gamma, 1.0)
    return Estimate(advantages, returns)


def token_rewards(batch: RolloutBatch, algorithm: AlgorithmConfig) -> Arrays:
    """Return -``kl_coef`` x KL for every trained token, plus the sample's reward for the last one, float64 [T].

    Each sibling has the reward of its rollout."""
    rewards = [-penalty for penalty in kl_penalties(batch, algorithm)]
    for of_token, reward, mask in zip(rewards, batch.rewards, batch.masks):
        trained = np.flatnonzero(mask > 0)
        if len(trained):
            of_token[trained[-1]] += reward
    return rewards


def _explained(returns: np.ndarray, values: np.ndarray, trained: np.ndarray) -> float:
    """Return 1 - Var(G - V) / Var(G) over trained tokens; 0 if all returns are equal."""
    variance = returns[trained].var() if trained.any() else 0.0
    return float(1 - (returns - values)[trained].var() / variance) if variance else 0.0
