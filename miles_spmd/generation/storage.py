"""Gives the memory of tensors on a CPU back while the tensor objects, and all views of them, stay."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def free(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Free the storages of ``tensors``, no two of which may share one; returns their sizes for :func:`allocate`."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    sizes = [storage.nbytes() for storage in storages]
    for storage in storages:
        storage.resize_(0)
    return sizes


def allocate(tensors: Iterable[torch.Tensor], sizes: list[int]) -> None:
    """Give freed tensors memory again; what it holds is undefined."""
    for tensor, size in zip(tensors, sizes, strict=True):
        tensor.untyped_storage().resize_(size)


def size(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes under ``tensors``, no two of which may share a storage; those of freed ones are 0."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
