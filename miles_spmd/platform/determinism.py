"""Run-to-run determinism of a process: environment and kernels that fix every reduction order."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# CUDA, cuBLAS, NCCL and Transformer Engine read these when they start.
ENVIRONMENT = {
    # cuBLAS may split a product differently from call to call while its workspace grows; torch requires this, too.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # NVLink SHARP: the switches between GPUs would sum in the order of arrival.
    "NCCL_NVLS_ENABLE": "0",
    # Otherwise NCCL chooses ring or tree by an estimate of their speed, for every message size. SGLang's deterministic
    # mode sets the same. Other collectives have one algorithm within a host.
    "NCCL_ALGO": "allreduce:tree",
    # The fused backward pass of attention sums with atomics, unless this forbids it.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}


def pin_environment() -> None:
    """Set these variables; call it before anything uses a GPU. Raises RuntimeError naming every variable that is set to
    another value."""
    wrong = [f"{k}={os.environ[k]}" for k, value in ENVIRONMENT.items() if os.environ.get(k, value) != value]
    if wrong:
        required = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
        raise RuntimeError(f"determinism.deterministic: unset {', '.join(wrong)}; it requires {required}")
    os.environ.update(ENVIRONMENT)


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Inside this context, torch uses kernels with a fixed reduction order, or raises RuntimeError where it has none.
    For the trainer only: SGLang's kernels have a switch of their own.

    SGLang's deterministic mode, which replaces kernels of torch in the whole process, is suspended: its norm has no
    backward pass, and gradients would end there, without an error."""
    import torch

    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    memory.fill_uninitialized_memory = False  # it costs time, and uninitialised memory is not read here
    torch.use_deterministic_algorithms(True)
    mode: Any = sys.modules.get("sglang.srt.batch_invariant_ops.batch_invariant_ops")
    suspended = mode is not None and mode.is_batch_invariant_mode_enabled()
    if suspended:
        mode.disable_batch_invariant_mode()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        memory.fill_uninitialized_memory = fills
        if suspended:
            mode.enable_batch_invariant_mode()
