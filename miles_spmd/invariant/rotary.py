"""Rotary positions (https://arxiv.org/abs/2104.09864): pairs of numbers, D / 2 apart, are rotated by an angle that
depends on the place in the sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_spmd.invariant import kernels


def table(frequencies: Tensor, length: int) -> Tensor:
    """Return cosines, then sines, of the angles of places 0 .. ``length - 1``: fp32 [length, D]. ``frequencies``: fp32
    [D / 2], in radians per place."""
    places = torch.arange(length, dtype=torch.float32, device=frequencies.device)
    angles = torch.outer(places, frequencies)
    return torch.cat([angles.cos(), angles.sin()], -1)


def rotate(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """Return ``x`` [T, H, D] rotated by the angles of ``positions``, int64 [T]; on a GPU in fp32 with one rounding."""
    return _Rotate.apply(x, table, positions)


class _Rotate(torch.autograd.Function):
    """The backward pass is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(table, positions)
        return _rotated(x, table, positions, back=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        table, positions = ctx.saved_tensors
        return _rotated(gradient, table, positions, back=True), None, None


def _rotated(x: Tensor, table: Tensor, positions: Tensor, back: bool) -> Tensor:
    if x.is_cuda:
        return kernels.rotate(x, table, positions, back)
    cos, sin = table.index_select(0, positions)[:, None].to(x.dtype).chunk(2, -1)
    first, second = x.chunk(2, -1)
    other = sin.neg() if back else sin
    return torch.cat([first * cos - second * other, second * cos + first * other], -1)
