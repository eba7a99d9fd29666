from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from miles_spmd.algorithms.rewards import GROUP_FILTERS, overlong_penalty, shape_rewards
from miles_spmd.config import AlgorithmConfig
from miles_spmd.plugins.plug_point import PlugInError
from miles_spmd.types.sample import Prompt, Sample
from tests.samples import sample_of


def samples(*rewards: float | None, length: int = 1) -> list[Sample]:
    prompt = Prompt("p:0", "?", [1])
    return [sample_of(prompt, i, [0] * length, reward=reward) for i, reward in enumerate(rewards)]


def test_overlong_penalty_by_hand() -> None:
    """DAPO: 16,384 tokens and a buffer of 4,096."""
    lengths = np.asarray([0, 12_288, 13_312, 16_384, 20_000])
    assert overlong_penalty(lengths, 16_384, 4_096).tolist() == [0, 0, -0.25, -1, -1]


def minus_mean(samples: Sequence[Sample], rewards: np.ndarray) -> np.ndarray:
    return rewards - rewards.mean()


def first_only(samples: Sequence[Sample], rewards: np.ndarray) -> np.ndarray:
    return rewards[:1]


def test_post_process_then_penalty() -> None:
    algorithm = AlgorithmConfig(
        reward_post_process=f"{__name__}:minus_mean", overlong_buffer_len=4, overlong_penalty_factor=0.5
    )
    assert shape_rewards(samples(1.0, 0.0, length=9), algorithm, 10).tolist() == [0.5 - 0.375, -0.5 - 0.375]
    assert shape_rewards(samples(1.0, 0.0), AlgorithmConfig(), 10).tolist() == [1.0, 0.0]


def test_bad_rewards() -> None:
    with pytest.raises(ValueError, match=r"rewards of samples \[1, 2\] are not finite"):
        shape_rewards(samples(1.0, None, math.nan), AlgorithmConfig(), 10)
    with pytest.raises(PlugInError, match=r"test_rewards:first_only' returned .*; it must return 2 finite numbers"):
        shape_rewards(samples(1.0, 0.0), AlgorithmConfig(reward_post_process=f"{__name__}:first_only"), 10)


def test_dynamic_sampling_keeps_groups_that_differ() -> None:
    keeps = GROUP_FILTERS.resolve("reward_nonzero_std")
    assert keeps(samples(1.0, 0.0, 1.0))
    assert not keeps(samples(0.1, 0.1, 0.1))
    assert not keeps(samples(1.0))
