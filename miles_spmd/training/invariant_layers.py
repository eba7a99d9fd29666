"""Megatron's linears and activation, with the forward passes of :mod:`miles_spmd.invariant`."""

from __future__ import annotations

from typing import Any

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

from miles_spmd.invariant.linear import linear
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
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.main_grad = getattr(weight, "main_grad", None) if gradient_accumulation_fusion else None
        ctx.use_bias, ctx.gradient_accumulation_fusion = bias is not None, gradient_accumulation_fusion
        ctx.allreduce_dgrad, ctx.sequence_parallel, ctx.tp_group = allreduce_dgrad, sequence_parallel, tp_group
        ctx.grad_output_buffer, ctx.wgrad_deferral_limit = grad_output_buffer, wgrad_deferral_limit
        return linear(gather_from_sequence_parallel_region(x, group=tp_group) if sequence_parallel else x, weight, bias)


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
) -> Tensor:
    """By the names that Megatron gives its arguments."""
    fused, summed, scattered = gradient_accumulation_fusion, allreduce_dgrad, sequence_parallel
    deferred = grad_output_buffer, wgrad_deferral_limit
    return _Linear.apply(input, weight, bias, fused, summed, scattered, *deferred, tp_group)


class InvariantColumnParallelLinear(ColumnParallelLinear):
    def _forward_impl(self, *args: Any, **kwargs: Any) -> Tensor:
        return multiply(*args, **kwargs)


class InvariantRowParallelLinear(RowParallelLinear):
    def _forward_impl(self, *args: Any, **kwargs: Any) -> Tensor:
        return multiply(*args, **kwargs)
