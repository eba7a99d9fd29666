"""Per-token losses. Pure tensor functions: no group, no rank, no reduction; weights come from the controller.

Shape suffix: T tokens of a packed micro-batch on this rank (only those that the trainer scores).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from miles_spmd.algorithms.kl import kl_estimate
from miles_spmd.config.schema import Algorithm

# exp() of a log-ratio beyond this has left anything a clipped objective can use; the bound keeps fp32 finite
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class TokenBatch:
    """What the controller said of each token, fp32 [T]. ``old_log_probs`` None: the current policy, detached."""

    loss_weights: Tensor
    advantages: Tensor | None = None
    rollout_log_probs: Tensor | None = None
    old_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None


class LossFunction(Protocol):
    """``differentiates_entropy`` tells the trainer whether entropy needs a graph."""

    differentiates_entropy: bool

    def __call__(self, log_probs: Tensor, entropy: Tensor, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each token, fp32 [T], and scalar sums over trained tokens for the metrics.

        ``log_probs`` and ``entropy`` are fp32 [T], of softmax(logits / temperature), with gradient.
        """


@dataclass(frozen=True)
class PolicyLoss:
    """Clipped policy gradient with optional dual clip, entropy bonus and KL term.

    max(-ratio A, -clip(ratio, 1 - eps_clip, 1 + eps_clip_high) A), bounded by -eps_clip_c A where A < 0.
    Sources: PPO (arXiv 1707.06347) eq. 7, DAPO's asymmetric clip (arXiv 2503.14476), dual clip (arXiv 1912.09729).
    """

    algorithm: Algorithm

    @property
    def differentiates_entropy(self) -> bool:
        return self.algorithm.entropy_coef != 0

    def __call__(self, log_probs: Tensor, entropy: Tensor, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        a = self.algorithm
        if tokens.advantages is None:
            raise ValueError("policy loss needs advantages")
        old_log_probs = log_probs.detach() if tokens.old_log_probs is None else tokens.old_log_probs
        log_ratio = log_probs - old_log_probs
        policy, clipped = clipped_policy_loss(
            log_ratio,
            tokens.advantages,
            a.eps_clip,
            a.eps_clip if a.eps_clip_high is None else a.eps_clip_high,
            a.eps_clip_c,
        )
        loss = policy - a.entropy_coef * entropy
        trained = tokens.loss_weights != 0
        sums = {
            "tokens": trained.sum(),
            "pg_loss": (tokens.loss_weights * policy).sum(),
            "pg_clipfrac": (clipped & trained).sum(),
            "ppo_kl": torch.where(trained, -log_ratio, 0.0).sum(),
            "entropy": torch.where(trained, entropy, 0.0).sum(),
        }
        if tokens.ref_log_probs is not None:
            kl = kl_estimate(log_probs, tokens.ref_log_probs, a.kl_loss_type)
            loss = loss + a.kl_loss_coef * kl
            sums["kl"] = torch.where(trained, kl, 0.0).sum()
        return loss, {name: value.detach() for name, value in sums.items()}


def clipped_policy_loss(
    log_ratio: Tensor, advantages: Tensor, eps_low: float, eps_high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """Loss [T] and whether the clipped branch was the larger one [T, bool]."""
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1 - eps_low, 1 + eps_high) * advantages
    loss = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss, clipped > unclipped


@dataclass(frozen=True)
class SupervisedLoss:
    """Negative log-likelihood of each trained token."""

    differentiates_entropy: bool = False

    def __call__(self, log_probs: Tensor, entropy: Tensor, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        trained = tokens.loss_weights != 0
        return -log_probs, {"tokens": trained.sum(), "entropy": torch.where(trained, entropy, 0.0).sum().detach()}


def make_loss(mode: str, algorithm: Algorithm) -> LossFunction:
    """The loss of a run's ``mode`` ("rl" or "sft")."""
    return SupervisedLoss() if mode == "sft" else PolicyLoss(algorithm)
