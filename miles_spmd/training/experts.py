"""Mixture of experts under the local layer spec: all experts of a rank in one grouped matrix product, and experts that
every token has beside them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from miles_spmd.invariant.expert_activation import activate, activate_backward, add_down_bias, owners
from miles_spmd.invariant.expert_kernels import gather_sum
from miles_spmd.invariant.experts import RowGroups, grouped, has_kernel, places_of_partial_sums
from miles_spmd.invariant.linear import tree_sum
from miles_spmd.models.blocks import experts as blocks
from miles_spmd.training.megatron_config import NetworkConfig
from miles_spmd.training.router import Router
from miles_spmd.training.shared_experts import SharedExperts


class Experts(MegatronModule):
    """A rank's experts, one stack for each of their two layers; a token's weight scales what lies between.

    Rows come sorted by expert. With tensor parallelism each rank has part of every expert's width, and its outputs are
    partial sums; the bias of the second layer is part of the first rank's.
    """

    def __init__(
        self, count: int, config: NetworkConfig, *, pg_collection: ProcessGroupCollection, name: str | None = None
    ) -> None:
        super().__init__(config=config)
        group = pg_collection.expt_tp
        width = config.moe_ffn_hidden_size // group.size()  # type: ignore[operator]
        self.form, self.first = config.experts, group.rank() == 0
        gate_up = (width, 2) if self.form.interleaved else (2, width)
        self.gate_up = self._parameter(count, *gate_up, config.hidden_size)
        self.down = self._parameter(count, config.hidden_size, width)
        if self.form.bias:
            self.gate_up_bias = self._parameter(count, *gate_up)
            self.down_bias = self._parameter(count, config.hidden_size, split=False)

    def _parameter(self, *shape: int, split: bool = True) -> torch.nn.Parameter:
        device = None if self.config.use_cpu_initialization else torch.cuda.current_device()
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=self.config.params_dtype, device=device))
        # or Megatron would take it for a copy, and count its gradient in the norm on one rank only
        parameter.tensor_model_parallel = split  # type: ignore[attr-defined]
        return parameter

    def forward(self, rows: Tensor, rows_per_expert: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        """Return [rows, hidden] from ``rows`` [rows, hidden], ``rows_per_expert`` int [experts] and ``weights`` fp32
        [rows]; and None for Megatron's bias."""
        groups = RowGroups(rows_per_expert.tolist(), rows_per_expert.cumsum(0, dtype=torch.int32).to(rows.device))
        biases = (self.gate_up_bias.flatten(1), self.down_bias, self.first) if self.form.bias else ()
        return ExpertsFunction.apply(rows, weights, self.gate_up, self.down, groups, self.form, *biases), None


class ExpertsFunction(torch.autograd.Function):
    """:func:`~miles_spmd.invariant.experts.apply_experts` with a gradient. Saves the output of ``gate_up`` only; the
    backward pass recomputes what follows from it.

    ``gate_up`` [E, 2, F, H], or [E, F, 2, H] of interleaved experts. ``first``: this rank adds the bias of ``down``,
    which gets its whole gradient on every rank that shares the experts.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        groups: RowGroups,
        form: blocks.Experts = blocks.SWIGLU,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        first: bool = True,
    ) -> Tensor:
        wide = grouped(rows, gate_up.flatten(1, 2).mT, groups)
        owner = None if gate_up_bias is None else owners(groups.ends, len(rows))
        ctx.save_for_backward(rows, weights, gate_up, down, wide, owner, gate_up_bias, down_bias)
        ctx.groups, ctx.form, ctx.first = groups, form, first
        inner = activate(wide, weights, form, _of_rows(gate_up_bias, owner))
        out = grouped(inner, down.mT, groups)
        return out if down_bias is None or not first else add_down_bias(out, weights, down_bias[owner])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, weights, gate_up, down, wide, owner, gate_up_bias, down_bias = ctx.saved_tensors
        gradient, groups = gradient.contiguous(), ctx.groups
        grad_wide, grad_weights, inner = activate_backward(
            wide, weights, grouped(gradient, down, groups), ctx.form, _of_rows(gate_up_bias, owner)
        )
        grad_biases: tuple[Tensor | None, ...] = (None, None)
        if gate_up_bias is not None:
            grad_biases = (
                _sums_of_groups(grad_wide, groups, gate_up_bias.dtype),
                _sums_of_groups(gradient.float() * weights[:, None], groups, down_bias.dtype),
            )
            if ctx.first:
                grad_weights = grad_weights + (gradient.float() * down_bias[owner].float()).sum(1)
        return (
            grouped(grad_wide, gate_up.flatten(1, 2), groups),
            grad_weights,
            _grouped_outer(grad_wide, rows, groups).view_as(gate_up),
            _grouped_outer(gradient, inner, groups),
            None,
            None,
            *grad_biases,
            None,
        )


def _of_rows(bias: Tensor | None, owner: Tensor | None) -> Tensor | None:
    return None if bias is None else bias[owner]


def _sums_of_groups(rows: Tensor, groups: RowGroups, dtype: torch.dtype) -> Tensor:
    """Return the sum of each group's rows, [groups, width], summed in fp32."""
    return torch.stack([part.float().sum(0) for part in rows.split(groups.counts)]).to(dtype)


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
        return rows

    def collect(self, rows: Tensor, shared: tuple[Tensor, ...]) -> Tensor:
        """Return the sum of every token's rows, and of ``shared``, of its shape: the partial sums of experts that every
        token has, which an engine adds to its own partial sum of the others."""
        flat, places = [part.view(-1, part.shape[-1]) for part in shared], self._partial_sums
        return _Collect.apply(rows, self._tokens, len(places), *places, *flat).view(self.hidden_shape)


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
    """Tokens from rows: one sum of each token's rows for every ``places``, to which ``shared`` are added, combined by
    :func:`tree_sum`. ``count`` is the number of ``places``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, tokens: Tensor, count: int, *places_and_shared: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.given, rows = len(places_and_shared), rows.contiguous()
        ctx.count = count
        sums = [gather_sum(rows, own) for own in places_and_shared[:count]]
        for own, shared in zip(sums, places_and_shared[count:]):
            own += shared
        return tree_sum(sums)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        of_shared = [gradient] * (ctx.given - ctx.count)
        return gradient.index_select(0, *ctx.saved_tensors), None, None, *[None] * ctx.count, *of_shared


class MoE(MoELayer):
    """A layer's experts with the router before them, and shared experts beside them."""

    def __init__(self, config: NetworkConfig, **_: Any) -> None:
        groups = get_default_pg_collection()
        super().__init__(config, MoESubmodules(Experts, SharedExperts, Router), pg_collection=groups)
        self.token_dispatcher = Dispatcher(self.num_local_experts, self.local_expert_indices, config, groups)

    def postprocess(self, output: Tensor, shared_expert_output: tuple[Tensor, ...] | None) -> Tensor:
        """Megatron combines the routed experts' outputs completely before it adds the shared ones'."""
        rows = self.token_dispatcher.combine_postprocess(output)
        return self.token_dispatcher.collect(rows, shared_expert_output or ())
