"""How much memory this process's device has, and how much of it is in use: a GPU's, or its share of the host's."""

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
    """Bytes. On a CPU torch keeps no account: ``allocated`` and ``reserved`` are the process's resident memory."""

    total: int
    free: int  # for any process
    allocated: int  # by torch, for tensors; what torch_memory_saver has taken away for a while is counted all the same
    reserved: int  # by torch, of the driver
    allocated_peak: int  # since the last :func:`reset_peak`
    reserved_peak: int

    @property
    def used(self) -> int:
        return self.total - self.free


def is_exact() -> bool:
    """Whether torch keeps account of every byte here."""
    return torch.cuda.is_available()


def read() -> Reading:
    if not torch.cuda.is_available():
        return read_host()
    free, total = torch.cuda.mem_get_info()
    stats = torch.cuda.memory_stats()
    torchs = (stats.get(f"{what}_bytes.all.{when}", 0) for when in ("current", "peak") for what in _COUNTED)
    return Reading(total, free, *torchs)


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # where the kernel does not let us, the peak is that of the whole run
            Path("/proc/self/clear_refs").write_text("5")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether somebody asked for memory that there is not: torch, a library under it, or SGLang, which when it starts
    raises errors of all types for that."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)


def first_line(error: BaseException) -> str:
    """What it says, without the account and the advice that follow: torch's own would not work here."""
    lines = str(error).splitlines()
    return lines[0].partition(" Including non-PyTorch memory")[0].rstrip(".") if lines else type(error).__name__


_COUNTED = ("allocated", "reserved")
_OUT_OF_MEMORY = (
    "out of memory",  # CUDA, NCCL
    "can't allocate memory",  # torch on a CPU
    "STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN
    "Not enough memory. Please try to increase --mem-fraction-static",
    "leave no GPU memory for the KV cache",
)


def read_host() -> Reading:
    """This rank's share of the host's memory, and what its process has of it."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    host = psutil.virtual_memory()
    total, free = host.total, host.available
    with contextlib.suppress(OSError, ValueError):  # no limit of a container
        total = min(total, int((CGROUP / "memory.max").read_text()))
        free = min(free, total - int((CGROUP / "memory.current").read_text()))
    status = Path("/proc/self/status").read_text()
    resident, peak = (int(status.partition(f"{name}:")[2].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return Reading(total // ranks, max(0, free) // ranks, resident, resident, peak, peak)
