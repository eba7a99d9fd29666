"""How per-token losses become one number: as a weight per token that already holds the global denominator.

The loss of an optimizer step is then a plain sum over tokens, micro-batches and ranks, and cannot depend on how the
batch was cut.
"""

from __future__ import annotations

import numpy as np


def loss_weights(masks: list[np.ndarray], kind: str, *, max_response_len: int) -> list[np.ndarray]:
    """Per-token weights, float32, shaped like each 0/1 ``mask``; one mask per sample of the optimizer step.

    - ``rollout_mean``: mean over samples of each sample's token mean (GRPO). An all-masked sample counts in the mean.
    - ``token_mean``: mean over all tokens (DAPO, arXiv 2503.14476).
    - ``constant``: sum over tokens / (samples x ``max_response_len``) (Dr.GRPO, arXiv 2503.20783).
    """
    samples = max(len(masks), 1)
    counts = [int(mask.sum()) for mask in masks]
    if kind == "rollout_mean":
        denominators = [samples * max(count, 1) for count in counts]
    elif kind == "token_mean":
        denominators = [max(sum(counts), 1)] * samples
    elif kind == "constant":
        denominators = [samples * max_response_len] * samples
    else:
        raise ValueError(f"unknown loss aggregation {kind!r}; known: rollout_mean, token_mean, constant")
    return [(mask / denominator).astype(np.float32) for mask, denominator in zip(masks, denominators)]
