"""The plug points of ``[algorithm]``: one Protocol for each setting that can name a user's function.

The Protocols of ``[reward]`` are in ``plugins/reward.py``. A setting's built-ins are in ``algorithms``, in the file of
its subject. Importing this file imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from miles_spmd.config import AlgorithmConfig
from miles_spmd.types.rollout_batch import Arrays, Correction, Estimate, RolloutBatch
from miles_spmd.types.sample import Sample

if TYPE_CHECKING:
    from torch import Tensor

    from miles_spmd.types.token_batch import TokenBatch


# --- on the controller, on plain arrays of the whole batch -----------------------------------------------------------


class RewardPostProcess(Protocol):
    """``algorithm.reward_post_process``: maps the rewards of a batch to those that the advantages are computed from."""

    def __call__(self, samples: Sequence[Sample], rewards: np.ndarray) -> np.ndarray:
        """Take and return float64 [N] in the order of ``samples``; a value that is not finite is an error."""
        ...


class GroupFilter(Protocol):
    """``algorithm.dynamic_sampling_filter``: decides whether a prompt's samples, with rewards, are trained on. It is
    called as rewards arrive, so it must be a function of the group alone."""

    def __call__(self, samples: Sequence[Sample]) -> bool: ...


class SampleFilter(Protocol):
    """``algorithm.sample_filter``: decides which samples of a step the loss counts. The others keep their rewards, and
    so their part in the baselines of their groups."""

    def __call__(self, samples: Sequence[Sample]) -> Sequence[bool]:
        """Return True for each sample that is trained on, in the order of ``samples``."""
        ...


class AdvantageEstimator(Protocol):
    """``algorithm.advantage_estimator``: computes an advantage for every trained token of the batch."""

    def __call__(self, batch: RolloutBatch, algorithm: AlgorithmConfig) -> Estimate: ...


class CorrectionFunction(Protocol):
    """``algorithm.tis_function``: computes weights of the policy term that correct for the difference between the
    probabilities with which the engine sampled and those that the trainer computes."""

    def __call__(self, batch: RolloutBatch, algorithm: AlgorithmConfig) -> Correction: ...


class Aggregation(Protocol):
    """``algorithm.loss_aggregation``: defines how the per-token losses of an optimizer step become one number."""

    def __call__(self, masks: Arrays, rollout_ids: np.ndarray, max_response_len: int) -> Arrays:
        """Return a weight for every token, shaped like the 0/1 ``masks`` and 0 where a mask is 0.

        ``rollout_ids`` is int [N]. The step's loss is the sum over all tokens of weight x per-token loss."""
        ...


# --- in the trainer, on the tokens of one packed micro-batch ---------------------------------------------------------


class Surrogate(Protocol):
    """``algorithm.loss_type``: the policy term of the loss. KL, entropy and correction weights are added around it."""

    def __call__(self, log_probs: Tensor, tokens: TokenBatch, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
        """Return the loss of each token, fp32 [T], differentiable in ``log_probs`` [T], and whether it was clipped,
        bool [T]."""
        ...
