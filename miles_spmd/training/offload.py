"""A trainer's memory while an engine generates: moments and main parameters are copied to host memory, gradients are
dropped.

Weights stay on the device, because a refit reads them and other ranks may have mapped them. Tensor objects and all
views stay, too: only the storage below them is freed and allocated again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor, UntypedStorage

from miles_spmd.training.optimizer import inner_optimizers


class Offload:
    """The offload of one trainer. Its host memory, pinned where there is a GPU, is allocated once."""

    def __init__(
        self, chunks: list[DistributedDataParallel], optimizer: ChainedOptimizer, weights: Collection[Tensor]
    ) -> None:
        self._chunks, self._optimizer = chunks, optimizer
        storages = [weight.untyped_storage() for weight in weights]
        self._weights = {_identity(storage): storage.nbytes() for storage in storages}
        # storages that are released, with their sizes; of the first ``_copied`` the contents are in host memory
        self._released: list[tuple[UntypedStorage, int]] = []
        self._copied = 0
        self._host = torch.empty(0, dtype=torch.uint8)
        self._on_host: dict[int, Tensor] = {}  # the copy of each storage that is released

    @property
    def offloaded_bytes(self) -> int:
        """Return the bytes of device memory that :meth:`move_in` would allocate."""
        return sum(nbytes for _, nbytes in self._released)

    def memory(self) -> dict[str, int]:
        """Return the bytes that the trainer holds on the device now, by purpose, without activations."""
        gradients, state = _size(self._storages(self._gradients())), _size(self._storages(self._state()))
        return {"parameters": sum(self._weights.values()), "gradients": gradients, "optimizer": state}

    def move_out(self) -> int:
        """Offload all but the weights until :meth:`move_in`; only the weights may be used meanwhile.

        Return the bytes that were released to the device's allocator; 0 if they were before.
        """
        if self._released:
            return 0
        self._optimizer.zero_grad()  # drops references to gradients in the optimizer's dtype
        state, gradients = self._storages(self._state()), self._storages(self._gradients())
        if self._host.numel() < _size(state):
            self._host = torch.empty(_size(state), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self._on_host = {_identity(storage): host for storage, host in zip(state, self._slices(state))}
        for storage in state:
            self._on_host[_identity(storage)].copy_(_bytes(storage), non_blocking=True)
        if state and state[0].is_cuda:
            torch.cuda.current_stream().synchronize()  # the copies must be done before their sources are freed
        self._released = [(storage, storage.nbytes()) for storage in (*state, *gradients)]
        self._copied = len(state)
        # Resizing a storage keeps the tensors and views that Megatron holds; they are valid again after move_in.
        for storage, _ in self._released:
            storage.resize_(0)
        return self.offloaded_bytes

    def on_host(self, tensor: Tensor) -> Tensor:
        """Return the optimizer's ``tensor`` where its memory is now: the tensor itself, or one with the same content in
        host memory that stays what it is until the next :meth:`move_out`."""
        memory = self._on_host.get(_identity(tensor.untyped_storage()))
        if memory is None:
            return tensor
        memory = memory.view(tensor.dtype)
        return memory.as_strided(tensor.size(), tensor.stride(), memory.storage_offset() + tensor.storage_offset())

    def move_in(self) -> int:
        """Undo :meth:`move_out`; gradients are undefined, as they are before every step.

        Return the bytes that were allocated; 0 if nothing was offloaded.
        """
        for storage, nbytes in self._released:
            storage.resize_(nbytes)
        state = [storage for storage, _ in self._released[: self._copied]]
        for storage, host in zip(state, self._slices(state)):
            _bytes(storage).copy_(host, non_blocking=True)
        allocated, self._released, self._on_host = self.offloaded_bytes, [], {}
        return allocated

    def _state(self) -> Iterable[Tensor]:
        for inner in inner_optimizers(self._optimizer):
            for group in inner.optimizer.param_groups:
                for parameter in group["params"]:
                    yield parameter
                    yield from (t for t in inner.optimizer.state[parameter].values() if torch.is_tensor(t) and t.dim())

    def _gradients(self) -> Iterable[Tensor]:
        for chunk in self._chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                yield buffer.grad_data

    def _storages(self, tensors: Iterable[Tensor]) -> list[UntypedStorage]:
        """Return the storages of ``tensors``, each once, without those that hold weights."""
        storages = {_identity(tensor.untyped_storage()): tensor.untyped_storage() for tensor in tensors}
        return [storage for identity, storage in storages.items() if identity not in self._weights]

    def _slices(self, storages: list[UntypedStorage]) -> Iterable[Tensor]:
        return self._host[: _size(storages)].split([storage.nbytes() for storage in storages])


def _identity(storage: UntypedStorage) -> int:
    """Return the address of the storage's C++ object: Python objects for it are many, and data pointers change."""
    return storage._cdata


def _size(storages: Iterable[UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages)


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
