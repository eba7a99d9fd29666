from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_spmd.algorithms.advantages import grpo_advantages, whiten


def oracle_grpo(rewards: list[float], size: int, std: bool) -> list[float]:
    out = []
    for start in range(0, len(rewards), size):
        group = rewards[start : start + size]
        mean = math.fsum(group) / size
        spread = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / (size - 1)) if size > 1 else 0.0
        for r in group:
            if max(group) == min(group):
                out.append(0.0)
            elif std and size > 1:
                out.append((r - mean) / (spread + 1e-6))
            else:
                out.append(r - mean)
    return out


rewards = st.integers(1, 6).flatmap(
    lambda size: st.tuples(
        st.just(size),
        st.lists(st.floats(-100, 100, width=32), min_size=size, max_size=size * 5).map(
            lambda x: x[: len(x) // size * size]
        ),
    )
)


@given(rewards, st.booleans())
def test_grpo_equals_plain_loops(case: tuple[int, list[float]], std: bool) -> None:
    size, values = case
    actual = grpo_advantages(np.asarray(values), size, std_normalization=std)
    np.testing.assert_allclose(actual, oracle_grpo(values, size, std), rtol=1e-6, atol=1e-9)


def test_grpo_by_hand() -> None:
    # mean 1/2, unbiased std sqrt(1/3)
    actual = grpo_advantages(np.asarray([1.0, 0, 0, 1]), 4, std_normalization=True)
    np.testing.assert_allclose(actual, np.asarray([1, -1, -1, 1]) * math.sqrt(3) / 2, rtol=1e-5)


def test_equal_rewards_give_exact_zeros() -> None:
    assert not grpo_advantages(np.full(8, 0.1), 8, std_normalization=True).any()


def test_group_size_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="5 rewards do not divide into groups of 2"):
        grpo_advantages(np.zeros(5), 2, std_normalization=True)


@given(
    st.lists(
        st.lists(st.tuples(st.floats(-5, 5, width=32), st.booleans()), min_size=1, max_size=6), min_size=1, max_size=6
    )
)
def test_whitening_equals_plain_loops(case: list[list[tuple[float, bool]]]) -> None:
    values = [np.asarray([v for v, _ in row], np.float32) for row in case]
    masks = [np.asarray([m for _, m in row], np.float32) for row in case]
    kept = [float(v) for row in case for v, m in row if m]
    mean = math.fsum(kept) / len(kept) if kept else 0.0
    scale = 1.0
    if len(kept) > 1:
        scale = 1 / math.sqrt(math.fsum((v - mean) ** 2 for v in kept) / (len(kept) - 1) + 1e-8)
    for row, actual in zip(case, whiten(values, masks)):
        expected = [(v - mean) * scale if m else 0.0 for v, m in row]
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
