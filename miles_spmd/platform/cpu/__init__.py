"""Adaptations by which megatron-core and sglang, both written for GPUs, run unchanged on a machine without one."""

from __future__ import annotations


def install() -> bool:
    """Make this process ready to import megatron.core and sglang on a CPU. Call before either is imported.

    Does nothing and returns False if CUDA is available. Raises RuntimeError when an installed version is not the one
    that these adaptations were written for, or when a backend was imported before.
    """
    import torch

    if torch.cuda.is_available():
        return False
    from miles_spmd.platform.cpu import megatron_hook, sglang_shim

    sglang_shim.install()
    megatron_hook.install()
    return True
