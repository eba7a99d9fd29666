"""What log-probs, entropy and their gradient need of a softmax, in tensor operations.

With v = logit / temperature, z = v - peak. Logits are scaled before the peak is subtracted, as engines do it. Numbers
are fp32, those of float64 logits float64. Shape suffixes as in :mod:`miles_spmd.training.log_probs`.
"""

from __future__ import annotations

import torch
from torch import Tensor

CUT_OFF = -1e4  # in place of a logit that is cut: exp is 0, as of -inf, but 0 times it is not NaN


def measure(logits_RV: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return every row's peak of v [R, 1], and its sums of exp(z) and of z exp(z), [R] each.

    Overwrites logits that are fp32 or float64.
    """
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
    entropy_and_grad: tuple[Tensor, Tensor] | None = None,
    threshold_R1: Tensor | None = None,
) -> Tensor:
    """Return the gradient of the logits, which are overwritten.

    d log p_y / d v = onehot(y) - p;  d H / d v = -p (log p + H).

    ``total``: sum of exp(z) over the whole vocabulary. ``column``: the target's, below 0 or from V on where it is
    another rank's. ``grad``: gradient of the target's log-prob. ``entropy_and_grad``: the row's entropy and its
    gradient, [R, 1] each; None: the entropy has no gradient. ``threshold``: of z, for :func:`cut`; None: no token is
    cut.
    """
    z_RV = scaled(logits_RV, temperature).sub_(peak_R1)
    if threshold_R1 is not None:
        cut(z_RV, threshold_R1, column_R1)
    grad_R1 = grad_R1 / temperature
    if entropy_and_grad is None:
        gradient_RV = z_RV.exp_().mul_(-grad_R1 / total_R1)
    else:
        entropy_R1, grad_entropy_R1 = entropy_and_grad
        p_RV = z_RV.exp().div_(total_R1)
        # z - log(total) is log p, so z becomes the factor of -p: (log p + H) grad_H + grad
        z_RV.add_(entropy_R1 - total_R1.log()).mul_(grad_entropy_R1 / temperature)
        gradient_RV = z_RV.add_(grad_R1).mul_(p_RV).neg_()
    # A column of another rank is clamped to one of this rank's, to which 0 is added.
    index_R1 = column_R1.clamp(0, z_RV.shape[1] - 1)
    return gradient_RV.scatter_add_(1, index_R1, torch.where(is_here(z_RV, column_R1), grad_R1, 0.0))


def scaled(logits_RV: Tensor, temperature: float) -> Tensor:
    """Return v. Logits that are fp32 or float64 are overwritten."""
    v_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    # divided by a tensor: a GPU would multiply by a number's reciprocal, which rounds differently
    return v_RV if temperature == 1.0 else v_RV.div_(v_RV.new_full((), temperature))


def sums(z_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Return every row's sums of exp(z) and of z exp(z), [R] each."""
    exp_RV = z_RV.exp()
    return exp_RV.sum(-1), exp_RV.mul_(z_RV).sum(-1)


def take(values_RV: Tensor, column_RK: Tensor) -> Tensor:
    """Return the values in the columns, [R, K]; 0 for columns of other ranks."""
    index_RK = column_RK.clamp(0, values_RV.shape[1] - 1)
    return torch.where(is_here(values_RV, column_RK), values_RV.gather(1, index_RK), 0.0)


def is_here(values_RV: Tensor, column_RK: Tensor) -> Tensor:
    """Return whether the columns are this rank's, bool [R, K]."""
    return (column_RK >= 0) & (column_RK < values_RV.shape[1])


def cut(z_RV: Tensor, threshold_R1: Tensor, column_R1: Tensor) -> None:
    """Replace what is below the threshold by CUT_OFF, in place, except for targets that are this rank's."""
    target_R1, here_R1 = take(z_RV, column_R1), is_here(z_RV, column_R1)
    z_RV.masked_fill_(z_RV < threshold_R1, CUT_OFF)
    index_R1 = column_R1.clamp(0, z_RV.shape[1] - 1)
    z_RV.scatter_(1, index_R1, torch.where(here_R1, target_R1, z_RV.gather(1, index_R1)))
