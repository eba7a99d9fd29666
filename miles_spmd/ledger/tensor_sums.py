"""Digests of the tensors of a rank, computed on their device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from miles_spmd.ledger.rectangles import COLUMN_STREAM, ROW_STREAM, Part, Rectangle, factors


class TensorSums:
    """Computes the sum of every part of every tensor; see :mod:`miles_spmd.ledger.rectangles`.

    ``parts`` are those of each tensor, by its name. Tensors are contiguous, with elements of 2 or 4 bytes.
    """

    def __init__(self, parts: Mapping[str, Sequence[Part]]) -> None:
        self._parts = [(name, part) for name, own in parts.items() for part in own]
        self._names = list(parts)
        self._table: Tensor | None = None  # of tiles, on a GPU
        self._even = False

    @property
    def rectangles(self) -> list[Rectangle]:
        return [part.rectangle for _, part in self._parts]

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return int64 [rectangles] on the tensors' device, without synchronising. All item sizes must be equal."""
        given = [tensors[name] for name in self._names]
        if given and given[0].is_cuda:
            return self._on_gpu(given)
        flat = {name: _words(tensors[name]) for name in self._names}
        sums = np.asarray([_sum(flat[name], part) for name, part in self._parts], np.uint64)
        return torch.from_numpy(sums.view(np.int64))

    def _on_gpu(self, given: list[Tensor]) -> Tensor:
        from miles_spmd.ledger import digest_kernel

        device, itemsize = given[0].device, given[0].element_size()
        if self._table is None:
            number = {name: index for index, name in enumerate(self._names)}
            tiles = digest_kernel.tiles([(number[name], part) for name, part in self._parts])
            self._table, self._even = torch.from_numpy(tiles).to(device), digest_kernel.even(tiles)
        addresses = torch.tensor([tensor.data_ptr() for tensor in given], dtype=torch.int64)
        aligned = self._even and not (addresses % 16).any()
        sums = torch.zeros(len(self._parts), dtype=torch.int64, device=device)
        digest_kernel.add_sums(addresses.to(device), itemsize, self._table, sums, bool(aligned))
        return sums


def _words(tensor: Tensor) -> np.ndarray:
    """Return the memory of a CPU tensor as unsigned integers of the elements' size, [elements].

    It is a copy: a storage that numpy refers to cannot be resized any more, and offloading resizes the trainer's."""
    signed, unsigned = (torch.int32, np.uint32) if tensor.element_size() == 4 else (torch.int16, np.uint16)
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(signed).numpy().view(unsigned)


def _sum(words: np.ndarray, part: Part) -> np.uint64:
    r = part.rectangle
    end = part.offset + (r.rows - 1) * part.stride + r.columns
    step = words.itemsize
    matrix = np.lib.stride_tricks.as_strided(words[part.offset : end], (r.rows, r.columns), (part.stride * step, step))
    by_row = matrix.astype(np.uint64) @ factors(COLUMN_STREAM, r.column, r.columns)
    return by_row @ factors(ROW_STREAM, r.row, r.rows)
