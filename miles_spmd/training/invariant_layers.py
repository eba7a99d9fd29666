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
from miles_spmd.invariant.swiglu import swiglu


class OwnActivationSpecProvider(LocalSpecProvider):
    def activation_func(self) -> type:
        return SwiGLU


class InvariantSpecProvider(OwnActivationSpecProvider):
    def column_parallel_linear(self) -> type:
        return InvariantColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return InvariantRowParallelLinear


class SwiGLU(MegatronModule):
    """Megatron's kind of module, which a checkpoint asks for its state though it has none."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x)


class _Linear(LinearWithGradAccumulationAndAsyncCommunication):
    """Megatron's, but for the product of the forward pass."""

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
        terms: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.main_grad = getattr(weight, "main_grad", None) if gradient_accumulation_fusion else None
        ctx.use_bias, ctx.gradient_accumulation_fusion = bias is not None, gradient_accumulation_fusion
        ctx.allreduce_dgrad, ctx.sequence_parallel, ctx.tp_group = allreduce_dgrad, sequence_parallel, tp_group
        ctx.grad_output_buffer, ctx.wgrad_deferral_limit = grad_output_buffer, wgrad_deferral_limit
        x = gather_from_sequence_parallel_region(x, group=tp_group) if sequence_parallel else x
        return linear(x, weight, bias, terms)

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
    terms: int = 1,
) -> Tensor:
    """By the names that Megatron gives its arguments; and :func:`linear`'s ``terms``."""
    fused, summed, scattered = gradient_accumulation_fusion, allreduce_dgrad, sequence_parallel
    deferred = grad_output_buffer, wgrad_deferral_limit
    return _Linear.apply(input, weight, bias, fused, summed, scattered, *deferred, tp_group, terms)


class InvariantColumnParallelLinear(ColumnParallelLinear):
    def _forward_impl(self, *args: Any, **kwargs: Any) -> Tensor:
        return multiply(*args, **kwargs)


class InvariantRowParallelLinear(RowParallelLinear):
    """Adds up as many terms as the configuration says, in one tree over those of all ranks."""

    def _forward_impl(self, *args: Any, **kwargs: Any) -> Tensor:
        kwargs["terms"] = self.config.sum_terms // self.tp_group.size()
        return multiply(*args, **kwargs)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        if self.tp_group.size() <= 2:  # whose sum has but one order
            return super().forward(x)
        fused = self.gradient_accumulation_fusion
        product = self._forward_impl(x, self.weight, None, fused, False, False, None, None)
        return _TreeSum.apply(product, self.tp_group, self.sequence_parallel), None


class _TreeSum(torch.autograd.Function):
    """Over the ranks; of a part of the tokens each, or of all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, scatter: bool) -> Tensor:
        ctx.group, ctx.scatter = group, scatter
        terms = [torch.empty_like(x[: len(x) // group.size()] if scatter else x) for _ in range(group.size())]
        if scatter:
            dist.all_to_all(terms, [*x.contiguous().chunk(group.size())], group)
        else:
            dist.all_gather(terms, x.contiguous(), group)
        return tree_sum(terms)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gather_from_sequence_parallel_region(gradient, group=ctx.group) if ctx.scatter else gradient, None, None
