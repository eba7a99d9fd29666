"""From rewards to the advantage of every token: estimator, then distillation, then whitening.

All three run on the controller, on plain arrays, because each of them may need the samples of the whole step.

There are three kinds of estimators. Those of groups compare the rollouts of a prompt and a role with each other, and
RAE compares a rollout with those of its role that came before: all tokens of a rollout have the same advantage. The
others, PPO's generalised advantages and REINFORCE++'s returns, have a reward and an advantage per token: masked tokens
are not transitions there, they have no reward, and neither discount nor trace decays across them. A truncated response
ends like a finished one, with value 0 (no bootstrap).

Shape suffixes: R rollouts of the batch, G of one group (groups may differ in size), N samples, K transitions (trained
tokens) of a sample, T tokens of one sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from miles_spmd.algorithms.distillation import reverse_kl
from miles_spmd.algorithms.kl import kl_penalties
from miles_spmd.config import AlgorithmConfig
from miles_spmd.plugins.algorithm import AdvantageEstimator
from miles_spmd.plugins.plug_point import PlugPoint
from miles_spmd.types.rollout_batch import Arrays, Baselines, Estimate, RolloutBatch, flat, masked, shaped

STD_EPSILON = 1e-6

Comparison = Callable[[np.ndarray], np.ndarray]  # rewards [G] -> advantages [G]; called for groups of at least two


# --- estimators that compare the rollouts of a prompt ----------------------------------------------------------------


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
    return _compared(batch, algorithm, standardised if algorithm.grpo_std_normalization else centred)


def dr_grpo(batch: RolloutBatch, algorithm: AlgorithmConfig) -> Estimate:
    """Estimate by Dr.GRPO (arXiv 2503.20783): centred, never divided. Its loss is aggregated by ``constant``."""
    return _compared(batch, algorithm, centred)


def rloo(batch: RolloutBatch, algorithm: AlgorithmConfig) -> Estimate:
    """Estimate by RLOO (arXiv 2402.14740): reward - mean reward of the group's others; ``kl_coef`` as in GRPO."""
    return _compared(batch, algorithm, leave_one_out)


def reinforce_plus_plus_baseline(batch: RolloutBatch, algorithm: AlgorithmConfig) -> Estimate:
    """Estimate by REINFORCE++-baseline (arXiv 2501.03262): centred reward - ``kl_coef`` x KL; then whitened."""
    return _compared(batch, algorithm, centred, penalised="tokens")


def _compared(
    batch: RolloutBatch, algorithm: AlgorithmConfig, compare: Comparison, penalised: str = "rewards"
) -> Estimate:
    """Return for every token its rollout's advantage. The KL is subtracted from the rewards, summed over the tokens of
    a rollout, or from the advantages of the ``penalised`` tokens."""
    rewards_R = _penalised(batch, algorithm) if penalised == "rewards" else batch.rollouts.rewards
    advantages_R, without_variance = within_groups(rewards_R, batch.rollouts.group_ids, compare)
    advantages = _of_tokens(batch, advantages_R)
    if penalised == "tokens":
        advantages = [a - penalty for a, penalty in zip(advantages, kl_penalties(batch, algorithm))]
    return Estimate(advantages, metrics={"zero_std_groups": float(without_variance)})


def _penalised(batch: RolloutBatch, algorithm: AlgorithmConfig) -> np.ndarray:
    """Return the rewards of the rollouts, less ``kl_coef`` x KL summed over their tokens, float64 [R]."""
    penalties_N = np.asarray([penalty.sum() for penalty in kl_penalties(batch, algorithm)])
    rewards_R = batch.rollouts.rewards
    return rewards_R - np.bincount(batch.rollouts.of_sample, penalties_N, minlength=len(rewards_R))


def _of_tokens(batch: RolloutBatch, advantages_R: np.ndarray) -> Arrays:
    """Give every trained token the advantage of its rollout."""
    advantages_N = advantages_R[batch.rollouts.of_sample]
    return [masked(np.full(m.shape, a), m) for a, m in zip(advantages_N, batch.masks)]


# --- an estimator with a baseline from the batches before ------------------------------------------------------------


def rae(batch: RolloutBatch, algorithm: AlgorithmConfig) -> Estimate:
    """Estimate by role-conditioned advantage estimation (SPIRAL, arXiv 2506.24119, eq. 2): reward - b, where b is a
    moving average of the rewards of this role in this game.

    Rollout after rollout, in the order of submission: b <- ``rae_decay`` b + (1 - ``rae_decay``) r; A = r - b. In the
    first batch b begins with 0. ``kl_coef`` as in GRPO.
    """
    baselines = {game: dict(roles) for game, roles in batch.baselines.items()}
    players = [("", "")] * len(batch.masks) if batch.players is None else batch.players
    rewards_R, decay = _penalised(batch, algorithm), algorithm.rae_decay
    advantages_R = np.zeros(len(rewards_R))
    for rollout in np.argsort(batch.rollouts.first):
        game, role = players[batch.rollouts.first[rollout]]
        roles, reward = baselines.setdefault(game, {}), float(rewards_R[rollout])
        roles[role] = decay * roles.get(role, 0.0) + (1 - decay) * reward
        advantages_R[rollout] = reward - roles[role]
    metrics = {f"baseline/{name}": b for name, b in _by_player(baselines).items()}
    return Estimate(_of_tokens(batch, advantages_R), metrics=metrics, baselines=baselines)


