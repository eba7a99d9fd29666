"""The inputs of a loss for the tokens that the trainer scores, beside the model's own outputs.

Shape suffix: T tokens of a packed micro-batch on this rank (only those that the trainer scores).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class SegmentSum(Protocol):
    def __call__(self, values: Tensor) -> Tensor:
        """Return for each token the sum of ``values`` [T] over all tokens of its segment, including those on other
        context-parallel ranks: [T], differentiable.

        Its matrix S (S_ij = 1 where tokens i and j share a segment) is symmetric, so the backward pass is the same
        operation on the gradient, summed over the context-parallel ranks too. It is a collective under context
        parallelism: a loss must call it on every rank, even where the rank has no trained token.
        """
        ...


@dataclass(frozen=True)
class TokenBatch:
    """The controller's arrays of each token, fp32 [T]. ``old_log_probs`` None: the current policy, detached."""

    loss_weights: Tensor  # mask and global denominator in one; 0: not trained
    advantages: Tensor | None = None
    rollout_log_probs: Tensor | None = None
    old_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    policy_weights: Tensor | None = None  # multiply the policy term; 0 rejects the token from it
    returns: Tensor | None = None  # targets of the critic
    old_values: Tensor | None = None  # of the critic before the update
    pair_signs: Tensor | None = None  # +1 on tokens of a preferred response, -1 on those of the rejected one
    sequence_sum: SegmentSum | None = None  # segments are sequences
    pair_sum: SegmentSum | None = None  # segments are pairs of a preferred and a rejected sequence

    @property
    def trained(self) -> Tensor:
        """Which tokens have a loss weight, bool [T]."""
        return self.loss_weights != 0

    def required(self, name: str) -> Any:
        """Return the field ``name``. Raises ValueError if the batch does not have it."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"this loss requires {name} for every token, but the batch has none")
        return value

    def sequence_mean(self, values: Tensor) -> Tensor:
        """Return for each token the mean of ``values`` over its sequence's trained tokens, [T]; 0 if it has none."""
        total: SegmentSum = self.required("sequence_sum")
        count = total(self.trained.to(values.dtype)).clamp(min=1)
        return total(values.where(self.trained, 0.0)) / count
