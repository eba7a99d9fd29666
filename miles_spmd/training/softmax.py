"""What log-probs, entropy and their gradient need of a softmax, in tensor operations.

Logits are scaled first, then the peak is subtracted, as engines do it. Numbers are fp32, of float64 logits float64.
Shape suffixes as in :mod:`miles_spmd.training.log_probs`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def measure(logits_RV: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row of v = logits / temperature: the peak [R, 1], and sums over z = v - peak of exp(z) and of z exp(z),
    [R] each. Overwrites logits that are fp32 or float64."""
    v_RV = scaled(logits_RV, temperature)
    peak_R1 = v_RV.amax(-1, keepdim=True)
    return peak_R1, *sums(v_RV.sub_(peak_R1))


def differentiate(
    logits_RV: Tensor,
    temperature: float,
    peak_R1: Tensor,
    total_R1: Tensor,
    column_R1: Tensor,
    grad_R1: Tensor,
    of_entropy: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The gradient of the logits, which are overwritten, given that of the log-prob of ``column`` and, with
    ``of_entropy``, the entropy and its gradient [R, 1].

    ``total`` is the sum of exp(z) over the whole vocabulary. Columns outside of 0 .. V - 1 are on other ranks.
    """
    z_RV = scaled(logits_RV, temperature).sub_(peak_R1)
    return differentiate_relative(z_RV, temperature, total_R1, column_R1, grad_R1, of_entropy)


def differentiate_relative(
    z_RV: Tensor,
    temperature: float,
    total_R1: Tensor,
    column_R1: Tensor,
    grad_R1: Tensor,
    of_entropy: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """d log p_y / d v = onehot(y) - p;  d H / d v = -p (log p + H);  in place."""
    grad_R1 = grad_R1 / temperature
    if of_entropy is None:
        gradient_RV = z_RV.exp_().mul_(-grad_R1 / total_R1)
    else:
        entropy_R1, grad_entropy_R1 = of_entropy
        p_RV = z_RV.exp().div_(total_R1)
        z_RV.add_(entropy_R1 - total_R1.log()).mul_(grad_entropy_R1 / temperature)
        gradient_RV = z_RV.add_(grad_R1).mul_(p_RV).neg_()
    index_R1 = column_R1.clamp(0, z_RV.shape[1] - 1)
    return gradient_RV.scatter_add_(1, index_R1, torch.where(is_here(z_RV, column_R1), grad_R1, 0.0))


def scaled(logits_RV: Tensor, temperature: float) -> Tensor:
    v_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    # by a tensor: of a number a GPU would multiply by the reciprocal, which rounds otherwise
    return v_RV if temperature == 1.0 else v_RV.div_(v_RV.new_full((), temperature))


def sums(z_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Of exp(z) and of z exp(z)."""
    exp_RV = z_RV.exp()
    return exp_RV.sum(-1), exp_RV.mul_(z_RV).sum(-1)


def take(values_RV: Tensor, column_RK: Tensor) -> Tensor:
    """What is in those columns; 0 for columns outside."""
    index_RK = column_RK.clamp(0, values_RV.shape[1] - 1)
    return torch.where(is_here(values_RV, column_RK), values_RV.gather(1, index_RK), 0.0)


def is_here(values_RV: Tensor, column_RK: Tensor) -> Tensor:
    return (column_RK >= 0) & (column_RK < values_RV.shape[1])
