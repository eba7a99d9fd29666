"""Sums over whole sequences or pairs for losses that need them, wherever a sequence's tokens lie."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class PackedSegmentSum:
    """The :class:`~miles_spmd.types.token_batch.SegmentSum` of a packed micro-batch.

    ``segment`` int64 [S] is the number of each scored token's segment within the micro-batch, which has ``count`` of
    them; ``group`` joins the context-parallel ranks that share the segments.
    """

    def __init__(self, segment: Tensor, count: int, group: dist.ProcessGroup | None) -> None:
        self.segment, self.count, self.group = segment, count, group

    def __call__(self, values: Tensor) -> Tensor:
        return _SegmentSum.apply(values, self)

    def total(self, values: Tensor) -> Tensor:
        """Return for each token the sum of its segment's ``values``, [S], without a gradient."""
        totals = values.new_zeros(self.count).index_add_(0, self.segment, values)
        if self.group is not None:
            dist.all_reduce(totals, group=self.group)
        return totals[self.segment]


class _SegmentSum(torch.autograd.Function):
    """Multiplication by a symmetric matrix: the backward pass is the same operation."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, sums: PackedSegmentSum) -> Tensor:
        ctx.sums = sums
        return sums.total(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.sums.total(gradient), None
