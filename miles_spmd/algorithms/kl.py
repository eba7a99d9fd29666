"""KL estimators between the sampled tokens' log-probs of two policies.

Source: J. Schulman, "Approximating KL Divergence" (2020). With x the policy that sampled, y the base and
r = log x - log y, the expectation under x of each estimator is KL(x || y); k2 is biased, k3 is never negative.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

Array = TypeVar("Array")  # numpy array or torch tensor, any shape

KINDS = ("k1", "k2", "k3")


def kl_estimate(log_probs: Array, base_log_probs: Array, kind: str) -> Array:
    """Per-token estimate of KL(policy || base), same shape and dtype as the inputs.

    Raises ValueError for an unknown kind.
    """
    r = log_probs - base_log_probs  # type: ignore[operator]
    if kind == "k1":
        return r
    if kind == "k2":
        return 0.5 * r * r
    if kind == "k3":
        return _exp(-r) - 1 + r
    raise ValueError(f"unknown KL estimator {kind!r}; known: {', '.join(KINDS)}")


def _exp(x: Array) -> Array:
    return np.exp(x) if isinstance(x, np.ndarray) else x.exp()  # type: ignore[attr-defined]
