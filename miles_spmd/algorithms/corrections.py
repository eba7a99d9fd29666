"""The train/inference mismatch, its metrics and corrections: engine and trainer compute different probabilities for a
token.

With rho = exp(old log-prob of the trainer - log-prob of the engine), the policy term of each token is multiplied by a
bounded form of rho, or rejected (weight 0).

- TIS, truncated importance sampling: F. Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL
  Training" (2025), https://fengyao.notion.site/off-policy-rl.
- IcePop: "Every Step Evolves" (arXiv 2510.18855). Tokens in range are weighted by rho, the rest are dropped.
- MIS, masked importance sampling and rejection: J. Liu et al., "When Speed Kills Stability" (2025); setting names are
  those of Miles' example.

Choices that other systems make differently, some of them against their own documentation:

- **Denominators count rejected tokens.** Both papers put the indicator inside the expectation over the engine's
  samples, so a rejected token contributes 0 to the mean and is still counted. Without it in the denominator, its weight
  would go to the tokens that are kept: the larger the mismatch, the larger the step on the remaining tokens.
- A rejected token keeps its KL and entropy terms, which depend on the current policy alone.
- ``tis_batch_normalize`` is over the whole step, and over the tokens (for ratios of sequences: the sequences) that are
  kept, whose weights then have mean 1; a rejected outlier cannot scale the others down.
- The veto applies whether or not ``use_rs`` is on.
"""

from __future__ import annotations

import numpy as np

from miles_spmd.algorithms.kl import MAX_LOG_RATIO
from miles_spmd.config import AlgorithmConfig
from miles_spmd.plugins.algorithm import CorrectionFunction
from miles_spmd.plugins.plug_point import PlugPoint
from miles_spmd.types.rollout_batch import Arrays, Correction, RolloutBatch, flat, masked, shaped


def correct(batch: RolloutBatch, algorithm: AlgorithmConfig) -> Correction | None:
    """Compute the correction that ``tis_function`` names; None without ``use_tis``.

    ``old_log_probs`` must be the trainer's, with the weights that generated. Raises ValueError if these or the engine's
    are missing, and with ``use_rollout_logprobs``; PlugInError if a user's function returns other shapes or values that
    are not finite.
    """
    if not algorithm.use_tis:
        return None
    if algorithm.use_rollout_logprobs:
        raise ValueError("use_tis has nothing to correct with use_rollout_logprobs, which makes both policies the same")
    correction = CORRECTIONS.resolve(algorithm.tis_function)(batch, algorithm)
    if not isinstance(correction, Correction):
        raise CORRECTIONS.returned(algorithm.tis_function, correction, "a Correction (types/rollout_batch.py)")
    weights = shaped(correction.policy_weights, batch.masks)
    if weights is None or not np.isfinite(flat(weights)).all():
        expected = "weights that are finite and shaped like the masks"
        raise CORRECTIONS.returned(algorithm.tis_function, correction.policy_weights, expected)
    return Correction([w.astype(np.float32) for w in weights], correction.metrics)


def tis(batch: RolloutBatch, algorithm: AlgorithmConfig) -> Correction:
    """Weight each token by clip(rho, ``tis_clip_low``, ``tis_clip``)."""
    ratios = _ratios(batch)
    weights = _clip(ratios.token, algorithm.tis_clip_low, algorithm.tis_clip)
    return ratios.correction(weights, kept=ratios.trained, clipped=weights != ratios.token)


def icepop(batch: RolloutBatch, algorithm: AlgorithmConfig) -> Correction:
    """Weight each token by rho where ``tis_clip_low`` <= rho <= ``tis_clip``, else by 0."""
    ratios = _ratios(batch)
    inside = _inside(ratios.token, algorithm.tis_clip_low, algorithm.tis_clip)
    return ratios.correction(ratios.token, kept=ratios.trained & inside, clipped=~inside)


def mis(batch: RolloutBatch, algorithm: AlgorithmConfig) -> Correction:
    """Weight by the ratio at ``tis_level``, bounded according to ``tis_mode``; then reject, veto and normalise.

    Adds the metrics ``rs_masked`` (fraction of trained tokens outside the rejection's bounds), ``rs_vetoed`` (fraction
    of samples with a vetoed token) and ``tis_normalizer``.
    """
    a = algorithm
    upper = a.tis_upper_bound
    lower = 1 / upper if a.tis_lower_bound is None else a.tis_lower_bound
    ratios = _ratios(batch)
    ratio = ratios.at(a.tis_level)
    weights, kept = ratio, ratios.trained
    if a.tis_mode == "truncate":
        weights = np.minimum(ratio, upper)
    elif a.tis_mode == "clip":
        weights = _clip(ratio, lower, upper)
    else:
        kept = kept & _inside(ratio, lower, upper)
    clipped = (weights != ratio) | ~kept
    metrics = {}
    if a.use_rs:
        rs_lower = lower if a.rs_lower_bound is None else a.rs_lower_bound
        rs_upper = upper if a.rs_upper_bound is None else a.rs_upper_bound
        rs_inside = _inside(ratios.at(a.rs_level), rs_lower, rs_upper)
        metrics["rs_masked"] = ratios.mean(~rs_inside)
        kept = kept & rs_inside
    if a.rs_veto_threshold is not None:
        vetoed_N = ratios.per_sample((ratios.token < a.rs_veto_threshold).astype(np.float64)) > 0
        metrics["rs_vetoed"] = float(vetoed_N.mean()) if len(vetoed_N) else 0.0
        kept = kept & ~vetoed_N[ratios.sample]
    if a.tis_batch_normalize:
        counted = weights[kept]
        if a.tis_level != "token":  # a sample has one weight
            counted = counted[np.diff(ratios.sample[kept], prepend=-1) > 0]
        metrics["tis_normalizer"] = _mean(counted)
        weights = weights / metrics["tis_normalizer"]
    return ratios.correction(weights, kept, clipped, **metrics)


