"""Where a user's own function can stand: one Protocol per plug point, and how a setting's name becomes a function.

A setting names a built-in, or anybody's function as ``module:function``. Importing this file imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from miles_spmd.config import AlgorithmConfig
from miles_spmd.types.rollout_batch import Arrays, Correction, Estimate, RolloutBatch
from miles_spmd.types.sample import Sample

if TYPE_CHECKING:
    from torch import Tensor

    from miles_spmd.types.token_batch import TokenBatch

Function = TypeVar("Function", bound=Callable[..., Any])


# --- on the controller, on plain arrays of the whole batch -----------------------------------------------------------


class RewardPostProcess(Protocol):
    """``algorithm.reward_post_process``: rewards as the advantages see them, from those that the samples were given."""

    def __call__(self, samples: Sequence[Sample], rewards: np.ndarray) -> np.ndarray:
        """``rewards`` and the result are float64 [N], in the order of ``samples``; not finite is an error."""
        ...


class GroupFilter(Protocol):
    """``algorithm.dynamic_sampling_filter``: whether a prompt's scored samples are worth training on."""

    def __call__(self, samples: Sequence[Sample]) -> bool: ...


class AdvantageEstimator(Protocol):
    """``algorithm.advantage_estimator``: an advantage for every trained token of the rollout."""

    def __call__(self, batch: RolloutBatch, algorithm: AlgorithmConfig) -> Estimate: ...


class CorrectionFunction(Protocol):
    """``algorithm.tis_function``: weights of the policy term that make up for the engine having sampled with other
    probabilities than the trainer computes."""

    def __call__(self, batch: RolloutBatch, algorithm: AlgorithmConfig) -> Correction: ...


class Aggregation(Protocol):
    """``algorithm.loss_aggregation``: how per-token losses of one optimizer step become one number."""

    def __call__(self, masks: Arrays, rollout_ids: np.ndarray, max_response_len: int) -> Arrays:
        """A weight for every token, shaped like the 0/1 ``masks`` and 0 where they are; ``rollout_ids`` is int [N].
        The step's loss is the sum over all tokens of weight x per-token loss."""
        ...


# --- in the trainer, on the tokens of one packed micro-batch ---------------------------------------------------------


class Surrogate(Protocol):
    """``algorithm.loss_type``: the policy term of the loss. KL, entropy and correction weights are added around it."""

    def __call__(self, log_probs: Tensor, tokens: TokenBatch, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
        """Loss of each token, fp32 [T], differentiable in ``log_probs`` [T]; and whether it was clipped, bool [T]."""
        ...
