"""Mixture of experts under the local layer spec: all experts of a rank in one grouped matrix product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from miles_spmd.invariant.expert_kernels import gather_sum, swiglu, swiglu_backward, top_k
from miles_spmd.invariant.experts import RowGroups, grouped, has_kernel, places_of_partial_sums
from miles_spmd.invariant.linear import tree_sum
from miles_spmd.training.invariant_layers import multiply
from miles_spmd.training.megatron_config import NetworkConfig

ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class Router(TopKRouter):
    """Computes logits in ``moe_router_dtype``, by default the model's dtype, and probabilities in fp32, as engines
    do."""

    def __init__(self, config: NetworkConfig, **options: Any) -> None:
        super().__init__(config, **options)
        if config.invariant:
            self.router_replay = SharedTopK()  # where Megatron asks for the experts to choose

    def gating(self, hidden: Tensor) -> Tensor:
        if self.config.invariant:
            return multiply(hidden, self.weight).float()
        dtype = ROUTER_DTYPES.get(self.config.moe_router_dtype, hidden.dtype)
        return F.linear(hidden.to(dtype), self.weight.to(dtype)).float()


class SharedTopK:
    """Chooses experts as an engine does that computes with :mod:`miles_spmd.invariant`.

    Stands in for Megatron's replay of the experts of an earlier forward pass.
    """

    def get_replay_topk(self, scores: Tensor, k: int, *_: Any) -> tuple[Tensor, Tensor]:
        experts = top_k(scores.detach(), k)[1]
        return scores.gather(1, experts), experts


class Experts(MegatronModule):
    """A rank's SwiGLU experts, one stack for each of their two layers; a token's weight scales what lies between.

    Rows come sorted by expert. With tensor parallelism each rank has part of every expert's width, and its outputs are
    partial sums.
    """

    def __init__(
        self, count: int, config: TransformerConfig, *, pg_collection: ProcessGroupCollection, name: str | None = None
    ) -> None:
        super().__init__(config=config)
        width = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()  # type: ignore[operator]
        self.gate_up = self._parameter(count, 2, width, config.hidden_size)
        self.down = self._parameter(count, config.hidden_size, width)

    def _parameter(self, *shape: int) -> torch.nn.Parameter:
        device = None if self.config.use_cpu_initialization else torch.cuda.current_device()
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=self.config.params_dtype, device=device))
        # or Megatron would take it for a copy, and count its gradient in the norm on one rank only
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        return parameter

    def forward(self, rows: Tensor, rows_per_expert: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        """Return [rows, hidden] from ``rows`` [rows, hidden], ``rows_per_expert`` int [experts] and ``weights`` fp32
        [rows]; and None for Megatron's bias."""
        groups = RowGroups(rows_per_expert.tolist(), rows_per_expert.cumsum(0, dtype=torch.int32).to(rows.device))
        return ExpertsFunction.apply(rows, weights, self.gate_up, self.down, groups), None


class ExpertsFunction(torch.autograd.Function):
    """``down(swiglu(gate_up(rows)) * weights)``. Saves the output of ``gate_up`` only; the backward pass recomputes
    what follows from it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, groups: RowGroups) -> Tensor:
        wide = grouped(rows, gate_up.flatten(1, 2).mT, groups)
        ctx.save_for_backward(rows, weights, gate_up, down, wide)
        ctx.groups = groups
        return grouped(swiglu(wide, weights), down.mT, groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, weights, gate_up, down, wide = ctx.saved_tensors
        gradient, groups = gradient.contiguous(), ctx.groups
        grad_wide, grad_weights, inner = swiglu_backward(wide, weights, grouped(gradient, down, groups))
        return (
            grouped(grad_wide, gate_up.flatten(1, 2), groups),
            grad_weights,
            _grouped_outer(grad_wide, rows, groups).view_as(gate_up),
            _grouped_outer(gradient, inner, groups),
            None,
        )


def _grouped_outer(left: Tensor, right: Tensor, groups: RowGroups) -> Tensor:
    """Return each group's ``left.T @ right``: [groups, a, b] from [rows, a] and [rows, b]; zeros where it has no
    rows."""
    if has_kernel(left, left.shape[1], right.shape[1]):
        return F.grouped_mm(left.T, right, offs=groups.ends)
    out = left.new_empty(len(groups.counts), left.shape[1], right.shape[1])
    for a, b, place in zip(left.split(groups.counts), right.split(groups.counts), out):
        torch.mm(a.T, b, out=place)
    return out


class Dispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's dispatcher with another first and last step.

    Megatron's last step sums a token's rows in the order in which threads happen to finish, in the dtype of the rows;
    here the order is fixed and the sum is in fp32. The first step is its counterpart in the backward pass.
    """

    def dispatch_preprocess(self, hidden: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Return a row for every expert of every token, sorted by expert, then by token; and the weight of each."""
        self.hidden_shape, self.probs = hidden.shape, probs
        counts = self.preprocess(routing_map)
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", counts)
        k = self.config.moe_router_topk
        # k experts of every token, token by token; the size is known, so the host need not wait for a count
        chosen = routing_map.nonzero_static(size=len(routing_map) * k)[:, 1]
        order = chosen.argsort(stable=True)
        self._tokens = order // k
        # the inverse of ``order``: in which row each of a token's experts has it
        self._places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        self._places, chosen = self._places.view(-1, k), chosen.view(-1, k)
        self._partial_sums = places_of_partial_sums(
            self._places, chosen, routing_map.shape[1], self.config.expert_partial_sums
        )
        weights = probs.gather(1, chosen).view(-1).index_select(0, order)
        return _Spread.apply(hidden.view(-1, hidden.shape[-1]), self._tokens, self._places), weights

    def dispatch_postprocess(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.ep_size * self.tp_size > 1:
            return super().dispatch_postprocess(rows, weights)
        for point in ("before_permutation_2", "before_finish"):  # Megatron waits for the counts at one of them
            self._maybe_dtoh_and_synchronize(point)
        return rows, self.tokens_per_expert, weights  # one rank has all experts: rows are in order already

    def combine_preprocess(self, rows: Tensor) -> Tensor:
        return super().combine_preprocess(rows) if self.ep_size * self.tp_size > 1 else rows

    def combine_postprocess(self, rows: Tensor) -> Tensor:
        return _Collect.apply(rows, self._tokens, *self._partial_sums).view(self.hidden_shape)


class _Spread(torch.autograd.Function):
    """Rows from tokens: row r is token ``tokens[r]``, and ``places[t]`` are the rows of token t. The backward pass sums
    a token's rows in the order of ``places``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return hidden.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gather_sum(gradient.contiguous(), *ctx.saved_tensors), None, None


class _Collect(torch.autograd.Function):
    """Tokens from rows: one sum of each token's rows for every ``places``, these combined by :func:`tree_sum`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, tokens: Tensor, *places: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.partial_sums, rows = len(places), rows.contiguous()
        return tree_sum([gather_sum(rows, own) for own in places])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return gradient.index_select(0, *ctx.saved_tensors), *[None] * (1 + ctx.partial_sums)


class MoE(MoELayer):
    """A layer's experts with the router before them."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        groups = get_default_pg_collection()
        super().__init__(config, MoESubmodules(experts=Experts, router=Router), pg_collection=groups)
        self.token_dispatcher = Dispatcher(self.num_local_experts, self.local_expert_indices, config, groups)
