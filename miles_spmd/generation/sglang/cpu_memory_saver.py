"""Gives the memory of SGLang's weights and KV cache back on a CPU, as torch_memory_saver does on a GPU."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE, GPU_MEMORY_TYPE_WEIGHTS
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter

from miles_spmd.generation import storage


class CpuMemorySaver(TorchMemorySaverAdapter):
    """SGLang's interface to a memory saver: ``pause`` frees what lies under a tag, ``resume`` allocates it again."""

    def __init__(self, weights: Iterable[torch.Tensor], kv_cache: Iterable[torch.Tensor]) -> None:
        self._tensors = {GPU_MEMORY_TYPE_WEIGHTS: list(weights), GPU_MEMORY_TYPE_KV_CACHE: list(kv_cache)}
        self._sizes: dict[str, list[int]] = {}

    @property
    def enabled(self) -> bool:
        return True

    def pause(self, tag: str) -> None:
        self._sizes[tag] = storage.free(self._tensors.get(tag, []))

    def resume(self, tag: str) -> None:
        tensors = self._tensors.get(tag, [])
        storage.allocate(tensors, self._sizes.pop(tag))
        if tag == GPU_MEMORY_TYPE_KV_CACHE:
            for tensor in tensors:
                tensor[0].zero_()  # padding attends to this slot with weight 0, which a stray NaN would survive
