"""SGLang in fp32 on a GPU, for small models and exact tests. It is written for 16-bit numbers: its compiled kernels
take nothing else, and Triton would round what its own multiply to TF32."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from sglang.srt.layers.utils import MultiPlatformOp


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Layers built meanwhile compute in torch's operations; from now on Triton multiplies fp32 in fp32."""
    os.environ["TRITON_F32_DEFAULT"] = "ieee"
    theirs = MultiPlatformOp.dispatch_forward
    MultiPlatformOp.dispatch_forward = _torch_operations
    try:
        yield
    finally:
        MultiPlatformOp.dispatch_forward = theirs


def _torch_operations(layer: MultiPlatformOp) -> Callable[..., object]:
    return layer.forward_native
