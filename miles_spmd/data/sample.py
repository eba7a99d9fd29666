"""The unit of work: one prompt's sample, from request to trained tokens."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec
import numpy as np


class FinishReason(StrEnum):
    """Why the engine stopped generating a sample."""

    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_new_tokens or the context was reached
    ABORT = "abort"  # stopped from outside; the tokens so far are kept


class Prompt(msgspec.Struct, frozen=True):
    """One row of a dataset, ready to be asked."""

    uid: str  # stable identity "name:row", the same in every epoch and on every machine
    text: str  # what the model sees, chat template applied
    tokens: list[int]
    label: Any = None
    metadata: dict[str, Any] = {}


class Sample(msgspec.Struct):
    """One answer to one prompt.

    ``response`` and its aligned lists have the same length R; ``loss_mask`` is 1 where the policy chose the token.
    """

    prompt: Prompt
    index: int  # 0 .. n_samples_per_prompt - 1 within the group; siblings, parts of one rollout, share it
    response: list[int] = []
    rollout_log_probs: list[float] = []  # engine's log-prob of each response token, natural log
    loss_mask: list[int] = []
    text: str = ""
    finish_reason: FinishReason = FinishReason.STOP
    weight_versions: list[tuple[int, int]] = []  # (version, number of tokens), in order
    reward: float | None = None
    reward_detail: dict[str, float] = {}
    likeliest: list[int] | None = None  # the engine's most likely tokens in the places of the response, where asked for

    @property
    def sequence(self) -> list[int]:
        return self.prompt.tokens + self.response


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
