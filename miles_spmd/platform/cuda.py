"""Prepares a process to share a GPU: environment variables, the device, and torch_memory_saver's hook.

The hook intercepts the CUDA runtime's allocation functions, so that an engine's memory can be released and resumed at
the same addresses. The dynamic linker loads it (LD_PRELOAD), which is only possible when a program starts.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

_NAME = "torch_memory_saver_hook_mode_preload"
# Read by CUDA, NCCL and torch when they start; a value that the user has set stays.
_ENVIRONMENT = {
    # NCCL would register the buffers of CUDA graphs with the network; an engine unmaps them when it releases memory.
    "NCCL_GRAPH_REGISTER": "0",
    # NCCL's cuMem allocator maps the buffers of every communicator for peers, and never releases that memory.
    "NCCL_CUMEM_ENABLE": "0",
    # One hardware queue: the trainer's collectives start in the order in which they were issued, before the matrix
    # product that overlaps with them. Megatron's tensor parallelism relies on it.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # Collectives that NCCL's flight recorder remembers, for the message about a hang.
    "TORCH_FR_BUFFER_SIZE": "2000",
    # Several threads pin the host memory for offloading, which takes a fifth of the time.
    "PYTORCH_CUDA_ALLOC_CONF": "pinned_use_cuda_host_register:True,pinned_num_register_threads:8",
}
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # two names of one variable


def memory_saver_libraries() -> list[Path]:
    """Return the libraries for ``LD_PRELOAD``: the hook, and before it the CUDA runtime that it needs, if that was
    installed as a Python package. Empty without torch_memory_saver or a torch for CUDA. Imports neither."""
    saver, torch = importlib.util.find_spec("torch_memory_saver"), importlib.util.find_spec("torch")
    if saver is None or saver.origin is None or torch is None or torch.origin is None:
        return []
    version = re.search(r"^cuda\b.*'(\d+)\.", Path(torch.origin).with_name("version.py").read_text(), re.MULTILINE)
    if version is None:
        return []
    major = version[1]
    runtimes = Path(torch.origin).parents[1].glob(f"nvidia/*/lib/libcudart.so.{major}")
    hooks = Path(saver.origin).parents[1].glob(f"{_NAME}_cu{major}.*so")
    return [*runtimes, *hooks]


def prepare() -> None:
    """Set the environment for CUDA, NCCL and torch and load the hook; call it before anything else on a machine with a
    GPU. If the hook is installed and not loaded, the program of this process is started again with it, and the state
    of the process is lost."""
    for name, value in _ENVIRONMENT.items():
        names = _ALLOCATOR if name in _ALLOCATOR else (name,)
        if not any(alias in os.environ for alias in names):
            os.environ[name] = value
    preloaded = os.environ.get("LD_PRELOAD", "")
    libraries = memory_saver_libraries()
    if libraries and _NAME not in preloaded:
        preload = ":".join([*map(str, libraries), *filter(None, [preloaded])])
        os.execve(sys.executable, sys.orig_argv, os.environ | {"LD_PRELOAD": preload})


def take_gpu(local_rank: int, ranks: int) -> None:
    """Make this rank's GPU the current device. ``ranks``: number of ranks on this host. Raises RuntimeError when the
    host has fewer GPUs."""
    import torch

    if ranks > torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise RuntimeError(
            f"{ranks} ranks on this host and {torch.cuda.device_count()} GPUs"
            + (f" (CUDA_VISIBLE_DEVICES={visible})" if visible else "")
            + ": start at most one rank per GPU, and let every rank of a host see all its GPUs"
        )
    torch.cuda.set_device(local_rank)


def name_gpu() -> str:
    """Return the number of this rank's GPU on its host, its model and the start of its UUID, as nvidia-smi prints them;
    "" without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return ""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"GPU {torch.cuda.current_device()}, {properties.name}, GPU-{str(properties.uuid)[:8]}"


def require_memory_saver() -> None:
    """Raise RuntimeError with the remedy when the hook is not loaded in this process or cannot work in it."""
    if any("expandable_segments:True" in os.environ.get(name, "") for name in _ALLOCATOR):
        raise RuntimeError(
            f"unset expandable_segments:True in {_ALLOCATOR[0]}: it is not compatible with torch_memory_saver, which "
            "maps the engine's memory itself"
        )
    if _NAME not in Path("/proc/self/maps").read_text():
        libraries = ":".join(map(str, memory_saver_libraries()))
        raise RuntimeError(
            "an engine requires torch_memory_saver's hook, which is not in this process: start ranks with "
            "`miles-spmd`, or set LD_PRELOAD before Python starts"
            + (f" (LD_PRELOAD={libraries})" if libraries else "; torch_memory_saver is not installed")
        )
