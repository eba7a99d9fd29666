"""What experts need beside matrix products: top-k, their activation, and bringing rows to experts and back to tokens.

Each result depends on its own row alone and is summed in one order, in fp32, so it is bitwise equal among other rows
and in another run. Triton on a GPU, the same formulas in torch elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


def top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of every row in descending order, fp32 [T, k], and their columns, int64 [T, k].

    ``values`` [T, E]. Of equal values, of which bf16 routers have many, the first columns are taken (on a CPU those of
    ``torch.topk``).
    """
    if not values.is_cuda:
        return values.float().topk(k, dim=1)
    rows, width = values.shape
    values = values.contiguous()
    best, where = values.new_empty((rows, k), dtype=torch.float32), values.new_empty((rows, k), dtype=torch.int64)
    if rows:
        _top_k[(rows,)](values, best, where, width, K=k, BLOCK=triton.next_power_of_2(width))
    return best, where


class Arranged(NamedTuple):
    """T tokens with k of E experts: their T k rows sorted by expert, then by token."""

    tokens: Tensor  # int64 [T k], the token of each row
    weights: Tensor  # fp32 [T k], the weight of each row
    places: Tensor  # int64 [T, k], the rows of each token, ascending; -1 for experts of other ranks, which come first
    ends: Tensor  # int32 [E], one past the last row of each expert


