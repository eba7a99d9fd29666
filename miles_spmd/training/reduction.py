"""In which order the gradients of a batch's parts are summed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor

STRETCH = 1 << 24  # elements of a gradient that are combined at a time
# Takes a stretch of the parts that are kept here, by their numbers, and the stretch that the sum of all parts replaces.
Total = Callable[[Mapping[int, Tensor], Tensor], None]


def plain_sum(chunks: list[DistributedDataParallel], num_tokens: Tensor | None = None, **groups: Any) -> None:
    """Run all of Megatron's gradient reductions, but not its division by the number of tokens: loss weights carry the
    global denominator already."""
    finalize_model_grads(chunks, None, **groups)


class TreeSum:
    """The canonical reduction: one binary tree whose leaves are equal shares of the batch, in order.

    Floating-point sums depend on their order. Here every data-parallel rank sums its own leaves, then ranks sum
    pairwise, always along the branches of the same tree, so that with ``leaves`` = 8 the gradients of 1, 2, 4 or 8
    ranks are bitwise equal. Meanwhile a rank holds up to log2(leaves / ranks) more gradients.

    Called like :func:`plain_sum` at the end of each leaf; after the last one the gradient is whole.

    Raises ValueError where ``leaves`` is not a multiple of the data-parallel size.
    """

    def __init__(self, chunks: list[DistributedDataParallel], leaves: int) -> None:
        self._group = parallel_state.get_data_parallel_group()
        self.own_leaves, rest = divmod(leaves, self._group.size())
        if rest or not self.own_leaves:
            raise ValueError(
                f"reduction_leaves {leaves} is not a multiple of the data-parallel size {self._group.size()}"
            )
        # Megatron's flat buffers, into which every backward pass adds its gradient
        self._gradient = [
            buffer.grad_data for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ]
        self._subtrees: list[list[Tensor]] = []  # sums of finished subtrees that wait for a sibling, larger ones first
        self._leaf = 0

    def __call__(self, chunks: list[DistributedDataParallel], num_tokens: Tensor | None = None, **groups: Any) -> None:
        self._leaf += 1
        # This works like the carries of a binary counter. Leaf number n (from 1) completes as many subtrees as n has
        # factors of two. A completed subtree is the sum of its left half, the last entry of ``_subtrees``, and of its
        # right half, which the buffers hold.
        for _ in range((self._leaf & -self._leaf).bit_length() - 1):
            torch._foreach_add_(self._gradient, self._subtrees.pop())
        if self._leaf < self.own_leaves:
            self._subtrees.append([part.clone() for part in self._gradient])
            torch._foreach_zero_(self._gradient)
            return
        self._leaf = 0
        self._sum_over_ranks()
        self._complete(chunks, **groups)

    def _complete(self, chunks: list[DistributedDataParallel], **groups: Any) -> None:
        """Spread the sum, which the first rank has, over all ranks."""
        # All but the first rank have zeros now, so Megatron's own sum over the ranks only copies the result to them.
        plain_sum(chunks, **groups)
        # One rank alone may keep a -0, where a sum with other ranks' zeros is 0: adding 0 makes both the same.
        torch._foreach_add_(self._gradient, 0.0)

    def _sum_over_ranks(self) -> None:
        """Continue the tree over the ranks, by point-to-point messages: an all-reduce sums in an order of its own.

        In every round half of the ranks that are left send their sum to the neighbour on their left and are done.
        """
        rank, size, stride = self._group.rank(), self._group.size(), 1
        while stride < size:
            if rank % (2 * stride):
                for part in self._gradient:
                    dist.send(part, group=self._group, group_dst=rank - stride)
                torch._foreach_zero_(self._gradient)
                return
            received = [torch.empty_like(part) for part in self._gradient]
            for part in received:
                dist.recv(part, group=self._group, group_src=rank + stride)
            torch._foreach_add_(self._gradient, received)
            stride *= 2


class PartSum(TreeSum):
    """The canonical reduction of a batch whose ``parts``, each a subtree with equally many leaves, are computed by
    several worlds of ranks. A part is :attr:`kept` when its last leaf is done: in the buffers, until another one begins
    and it moves to host memory. :meth:`combine` makes the sum of the whole batch of them all, and :meth:`spread` the
    gradient of every rank. Which world computed what does not matter for the bits.

    Raises ValueError where a part has fewer leaves than there are data-parallel ranks.
    """

    def __init__(self, chunks: list[DistributedDataParallel], leaves: int, parts: int) -> None:
        super().__init__(chunks, leaves // parts)
        self._moved: dict[int, list[Tensor]] = {}  # on other than the first data-parallel rank without tensors
        self._here: int | None = None  # the part that the buffers hold
        self._chunks, self._part = chunks, 0

    def begin(self, part: int) -> None:
        """The leaves that follow are those of ``part``. Afterwards the buffers may be cleared."""
        if self._here is not None:
            first = self._group.rank() == 0  # the others have zeros
            self._moved[self._here] = [_on_host(each) for each in self._gradient] if first else []
        self._part, self._leaf, self._here = part, 0, None
        self._subtrees.clear()

    def _complete(self, chunks: list[DistributedDataParallel], **groups: Any) -> None:
        self._here = self._part

    @property
    def kept(self) -> list[int]:
        """The parts that are kept."""
        return [*self._moved] if self._here is None else [*self._moved, self._here]

    @property
    def kept_bytes(self) -> int:
        """Host memory of the parts that are kept."""
        return sum(each.nbytes for part in self._moved.values() for each in part)

    def forget(self) -> None:
        """Keep nothing."""
        self._moved.clear()
        self._here = None

    def forget_overwritten(self) -> list[int]:
        """Keep what is in host memory alone, after :meth:`combine`. Return the part that the buffers held."""
        gone, self._here = self._here, None
        return [] if gone is None else [gone]

    def combine(self, total: Total) -> None:
        """Put the sum of all parts into the buffers of the first data-parallel rank, and zeros into those of others.
        ``total`` is called on the first one, for one stretch of the sums after the other."""
        if self._group.rank() > 0:
            torch._foreach_zero_(self._gradient)
            return
        for number, buffer in enumerate(self._gradient):
            parts = {part: sums[number].view(-1) for part, sums in self._moved.items()}
            flat = buffer.view(-1)
            if self._here is not None:
                parts[self._here] = flat
            for start in range(0, flat.numel(), STRETCH):
                end = start + STRETCH
                total({part: of_part[start:end] for part, of_part in parts.items()}, flat[start:end])

    def spread(self) -> None:
        """Give every rank the gradient."""
        super()._complete(self._chunks)


def _on_host(tensor: Tensor) -> Tensor:
    """Return a copy: the device has room for one gradient."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)


def add_tree(terms: list[Tensor]) -> Tensor:
    """Return the sum of 2^n terms in the order of :class:`TreeSum`, each time into the left of two neighbours.
    Overwrites some of them."""
    stride = 1
    while stride < len(terms):
        for left in range(0, len(terms), 2 * stride):
            terms[left].add_(terms[left + stride])
        stride *= 2
    return terms[0]
