"""Experts that every token has, beside those that are chosen: how much of their output a token gets."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import pad

from miles_spmd.invariant.expert_activation import sigmoid
from miles_spmd.invariant.linear import linear

_ROWS = 16  # of a weight, with fewer of which products are computed by other kernels


def gate_scores(hidden: Tensor, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor] = linear) -> Tensor:
    """Return ``sigmoid(hidden @ weight.T)``, [..., 1] in the dtype of ``hidden`` [..., H]; ``weight`` [1, H].

    The trainer's ``product`` is one with a gradient. The shared output is multiplied by the result, rounded to the same
    dtype and added to the routed output.
    """
    logits = product(hidden, pad(weight, (0, 0, 0, _ROWS - 1)))[..., :1]
    return sigmoid(logits.float()).to(hidden.dtype)
