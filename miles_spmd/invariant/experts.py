"""Mixtures of experts: the choice of experts, their matrix products, and the sum of their outputs.

A token's result depends on its own row and on nothing else: neither on how many rows an expert has, nor on its row's
place among them; and the outputs of its experts are summed in the order of the experts' numbers. Where the inputs of a
router are bitwise equal in engine and trainer, so is its choice, which therefore need not be recorded and replayed.

T tokens, each with k of E experts, have T k rows. These come sorted by expert, then by token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miles_spmd.invariant.expert_kernels import arrange, gather_sum, swiglu, top_k
from miles_spmd.invariant.linear import linear

ALIGNED = 8  # elements; grouped kernels require rows of a multiple of 16 bytes


class RowGroups(NamedTuple):
    """Which rows belong to which expert: the number of rows of each, and where they end."""

    counts: list[int]  # on the host; may be empty where a kernel reads the ends
    ends: Tensor  # int32 [experts], on the rows' device


def choose(logits: Tensor, k: int, softmax_first: bool) -> tuple[Tensor, Tensor]:
    """Return the weights, fp32 [T, k], and the numbers, int64 [T, k], of the top-k experts of every token.

    ``logits`` [T, E]. Weights are probabilities over all experts (``softmax_first``), or the softmax of the chosen
    experts' logits. The trainer's router computes the same: Megatron's, with
    :func:`~miles_spmd.invariant.expert_kernels.top_k`.
    """
    if softmax_first:
        return top_k(logits.float().softmax(-1), k)
    scores, experts = top_k(logits, k)
    return scores.softmax(-1), experts


def mix(hidden: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Return the output of a layer of experts, [T, H], without a gradient.

    ``hidden`` [T, H], ``experts`` int [T, k] and ``weights`` fp32 [T, k] of every token, ``gate_up`` [E, 2 F, H] and
    ``down`` [E, H, F]. An expert below 0 belongs to another rank; its part of the sum is left out.
    """
    by_expert = arrange(experts, weights, len(down))
    # A kernel does not read counts on the host. To fetch them would wait for the device, which a CUDA graph cannot.
    on_device = has_kernel(hidden, *down.shape[1:])
    counts = [] if on_device else by_expert.ends.diff(prepend=by_expert.ends.new_zeros(1)).tolist()
    groups = RowGroups(counts, by_expert.ends)
    wide = grouped(hidden.index_select(0, by_expert.tokens), gate_up.mT, groups)
    return gather_sum(grouped(swiglu(wide, by_expert.weights), down.mT, groups), by_expert.places)


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