def arrange(experts: Tensor, weights: Tensor, count: int) -> Arranged:
    """Return the rows of ``experts`` int [T, k] with ``weights`` fp32 [T, k], where this rank has ``count`` experts.

    An expert below 0 belongs to another rank and has no row here. As many rows as that are left over behind the others;
    their weights are undefined, their tokens valid but without meaning.
    """
    k, flat = experts.shape[1], experts.flatten()
    if not flat.is_cuda:
        owners, order = torch.where(flat < 0, count, flat).sort(stable=True)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).where(flat >= 0, -1)
        ends = torch.searchsorted(owners, torch.arange(count, dtype=owners.dtype), right=True, out_int32=True)
        return Arranged(order // k, weights.flatten()[order], places.view_as(experts).sort(1).values, ends)
    arranged = Arranged(
        torch.empty_like(flat, dtype=torch.int64),
        torch.empty_like(weights).view(-1),
        torch.full_like(experts, -1, dtype=torch.int64),
        torch.empty(count, dtype=torch.int32, device=flat.device),
    )
    _arrange[(count,)](flat, weights.contiguous(), *arranged, len(flat), count, K=k, BLOCK=1024)
    return arranged


def swiglu(gate_up: Tensor, weights: Tensor) -> Tensor:
    """Return ``silu(gate) * up * weight`` [rows, width] of ``gate_up`` [rows, 2 x width] (gates, then ups) and
    ``weights`` fp32 [rows], computed in fp32."""
    rows, width = len(gate_up), gate_up.shape[1] // 2
    if not gate_up.is_cuda:
        gate, up = gate_up.float().chunk(2, 1)
        return (F.silu(gate) * up * weights[:, None]).to(gate_up.dtype)
    out = gate_up.new_empty(rows, width)
    if rows:
        _swiglu[(rows,)](gate_up, weights, out, width, BLOCK=triton.next_power_of_2(width))
    return out


def swiglu_backward(gate_up: Tensor, weights: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``gate_up`` and of ``weights`` from that of :func:`swiglu`'s result, and the result
    itself, which the gradient of the second layer's weight needs again."""
    rows, width = gradient.shape
    if not gate_up.is_cuda:
        (gate, up), g = gate_up.float().chunk(2, 1), gradient.float()
        sigmoid = gate.sigmoid()
        silu, weight = gate * sigmoid, weights[:, None]
        grad_gate = g * weight * up * (sigmoid + silu * (1 - sigmoid))
        grad_gate_up = torch.cat((grad_gate, g * weight * silu), 1).to(gate_up.dtype)
        return grad_gate_up, (g * silu * up).sum(1), (silu * up * weight).to(gate_up.dtype)
    grad_gate_up, grad_weights, out = torch.empty_like(gate_up), torch.empty_like(weights), torch.empty_like(gradient)
    if rows:
        _swiglu_backward[(rows,)](
            gate_up, weights, gradient, grad_gate_up, grad_weights, out, width, BLOCK=triton.next_power_of_2(width)
        )
    return grad_gate_up, grad_weights, out


def gather_sum(rows: Tensor, places: Tensor) -> Tensor:
    """Return the sum of ``rows[places[t, 0]], rows[places[t, 1]], ...`` for every t, in this order and in fp32.

    [T, width] from [rows, width] and int64 [T, k]. Places below 0 are left out.
    """
    count, k = places.shape
    if not rows.is_cuda:
        total = rows.new_zeros((count, rows.shape[1]), dtype=torch.float32)
        for place in places.T:
            total += rows.index_select(0, place.clamp(min=0)).where((place >= 0)[:, None], 0)
        return total.to(rows.dtype)
    width = rows.shape[1]
    out = rows.new_empty(count, width)
    if count:
        block = min(1024, triton.next_power_of_2(width))
        _gather_sum[(count, triton.cdiv(width, block))](rows, places, out, width, K=k, BLOCK=block)
    return out


@triton.jit
def _top_k(values, best, where, width, K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """NaN counts as -inf, so that every row has k largest values."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(values + row * width + column, mask=column < width, other=0.0).to(tl.float32)
    value = tl.where(value == value, value, float("-inf"))
    left = column < width
    for i in tl.static_range(K):
        largest = tl.max(tl.where(left, value, float("-inf")))
        first = tl.min(tl.where(left & (value == largest), column, BLOCK))
        tl.store(best + row * K + i, largest)
        tl.store(where + row * K + i, first.to(tl.int64))
        left = left & (column != first)


@triton.jit(do_not_specialize=["rows"])  # their number depends on the batch
def _arrange(  # type: ignore[no-untyped-def]
    flat, weights, tokens, sorted_weights, places, ends, rows, count, K: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per expert: it counts the rows of experts before it, which gives its first place, then places its
    own. Rows that are left over get token 0."""
    expert = tl.program_id(0)
    offset = tl.arange(0, BLOCK)
    place = 0
    for start in range(0, rows, BLOCK):
        other = tl.load(flat + start + offset, mask=start + offset < rows, other=-1)
        place += tl.sum(((other >= 0) & (other < expert)).to(tl.int32))
    for start in range(0, rows, BLOCK):
        row = start + offset
        owner = tl.load(flat + row, mask=row < rows, other=-1)
        own = (owner == expert).to(tl.int32)
        # The running count keeps rows in the order of tokens. No atomics: their order would differ from run to run.
        to, token = place + tl.cumsum(own) - own, row // K
        rank = tl.zeros((BLOCK,), tl.int32)  # of this expert among its token's; -1 of other ranks' experts come first
        for i in tl.static_range(K):
            sibling = tl.load(flat + token * K + i, mask=own != 0, other=0)
            rank += (sibling < expert).to(tl.int32)
        tl.store(tokens + to, token.to(tl.int64), mask=own != 0)
        tl.store(sorted_weights + to, tl.load(weights + row, mask=own != 0), mask=own != 0)
        tl.store(places + token * K + rank, to.to(tl.int64), mask=own != 0)
        place += tl.sum(own)
    tl.store(ends + expert, place)
    if expert == count - 1:
        for start in range(place, rows, BLOCK):
            tl.store(tokens + start + offset, tl.zeros((BLOCK,), tl.int64), mask=start + offset < rows)


@triton.jit
def _swiglu(gate_up, weights, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weights + row)
    tl.store(out + row * width + column, gate * tl.sigmoid(gate) * up * weight, mask=inside)


@triton.jit
def _swiglu_backward(  # type: ignore[no-untyped-def]
    gate_up, weights, gradient, grad_gate_up, grad_weights, out, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gradient + row * width + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weights + row)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    slope = sigmoid + silu * (1 - sigmoid)
    tl.store(grad_gate_up + row * 2 * width + column, g * weight * up * slope, mask=inside)
    tl.store(grad_gate_up + row * 2 * width + width + column, g * weight * silu, mask=inside)
    tl.store(grad_weights + row, tl.sum(g * silu * up))
    tl.store(out + row * width + column, silu * up * weight, mask=inside)


@triton.jit
def _gather_sum(rows, places, out, width, K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(K):
        place = tl.load(places + token * K + i)
        total += tl.load(rows + place * width + column, mask=inside & (place >= 0), other=0.0).to(tl.float32)
    tl.store(out + token * width + column, total, mask=inside)
