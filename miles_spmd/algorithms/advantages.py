"""From rewards to advantages, on plain arrays: they need the whole batch, and so belong to no rank.

Shape suffixes: N samples of the batch, in submission order; groups are consecutive (all samples of one prompt).
"""

from __future__ import annotations

import numpy as np

STD_EPSILON = 1e-6


def grpo_advantages(rewards_N: np.ndarray, group_size: int, *, std_normalization: bool) -> np.ndarray:
    """Group-relative advantages, float64 [N]: reward minus group mean, divided by the group's unbiased standard
    deviation + 1e-6 when ``std_normalization``. A group without variance, or of one sample, gets zeros.

    Source: DeepSeekMath (arXiv 2402.03300), eq. of section 4.1.2; without the division it is Dr.GRPO's estimator
    (arXiv 2503.20783). Raises ValueError when N is not a multiple of ``group_size``.
    """
    if len(rewards_N) % group_size:
        raise ValueError(f"{len(rewards_N)} rewards do not divide into groups of {group_size}")
    rewards_PG = np.asarray(rewards_N, np.float64).reshape(-1, group_size)
    centred_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    # equal rewards can leave a rounding residue of the mean, which the division would blow up to +-1
    centred_PG[np.ptp(rewards_PG, axis=1) == 0] = 0.0
    if std_normalization and group_size > 1:
        centred_PG /= rewards_PG.std(axis=1, ddof=1, keepdims=True) + STD_EPSILON
    return centred_PG.reshape(-1)


def whiten(values: list[np.ndarray], masks: list[np.ndarray]) -> list[np.ndarray]:
    """Zero mean and unit variance over all unmasked tokens of the batch (unbiased, two passes, float64 inside).

    Shapes: per sample [T]; masked entries come out as 0. A batch with fewer than two tokens is returned centred only.
    """
    flat = np.concatenate([v[m > 0] for v, m in zip(values, masks)]).astype(np.float64)
    mean = flat.mean() if flat.size else 0.0
    scale = 1.0 / np.sqrt(flat.var(ddof=1) + 1e-8) if flat.size > 1 else 1.0
    return [np.where(m > 0, (v - mean) * scale, 0.0).astype(np.float32) for v, m in zip(values, masks)]
