"""Megatron's linears and activation, with the forward passes of :mod:`miles_spmd.invariant`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from miles_spmd.invariant.linear import linear
from miles_spmd.invariant.swiglu import swiglu


class InvariantSpecProvider(LocalSpecProvider):
    def column_parallel_linear(self) -> type:
        return InvariantColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return InvariantRowParallelLinear

    def activation_func(self) -> type:
        return SwiGLU


class SwiGLU(torch.nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x)


class _Linear(torch.autograd.Function):
    """Megatron's linear over a tensor-parallel group: under sequence parallelism the input is gathered first, and its
    gradient is the sum over ranks, whole or scattered."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sums_gradient: bool,
        scattered: bool,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.sums_gradient, ctx.scattered, ctx.group = bias is not None, sums_gradient, scattered, group
        return linear(gather_from_sequence_parallel_region(x, group=group) if scattered else x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        of_x = gradient.matmul(weight)
        under_way = dist.all_reduce(of_x, group=ctx.group, async_op=True) if ctx.sums_gradient else None
        if ctx.scattered:
            x = gather_from_sequence_parallel_region(x, group=ctx.group)
            of_x = reduce_scatter_to_sequence_parallel_region(of_x, group=ctx.group)
        rows = gradient.flatten(0, -2)
        of_weight = rows.t().matmul(x.flatten(0, -2))
        if under_way is not None:
            under_way.wait()
        return of_x, of_weight, rows.sum(0) if ctx.has_bias else None, None, None, None


def _multiply(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: dist.ProcessGroup | None,
    **_: Any,
) -> Tensor:
    """By the names that Megatron gives its arguments."""
    return _Linear.apply(input, weight, bias, allreduce_dgrad, sequence_parallel, tp_group)


class InvariantColumnParallelLinear(ColumnParallelLinear):
    def _forward_impl(self, *args: Any, **kwargs: Any) -> Tensor:
        return _multiply(*args, **kwargs)


class InvariantRowParallelLinear(RowParallelLinear):
    def _forward_impl(self, *args: Any, **kwargs: Any) -> Tensor:
        return _multiply(*args, **kwargs)
