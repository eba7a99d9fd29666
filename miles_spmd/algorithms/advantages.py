"""From rewards to the advantage of every token: estimator, then distillation, then whitening.

All three run on the controller, on plain arrays, because each of them may need the samples of the whole step.
"""

from __future__ import annotations

import numpy as np

from miles_spmd.algorithms import gae
from miles_spmd.algorithms.distillation import reverse_kl
from miles_spmd.algorithms.group_relative import dr_grpo, grpo, reinforce_plus_plus_baseline, rloo
from miles_spmd.config import AlgorithmConfig
from miles_spmd.plugins.algorithm import AdvantageEstimator
from miles_spmd.plugins.plug_point import PlugPoint
from miles_spmd.types.rollout_batch import Arrays, Estimate, RolloutBatch, flat, masked

ESTIMATORS: PlugPoint[AdvantageEstimator] = PlugPoint(
    "algorithm.advantage_estimator",
    {
        "grpo": grpo,
        "gspo": grpo,
        "cispo": grpo,
        "dr_grpo": dr_grpo,
        "rloo": rloo,
        "reinforce_plus_plus": gae.reinforce_plus_plus,
        "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
        "ppo": gae.ppo,
    },
)


def compute_advantages(batch: RolloutBatch, algorithm: AlgorithmConfig) -> Estimate:
    """Compute the advantage (and PPO's return) of every token, float32 [T] per sample and 0 where masked, with metrics.

    Metrics are ``zero_std_groups`` and ``fully_masked_samples`` (counts), ``opd_reverse_kl`` (mean over trained tokens)
    and those of the estimator. Raises ValueError if the batch lacks an array that the algorithm requires, and if an
    estimator returns other shapes or values that are not finite.
    """
    estimate = ESTIMATORS.resolve(algorithm.advantage_estimator)(batch, algorithm)
    advantages = _checked("advantages", estimate.advantages, batch, algorithm)
    returns = None if estimate.returns is None else _checked("returns", estimate.returns, batch, algorithm)
    metrics = {**estimate.metrics, "fully_masked_samples": float(batch.fully_masked_samples)}
    if algorithm.opd_kl_coef:
        kl = reverse_kl(batch)
        advantages = [a - algorithm.opd_kl_coef * k for a, k in zip(advantages, kl)]
        metrics["opd_reverse_kl"] = float(flat(kl).sum() / max(flat(batch.masks).sum(), 1))
    if algorithm.whitens_advantages:
        advantages = whiten(advantages, batch.masks)
    return Estimate(_float32(advantages), None if returns is None else _float32(returns), metrics)


def whiten(values: Arrays, masks: Arrays) -> Arrays:
    """Scale to zero mean and unit variance over all trained tokens of the batch (unbiased, two passes, float64 inside).

    Takes and returns [T] per sample, returned as float32 with 0 where masked. A single token is only centred.
    """
    trained = flat(values)[flat(masks) > 0]
    mean = trained.mean() if trained.size else 0.0
    scale = 1.0 / np.sqrt(trained.var(ddof=1) + 1e-8) if trained.size > 1 else 1.0
    return _float32([np.where(m > 0, (v - mean) * scale, 0.0) for v, m in zip(values, masks)])


def _checked(kind: str, arrays: Arrays, batch: RolloutBatch, algorithm: AlgorithmConfig) -> Arrays:
    """Return an estimator's result, which may be a user's, as float64 with 0 where masked. Raises ValueError."""
    name = algorithm.advantage_estimator
    if [a.shape for a in arrays] != [m.shape for m in batch.masks]:
        raise ValueError(f"advantage_estimator {name!r}: {kind} have other shapes than the masks")
    arrays = [masked(a, m) for a, m in zip(arrays, batch.masks)]
    if not np.isfinite(flat(arrays)).all():
        raise ValueError(f"advantage_estimator {name!r}: {kind} are not finite")
    return arrays


def _float32(arrays: Arrays) -> Arrays:
    return [a.astype(np.float32) for a in arrays]
