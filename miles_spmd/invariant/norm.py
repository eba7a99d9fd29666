"""Root-mean-square norm of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_spmd.invariant import kernels


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32, rounded once
    (https://arxiv.org/abs/1910.07467)."""
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of x + residual, and the sum, which is rounded to the dtype of ``x`` first; without a
    gradient."""
    if x.is_cuda:
        y, _, total = kernels.rms_norm(x, weight, eps, residual)
        return y, total  # type: ignore[return-value]
    total = x + residual
    return _forward(total, weight, eps)[0], total


class _RMSNorm(torch.autograd.Function):
    """The norm with its backward pass written out: torch has no CPU kernel for it, and autograd's costs twice as much.

    With r = rsqrt(mean(x^2) + eps) and n = x r: y = n w, dx = r (g w - n mean(g w n)), dw = sum g n.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, r = _forward(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, r = ctx.saved_tensors
        if x.is_cuda:
            return *kernels.rms_norm_backward(gradient, x.contiguous(), weight, r), None
        g, n = gradient.float(), x.float() * r
        grad_weight = (g * n).flatten(0, -2).sum(0)
        grad_x = g * weight
        shift = torch.linalg.vecdot(grad_x, n).unsqueeze(-1) / x.shape[-1]
        grad_x.sub_(n.mul_(shift)).mul_(r)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return y and r, fp32: [..., 1] on a CPU, one number per row on a GPU."""
    if x.is_cuda:
        y, r, _ = kernels.rms_norm(x, weight, eps, None)
        return y, r
    x32 = x.float()
    r = (torch.linalg.vecdot(x32, x32).unsqueeze(-1) / x.shape[-1] + eps).rsqrt_()
    return (x32 * r).mul_(weight).to(x.dtype), r
