"""From the reward function's rewards to those that advantages are computed from, and which groups are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from miles_spmd.config import AlgorithmConfig
from miles_spmd.plugins.algorithm import GroupFilter, RewardPostProcess, SampleFilter
from miles_spmd.plugins.plug_point import PlugPoint
from miles_spmd.types.sample import Sample, by_role


def shape_rewards(samples: Sequence[Sample], algorithm: AlgorithmConfig, max_response_len: int) -> np.ndarray:
    """Return the samples' rewards, float64 [N], after ``reward_post_process`` and then the over-long penalty.

    Raises ValueError if a sample has no reward or one that is not finite, and PlugInError if a user's function returns
    such or another shape.
    """
    rewards = np.asarray([np.nan if s.reward is None else s.reward for s in samples], np.float64)
    if not np.isfinite(rewards).all():
        raise ValueError(f"rewards of samples {np.flatnonzero(~np.isfinite(rewards))[:8].tolist()} are not finite")
    if algorithm.reward_post_process is not None:
        processed = REWARD_POST_PROCESSES.resolve(algorithm.reward_post_process)(samples, rewards)
        rewards = as_numbers(processed)
        if rewards.shape != (len(samples),):
            expected = f"{len(samples)} finite numbers, one for each sample"
            raise REWARD_POST_PROCESSES.returned(algorithm.reward_post_process, processed, expected)
    if algorithm.overlong_buffer_len:
        longest: dict[tuple[str, int, str], int] = {}  # siblings share a reward, and so the longest one's penalty
        for s in samples:
            longest[s.rollout] = max(longest.get(s.rollout, 0), len(s.response))
        lengths = np.asarray([longest[s.rollout] for s in samples])
        penalties = overlong_penalty(lengths, max_response_len, algorithm.overlong_buffer_len)
        rewards = rewards + algorithm.overlong_penalty_factor * penalties
    return rewards


def as_numbers(values: Any) -> np.ndarray:
    """Return what a user's function has returned as float64, empty where it has anything that is not finite."""
    try:
        numbers = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        return np.empty(0)
    return numbers if np.isfinite(numbers).all() else np.empty(0)


def overlong_penalty(lengths: np.ndarray, max_response_len: int, buffer_len: int) -> np.ndarray:
    """Return DAPO's soft over-long punishment (arXiv 2503.14476, eq. 13), float64 in [-1, 0]: 0 up to
    ``max_response_len`` - ``buffer_len`` tokens, falling linearly to -1 at ``max_response_len`` and beyond."""
    return np.clip((max_response_len - buffer_len - lengths) / buffer_len, -1.0, 0.0)


def reward_nonzero_std(samples: Sequence[Sample]) -> bool:
    """Return whether a group's rewards differ, where there are roles those of one of them: others have no gradient
    (DAPO, arXiv 2503.14476, eq. 11)."""
    return any(len({sample.reward for sample in of_role}) > 1 for of_role in by_role(samples))


def keeps_group(name: str, samples: Sequence[Sample]) -> bool:
    """Return whether the group filter called ``name`` keeps a prompt's samples."""
    kept = GROUP_FILTERS.resolve(name)(samples)
    if not isinstance(kept, bool | np.bool_):
        raise GROUP_FILTERS.returned(name, kept, "True for a group that is trained on, False for another")
    return bool(kept)


def kept_samples(name: str, samples: Sequence[Sample]) -> list[bool]:
    """Return which samples the sample filter called ``name`` keeps."""
    returned = SAMPLE_FILTERS.resolve(name)(samples)
    try:
        kept = list(returned)
    except TypeError:
        kept = []
    if len(kept) != len(samples) or not all(isinstance(one, bool | np.bool_) for one in kept):
        raise SAMPLE_FILTERS.returned(name, returned, f"True or False for each of the {len(samples)} samples")
    return [bool(one) for one in kept]


SAMPLE_FILTERS: PlugPoint[SampleFilter] = PlugPoint("algorithm.sample_filter", {}, SampleFilter)
REWARD_POST_PROCESSES: PlugPoint[RewardPostProcess] = PlugPoint("algorithm.reward_post_process", {}, RewardPostProcess)
GROUP_FILTERS: PlugPoint[GroupFilter] = PlugPoint(
    "algorithm.dynamic_sampling_filter", {"reward_nonzero_std": reward_nonzero_std}, GroupFilter
)
