"""The functions of :mod:`miles_spmd.training.softmax` on a GPU, without a copy of the logits in fp32.

Rows are independent of each other, and every sum has a fixed reduction order. That of exp(z) is the order of SGLang's
batch-invariant log_softmax over the same logits in fp32, so that log-probs are bitwise equal to that kernel's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 4  # SGLang's: the reduction order of a block depends on them
WIDE = 4096  # block where no sum is computed, and so no order matters


def measure(logits_RV: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :func:`miles_spmd.training.softmax.measure` does, and leave the logits as they are.

    Logits have 16 or 32 bits; the numbers of a row are contiguous in memory, rows need not be.
    """
    rows, columns = logits_RV.shape
    peak_R1 = torch.empty(rows, 1, dtype=torch.float32, device=logits_RV.device)
    # each allocated alone, hence aligned: Triton would compile another kernel where one is not
    total_R, weighted_R = (torch.empty(rows, dtype=torch.float32, device=logits_RV.device) for _ in range(2))
    if rows:
        _measure[(rows,)](
            logits_RV, logits_RV.stride(0), columns, temperature, peak_R1, total_R, weighted_R,
            SCALE=temperature != 1.0, BLOCK=BLOCK, WIDE=WIDE, num_warps=WARPS,
        )  # fmt: skip
    return peak_R1, total_R, weighted_R


def differentiate(
    logits_RV: Tensor,
    temperature: float,
    peak_R1: Tensor,
    total_R1: Tensor,
    column_R1: Tensor,
    grad_R1: Tensor,
    entropy_and_grad: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return what :func:`miles_spmd.training.softmax.differentiate` does, rounded to the logits' dtype, in place."""
    rows, columns = logits_RV.shape
    grad_R1 = grad_R1 / temperature
    slope_R1, shift_R1 = grad_R1, grad_R1  # the kernel does not read them without entropy
    if entropy_and_grad is not None:
        slope_R1, shift_R1 = entropy_and_grad[1] / temperature, entropy_and_grad[0] - total_R1.log()
    if rows:
        _differentiate[(rows, triton.cdiv(columns, WIDE))](
            logits_RV, logits_RV.stride(0), columns, temperature,
            peak_R1.contiguous(), total_R1.contiguous(), column_R1.contiguous(), grad_R1, slope_R1, shift_R1,
            SCALE=temperature != 1.0, ENTROPY=entropy_and_grad is not None, WIDE=WIDE, num_warps=8,
        )  # fmt: skip
    return logits_RV


@triton.jit
def _scaled(logits, temperature, SCALE: tl.constexpr):  # type: ignore[no-untyped-def]
    v = logits.to(tl.float32)
    return tl.div_rn(v, temperature) if SCALE else v


# A loop that is known to run once is unrolled, and max_contiguous is lost with it.
@triton.jit(do_not_specialize=["columns"])
def _measure(  # type: ignore[no-untyped-def]
    logits,
    stride: tl.constexpr,
    columns,
    temperature,
    peaks,
    totals,
    weighteds,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    here = logits + row * stride
    wide = tl.arange(0, WIDE)
    highest = tl.full([WIDE], float("-inf"), tl.float32)
    for first in range(0, columns, WIDE):
        column = first + wide
        highest = tl.maximum(highest, tl.load(here + column, mask=column < columns, other=float("-inf")).to(tl.float32))
    peak = _scaled(tl.max(highest, 0), temperature, SCALE)

    # SGLang's kernel reads fp32 logits 16 bytes at a time, so each of its threads holds 4 neighbours, which it adds
    # first. Logits in 16 bits would be read 8 at a time; the hint keeps it at 4, and with it the reduction order.
    lane = tl.arange(0, BLOCK)
    total = 0.0
    weighted = tl.zeros([BLOCK], tl.float32)  # summed once, at the end: no engine computes this sum
    for first in range(0, columns, BLOCK):
        column = tl.max_contiguous(first + lane, 4)
        inside = column < columns
        z = _scaled(tl.load(here + column, mask=inside, other=0.0), temperature, SCALE) - peak
        exp = tl.where(inside, tl.exp(z), 0.0)
        total += tl.sum(exp)
        weighted += exp * z
    tl.store(peaks + row, peak)
    tl.store(totals + row, total)
    tl.store(weighteds + row, tl.sum(weighted))


# Of a row one number each is read, and rows may begin anywhere in these tensors.
@triton.jit(do_not_specialize_on_alignment=["peaks", "totals", "targets", "grads", "slopes", "shifts"])
def _differentiate(  # type: ignore[no-untyped-def]
    logits,
    stride,
    columns,
    temperature,
    peaks,
    totals,
    targets,
    grads,
    slopes,
    shifts,
    SCALE: tl.constexpr,
    ENTROPY: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = column < columns
    here = logits + row * stride + column
    z = _scaled(tl.load(here, mask=inside, other=0.0), temperature, SCALE) - tl.load(peaks + row)
    grad = tl.load(grads + row)
    factor = grad
    if ENTROPY:
        factor = (z + tl.load(shifts + row)) * tl.load(slopes + row) + grad
    gradient = tl.exp(z) * (-factor / tl.load(totals + row))
    gradient += tl.where(column == tl.load(targets + row), grad, 0.0)
    tl.store(here, gradient.to(logits.dtype.element_ty), mask=inside)
