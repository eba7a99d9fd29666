"""How the gradients of a batch's parts are added up."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor


def plain_sum(chunks: list[DistributedDataParallel], num_tokens: Tensor | None = None, **groups: Any) -> None:
    """All of Megatron's reductions of the gradient, but not its division by the number of tokens."""
    finalize_model_grads(chunks, None, **groups)


class TreeSum:
    """The canonical reduction: one binary tree whose leaves are equal shares of the batch, in order.

    Floating-point sums depend on their order. Here every data-parallel rank adds up the leaves that are its own, then
    ranks add to each other, always along the branches of the same tree, so that ``leaves`` = 8 gives the same bits on
    1, 2, 4 or 8 ranks. A rank holds up to log2(leaves / ranks) more gradients meanwhile.

    Called like :func:`plain_sum` at the end of each leaf; at the last one the gradient is whole.
    """

    def __init__(self, chunks: list[DistributedDataParallel], leaves: int) -> None:
        self._group = parallel_state.get_data_parallel_group()
        self.own_leaves, rest = divmod(leaves, self._group.size())
        if rest or not self.own_leaves:
            raise ValueError(f"reduction_leaves {leaves} is no multiple of the data-parallel size {self._group.size()}")
        self._gradient = [
            buffer.grad_data for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ]
        self._branches: list[list[Tensor]] = []  # sums of finished subtrees, larger ones first
        self._leaf = 0

    def __call__(self, chunks: list[DistributedDataParallel], num_tokens: Tensor | None = None, **groups: Any) -> None:
        self._leaf += 1
        # as many subtrees end with this leaf as its number has factors of two
        for _ in range((self._leaf & -self._leaf).bit_length() - 1):
            self._add(self._branches.pop())
        if self._leaf < self.own_leaves:
            self._branches.append([part.clone() for part in self._gradient])
            self._clear()
            return
        self._leaf = 0
        self._add_up_ranks()
        # all but the first rank have zeros now: Megatron's own sum over the ranks only spreads the result
        plain_sum(chunks, **groups)
        self._add([torch.zeros((), device=part.device) for part in self._gradient])  # -0 becomes 0, as on many ranks

    def _add_up_ranks(self) -> None:
        rank, size, stride = self._group.rank(), self._group.size(), 1
        while stride < size:
            if rank % (2 * stride):
                for part in self._gradient:
                    dist.send(part, group=self._group, group_dst=rank - stride)
                self._clear()
                return
            received = [torch.empty_like(part) for part in self._gradient]
            for part in received:
                dist.recv(part, group=self._group, group_src=rank + stride)
            self._add(received)
            stride *= 2

    def _add(self, other: list[Tensor]) -> None:
        for part, more in zip(self._gradient, other, strict=True):
            part.add_(more)

    def _clear(self) -> None:
        for part in self._gradient:
            part.zero_()
