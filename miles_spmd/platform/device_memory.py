"""Total, free and used memory of this process's device: a GPU, or on a CPU this rank's share of the host."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Reading:
    """Bytes. On a CPU ``allocated`` and ``reserved`` are the resident memory of the process: torch does not count."""

    total: int
    free: int  # for any process
    allocated: int  # by torch, for tensors, including memory that torch_memory_saver has released
    reserved: int  # by torch from the driver
    allocated_peak: int  # since the last :func:`reset_peak`
    reserved_peak: int

    @property
    def used(self) -> int:
        return self.total - self.free


def read() -> Reading:
    """Read the memory of this process's current device."""
    if not torch.cuda.is_available():
        return read_host()
    free, total = torch.cuda.mem_get_info()
    stats = torch.cuda.memory_stats()
    kinds = ((what, when) for when in ("current", "peak") for what in ("allocated", "reserved"))
    return Reading(total, free, *(stats.get(f"{what}_bytes.all.{when}", 0) for what, when in kinds))


def reset_peak() -> None:
    """Start a new measurement of the peaks of :class:`Reading`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # if Linux does not permit it, the peak is that of the whole run
            Path("/proc/self/clear_refs").write_text("5")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means that memory is exhausted. Torch, a library below it or SGLang raises it; SGLang uses
    several types of errors for that when it starts."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(words in str(error) for words in _OUT_OF_MEMORY)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without torch's details and advice, which do not apply here."""
    lines = str(error).splitlines()
    return lines[0].partition(" Including non-PyTorch memory")[0].rstrip(".") if lines else type(error).__name__


_OUT_OF_MEMORY = (
    "out of memory",  # CUDA, NCCL
    "can't allocate memory",  # torch on a CPU
    "STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN
    "Not enough memory. Please try to increase --mem-fraction-static",
    "leave no GPU memory for the KV cache",
)


def read_host() -> Reading:
    """Read this rank's share of the host's memory and the resident memory of its process."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    host = psutil.virtual_memory()
    total, free = host.total, host.available
    with contextlib.suppress(OSError, ValueError):  # outside of a container without limit
        total = min(total, int((CGROUP / "memory.max").read_text()))
        free = min(free, total - int((CGROUP / "memory.current").read_text()))
    status = Path("/proc/self/status").read_text()
    resident, peak = (int(status.partition(f"{name}:")[2].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return Reading(total // ranks, max(0, free) // ranks, resident, resident, peak, peak)
