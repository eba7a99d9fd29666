"""The trainer's input: a sequence of tokens, and the arrays that its loss needs, aligned with the tokens."""

import msgspec
import numpy as np


class TrainSequence(msgspec.Struct):
    """One sequence for the trainer. Every array has length T = len(tokens); entry t belongs to token t.

    Token t is scored by the logits at t - 1, so entry 0 is never used. ``loss_weights`` contains the mask and the
    *global* denominator: the loss of the step is the plain sum of ``loss_weights * per-token loss`` over all ranks.
    """

    tokens: np.ndarray  # int32
    loss_weights: np.ndarray  # float32, 0 on tokens that are not trained
    advantages: np.ndarray | None = None  # float32
    rollout_log_probs: np.ndarray | None = None  # float32, of the engine
    old_log_probs: np.ndarray | None = None  # float32; None: the current policy, detached (ratio 1)
    ref_log_probs: np.ndarray | None = None  # float32
    policy_weights: np.ndarray | None = None  # float32, multiply the policy term of the loss; 0 rejects the token
    returns: np.ndarray | None = None  # float32, targets of the critic
    old_values: np.ndarray | None = None  # float32, of the critic before the update
    pair_signs: np.ndarray | None = None  # float32, +1 in the preferred sequence of a pair, -1 in the rejected one
    candidates: np.ndarray | None = None  # int32 [T, K], other tokens at the position whose log-probs are requested


MicroBatch = list[TrainSequence]  # sequences packed into one forward pass; the two of a pair are neighbours
