"""Mixtures of experts: which experts a token has, their products, and the sum of what they say.

A token's result depends on its own row and on nothing else: neither on how many rows an expert has, nor on where they
stand among them; and what its experts say is added up in the order of their numbers. Where engine and trainer agree on
what comes before a router, they agree on its choice, which therefore need not be recorded and replayed.

T tokens, each with k of E experts, have T k rows. These come sorted by expert, then by token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miles_spmd.invariant.expert_kernels import arrange, gather_sum, swiglu, top_k
from miles_spmd.invariant.linear import linear

ALIGNED = 8  # elements: a multiple of 16 bytes, of which grouped kernels want rows to be


class Groups(NamedTuple):
    """How many of the rows each expert has; and where its last one ends, int32, where the rows are."""

    counts: list[int]
    ends: Tensor


def choose(logits: Tensor, k: int, softmax_first: bool) -> tuple[Tensor, Tensor]:
    """The k most likely experts of every token, int64 [T, k], after their weights, fp32 [T, k]: their probabilities
    (``softmax_first``), or the softmax of their logits, float [T, E]. As the trainer's router: Megatron's, with
    :func:`~miles_spmd.invariant.expert_kernels.top_k`."""
    if softmax_first:
        return top_k(logits.float().softmax(-1), k)
    scores, experts = top_k(logits, k)
    return scores.softmax(-1), experts


def mix(hidden: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """A layer without gradients: [T, H] from [T, H], experts [T, k], fp32 [T, k], [E, 2 F, H] and [E, H, F].

    An expert below 0 is one of another rank, whose part of the sum is left out.
    """
    by_expert = arrange(experts, weights, len(down))
    unseen = has_kernel(hidden, *down.shape[1:])  # counts on the host, for which a CUDA graph could not wait
    counts = [] if unseen else by_expert.ends.diff(prepend=by_expert.ends.new_zeros(1)).tolist()
    groups = Groups(counts, by_expert.ends)
    wide = grouped(hidden.index_select(0, by_expert.tokens), gate_up.mT, groups)
    return gather_sum(grouped(swiglu(wide, by_expert.weights), down.mT, groups), by_expert.places)


def places_of_terms(places: Tensor, experts: Tensor, count: int, terms: int) -> list[Tensor]:
    """What :func:`~miles_spmd.invariant.expert_kernels.gather_sum` adds up on each of ``terms`` ranks that share
    ``count`` experts: of ``places`` [T, k] those of its ``experts`` [T, k]."""
    if terms == 1:
        return [places]
    owners = experts // (count // terms)
    return [places.where(owners == term, -1) for term in range(terms)]


def grouped(rows: Tensor, matrices: Tensor, groups: Groups) -> Tensor:
    """Each group's rows times its matrix: [rows, out] from [rows, in] and [groups, in, out]. What rows there are behind
    the last group's are left as they happen to be."""
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
    """Whether torch has one kernel for products of groups of such rows. It has two tile shapes, for few and for many
    rows of a group, and adds up over the inner dimension in one order in both."""
    return rows.is_cuda and rows.dtype is torch.bfloat16 and len(rows) > 0 and not any(s % ALIGNED for s in sizes)
