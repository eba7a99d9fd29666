"""Per-token losses, as pure functions of tensors: they reduce nothing over ranks; weights come from the controller.

Shape suffix: T tokens of a packed micro-batch on this rank (only those that the trainer scores).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from miles_spmd.algorithms.kl import MAX_LOG_RATIO, kl_estimate
from miles_spmd.algorithms.preference import PreferenceLoss, RewardModelLoss
from miles_spmd.algorithms.surrogates import SURROGATES, log_ratio, off_policy_sequences
from miles_spmd.config import AlgorithmConfig
from miles_spmd.types.token_batch import TokenBatch


class LossFunction(Protocol):
    """The loss of a policy."""

    def __call__(self, log_probs: Tensor, entropy: Tensor, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each token, fp32 [T], and sums over the trained tokens for the metrics, scalars.

        ``log_probs`` and ``entropy`` are fp32 [T], of softmax(logits / temperature); the entropy has a gradient only if
        the configuration has an ``entropy_coef``.
        """


class HeadLoss(Protocol):
    """The loss of a model whose head returns one number per token: a critic or a reward model."""

    def __call__(self, values: Tensor, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each token, fp32 [T], from the head's ``values`` [T]; and sums as LossFunction does."""


class PolicyLoss:
    """Computes policy_weights x surrogate - entropy_coef x entropy + kl_loss_coef x KL(policy || reference).

    ``loss_type`` names the surrogate. Off-policy sequence masking and ``policy_weights`` apply to the surrogate only.
    """

    def __init__(self, algorithm: AlgorithmConfig) -> None:
        self.algorithm = algorithm
        self.surrogate = SURROGATES.resolve(algorithm.surrogate)

    def __call__(self, log_probs: Tensor, entropy: Tensor, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        a = self.algorithm
        trained = tokens.trained
        sums = {"tokens": trained.sum()}
        policy, clipped = self.surrogate(log_probs, tokens, a)
        if policy.shape != log_probs.shape:
            raise ValueError(
                f"loss_type {a.surrogate!r} returned shape {list(policy.shape)}, not {list(log_probs.shape)}"
            )
        if tokens.policy_weights is not None:
            policy = tokens.policy_weights * policy
        if a.use_opsm:
            dropped = off_policy_sequences(log_probs, tokens, a.opsm_delta)
            policy = torch.where(dropped, 0.0, policy)
            sums["opsm_masked"] = (dropped & trained).sum()
        loss = policy - a.entropy_coef * entropy
        log_r = log_ratio(log_probs, tokens)
        sums |= {
            "pg_loss": _sum(trained, tokens.loss_weights * policy),
            "pg_clipfrac": (clipped & trained).sum(),
            "ppo_kl": _sum(trained, -log_r),
            "entropy": _sum(trained, entropy),
        }
        if tokens.ref_log_probs is not None:
            ratio = log_r.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() if a.use_unbiased_kl else None
            kl = kl_estimate(log_probs, tokens.ref_log_probs, a.kl_loss_type, ratio)
            loss = loss + a.kl_loss_coef * kl
            sums["kl"] = _sum(trained, kl)
        return loss, {name: value.detach() for name, value in sums.items()}


@dataclass(frozen=True)
class SupervisedLoss:
    """Computes the negative log-likelihood of each token."""

    def __call__(self, log_probs: Tensor, entropy: Tensor, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        trained = tokens.trained
        return -log_probs, {"tokens": trained.sum(), "entropy": _sum(trained, entropy).detach()}


@dataclass(frozen=True)
class ValueLoss:
    """Computes the critic's max((V - G)^2, (clip(V, V_old +- value_clip) - G)^2), where G are the ``returns``.

    Source: the reference code of PPO (openai/baselines, ppo2), but as in slime and Miles without its factor 1/2.
    """

    algorithm: AlgorithmConfig

    def __call__(self, values: Tensor, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        returns, old, clip = tokens.required("returns"), tokens.required("old_values"), self.algorithm.value_clip
        unclipped = (values - returns) ** 2
        clipped = (old + (values - old).clamp(-clip, clip) - returns) ** 2
        loss = torch.maximum(unclipped, clipped)
        trained = tokens.trained
        sums = {
            "tokens": trained.sum(),
            "value_loss": _sum(trained, tokens.loss_weights * loss),
            "value_clipfrac": ((clipped > unclipped) & trained).sum(),
        }
        return loss, {name: value.detach() for name, value in sums.items()}


def make_loss(mode: str, algorithm: AlgorithmConfig) -> LossFunction | HeadLoss:
    """Return the loss of a run's ``mode``: "rl", "sft", "dpo" or "rm". Raises ValueError for another."""
    match mode:
        case "rl":
            return PolicyLoss(algorithm)
        case "sft":
            return SupervisedLoss()
        case "dpo":
            return PreferenceLoss(algorithm)
        case "rm":
            return RewardModelLoss()
    raise ValueError(f"no loss for mode {mode!r}; known: rl, sft, dpo, rm")


def _sum(trained: Tensor, values: Tensor) -> Tensor:
    return torch.where(trained, values, 0.0).sum()
