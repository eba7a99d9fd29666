"""Releases and resumes the memory of SGLang's weights and KV cache on a CPU, as torch_memory_saver does on a GPU."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE, GPU_MEMORY_TYPE_WEIGHTS
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter


class CpuMemorySaver(TorchMemorySaverAdapter):
    """SGLang's interface to a memory saver: ``pause`` frees the memory under a tag, ``resume`` allocates it again. The
    tensor objects, and all views of them, stay. No two tensors may share a storage."""

    def __init__(self, weights: Iterable[torch.Tensor], kv_cache: Iterable[torch.Tensor]) -> None:
        self._tensors = {GPU_MEMORY_TYPE_WEIGHTS: list(weights), GPU_MEMORY_TYPE_KV_CACHE: list(kv_cache)}
        self._sizes: dict[str, list[int]] = {}  # bytes of each tensor of a tag that is paused

    @property
    def enabled(self) -> bool:
        return True

    def pause(self, tag: str) -> None:
        storages = [tensor.untyped_storage() for tensor in self._tensors.get(tag, [])]
        self._sizes[tag] = [storage.nbytes() for storage in storages]
        for storage in storages:
            storage.resize_(0)

    def resume(self, tag: str) -> None:
        for tensor, size in zip(self._tensors.get(tag, []), self._sizes.pop(tag), strict=True):
            tensor.untyped_storage().resize_(size)
            if tag == GPU_MEMORY_TYPE_KV_CACHE:
                tensor[0].zero_()  # padding attends to this slot with weight 0, and 0 times a stray NaN is NaN
