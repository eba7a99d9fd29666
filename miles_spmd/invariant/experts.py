"""Mixtures of experts: the choice of experts, their matrix products, and the sum of their outputs.

A token's result depends on its own row and on nothing else: neither on how many rows an expert has, nor on its row's
place among them; and the outputs of its experts are summed in the order of the experts' numbers. Where the inputs of a
router are bitwise equal in engine and trainer, so is its choice, which therefore need not be recorded and replayed.

T tokens, each with k of E experts, have T k rows. These come sorted by expert, then by token.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miles_spmd.invariant.expert_activation import Biases, activate, add_down_bias, owners, sigmoid
from miles_spmd.invariant.expert_kernels import arrange, gather_sum, top_k
from miles_spmd.invariant.linear import linear
from miles_spmd.models.blocks.experts import SWIGLU, Experts, Router

_TINY = 1e-20  # added to a sum of weights, which are all 0 where every sigmoid is
ALIGNED = 8  # elements; grouped kernels require rows of a multiple of 16 bytes


class RowGroups(NamedTuple):
    """Which rows belong to which expert: the number of rows of each, and where they end."""

    counts: list[int]  # on the host; may be empty where a kernel reads the ends
    ends: Tensor  # int32 [experts], on the rows' device


def choose(logits: Tensor, router: Router, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the weights, fp32 [T, k], and the numbers, int64 [T, k], of the chosen experts of every token, those with
    the highest scores first.

    ``logits`` [T, E]; ``bias`` fp32 [E] where the router has one, added for the choice only. Weights have a gradient
    where logits do.
    """
    softmax = router.scores == "softmax"
    if softmax and not router.softmax_first:
        scores = logits
    else:
        scores = logits.float().softmax(-1) if softmax else sigmoid(logits.float())
    ranked = scores.detach()
    if router.bias:
        ranked = ranked + bias.detach()  # type: ignore[union-attr]
    if router.groups > 1:
        ranked = _within_best_groups(ranked, router)
    weights, experts = top_k(ranked, router.per_token)
    if scores.requires_grad or router.bias:
        weights = scores.gather(1, experts).float()
    if softmax and not router.softmax_first:
        weights = weights.softmax(-1)
    if router.normalize:
        weights = weights / (_sum_in_order(weights) + _TINY)
    return (weights if router.scale == 1 else weights * router.scale), experts


def _within_best_groups(scores: Tensor, router: Router) -> Tensor:
    """Return ``scores`` [T, E] with -inf for all experts that are not in a token's best groups."""
    count, size = router.groups, router.count // router.groups
    of_groups = _sum_in_order(top_k(scores.reshape(-1, size), router.best_of_group)[0])
    best = top_k(of_groups.view(-1, count), router.groups_per_token)[1]
    chosen = torch.zeros(len(scores), count, dtype=torch.bool, device=scores.device).scatter_(1, best, True)
    return scores.masked_fill(~chosen[:, :, None].expand(-1, -1, size).reshape_as(scores), float("-inf"))


def _sum_in_order(values: Tensor) -> Tensor:
    """Return the sum of every row of ``values`` [T, n] from left to right, [T, 1]."""
    return reduce(torch.add, values.split(1, 1))


def mix(
    hidden: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    form: Experts = SWIGLU,
    biases: Biases | None = None,
) -> Tensor:
    """Return the output of a layer of experts, [T, H], without a gradient.

    ``hidden`` [T, H], ``experts`` int [T, k] and ``weights`` fp32 [T, k] of every token, ``gate_up`` [E, 2 F, H] and
    ``down`` [E, H, F]. An expert below 0 belongs to another rank; its part of the sum is left out.
    """
    by_expert = arrange(experts, weights, len(down))
    # A kernel does not read counts on the host. To fetch them would wait for the device, which a CUDA graph cannot.
    on_device = has_kernel(hidden, *down.shape[1:])
    counts = [] if on_device else by_expert.ends.diff(prepend=by_expert.ends.new_zeros(1)).tolist()
    groups = RowGroups(counts, by_expert.ends)
    rows = hidden.index_select(0, by_expert.tokens)
    return gather_sum(apply_experts(rows, by_expert.weights, gate_up, down, groups, form, biases), by_expert.places)


def apply_experts(
    rows: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    groups: RowGroups,
    form: Experts = SWIGLU,
    biases: Biases | None = None,
) -> Tensor:
    """Return the output of each row's expert times the row's weight: [rows, H] from ``rows`` [rows, H] and ``weights``
    fp32 [rows], without a gradient. ``gate_up`` and ``down`` as in :func:`mix`."""
    wide = grouped(rows, gate_up.mT, groups)
    if biases is None:
        return grouped(activate(wide, weights, form), down.mT, groups)
    owner = owners(groups.ends, len(rows))
    narrow = grouped(activate(wide, weights, form, biases.gate_up[owner]), down.mT, groups)
    return narrow if biases.down is None else add_down_bias(narrow, weights, biases.down[owner])


def places_of_partial_sums(places: Tensor, experts: Tensor, count: int, partial_sums: int) -> list[Tensor]:
    """Return the rows of each partial sum, as :func:`~miles_spmd.invariant.expert_kernels.gather_sum` takes them.

    ``partial_sums`` ranks of an engine share ``count`` experts, and each sums the rows of its own: of ``places`` [T,
    k], where the rows of ``experts`` [T, k] are, those of the other ranks become -1.
    """
    if partial_sums == 1:
        return [places]
    owners = experts // (count // partial_sums)
    return [places.where(owners == rank, -1) for rank in range(partial_sums)]


def grouped(rows: Tensor, matrices: Tensor, groups: RowGroups) -> Tensor:
    """Return each group's rows times its matrix: [rows, out] from [rows, in] and [groups, in, out].

    The result of rows behind the last group's is undefined.
    """
    if has_kernel(rows, *matrices.shape[1:]):
        return F.grouped_mm(rows, matrices, offs=groups.ends)
    out = rows.new_empty(len(rows), matrices.shape[2])
    start = 0
    for count, matrix in zip(groups.counts, matrices):
        if count:
            out[start : start + count] = linear(rows[start : start + count], matrix.mT)
        start += count
    return out


def has_kernel(rows: Tensor, *sizes: int) -> bool:
    """Return whether torch has a kernel for grouped products of such rows. It has two tile shapes, for few and for many
    rows of a group, and the reduction order over the inner dimension is the same in both."""
    return rows.is_cuda and rows.dtype is torch.bfloat16 and len(rows) > 0 and not any(s % ALIGNED for s in sizes)
