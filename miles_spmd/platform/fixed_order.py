"""What makes a process compute the same bits every time: sums in one order, kernels that are always the same."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Read when CUDA, cuBLAS, NCCL and Transformer Engine start, so they are set before.
ENVIRONMENT = {
    # cuBLAS may split a product differently from call to call while its workspace grows; torch demands this, too.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # The switches between GPUs would add up in the order of arrival.
    "NCCL_NVLS_ENABLE": "0",
    # Ring or tree is otherwise NCCL's guess of what is faster, for every message size. SGLang's deterministic mode asks
    # for the same. Other collectives have one algorithm within a host.
    "NCCL_ALGO": "allreduce:tree",
    # The fused backward of attention adds up with atomics, unless it may not.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}


def pin_environment() -> None:
    """To be called before anything uses a GPU. Raises RuntimeError naming every variable that says otherwise."""
    wrong = [f"{k}={os.environ[k]}" for k, value in ENVIRONMENT.items() if os.environ.get(k, value) != value]
    if wrong:
        wanted = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
        raise RuntimeError(f"determinism.deterministic: unset {', '.join(wrong)}; it needs {wanted}")
    os.environ.update(ENVIRONMENT)


@contextmanager
def kernels() -> Iterator[None]:
    """torch's kernels that have no fixed order of summation are replaced by such that have, or raise RuntimeError. For
    the trainer alone: SGLang's have their own switch."""
    import torch

    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    memory.fill_uninitialized_memory = False  # which nobody reads
    torch.use_deterministic_algorithms(True)
    try:
        with _torchs_own():
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        memory.fill_uninitialized_memory = fills


@contextmanager
def _torchs_own() -> Iterator[None]:
    """SGLang's deterministic mode puts kernels in the place of torch's, in the whole process. That of a norm has no
    backward pass: gradients would end there, without an error."""
    mode = sys.modules.get("sglang.srt.batch_invariant_ops.batch_invariant_ops")
    if mode is None or not mode.is_batch_invariant_mode_enabled():
        yield
        return
    mode.disable_batch_invariant_mode()
    try:
        yield
    finally:
        mode.enable_batch_invariant_mode()
