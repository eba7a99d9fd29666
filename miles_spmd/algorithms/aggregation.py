"""Aggregation of per-token losses, as one weight per token that already contains the global denominator.

The loss of an optimizer step is then a plain sum over tokens, micro-batches and ranks, and cannot depend on how the
batch is divided over them. Denominators count every token of the masks, even if a correction rejects it later.
"""

from __future__ import annotations

import numpy as np

from miles_spmd.plugins.algorithm import Aggregation
from miles_spmd.plugins.plug_point import PlugPoint
from miles_spmd.types.rollout_batch import Arrays, flat, shaped


def rollout_mean(masks: Arrays, rollout_ids: np.ndarray, max_response_len: int) -> Arrays:
    """Mean over rollouts of the mean over each rollout's tokens, including its siblings' (GRPO, arXiv 2402.03300).
    A rollout without a trained token counts in the mean, with loss 0."""
    _, rollout_N = np.unique(rollout_ids, return_inverse=True)
    tokens_R = np.bincount(rollout_N, [mask.sum() for mask in masks])
    return [mask / (len(tokens_R) * max(tokens_R[r], 1)) for mask, r in zip(masks, rollout_N)]


def token_mean(masks: Arrays, rollout_ids: np.ndarray, max_response_len: int) -> Arrays:
    """Mean over all tokens (DAPO, arXiv 2503.14476)."""
    tokens = max(sum(mask.sum() for mask in masks), 1)
    return [mask / tokens for mask in masks]


def constant(masks: Arrays, rollout_ids: np.ndarray, max_response_len: int) -> Arrays:
    """Sum over tokens / (rollouts x ``max_response_len``): no rollout's length matters (Dr.GRPO, arXiv 2503.20783)."""
    rollouts = len(np.unique(rollout_ids))
    return [mask / (rollouts * max_response_len) for mask in masks]


AGGREGATIONS: PlugPoint[Aggregation] = PlugPoint(
    "algorithm.loss_aggregation",
    {"rollout_mean": rollout_mean, "token_mean": token_mean, "constant": constant},
    Aggregation,
)


def loss_weights(masks: Arrays, kind: str, *, max_response_len: int, rollout_ids: np.ndarray | None = None) -> Arrays:
    """Return the weight of every token of one optimizer step, float32, shaped like the 0/1 masks.

    ``kind`` is ``algorithm.loss_aggregation``. ``rollout_ids`` [N] are equal for siblings, all of which must be in the
    step; None: every sample is a rollout. Preference pairs are aggregated by ``rollout_mean`` with the pair as the
    rollout. Raises PlugPointError for an unknown name, and PlugInError if a user's function returns other shapes,
    weights that are not finite, or a weight on a masked token.
    """
    ids = np.arange(len(masks)) if rollout_ids is None else rollout_ids
    returned = AGGREGATIONS.resolve(kind)(masks, ids, max_response_len)
    weights = shaped(returned, masks)
    if weights is None or not np.isfinite(flat(weights)).all() or flat(weights)[flat(masks) == 0].any():
        expected = "weights that are finite, shaped like the masks, and 0 where these are 0"
        raise AGGREGATIONS.returned(kind, returned, expected)
    return [weight.astype(np.float32) for weight in weights]
