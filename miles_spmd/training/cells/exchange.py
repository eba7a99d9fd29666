"""The sum of what several cells have of a gradient."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from miles_spmd.training.cells.group import Group
from miles_spmd.training.reduction import add_tree


class LostUpdateError(RuntimeError):
    """The cells could not meet, or the update was not made: nothing but gradient buffers has changed, and what was
    received from another cell. ``missing`` are parts that no cell had, where that is why, and ``overwritten`` those
    that this cell has no more."""

    def __init__(self, text: str, missing: Collection[int] = ()) -> None:
        super().__init__(text)
        self.missing = sorted(missing)
        self.overwritten: list[int] = []


class Space:
    """Memory for what is under way between cells. It is used again, because the kernel has to map new memory of the
    host first, page by page."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.device], Tensor] = {}

    def tensor(self, name: str, device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
        """Return a tensor whose values are undefined; valid until the next one of this name there."""
        nbytes, own = math.prod(shape) * dtype.itemsize, (name, device)
        if own not in self._memory or self._memory[own].numel() < nbytes:
            pinned = device.type == "cpu" and torch.cuda.is_available()
            self._memory[own] = torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=pinned)
        return self._memory[own][:nbytes].view(dtype).view(shape)


class Exchange:
    """Sums ``parts`` parts, which the ``cells`` of a quorum have; this one is number ``rank`` of them. All of them call
    :meth:`total` for the same stretches.

    Raises LostUpdateError where no cell has a part.
    """

    def __init__(self, group: Group, space: Space, parts: int, rank: int, cells: int, own: Collection[int]) -> None:
        self._group, self._space, self._cells = group, space, cells
        have = torch.zeros(parts, dtype=torch.uint8)
        have[[*own]] = 1
        everywhere = torch.stack(group.gather(have, cells))
        if missing := (everywhere.sum(0) == 0).nonzero().flatten().tolist():
            raise LostUpdateError(f"no cell has part {', '.join(map(str, missing))}", missing)
        senders = everywhere.argmax(0)  # of cells that have a part the first; what they have is bitwise equal
        self._counts = senders.bincount(minlength=cells).tolist()
        self._arrival = senders.argsort(stable=True).tolist()  # parts in the order in which they arrive
        self._own = [part for part in self._arrival if senders[part] == rank]

    def total(self, own: Mapping[int, Tensor], stretch: Tensor) -> None:
        """Replace a ``stretch`` by the sum of all parts, from the stretches of the parts that this cell has, one of
        which may be ``stretch`` itself. Each cell sums one piece of it."""
        size = -(-stretch.numel() // self._cells)
        pieces = self._tensor("pieces", stretch.dtype, self._cells, len(self._own), size)  # by receiver and part
        for row, part in enumerate(self._own):
            for receiver, piece in enumerate(own[part].split(size)):
                pieces[receiver, row, : piece.numel()].copy_(piece)
        terms = dict(zip(self._arrival, self._exchange(pieces)))
        summed = add_tree([terms[part] for part in sorted(terms)])
        whole = summed
        if self._cells > 1:
            whole = self._tensor("whole", stretch.dtype, self._cells, size)
            self._group.all_gather(whole, summed)
        stretch.copy_(whole.view(-1)[: stretch.numel()])

    def _exchange(self, pieces: Tensor) -> Tensor:
        """Send to each cell its ``pieces``; return what all have sent to this one, by sender and part."""
        size = pieces.shape[-1]
        if self._cells == 1:
            return pieces.view(-1, size)
        arrived = self._tensor("arrived", pieces.dtype, len(self._arrival), size)
        sent, counts = [len(self._own) * size] * self._cells, [count * size for count in self._counts]
        self._group.all_to_all(arrived.view(-1), counts, pieces.view(-1), sent)
        return arrived

    def _tensor(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        return self._space.tensor(name, self._group.device, dtype, *shape)
