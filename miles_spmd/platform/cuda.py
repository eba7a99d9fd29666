"""What a process needs before it can share a GPU: the GPU, and torch_memory_saver's hook.

The hook stands before the CUDA runtime's allocation functions, so that an engine's memory can be given back and taken
again at the same addresses. The dynamic linker has to load it, which it does only when a program starts.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

_NAME = "torch_memory_saver_hook_mode_preload"
# What CUDA, NCCL and torch read when they start, where the user has not said otherwise.
_ENVIRONMENT = {
    # NCCL would register with the network what a CUDA graph captured: buffers that the engine unmaps when it sleeps.
    "NCCL_GRAPH_REGISTER": "0",
    # Communicators map their buffers so that peers may import them: memory that is never given back, in every group.
    "NCCL_CUMEM_ENABLE": "0",
    # One hardware queue: the trainer's collectives start in the order in which they were issued, before the matrix
    # product that is to hide them. Megatron's tensor parallelism counts on it.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # Host memory for what leaves the device is pinned by several threads, in a fifth of the time.
    "PYTORCH_CUDA_ALLOC_CONF": "pinned_use_cuda_host_register:True,pinned_num_register_threads:8",
}
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # two names of one variable


def memory_saver_libraries() -> list[Path]:
    """What ``LD_PRELOAD`` has to name: the hook, and before it the CUDA runtime that it needs, where that came as a
    Python package. Empty where torch_memory_saver or a torch for CUDA is missing. Imports neither."""
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
    """To be called before anything else, where there is a GPU: the environment that CUDA, NCCL and torch are to find,
    and the hook. Without the hook, where there is one, the process's program is started again with it, and nothing of
    what it has done survives."""
    for name, value in _ENVIRONMENT.items():
        names = _ALLOCATOR if name in _ALLOCATOR else (name,)
        if not any(said in os.environ for said in names):
            os.environ[name] = value
    preloaded = os.environ.get("LD_PRELOAD", "")
    libraries = memory_saver_libraries()
    if libraries and _NAME not in preloaded:
        preload = ":".join([*map(str, libraries), *filter(None, [preloaded])])
        os.execve(sys.executable, sys.orig_argv, os.environ | {"LD_PRELOAD": preload})


def take_gpu(local_rank: int, ranks: int) -> None:
    """Make this rank's GPU the current one. ``ranks``: how many share this host. Raises RuntimeError."""
    import torch

    if ranks > torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise RuntimeError(
            f"{ranks} ranks on this host and {torch.cuda.device_count()} GPUs"
            + (f" (CUDA_VISIBLE_DEVICES={visible})" if visible else "")
            + ": each rank needs one of its own, and all ranks of a host have to see all of them"
        )
    torch.cuda.set_device(local_rank)


def require_memory_saver() -> None:
    """Raise RuntimeError, with what to do, when the hook is not in this process or cannot work there."""
    if any("expandable_segments:True" in os.environ.get(name, "") for name in _ALLOCATOR):
        raise RuntimeError(
            f"unset expandable_segments:True in {_ALLOCATOR[0]}: torch_memory_saver maps an engine's memory itself, "
            "and cannot do so under an allocator that does"
        )
    if _NAME not in Path("/proc/self/maps").read_text():
        libraries = ":".join(map(str, memory_saver_libraries()))
        raise RuntimeError(
            "an engine that shares its GPU needs torch_memory_saver's hook, which is not in this process: start ranks "
            "with `miles-spmd`, or set LD_PRELOAD before Python starts"
            + (f" (LD_PRELOAD={libraries})" if libraries else "; torch_memory_saver is not installed")
        )
