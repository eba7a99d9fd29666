"""Metrics of the train/inference mismatch: engine and trainer compute the same policy by different programs."""

from __future__ import annotations

import numpy as np

from miles_spmd.algorithms.kl import MAX_LOG_RATIO
from miles_spmd.types.rollout_batch import Arrays, flat, masked


def mismatch_metrics(train_log_probs: Arrays, rollout_log_probs: Arrays, masks: Arrays) -> dict[str, float]:
    """Return metrics over the trained tokens of a whole step; {} if there are none. Log-probs are [T] per sample.

    ``train_log_probs`` must come from the trainer's forward pass with the weights that generated; otherwise the metrics
    measure staleness. Raises ValueError for log-probs that are not finite. With d = train - rollout and rho = exp(d),
    where d is clamped to +-20 in every exponential:

    - ``train_rollout_logprob_abs_diff``, ``..._p999``, ``..._max``: of |d|
    - ``train_rollout_kl``: k3 of KL(rollout || train), mean of rho - 1 - d
    - ``train_rollout_chi2_token``: mean of rho^2 - 1; ``train_rollout_chi2_seq``: mean over samples of exp(2 sum d) - 1
    - ``train_rollout_ess``: mean over samples of (sum rho)^2 / (n sum rho^2), 1 where nothing differs
    - ``train_rollout_ppl_ratio``: mean over samples of exp(-mean d), the trainer's perplexity over the engine's
    - ``extreme_ratios``: count of tokens whose d was clamped
    """
    d_M = flat([masked(t, m) - masked(r, m) for t, r, m in zip(train_log_probs, rollout_log_probs, masks, strict=True)])
    trained_M = flat(masks) > 0
    if not trained_M.any():
        return {}
    sample_M = np.repeat(np.arange(len(masks)), [len(mask) for mask in masks])[trained_M]
    d_M = d_M[trained_M]
    if not np.isfinite(d_M).all():
        raise ValueError(f"log-probs of samples {np.unique(sample_M[~np.isfinite(d_M)])[:8].tolist()} are not finite")

    count_N = np.bincount(sample_M, minlength=len(masks))
    with_tokens = count_N > 0

    def per_sample(values_M: np.ndarray) -> np.ndarray:
        return np.bincount(sample_M, values_M, minlength=len(masks))[with_tokens]

    n, absolute = count_N[with_tokens], np.abs(d_M)
    rho = np.exp(_clamped(d_M))
    return {
        "train_rollout_logprob_abs_diff": float(absolute.mean()),
        "train_rollout_logprob_abs_diff_p999": float(np.quantile(absolute, 0.999)),
        "train_rollout_logprob_abs_diff_max": float(absolute.max()),
        "train_rollout_kl": float((np.expm1(_clamped(d_M)) - d_M).mean()),
        "train_rollout_chi2_token": float(np.expm1(2 * _clamped(d_M)).mean()),
        "train_rollout_chi2_seq": float(np.expm1(2 * _clamped(per_sample(d_M))).mean()),
        "train_rollout_ess": float((per_sample(rho) ** 2 / (n * per_sample(rho**2))).mean()),
        "train_rollout_ppl_ratio": float(np.exp(_clamped(-per_sample(d_M) / n)).mean()),
        "extreme_ratios": float((absolute > MAX_LOG_RATIO).sum()),
    }


def _clamped(log_ratio: np.ndarray) -> np.ndarray:
    return log_ratio.clip(-MAX_LOG_RATIO, MAX_LOG_RATIO)
