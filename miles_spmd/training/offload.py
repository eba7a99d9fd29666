"""A trainer's memory while an engine generates: moments and main parameters wait in host memory, gradients nowhere.

Weights stay, because a refit reads them and other ranks may have mapped them. Tensor objects and all views stay, too:
only what lies under them is freed and allocated again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor, UntypedStorage

from miles_spmd.training.optimizer import parts


class TrainerMemory(NamedTuple):
    """Bytes on the device."""

    parameters: int
    gradients: int
    optimizer: int


class Offload:
    """Of one trainer. Its host memory, pinned where there is a GPU, is allocated once and kept."""

    def __init__(
        self, chunks: list[DistributedDataParallel], optimizer: ChainedOptimizer, weights: Collection[Tensor]
    ) -> None:
        self._chunks, self._optimizer = chunks, optimizer
        storages = [weight.untyped_storage() for weight in weights]
        self._weights = {_identity(storage): storage.nbytes() for storage in storages}
        self._away: list[tuple[UntypedStorage, int]] = []
        self._kept = 0  # of these, from the first on, the contents are in host memory
        self._host = torch.empty(0, dtype=torch.uint8)

    @property
    def away(self) -> int:
        """Bytes that :meth:`move_in` would take."""
        return sum(nbytes for _, nbytes in self._away)

    def memory(self) -> TrainerMemory:
        """What the trainer holds now, without activations."""
        state, gradients = (self._storages(tensors) for tensors in (self._state(), self._gradients()))
        return TrainerMemory(sum(self._weights.values()), _size(gradients), _size(state))

    def move_out(self) -> int:
        """Returns the bytes given back to the device's allocator; 0 when they are away already."""
        if self._away:
            return 0
        self._optimizer.zero_grad()  # lets go of the gradients
        state, gradients = self._storages(self._state()), self._storages(self._gradients())
        self._reserve(_size(state))
        for storage, host in zip(state, self._slices(state)):
            host.copy_(_bytes(storage), non_blocking=True)
        if state and state[0].is_cuda:
            torch.cuda.current_stream().synchronize()
        self._away = [(storage, storage.nbytes()) for storage in (*state, *gradients)]
        self._kept = len(state)
        for storage, _ in self._away:
            storage.resize_(0)
        return self.away

    def move_in(self) -> int:
        """Returns the bytes taken; gradients are undefined, as they are before every step."""
        for storage, nbytes in self._away:
            storage.resize_(nbytes)
        state = [storage for storage, _ in self._away[: self._kept]]
        for storage, host in zip(state, self._slices(state)):
            _bytes(storage).copy_(host, non_blocking=True)
        taken, self._away = self.away, []
        return taken

    def _state(self) -> Iterable[Tensor]:
        for inner in parts(self._optimizer):
            for group in inner.optimizer.param_groups:
                for parameter in group["params"]:
                    yield parameter
                    yield from (t for t in inner.optimizer.state[parameter].values() if torch.is_tensor(t) and t.dim())

    def _gradients(self) -> Iterable[Tensor]:
        for chunk in self._chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                yield buffer.grad_data

    def _storages(self, tensors: Iterable[Tensor]) -> list[UntypedStorage]:
        """Under ``tensors``, each once, none that weights lie in."""
        storages = {_identity(tensor.untyped_storage()): tensor.untyped_storage() for tensor in tensors}
        return [storage for identity, storage in storages.items() if identity not in self._weights]

    def _reserve(self, nbytes: int) -> None:
        if self._host.numel() < nbytes:
            self._host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())

    def _slices(self, storages: list[UntypedStorage]) -> Iterable[Tensor]:
        start = 0
        for storage in storages:
            yield self._host[start : start + storage.nbytes()]
            start += storage.nbytes()


def _identity(storage: UntypedStorage) -> int:
    return storage._cdata


def _size(storages: Iterable[UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages)


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
