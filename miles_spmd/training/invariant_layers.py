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
    layers,
)
from megatron.core.tensor_parallel.layers import LinearWithGradAccumulationAndAsyncCommunication
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from miles_spmd.invariant.linear import linear, tree_sum
from miles_spmd.invariant.operators import swiglu


class OwnActivationSpecProvider(LocalSpecProvider):
    def activation_func(self) -> type:
        return SwiGLU


class InvariantSpecProvider(OwnActivationSpecProvider):
    def column_parallel_linear(self) -> type:
        return InvariantColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return InvariantRowParallelLinear


class SwiGLU(MegatronModule):
    """:func:`~miles_spmd.invariant.operators.swiglu` as Megatron's kind of module: a checkpoint asks even a module
    without parameters for its state."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x)


class _Linear(LinearWithGradAccumulationAndAsyncCommunication):
    """Megatron's function with our matrix product in the forward pass.

    The forward pass saves what Megatron's own would, because the backward pass is Megatron's.
    """

    @staticmethod
    @layers.custom_fwd
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        grad_output_buffer: list[Tensor] | None,
        wgrad_deferral_limit: int | None,
        tp_group: dist.ProcessGroup | None,
        partial_sums: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.main_grad = getattr(weight, "main_grad", None) if gradient_accumulation_fusion else None
        ctx.use_bias, ctx.gradient_accumulation_fusion = bias is not None, gradient_accumulation_fusion
        ctx.allreduce_dgrad, ctx.sequence_parallel, ctx.tp_group = allreduce_dgrad, sequence_parallel, tp_group
        ctx.grad_output_buffer, ctx.wgrad_deferral_limit = grad_output_buffer, wgrad_deferral_limit
        x = gather_from_sequence_parallel_region(x, group=tp_group) if sequence_parallel else x
        return linear(x, weight, bias, partial_sums)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *LinearWithGradAccumulationAndAsyncCommunication.backward(ctx, gradient), None


def multiply(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    grad_output_buffer: list[Tensor] | None,
    tp_group: dist.ProcessGroup | None,
    wgrad_deferral_limit: int | None = None,
    partial_sums: int = 1,
) -> Tensor:
    """Return ``input`` [..., K] times ``weight`` [N, K] transposed, plus ``bias``, with a gradient.

    Arguments have the names by which Megatron gives them; ``partial_sums`` is :func:`linear`'s.
    """
    fused, summed, scattered = gradient_accumulation_fusion, allreduce_dgrad, sequence_parallel
    deferred = grad_output_buffer, wgrad_deferral_limit
    return _Linear.apply(input, weight, bias, fused, summed, scattered, *deferred, tp_group, partial_sums)


class InvariantColumnParallelLinear(ColumnParallelLinear):
    def _forward_impl(self, *args: Any, **kwargs: Any) -> Tensor:
        return multiply(*args, **kwargs)


class InvariantRowParallelLinear(RowParallelLinear):
    """Combines the configured number of partial sums in one tree over those of all ranks."""

    def _forward_impl(self, *args: Any, **kwargs: Any) -> Tensor:
        kwargs["partial_sums"] = self.config.partial_sums // self.tp_group.size()
        return multiply(*args, **kwargs)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        if self.tp_group.size() <= 2:  # a sum of two numbers has one order, also in Megatron's all-reduce
            return super().forward(x)
        fused = self.gradient_accumulation_fusion
        product = self._forward_impl(x, self.weight, None, fused, False, False, None, None)
        return _TreeReduce.apply(product, self.tp_group, self.sequence_parallel), None


class _TreeReduce(torch.autograd.Function):
    """:func:`tree_sum` over the ranks of a group: an all-reduce, or with ``scatter`` a reduce-scatter over tokens.

    NCCL's own reductions sum in an order that depends on the number of ranks.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, scatter: bool) -> Tensor:
        ctx.group, ctx.scatter = group, scatter
        of_ranks = [torch.empty_like(x[: len(x) // group.size()] if scatter else x) for _ in range(group.size())]
        if scatter:
            dist.all_to_all(of_ranks, [*x.contiguous().chunk(group.size())], group)
        else:
            dist.all_gather(of_ranks, x.contiguous(), group)
        return tree_sum(of_ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gather_from_sequence_parallel_region(gradient, group=ctx.group) if ctx.scatter else gradient, None, None