CORRECTIONS: PlugPoint[CorrectionFunction] = PlugPoint(
    "algorithm.tis_function", {"tis": tis, "icepop": icepop, "mis": mis}, CorrectionFunction
)


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
    ratios = _Ratios(train_log_probs, rollout_log_probs, masks)
    if not ratios.trained.any():
        return {}
    d_M = ratios.log_M[ratios.trained]
    if not np.isfinite(d_M).all():
        wrong = np.unique(ratios.sample[~np.isfinite(ratios.log_M)])[:8].tolist()
        raise ValueError(f"log-probs of samples {wrong} are not finite")
    absolute = np.abs(d_M)
    columns_M = np.ones(len(ratios.log_M)), ratios.log_M, ratios.token, ratios.token**2
    sums_N = np.stack([ratios.per_sample(values_M) for values_M in columns_M])
    n, log_N, rho_N, square_N = sums_N[:, sums_N[0] > 0]  # of samples with trained tokens
    return {
        "train_rollout_logprob_abs_diff": float(absolute.mean()),
        "train_rollout_logprob_abs_diff_p999": float(np.quantile(absolute, 0.999)),
        "train_rollout_logprob_abs_diff_max": float(absolute.max()),
        "train_rollout_kl": float((np.expm1(_clamped(d_M)) - d_M).mean()),
        "train_rollout_chi2_token": float(np.expm1(2 * _clamped(d_M)).mean()),
        "train_rollout_chi2_seq": float(np.expm1(2 * _clamped(log_N)).mean()),
        "train_rollout_ess": float((rho_N**2 / (n * square_N)).mean()),
        "train_rollout_ppl_ratio": float(np.exp(_clamped(-log_N / n)).mean()),
        "extreme_ratios": float((absolute > MAX_LOG_RATIO).sum()),
    }


class _Ratios:
    """rho of M tokens, all samples concatenated; log-ratios are clamped to +-20 before exp."""

    def __init__(self, train_log_probs: Arrays, rollout_log_probs: Arrays, masks: Arrays) -> None:
        triples = zip(train_log_probs, rollout_log_probs, masks, strict=True)
        self.log_M = flat([masked(t, m) - masked(r, m) for t, r, m in triples])
        self.trained = flat(masks) > 0
        self.lengths = [len(mask) for mask in masks]
        self.sample = np.repeat(np.arange(len(masks)), self.lengths)
        self.token = self.at("token")

    def per_sample(self, values_M: np.ndarray) -> np.ndarray:
        """Return the sum over each sample's trained tokens, float64 [N]."""
        return np.bincount(self.sample, np.where(self.trained, values_M, 0.0), minlength=len(self.lengths))

    def at(self, level: str) -> np.ndarray:
        """Return for each token rho of the token, of its sequence (the product), or the geometric mean over it, [M]."""
        log_ratio = self.log_M
        if level != "token":
            sums_N = self.per_sample(self.log_M)
            if level == "geometric":
                sums_N = sums_N / np.maximum(self.per_sample(np.ones(len(self.log_M))), 1)
            log_ratio = sums_N[self.sample]
        return np.exp(_clamped(log_ratio))

    def mean(self, values_M: np.ndarray) -> float:
        """Return the mean over trained tokens, 0 if there are none."""
        return _mean(values_M[self.trained], of_none=0.0)

    def correction(self, weights: np.ndarray, kept: np.ndarray, clipped: np.ndarray, **metrics: float) -> Correction:
        """Return the result with its metrics.

        They are means over trained tokens: ``tis`` (rho), ``tis_abs`` (|rho - 1|), ``tis_clipfrac`` (weight bounded or
        set to 0 by its bounds), ``tis_rejected`` (weight 0 for any reason), ``tis_weight`` (as applied); and the count
        ``extreme_ratios`` of tokens whose log-ratio was clamped.
        """
        applied = np.where(kept, weights, 0.0)
        own = {
            "tis": self.mean(self.token),
            "tis_abs": self.mean(np.abs(self.token - 1)),
            "tis_clipfrac": self.mean(clipped),
            "tis_rejected": self.mean(~kept),
            "tis_weight": self.mean(applied),
            "extreme_ratios": float((np.abs(self.log_M) > MAX_LOG_RATIO).sum()),
        }
        policy_weights = np.split(applied, np.cumsum(self.lengths)[:-1]) if self.lengths else []
        return Correction(policy_weights, own | metrics)


def _ratios(batch: RolloutBatch) -> _Ratios:
    old, engine = (batch.required(name, "use_tis") for name in ("old_log_probs", "rollout_log_probs"))
    return _Ratios(old, engine, batch.masks)


def _inside(ratio: np.ndarray, lower: float, upper: float) -> np.ndarray:
    return _clip(ratio, lower, upper) == ratio


def _clip(ratio: np.ndarray, lower: float, upper: float) -> np.ndarray:
    if lower >= upper:
        raise ValueError(f"the lower bound {lower} of importance ratios is not below the upper bound {upper}")
    return ratio.clip(lower, upper)


def _clamped(log_ratio: np.ndarray) -> np.ndarray:
    return log_ratio.clip(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _mean(values: np.ndarray, of_none: float = 1.0) -> float:
    return float(values.mean()) if values.size else of_none
