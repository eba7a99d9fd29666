"""Log-prob of the target token and entropy of the distribution, from logits whose vocabulary is split over ranks.

Shape suffixes: S scored positions, V this rank's slice of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def log_probs_and_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    first_id: int = 0,
    group: dist.ProcessGroup | None = None,
    differentiate_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature)[target] and -sum p log p, both fp32 [S], natural log.

    ``logits`` [S, V] cover token ids ``first_id`` .. ``first_id + V - 1``; the other ranks of ``group`` hold the rest
    of the vocabulary and call this with the same ``targets`` [S] (global ids). Two all-reduces over ``group``.
    The entropy has a gradient only with ``differentiate_entropy``, which keeps one more [S, V] tensor alive.
    """
    group = group if group is not None and group.size() > 1 else None
    return _LogProbsAndEntropy.apply(logits, targets, temperature, first_id, group, differentiate_entropy)


class _LogProbsAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        temperature: float,
        first_id: int,
        group: dist.ProcessGroup | None,
        differentiate_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        peak_S1 = logits.amax(-1, keepdim=True).float()
        if group is not None:
            dist.all_reduce(peak_S1, dist.ReduceOp.MAX, group)
        z_SV = logits - peak_S1  # fp32, and before the division: what is left to divide is small and exact
        if temperature != 1.0:
            z_SV /= temperature
        column_S1 = (targets - first_id)[:, None]
        here_S1 = (column_S1 >= 0) & (column_S1 < z_SV.shape[1])
        column_S1 = column_S1.clamp(0, z_SV.shape[1] - 1)
        exp_SV = z_SV.exp()
        sums_3S = torch.stack(
            (
                exp_SV.sum(-1),
                torch.linalg.vecdot(exp_SV, z_SV),
                torch.where(here_S1, z_SV.gather(1, column_S1), 0.0).squeeze(1),
            )
        )
        if group is not None:
            dist.all_reduce(sums_3S, dist.ReduceOp.SUM, group)
        total_S, weighted_S, target_S = sums_3S
        log_total_S = total_S.log()
        log_probs_S = target_S - log_total_S
        entropy_S = log_total_S - weighted_S / total_S
        p_SV = exp_SV.div_(total_S[:, None])
        log_p_SV = z_SV.sub_(log_total_S[:, None]) if differentiate_entropy else None
        ctx.save_for_backward(p_SV, column_S1, here_S1, entropy_S, log_p_SV)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        if not differentiate_entropy:
            ctx.mark_non_differentiable(entropy_S)
        return log_probs_S, entropy_S

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """d log p_y / d z = onehot(y) - p;  d H / d z = -p (log p + H)."""
        p_SV, column_S1, here_S1, entropy_S, log_p_SV = ctx.saved_tensors
        coefficient_S1 = grad_log_probs[:, None] / ctx.temperature
        gradient_SV = p_SV * -coefficient_S1
        gradient_SV.scatter_add_(1, column_S1, torch.where(here_S1, coefficient_S1, 0.0))
        if log_p_SV is not None:
            gradient_SV -= p_SV * (log_p_SV + entropy_S[:, None]) * (grad_entropy[:, None] / ctx.temperature)
        return gradient_SV.to(ctx.dtype), None, None, None, None, None
