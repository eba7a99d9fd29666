"""Sums over whole sequences for losses that need them, wherever a sequence's tokens lie."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class SequenceSum:
    """For each scored token the sum over the scored tokens of its sequence; see ``types.token_batch.SegmentSum``.

    ``sequence`` [S] numbers the sequence of each token within the micro-batch, of which there are ``count``; ``group``
    joins the context-parallel ranks that share them.
    """

    def __init__(self, sequence: Tensor, count: int, group: dist.ProcessGroup | None) -> None:
        self.sequence, self.count, self.group = sequence, count, group

    def __call__(self, values: Tensor) -> Tensor:
        return _SequenceSum.apply(values, self)

    def total(self, values: Tensor) -> Tensor:
        totals = values.new_zeros(self.count).index_add_(0, self.sequence, values)
        if self.group is not None:
            dist.all_reduce(totals, group=self.group)
        return totals[self.sequence]


class _SequenceSum(torch.autograd.Function):
    """Multiplication by a symmetric matrix: the backward pass is the same operation."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, sums: SequenceSum) -> Tensor:
        ctx.sums = sums
        return sums.total(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.sums.total(gradient), None
