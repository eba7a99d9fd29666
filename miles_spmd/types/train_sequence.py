"""What the trainer takes: one sequence with everything that its loss needs, aligned to its tokens."""

from __future__ import annotations

import msgspec
import numpy as np


class TrainSequence(msgspec.Struct):
    """One sequence as the trainer takes it: every array has length T = len(tokens), entry t belongs to token t.

    Token t is scored by the logits at t - 1, so entry 0 is never used. ``loss_weights`` carries mask and *global*
    denominator together: the loss of the step is the plain sum of ``loss_weights * per-token loss`` over all ranks.
    """

    tokens: np.ndarray  # int32
    loss_weights: np.ndarray  # float32, 0 where nothing is trained
    advantages: np.ndarray | None = None  # float32
    rollout_log_probs: np.ndarray | None = None  # float32, engine
    old_log_probs: np.ndarray | None = None  # float32; None: the current policy, detached (ratio 1)
    ref_log_probs: np.ndarray | None = None  # float32
    policy_weights: np.ndarray | None = None  # float32, multiply the policy term of the loss; 0 rejects the token
    returns: np.ndarray | None = None  # float32, targets of the critic
    old_values: np.ndarray | None = None  # float32, of the critic before the update
    pair_signs: np.ndarray | None = None  # float32: the sequence is (+1) the preferred, (-1) the rejected one of a pair
    candidates: np.ndarray | None = None  # int32 [T, K], other tokens in its place to give the log-probs of


MicroBatch = list[TrainSequence]  # sequences packed into one forward pass; of pairs, both, one after the other
