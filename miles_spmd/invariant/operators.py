"""The operators of a layer other than products and attention, with their backward passes: on a GPU by the kernels of
:mod:`miles_spmd.invariant.kernels`, in fp32 with one rounding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miles_spmd.invariant import kernels

# --- root-mean-square norm of rows -----------------------------------------------------------------------------------


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
    return _norm(total, weight, eps)[0], total


class _RMSNorm(torch.autograd.Function):
    """The norm with its backward pass written out: torch has no CPU kernel for it, and autograd's costs twice as much.

    With r = rsqrt(mean(x^2) + eps) and n = x r: y = n w, dx = r (g w - n mean(g w n)), dw = sum g n.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, r = _norm(x, weight, eps)
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


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return y and r, fp32: [..., 1] on a CPU, one number per row on a GPU."""
    if x.is_cuda:
        y, r, _ = kernels.rms_norm(x, weight, eps, None)
        return y, r
    x32 = x.float()
    r = (torch.linalg.vecdot(x32, x32).unsqueeze(-1) / x.shape[-1] + eps).rsqrt_()
    return (x32 * r).mul_(weight).to(x.dtype), r


# --- rotary positions ------------------------------------------------------------------------------------------------


def rotate(x: Tensor, table: Tensor, positions: Tensor, interleaved: bool = False) -> Tensor:
    """Return ``x`` [T, H, D] in which pairs of numbers are rotated by the angles of ``positions``, int64 [T]
    (https://arxiv.org/abs/2104.09864).

    ``table``: fp32 [places, R], see :func:`miles_spmd.invariant.rope.rotary_table`. Of the D dimensions of a head the
    first R are rotated, in pairs R / 2 apart or, ``interleaved``, in pairs of neighbours; the others are copied.
    """
    return _Rotate.apply(x, table, positions, interleaved)


class _Rotate(torch.autograd.Function):
    """The backward pass is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(table, positions)
        ctx.interleaved = interleaved
        return _rotated(x, table, positions, interleaved, back=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        table, positions = ctx.saved_tensors
        return _rotated(gradient, table, positions, ctx.interleaved, back=True), None, None, None


def _rotated(x: Tensor, table: Tensor, positions: Tensor, interleaved: bool, back: bool) -> Tensor:
    if x.is_cuda:
        return kernels.rotate(x, table, positions, interleaved, back)
    cos, sin = table.index_select(0, positions)[:, None].to(x.dtype).chunk(2, -1)
    other = sin.neg() if back else sin
    rotated, copied = x[..., : table.shape[-1]], x[..., table.shape[-1] :]
    first, second = (rotated[..., ::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, -1)
    pairs = first * cos - second * other, second * cos + first * other
    return torch.cat([torch.stack(pairs, -1).flatten(-2), copied] if interleaved else [*pairs, copied], -1)


def one_more(weight: Tensor) -> Tensor:
    """Return 1 + ``weight`` in fp32, which is what a zero-centred norm multiplies by."""
    return weight.float() + 1


# --- SwiGLU ----------------------------------------------------------------------------------------------------------


def swiglu(x: Tensor) -> Tensor:
    """Return silu(gate) * up [..., F] of ``x`` [..., 2 F], gate first (https://arxiv.org/abs/2002.05202)."""
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


def geglu(x: Tensor) -> Tensor:
    """Return gelu(gate) * up [..., F] of ``x`` [..., 2 F], gate first, with tanh's approximation of gelu, in fp32 with
    one rounding (https://arxiv.org/abs/2002.05202)."""
    gate, up = x.float().chunk(2, -1)
    return (F.gelu(gate, approximate="tanh") * up).to(x.dtype)


def softcap(logits: Tensor, cap: float) -> Tensor:
    """Return cap * tanh(logits / cap), at least in fp32, without a gradient."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.tanh(logits / cap).mul_(cap)


# --- log-probs over a vocabulary -------------------------------------------------------------------------------------


def log_softmax(values: Tensor) -> Tensor:
    """Return (value - peak) - log(sum of exp(value - peak)) of every row of ``values``, fp32 [R, V].

    The trainer needs those of single tokens and no copy of the logits. Its sums have the same reduction order, so its
    results are bitwise equal: ``training.softmax`` on a CPU, ``training.softmax_kernel`` on a GPU.
    """
    if values.is_cuda:
        from sglang.srt.batch_invariant_ops import batch_invariant_ops

        return batch_invariant_ops.log_softmax(values, -1)
    z = values - values.amax(-1, keepdim=True)
    return z.sub_(z.exp().sum(-1, keepdim=True).log_())
