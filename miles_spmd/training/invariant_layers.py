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

    def partial_sums(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """Return the output as ``count`` terms of a sum, those of an engine with so many ranks; of each the tokens that
        :meth:`forward` returns. ``count`` is at most the configured number of partial sums."""
        if count == 1:
            return (self(x)[0],)
        ranks = self.tp_group.size()
        own = max(1, count // ranks)  # terms of this rank
        each = self.config.partial_sums // max(count, ranks)
        options = {"gradient_accumulation_fusion": self.gradient_accumulation_fusion and own == 1}
        pairs = zip(x.chunk(own, -1), self.weight.chunk(own, 1), strict=True)
        terms = [multiply(part, weight, partial_sums=each, **options) for part, weight in pairs]
        if ranks == 1:
            return tuple(terms)
        return _Exchange.apply(self.tp_group, self.sequence_parallel, count, *terms)


class _Exchange(torch.autograd.Function):
    """``count`` terms of a sum from ``terms`` of every rank of a group, of all tokens, or with ``scatter`` of a rank's
    own. With fewer terms than ranks, neighbours combine theirs by :func:`tree_sum`."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, scatter: bool, count: int, *terms: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.scatter, ctx.own = group, scatter, len(terms)
        of_ranks = [_of_ranks(term, group, scatter) for term in terms]
        in_order = [term for of_rank in zip(*of_ranks) for term in of_rank]
        width = len(in_order) // count
        return tuple(tree_sum(in_order[i : i + width]) for i in range(0, len(in_order), width))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ranks, rank = ctx.group.size(), ctx.group.rank()
        # of every rank's term number i, the gradient of the term that it is part of
        by_term = [
            [gradients[(r * ctx.own + i) * len(gradients) // (ranks * ctx.own)] for r in range(ranks)]
            for i in range(ctx.own)
        ]
        if not ctx.scatter:
            return None, None, None, *(of_ranks[rank] for of_ranks in by_term)
        found = []
        for of_ranks in by_term:
            parts = [torch.empty_like(gradient) for gradient in of_ranks]
            dist.all_to_all(parts, [gradient.contiguous() for gradient in of_ranks], ctx.group)
            found.append(torch.cat(parts))
        return None, None, None, *found


def _of_ranks(x: Tensor, group: dist.ProcessGroup, scatter: bool) -> list[Tensor]:
    """Return every rank's ``x``, of all tokens, or with ``scatter`` of this rank's tokens."""
    of_ranks = [torch.empty_like(x[: len(x) // group.size()] if scatter else x) for _ in range(group.size())]
    if scatter:
        dist.all_to_all(of_ranks, [*x.contiguous().chunk(group.size())], group)
    else:
        dist.all_gather(of_ranks, x.contiguous(), group)
    return of_ranks


class _TreeReduce(torch.autograd.Function):
    """:func:`tree_sum` over the ranks of a group: an all-reduce, or with ``scatter`` a reduce-scatter over tokens.

    NCCL's own reductions sum in an order that depends on the number of ranks.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, scatter: bool) -> Tensor:
        ctx.group, ctx.scatter = group, scatter
        return tree_sum(_of_ranks(x, group, scatter))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gather_from_sequence_parallel_region(gradient, group=ctx.group) if ctx.scatter else gradient, None, None


# With ``gradient_accumulation_fusion`` Megatron's linears call Apex's extension, in whose place this module stands.
wgrad_gemm_accum_fp32 = wgrad_gemm_accum_fp16 = add_product  # Apex's names
layers.fused_weight_gradient_mlp_cuda = sys.modules[__name__]
layers._grad_accum_fusion_available = True
