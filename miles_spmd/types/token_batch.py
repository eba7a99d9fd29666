"""What the trainer knows of the tokens it scores, beside the model's own outputs.

Shape suffix: T tokens of a packed micro-batch on this rank (only those that the trainer scores).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class SegmentSum(Protocol):
    def __call__(self, values: Tensor) -> Tensor:
        """For each token the sum of ``values`` [T] over all tokens of its segment, also those that other
        context-parallel ranks hold: [T], differentiable.

        Its matrix S (S_ij = 1 where tokens i and j share a segment) is symmetric, so that the backward pass is the same
        operation on the gradient, summed over the context-parallel ranks too. A collective under context parallelism:
        losses call it on every rank, whatever the rank holds.
        """
        ...


@dataclass(frozen=True)
class TokenBatch:
    """What the controller said of each token, fp32 [T]. ``old_log_probs`` None: the current policy, detached."""

    loss_weights: Tensor  # mask and global denominator; 0: not trained
    advantages: Tensor | None = None
    rollout_log_probs: Tensor | None = None
    old_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    policy_weights: Tensor | None = None  # multiply the policy term; 0 rejects the token from it
    returns: Tensor | None = None  # targets of the critic
    old_values: Tensor | None = None  # of the critic before the update
    pair_signs: Tensor | None = None  # +1 on tokens of a preferred answer, -1 on those of the rejected one
    sequence_sum: SegmentSum | None = None  # segments are sequences
    pair_sum: SegmentSum | None = None  # segments are pairs of a preferred and a rejected sequence

    @property
    def trained(self) -> Tensor:
        return self.loss_weights != 0

    def required(self, name: str) -> Any:
        """The field ``name``. Raises ValueError if the batch has none."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"this loss needs {name} of every token, but the batch has none")
        return value

    def sequence_mean(self, values: Tensor) -> Tensor:
        """For each token the mean of ``values`` over the trained tokens of its sequence, [T]; 0 without any."""
        total: SegmentSum = self.required("sequence_sum")
        count = total(self.trained.to(values.dtype)).clamp(min=1)
        return total(values.where(self.trained, 0.0)) / count