def _by_player(baselines: Baselines) -> dict[str, float]:
    """Return the baselines by names for metrics: game and role, without what has no name."""
    pairs = ((game, role, b) for game, roles in baselines.items() for role, b in roles.items())
    return {"/".join(filter(None, (game, role))) or "all": b for game, role, b in pairs}


# --- estimators with a reward per token ------------------------------------------------------------------------------


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
    """Return -``kl_coef`` x KL for every trained token, plus the sample's reward: that of each turn for its last
    token, and for the last token of all what the turns have not received of the rollout's, float64 [T].

    Each sibling has the reward of its rollout. What a token receives that is not trained, the last trained one before
    it does; a turn before all trained tokens is none of their doing."""
    rewards = [-penalty for penalty in kl_penalties(batch, algorithm)]
    turns = [None] * len(rewards) if batch.turn_rewards is None else batch.turn_rewards
    for of_token, reward, of_turns, mask in zip(rewards, batch.rewards, turns, batch.masks):
        trained = np.flatnonzero(mask > 0)
        if not len(trained):
            continue
        if of_turns is not None:
            reward = reward - math.fsum(of_turns)
            for end in np.flatnonzero(of_turns):
                if (before := np.searchsorted(trained, end, side="right")) > 0:
                    of_token[trained[before - 1]] += of_turns[end]
        of_token[trained[-1]] += reward
    return rewards


def _explained(returns: np.ndarray, values: np.ndarray, trained: np.ndarray) -> float:
    """Return 1 - Var(G - V) / Var(G) over trained tokens; 0 if all returns are equal."""
    variance = returns[trained].var() if trained.any() else 0.0
    return float(1 - (returns - values)[trained].var() / variance) if variance else 0.0


# --- from an estimate to advantages ----------------------------------------------------------------------------------


ESTIMATORS: PlugPoint[AdvantageEstimator] = PlugPoint(
    "algorithm.advantage_estimator",
    {
        "grpo": grpo,
        "gspo": grpo,
        "cispo": grpo,
        "dr_grpo": dr_grpo,
        "rloo": rloo,
        "reinforce_plus_plus": reinforce_plus_plus,
        "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
        "ppo": ppo,
        "rae": rae,
    },
    AdvantageEstimator,
)


def compute_advantages(batch: RolloutBatch, algorithm: AlgorithmConfig) -> Estimate:
    """Compute the advantage (and PPO's return) of every token, float32 [T] per sample and 0 where masked, with metrics.

    Metrics are ``zero_std_groups`` and ``fully_masked_samples`` (counts), ``opd_reverse_kl`` (mean over trained tokens)
    and those of the estimator. Raises ValueError if the batch lacks an array that the algorithm requires, and
    PlugInError if an estimator returns other shapes or values that are not finite.
    """
    estimate = ESTIMATORS.resolve(algorithm.advantage_estimator)(batch, algorithm)
    if not isinstance(estimate, Estimate):
        raise ESTIMATORS.returned(algorithm.advantage_estimator, estimate, "an Estimate (types/rollout_batch.py)")
    advantages = _checked("advantages", estimate.advantages, batch, algorithm)
    returns = None if estimate.returns is None else _checked("returns", estimate.returns, batch, algorithm)
    metrics = {**estimate.metrics, "fully_masked_samples": float(batch.fully_masked_samples)}
    if algorithm.opd_kl_coef:
        kl = reverse_kl(batch)
        advantages = [a - algorithm.opd_kl_coef * k for a, k in zip(advantages, kl)]
        metrics["opd_reverse_kl"] = float(flat(kl).sum() / max(flat(batch.masks).sum(), 1))
    if algorithm.whitens_advantages:
        advantages = whiten(advantages, batch.masks)
    returns = None if returns is None else _float32(returns)
    return Estimate(_float32(advantages), returns, metrics, estimate.baselines)


def whiten(values: Arrays, masks: Arrays) -> Arrays:
    """Scale to zero mean and unit variance over all trained tokens of the batch (unbiased, two passes, float64 inside).

    Takes and returns [T] per sample, returned as float32 with 0 where masked. A single token is only centred.
    """
    trained = flat(values)[flat(masks) > 0]
    mean = trained.mean() if trained.size else 0.0
    scale = 1.0 / np.sqrt(trained.var(ddof=1) + 1e-8) if trained.size > 1 else 1.0
    return _float32([np.where(m > 0, (v - mean) * scale, 0.0) for v, m in zip(values, masks)])


def _checked(kind: str, arrays: Arrays, batch: RolloutBatch, algorithm: AlgorithmConfig) -> Arrays:
    """Return an estimator's result, which may be a user's, as float64 with 0 where masked. Raises PlugInError."""
    found = shaped(arrays, batch.masks)
    checked = [masked(a, m) for a, m in zip(found or [], batch.masks)]
    if found is None or not np.isfinite(flat(checked)).all():
        expected = f"{kind} that are finite and shaped like the masks"
        raise ESTIMATORS.returned(algorithm.advantage_estimator, arrays, expected)
    return checked


def _float32(arrays: Arrays) -> Arrays:
    return [a.astype(np.float32) for a in arrays]
