"""What lies between an expert's two layers, and the biases of both. SwiGLU by the kernels of
:mod:`miles_spmd.invariant.expert_kernels`; other forms in torch, in fp32 with one rounding.

Rows come sorted by expert. With F the width of an expert, its first layer returns 2 F numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from miles_spmd.invariant.expert_kernels import swiglu, swiglu_backward
from miles_spmd.models.blocks.experts import SWIGLU, Experts

_VECTOR = 64  # a multiple of the elements that a CPU computes at once


class Biases(NamedTuple):
    """The biases of a rank's E experts, in their order."""

    gate_up: Tensor  # [E, 2 F], in the order of the rows of the first layer's weight
    down: Tensor | None  # [E, H]; None where another rank adds it


def sigmoid(x: Tensor) -> Tensor:
    """Return the sigmoid of ``x``, fp32 [..., N].

    On a CPU torch computes the last elements of a tensor, which do not fill a vector, by another function. Here no row
    has such elements.
    """
    width = x.shape[-1]
    if x.is_cuda or width % _VECTOR == 0:
        return x.contiguous().sigmoid()
    return pad(x, (0, -width % _VECTOR)).sigmoid()[..., :width]


def owners(ends: Tensor, rows: int) -> Tensor:
    """Return the expert of each of ``rows`` rows, int64 [rows], from the ends of the experts' rows, int32 [E]. Rows
    behind the last expert's are given to it."""
    numbers = torch.arange(rows, dtype=ends.dtype, device=ends.device)
    return torch.searchsorted(ends, numbers, right=True).clamp_(max=len(ends) - 1)


def activate(gate_up: Tensor, weights: Tensor, form: Experts = SWIGLU, bias: Tensor | None = None) -> Tensor:
    """Return the activation of ``gate_up`` [rows, 2 F] times ``weights`` fp32 [rows]: [rows, F]. ``bias`` [rows, 2 F]
    is added first."""
    if form == SWIGLU:
        return swiglu(gate_up, weights)
    gate, up, alpha = _parts(gate_up, form, bias)
    return (gate * sigmoid(alpha * gate) * up * weights[:, None]).to(gate_up.dtype)


def activate_backward(
    gate_up: Tensor, weights: Tensor, gradient: Tensor, form: Experts = SWIGLU, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``gate_up``, which is that of ``bias``, too, and of ``weights`` from that of
    :func:`activate`'s result, and the result itself."""
    if form == SWIGLU:
        return swiglu_backward(gate_up, weights, gradient)
    gate, up, alpha = _parts(gate_up, form, bias)
    g, s, weight = gradient.float(), (alpha * gate).sigmoid(), weights[:, None]
    glu = gate * s
    of_up, of_gate = g * weight * glu, g * weight * up * s * (1 + alpha * gate * (1 - s))
    if form.activation is not None:  # numbers beyond the limit have no gradient
        raw_gate, raw_up = _split(_biased(gate_up, bias), form)
        limit = form.activation.limit
        of_gate, of_up = of_gate.where(raw_gate <= limit, 0), of_up.where(raw_up.abs() <= limit, 0)
    both = torch.stack((of_gate, of_up), -1).flatten(1) if form.interleaved else torch.cat((of_gate, of_up), 1)
    return both.to(gate_up.dtype), (g * glu * up).sum(1), (gate * sigmoid(alpha * gate) * up * weight).to(gate_up.dtype)


def add_down_bias(rows: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """Return ``rows`` [rows, H] plus ``weights`` fp32 [rows] times ``bias`` [rows, H]."""
    return (rows.float() + weights[:, None] * bias.float()).to(rows.dtype)


def _parts(gate_up: Tensor, form: Experts, bias: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """Return gate and the factor of it that up is, fp32 [rows, F], and the factor of gate inside the sigmoid."""
    gate, up = _split(_biased(gate_up, bias), form)
    if form.activation is None:
        return gate, up, 1.0
    alpha, limit = form.activation.alpha, form.activation.limit
    return gate.clamp(max=limit), up.clamp(-limit, limit) + 1, alpha


def _split(gate_up: Tensor, form: Experts) -> tuple[Tensor, Tensor]:
    return (gate_up[:, ::2], gate_up[:, 1::2]) if form.interleaved else gate_up.tensor_split(2, 1)  # type: ignore[return-value]


def _biased(gate_up: Tensor, bias: Tensor | None) -> Tensor:
    return gate_up.float() if bias is None else gate_up.float() + bias.float()
