"""Held-out sets: how responses to their prompts are sampled, and the metrics of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from miles_spmd.config import Config
from miles_spmd.controller.datasets import eval_response_len
from miles_spmd.controller.journal.events import Groups
from miles_spmd.controller.journal.metrics import pass_at_k
from miles_spmd.types.request import SamplingParams

CORRECT = 1.0  # a sample counts as solved from this reward on


def eval_sampling(config: Config) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=eval_response_len(config),
        temperature=config.eval.eval_temperature,
        top_p=config.eval.eval_top_p,
        stop=config.rollout.rollout_stop,
        stop_token_ids=config.rollout.rollout_stop_token_ids,
    )


def eval_metrics(sets: Mapping[str, Groups]) -> dict[str, float]:
    """Return the metrics of each set: ``eval/<name>`` is the mean reward (pass@1 for a 0/1 reward), ``-response_len``
    the mean number of generated tokens, and with n > 1 samples ``-pass@k`` for k = 2, 4, ... n."""
    metrics: dict[str, float] = {}
    for name, groups in sets.items():
        rewards = [[sample.reward or 0.0 for sample in group] for group in groups]
        metrics[f"eval/{name}"] = float(np.mean(rewards))
        metrics[f"eval/{name}-response_len"] = float(np.mean([len(s.response) for group in groups for s in group]))
        n = len(groups[0])
        correct = [sum(reward >= CORRECT for reward in group) for group in rewards]
        for k in {2**i for i in range(1, n.bit_length())} | ({n} if n > 1 else set()):
            metrics[f"eval/{name}-pass@{k}"] = pass_at_k(correct, n, k)
    return metrics
