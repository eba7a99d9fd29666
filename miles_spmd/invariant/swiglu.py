"""SwiGLU (https://arxiv.org/abs/2002.05202): silu(gate) * up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miles_spmd.invariant import kernels


def swiglu(x: Tensor) -> Tensor:
    """Return silu(gate) * up [..., F] of ``x`` [..., 2 F], gate first; on a GPU in fp32 with one rounding."""
    return _SwiGLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        if x.is_cuda:
            return kernels.swiglu(x)
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        if x.is_cuda:
            return kernels.swiglu_backward(gradient, x.contiguous())
        gate, up = x.chunk(2, -1)
        sigmoid = gate.sigmoid()
        of_up = gate * sigmoid
        of_gate = (1 - sigmoid).mul_(gate).add_(1).mul_(sigmoid).mul_(up).mul_(gradient)
        return torch.cat([of_gate, of_up.mul_(gradient)], -1)
