"""Readings of this machine's memory, and which errors are about it."""

from __future__ import annotations

import psutil
import pytest
import torch

from miles_spmd.platform import device_memory

MIB = 2**20


def test_a_reading_follows_what_the_process_does() -> None:
    before = device_memory.read_host()
    assert 0 < before.allocated < before.total <= psutil.virtual_memory().total
    held = torch.ones(64 * MIB, dtype=torch.uint8)
    grown = device_memory.read_host()
    assert grown.allocated - before.allocated >= 60 * MIB
    del held
    after = device_memory.read_host()
    assert grown.allocated - after.allocated >= 60 * MIB
    assert after.allocated_peak >= grown.allocated - MIB


def test_ranks_of_a_host_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = device_memory.read_host()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert device_memory.read_host().total == alone.total // 4
    assert device_memory.read_host().free < alone.total // 4


def test_errors_for_want_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert device_memory.is_out_of_memory(caught.value)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Not enough memory. Please try to increase --mem-fraction-static. Current value: 0.1"),
        Exception("Capture cuda graph failed: CUDA out of memory."),
        MemoryError(),
    ):
        assert device_memory.is_out_of_memory(error)
    for error in (RuntimeError("shape mismatch"), ValueError("memory"), KeyError("x")):
        assert not device_memory.is_out_of_memory(error)
    advice = "Including non-PyTorch memory, this process has 139 GiB. Try setting expandable_segments:True."
    for following in (f" {advice}", f"\n{advice}"):
        error = torch.OutOfMemoryError(f"CUDA out of memory. Tried 2 GiB. 3 MiB is free.{following}")
        assert device_memory.first_line(error) == "CUDA out of memory. Tried 2 GiB. 3 MiB is free"
    assert device_memory.first_line(MemoryError()) == "MemoryError"
