"""Estimators of the KL divergence from the log-probs that two policies have for the sampled tokens.

Source: J. Schulman, "Approximating KL Divergence" (2020). With x the policy that sampled, y the base and
r = log x - log y, the expectation under x of k1 and k3 is KL(x || y); k2 is biased, k3 is never negative.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from miles_spmd.config import AlgorithmConfig
from miles_spmd.types.rollout_batch import Arrays, RolloutBatch, masked

Array = TypeVar("Array")  # numpy array or torch tensor, any shape

KINDS = ("k1", "k2", "k3", "low_var_kl")

# No objective can use the exp() of a larger log-ratio; the bound keeps fp32 finite.
MAX_LOG_RATIO = 20.0
MAX_LOW_VAR_KL = 10.0


def kl_estimate(log_probs: Array, base_log_probs: Array, kind: str, ratio: Array | None = None) -> Array:
    """Return a per-token estimate of KL(policy || base), of the inputs' shape and dtype.

    ``low_var_kl`` is k3 with bounds: r is clamped to +-20 and the estimate to +-10 (slime, Miles). ``ratio``,
    the policy's probability over the sampling policy's, multiplies the estimate before the second clamp; it makes
    value and gradient unbiased for tokens that another policy sampled (DeepSeek-V3.2, arXiv 2512.02556).
    Raises ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown KL estimator {kind!r}; known: {', '.join(KINDS)}")
    r = log_probs - base_log_probs  # type: ignore[operator]
    if kind == "low_var_kl":
        r = r.clip(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    estimate = r if kind == "k1" else 0.5 * r * r if kind == "k2" else _expm1(-r) + r
    if ratio is not None:
        estimate = ratio * estimate
    return estimate.clip(-MAX_LOW_VAR_KL, MAX_LOW_VAR_KL) if kind == "low_var_kl" else estimate


def kl_penalties(batch: RolloutBatch, algorithm: AlgorithmConfig) -> Arrays:
    """Return ``kl_coef`` x estimated KL(old policy || reference) for every token, float64 [T]; 0 where masked."""
    if not algorithm.kl_coef:
        return [np.zeros(m.shape) for m in batch.masks]
    old = batch.required("old_log_probs", "kl_coef")
    ref = batch.required("ref_log_probs", "kl_coef")
    return [
        algorithm.kl_coef * kl_estimate(masked(x, m), masked(y, m), algorithm.kl_loss_type)
        for x, y, m in zip(old, ref, batch.masks)
    ]


def _expm1(x: Array) -> Array:
    """Return exp(x) - 1, without the cancellation that in fp32 loses all digits of a small x."""
    return np.expm1(x) if isinstance(x, np.ndarray) else x.expm1()  # type: ignore[attr-defined,return-value]
