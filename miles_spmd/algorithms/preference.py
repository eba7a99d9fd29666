"""Losses of pairs: a preferred response c and a rejected response r to the same prompt.

Both sequences of a pair are in one micro-batch. Every token gets its pair's loss, and the loss weights of a pair's
tokens sum to 1 / (pairs of the step): aggregation ``rollout_mean`` with the pair as the rollout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from miles_spmd.config import AlgorithmConfig
from miles_spmd.types.token_batch import SegmentSum, TokenBatch


@dataclass(frozen=True)
class PreferenceLoss:
    """Computes the loss named by ``preference_loss``; beta = ``dpo_beta``, sums are over the trained tokens of c and r:

    - ``dpo``: -log sigmoid(beta h), h = sum_c log(pi / pi_ref) - sum_r log(pi / pi_ref) (arXiv 2305.18290, eq. 7)
    - ``ipo``: (h - 1 / (2 beta))^2 (arXiv 2310.12036, eq. 17), with sums as there; TRL takes means
    - ``simpo``: -log sigmoid(beta h - ``simpo_gamma``), h = mean_c log pi - mean_r log pi (arXiv 2405.14734, eq. 6)
    """

    algorithm: AlgorithmConfig

    def __call__(self, log_probs: Tensor, entropy: Tensor, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        a = self.algorithm
        if a.preference_loss == "simpo":
            sequence_sum: SegmentSum = tokens.required("sequence_sum")
            score = log_probs / sequence_sum(tokens.trained.to(log_probs.dtype)).clamp(min=1)
        else:
            score = log_probs - tokens.required("ref_log_probs")
        h, chosen, rejected = _margin(score, tokens)
        if a.preference_loss == "ipo":
            loss = (h - 1 / (2 * a.dpo_beta)) ** 2
        else:
            loss = -logsigmoid(a.dpo_beta * h - (a.simpo_gamma if a.preference_loss == "simpo" else 0.0))
        sums = _sums(loss, a.dpo_beta * h, a.dpo_beta * chosen, a.dpo_beta * rejected, tokens)
        return loss, {**sums, "entropy": torch.where(tokens.trained, entropy, 0.0).sum().detach()}


@dataclass(frozen=True)
class RewardModelLoss:
    """Computes the Bradley-Terry loss, -log sigmoid(score_c - score_r), where the score of a sequence is the head's
    output on its last token, the only one that is trained. Source: InstructGPT (arXiv 2203.02155) eq. 1."""

    def __call__(self, values: Tensor, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        h, chosen, rejected = _margin(values, tokens)
        loss = -logsigmoid(h)
        return loss, _sums(loss, h, chosen, rejected, tokens)


def _margin(score: Tensor, tokens: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return score(c) - score(r), score(c) and score(r) of each token's pair, [T] each."""
    pair_sum: SegmentSum = tokens.required("pair_sum")
    preferred = tokens.required("pair_signs") > 0
    chosen = pair_sum(torch.where(tokens.trained & preferred, score, 0.0))
    rejected = pair_sum(torch.where(tokens.trained & ~preferred, score, 0.0))
    return chosen - rejected, chosen, rejected


def _sums(loss: Tensor, margin: Tensor, chosen: Tensor, rejected: Tensor, tokens: TokenBatch) -> dict[str, Tensor]:
    """Return sums weighted by the loss weights: their sum over all ranks is the mean over the step's pairs."""
    per_pair = {
        "preference_loss": loss,
        "reward_accuracy": (margin > 0).to(loss.dtype),
        "reward_margin": margin,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
    }
    weighted = {
        name: torch.where(tokens.trained, tokens.loss_weights * values, 0.0).sum().detach()
        for name, values in per_pair.items()
    }
    return {"tokens": tokens.trained.sum(), **weighted}
