"""Triton kernels of the norms, rotary positions and SwiGLU, with their backward passes.

The reduction order of a row is always the same, because tile sizes depend on a row's width alone. Everything is
computed in fp32 and rounded once.

Numbers of rows are not specialised: Triton would compile a kernel three times, for one row, for multiples of 16 and for
the rest, and results are those of the last anyway.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # elements that a program reads at a time, at least a row
PARTS = 1056  # partial sums of a weight's gradient, whatever the number of rows: eight per multiprocessor of an H200


# --- RMS norm --------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return y = v r w with r = 1 / sqrt(mean(v^2) + eps), r (fp32, one per row), and v.

    ``x`` [..., width]. With ``residual``, v is x + residual, rounded to the dtype of x before it is squared; without, v
    is x, and None is returned in its place.
    """
    x = x.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    y, r = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    total = None if residual is None else torch.empty_like(x)
    if rows:
        block, together = _tile(width, TILE)
        other = x if residual is None else residual.contiguous()
        _rms_norm[(triton.cdiv(rows, together),)](
            x, other, weight, y, x if total is None else total, r, rows, eps,
            WIDTH=width, BLOCK=block, ROWS=together, ADD=residual is not None,
        )  # fmt: skip
    return y, r, total


def rms_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight; that of the weight is summed over rows in a fixed order, as PARTS partial
    sums over rows that follow each other."""
    gradient = gradient.contiguous()
    width, rows = x.shape[-1], r.numel()
    block, together = _tile(width, 4 * TILE if width < 1024 else TILE)
    dx, parts = torch.empty_like(x), torch.empty(PARTS, width, dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(rows, together)
    _rms_norm_backward[(PARTS,)](
        gradient, x, weight, r, dx, parts, rows, triton.cdiv(tiles, PARTS), WIDTH=width, BLOCK=block, ROWS=together
    )
    return dx, parts.sum(0).to(weight.dtype)


def _tile(width: int, elements: int) -> tuple[int, int]:
    block = triton.next_power_of_2(width)
    return block, max(1, elements // block)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm(  # type: ignore[no-untyped-def]
    x, residual, weight, y, total, r, rows, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    root = tl.rsqrt(tl.sum(value * value, 1) / WIDTH + eps)
    scale = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    out = value * root[:, None] * scale[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)
    tl.store(r + row, root, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _rms_norm_backward(  # type: ignore[no-untyped-def]
    gradient, x, weight, r, dx, parts, rows, tiles,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """With n = x r: dx = r (g w - n mean(g w n)), dw = sum over rows of g n."""
    part = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    scale = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for tile in range(part * tiles, min((part + 1) * tiles, tl.cdiv(rows, ROWS))):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
        at = row[:, None] * WIDTH + column[None, :]
        root = tl.load(r + row, mask=row < rows, other=0.0)[:, None]
        n = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * root
        g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        sums += tl.sum(g * n, 0)
        g *= scale[None, :]
        out = root * (g - n * (tl.sum(g * n, 1) / WIDTH)[:, None])
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)
    tl.store(parts + part * WIDTH + column, sums, mask=column < WIDTH)


# --- rotary positions ------------------------------------------------------------------------------------------------


def rotate(x: Tensor, table: Tensor, positions: Tensor, interleaved: bool = False, back: bool = False) -> Tensor:
    """Return ``x`` [T, H, D] rotated by the angles of ``positions`` [T], or by the opposite angles (``back``).

    The heads of ``x`` may be a slice of a wider tensor. ``table``: fp32 [L, R], cosines, then sines, of R / 2 angles;
    the first R dimensions of a head are rotated, in pairs R / 2 apart or, ``interleaved``, in pairs of neighbours.
    """
    tokens, heads, width = x.shape
    if x.stride(2) != 1 or x.stride(1) != width:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if tokens:
        half = table.shape[1] // 2
        copied = width - 2 * half
        _rotate[(tokens,)](
            x, table, positions, out, x.stride(0), heads,
            HEADS=triton.next_power_of_2(heads), WIDTH=width, HALF=half, BLOCK=triton.next_power_of_2(half),
            COPIED=copied and triton.next_power_of_2(copied), INTERLEAVED=interleaved, BACK=back,
        )  # fmt: skip
    return out


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    x, table, positions, out, stride, heads,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    COPIED: tl.constexpr, INTERLEAVED: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    head = tl.arange(0, HEADS)
    angle = table + tl.load(positions + token) * (2 * HALF) + column
    cos = tl.load(angle, mask=column < HALF, other=0.0)[None, :]
    sin = tl.load(angle + HALF, mask=column < HALF, other=0.0)[None, :]
    if BACK:
        sin = -sin
    inside = (head < heads)[:, None] & (column < HALF)[None, :]
    step: tl.constexpr = 2 if INTERLEAVED else 1  # from a pair to the next
    apart: tl.constexpr = 1 if INTERLEAVED else HALF
    at = head[:, None] * WIDTH + column[None, :] * step
    first = tl.load(x + token * stride + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + token * stride + at + apart, mask=inside, other=0.0).to(tl.float32)
    to = out + token * heads * WIDTH + at
    tl.store(to, (first * cos - second * sin).to(out.dtype.element_ty), mask=inside)
    tl.store(to + apart, (second * cos + first * sin).to(out.dtype.element_ty), mask=inside)
    if COPIED:
        rest = 2 * HALF + tl.arange(0, COPIED)
        behind = (head < heads)[:, None] & (rest < WIDTH)[None, :]
        at = head[:, None] * WIDTH + rest[None, :]
        tl.store(out + token * heads * WIDTH + at, tl.load(x + token * stride + at, mask=behind), mask=behind)


# --- SwiGLU ----------------------------------------------------------------------------------------------------------


def swiglu(x: Tensor) -> Tensor:
    """Return silu(gate) * up [..., F] of ``x`` [..., 2 F], gate first."""
    x = x.contiguous()
    width = x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    rows = out.numel() // width
    if rows:
        _swiglu[(rows, triton.cdiv(width, TILE))](x, out, WIDTH=width, BLOCK=TILE)
    return out


def swiglu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of ``x`` [..., 2 F] from that of :func:`swiglu`'s result [..., F]."""
    gradient = gradient.contiguous()
    dx = torch.empty_like(x)
    width = x.shape[-1] // 2
    _swiglu_backward[(gradient.numel() // width, triton.cdiv(width, TILE))](gradient, x, dx, WIDTH=width, BLOCK=TILE)
    return dx


@triton.jit
def _swiglu(x, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(x + row * 2 * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * WIDTH + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(gradient, x, dx, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = row * 2 * WIDTH + column
    gate = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gradient + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    of_gate = g * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(dx + at, of_gate.to(dx.dtype.element_ty), mask=inside)
    tl.store(dx + at + WIDTH, (g * gate * sigmoid).to(dx.dtype.element_ty), mask=inside)
