"""What a step did, in numbers: computed once, on the whole batch, from what the ranks sent up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from miles_spmd.algorithms import mismatch
from miles_spmd.protocol.messages import TrainerRank
from miles_spmd.protocol.results import TrainResult
from miles_spmd.types.sample import FinishReason, Sample
from miles_spmd.types.train_sequence import TrainSequence

# sums of the losses (miles_spmd/algorithms) -> the names that users of slime and Miles know
MEANS = {
    "loss": "train/loss",
    "pg_loss": "train/pg_loss",
    "reward_accuracy": "train/reward_accuracy",
    "reward_margin": "train/reward_margin",
    "reward_chosen": "train/reward_chosen",
    "reward_rejected": "train/reward_rejected",
}
PER_TOKEN = {
    "entropy": "train/entropy_loss",
    "pg_clipfrac": "train/pg_clipfrac",
    "ppo_kl": "train/ppo_kl",
    "kl": "train/kl_loss",
    "opsm_masked": "train/opsm_masked",
    "value_clipfrac": "train/value_clipfrac",
}
OF_CRITIC = {
    "train/loss": "train/critic_loss",
    "train/grad_norm": "train/critic_grad_norm",
    "train/lr": "train/critic_lr",
    "train/skipped_steps": "train/critic_skipped_steps",
}


def rollout_metrics(groups: Sequence[Sequence[Sample]]) -> dict[str, float]:
    samples = [sample for group in groups for sample in group]
    lengths = np.asarray([len(s.response) for s in samples])
    rewards = [np.asarray([s.reward for s in group], np.float64) for group in groups]
    return {
        "rollout/raw_reward": float(np.mean([r.mean() for r in rewards])),
        "rollout/response_len": float(lengths.mean()),
        "rollout/response_len_max": float(lengths.max()),
        "rollout/truncated_ratio": float(np.mean([s.finish_reason is FinishReason.LENGTH for s in samples])),
        "rollout/zero_std_ratio": float(np.mean([np.ptp(r) == 0 for r in rewards])),
    }


def train_metrics(
    results: Sequence[TrainResult], trainers: Sequence[TrainerRank], critic: bool = False
) -> dict[str, float]:
    """Of one optimizer step: sums over the reporting ranks. Those of loss weights are means already, others become
    means over trained tokens."""
    sums: dict[str, float] = {}
    reporting = [(rank, result) for rank, result in zip(trainers, results, strict=True) if rank.reports]
    # in the order of the leaves, in which the sum is the same for every data-parallel size
    for _, result in sorted(reporting, key=lambda pair: pair[0].data_parallel_rank):
        for leaf in result.sums:
            for name, value in leaf.items():
                sums[name] = sums.get(name, 0.0) + value
    tokens = max(sums.get("tokens", 0.0), 1.0)
    metrics = {
        "train/grad_norm": results[0].grad_norm,
        "train/lr": results[0].lr,
        "train/skipped_steps": float(bool(results[0].skipped)),
    }
    metrics |= {MEANS[name]: value for name, value in sums.items() if name in MEANS}
    metrics |= {PER_TOKEN[name]: value / tokens for name, value in sums.items() if name in PER_TOKEN}
    return {OF_CRITIC.get(name, name): value for name, value in metrics.items()} if critic else metrics


def mismatch_metrics(sequences: Sequence[TrainSequence], train_log_probs: Sequence[np.ndarray]) -> dict[str, float]:
    """Engine against trainer on every trained token; see :func:`mismatch.mismatch_metrics`.

    ``train_log_probs`` come from the trainer's own forward with the weights that generated the samples.
    """
    rollout = [s.rollout_log_probs for s in sequences if s.rollout_log_probs is not None]
    masks = [(s.loss_weights != 0).astype(np.float32) for s in sequences]
    found = mismatch.mismatch_metrics(list(train_log_probs), rollout, masks)
    return {f"train/{name}": value for name, value in found.items()}


def pass_at_k(correct: Sequence[int], n: int, k: int) -> float:
    """Unbiased pass@k from ``correct`` successes of ``n`` samples per prompt: 1 - C(n - c, k) / C(n, k), averaged.

    Source: Chen et al., "Evaluating Large Language Models Trained on Code" (arXiv 2107.03374), eq. 1.
    """
    misses = [
        float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))
        if n - c >= k
        else 0.0  # the product form avoids big binomials
        for c in correct
    ]
    return 1.0 - float(np.mean(misses))
