"""Samples of one response, as most tests need them."""

from __future__ import annotations

from typing import Any

from miles_spmd.types.sample import Prompt, Sample
from miles_spmd.types.trajectory import FinishReason, Segment, Trajectory


def sample_of(
    prompt: Prompt,
    index: int,
    response: list[int],
    log_probs: list[float] | None = None,
    mask: list[int] | None = None,
    *,
    text: str = "",
    finish_reason: FinishReason = FinishReason.STOP,
    top1_ids: list[int] | None = None,
    weight_versions: list[tuple[int, int]] | None = None,
    **reward: Any,
) -> Sample:
    """A response to ``prompt``; with a ``mask``, its tokens of 0 are a segment that is not sampled."""
    log_probs, mask = log_probs or [], [1] * len(response) if mask is None else mask
    segments, start = list[Segment](), 0
    for end in range(1, len(response) + 1):
        if end == len(response) or mask[end] != mask[start]:
            top1 = top1_ids and top1_ids[start:end]
            own = log_probs[start:end] if mask[start] else []
            segments.append(Segment(response[start:end], bool(mask[start]), True, own, weight_versions or [], top1))
            start = end
    trajectory = Trajectory(prompt.tokens, segments, text=text, finish_reason=finish_reason)
    return Sample(prompt, index, trajectory, **reward)
