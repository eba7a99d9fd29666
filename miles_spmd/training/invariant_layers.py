"""Megatron's linears and activation, with the forward passes of :mod:`miles_spmd.invariant`; and the gradients of
weights, which are added to their buffer by the matrix product that computes them."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, layers
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from miles_spmd.invariant.linear import linear, tree_sum
from miles_spmd.invariant.operators import geglu, swiglu
from miles_spmd.models.blocks.mlp import Activation
from miles_spmd.training.log_probs import add_product


class Gated(MegatronModule):
    """:func:`~miles_spmd.invariant.operators.swiglu`, or geglu, as Megatron's kind of module: a checkpoint asks even a
    module without parameters for its state."""

    def __init__(self, config: TransformerConfig, activation: Activation) -> None:
        super().__init__(config)
        self.operator = {"silu": swiglu, "gelu_tanh": geglu}[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(x)


class _Linear(layers.LinearWithGradAccumulationAndAsyncCommunication):
    """Megatron's function with our matrix product in the forward pass.

    The forward pass saves what Megatron's own would, because the backward pass is Megatron's.
    """

    @staticmethod
    @layers.custom_fwd
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, partial_sums: int, options: dict[str, Any]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        for name, value in options.items():
            setattr(ctx, name, value)
        ctx.use_bias = bias is not None
        ctx.main_grad = getattr(weight, "main_grad", None) if ctx.gradient_accumulation_fusion else None
        x = gather_from_sequence_parallel_region(x, group=ctx.tp_group) if ctx.sequence_parallel else x
        return linear(x, weight, bias, partial_sums)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *layers.LinearWithGradAccumulationAndAsyncCommunication.backward(ctx, gradient)[:3], None, None


# of Megatron's function, by the names by which Megatron gives them and its backward pass reads them
_OPTIONS = {
    **dict.fromkeys(("gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel"), False),
    **dict.fromkeys(("grad_output_buffer", "wgrad_deferral_limit", "tp_group"), None),
    "gtp_remat_size": 1,  # weights are whole
}


def multiply(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, partial_sums: int = 1, **options: Any
) -> Tensor:
    """Return ``input`` [..., K] times ``weight`` [N, K] transposed, plus ``bias``, with a gradient.

    ``partial_sums`` is :func:`linear`'s; the others are those of ``_OPTIONS``.
    """
    return _Linear.apply(input, weight, bias, partial_sums, _OPTIONS | options)


class InvariantColumnParallelLinear(layers.ColumnParallelLinear):
    _forward_impl = staticmethod(multiply)


class InvariantRowParallelLinear(layers.RowParallelLinear):
    """Combines the configured number of partial sums in one tree over those of all ranks."""

    def _forward_impl(self, *args: Any, **kwargs: Any) -> Tensor:
        return multiply(*args, **kwargs, partial_sums=self.config.partial_sums // self.tp_group.size())

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        if self.tp_group.size() <= 2:  # a sum of two numbers has one order, also in Megatron's all-reduce
            return super().forward(x)
        product = self._forward_impl(x, self.weight, gradient_accumulation_fusion=self.gradient_accumulation_fusion)
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


# With ``gradient_accumulation_fusion`` Megatron's linears call Apex's extension, in whose place this module stands.
wgrad_gemm_accum_fp32 = wgrad_gemm_accum_fp16 = add_product  # Apex's names
layers.fused_weight_gradient_mlp_cuda = sys.modules[__name__]
layers._grad_accum_fusion_available = True
