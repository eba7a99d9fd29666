"""Which of SGLang's own kernels an engine on a GPU uses."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe
from sglang.srt.layers.utils import MultiPlatformOp


def use_one_expert_sum() -> None:
    """Combine expert outputs by one kernel for any number of tokens. For up to 32 tokens SGLang would use a function
    that torch compiles and tunes for every number of tokens: this takes seconds for each CUDA graph, and the reduction
    order would depend on the batch."""
    fused_moe._use_moe_sum_reduce_torch_compile = lambda num_tokens: False


@contextlib.contextmanager
def float32_kernels() -> Iterator[None]:
    """Layers built inside this context compute in torch operations, and Triton multiplies fp32 in full precision from
    now on. SGLang's compiled kernels take 16-bit numbers only, and Triton would round fp32 factors to TF32. For small
    models and exact tests."""
    os.environ["TRITON_F32_DEFAULT"] = "ieee"
    dispatch = MultiPlatformOp.dispatch_forward
    MultiPlatformOp.dispatch_forward = lambda layer: layer.forward_native
    try:
        yield
    finally:
        MultiPlatformOp.dispatch_forward = dispatch
