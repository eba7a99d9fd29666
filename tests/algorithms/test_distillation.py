"""The top-k forms of on-policy distillation against sets and dictionaries, one position at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_spmd.algorithms.advantages import compute_advantages
from miles_spmd.algorithms.distillation import STRATEGIES, WEIGHT_MODES, Candidates, topk_reverse_kl
from miles_spmd.config import AlgorithmConfig
from tests.algorithms.rollout_cases import one_per_group

VOCABULARY = 8


def oracle(student: np.ndarray, teacher: np.ndarray, k: int, strategy: str, weight_mode: str) -> float:
    """At one position, from both whole distributions (log-probs [V])."""
    s, t = ({int(i) for i in np.argsort(-x)[:k]} for x in (student, teacher))
    chosen = {"only-student": s, "only-teacher": t, "intersection": s & t, "union": s | t, "xor": s ^ t}[strategy]
    weights = {
        i: math.exp({"student_p": student[i], "teacher_p": teacher[i], "none": 0.0}[weight_mode]) for i in chosen
    }
    norm = 1.0 if strategy == "xor" else math.fsum(weights.values())
    return math.fsum(w / norm * (student[i] - teacher[i]) for i, w in weights.items())


def top(log_probs: np.ndarray, student: np.ndarray, teacher: np.ndarray, k: int) -> Candidates:
    ids = np.argsort(-log_probs, axis=1)[:, :k]
    return Candidates(ids, np.take_along_axis(student, ids, 1), np.take_along_axis(teacher, ids, 1))


@given(
    st.sampled_from(STRATEGIES),
    st.sampled_from(WEIGHT_MODES),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(0, 999),
)
def test_equals_sets(strategy: str, weight_mode: str, k: int, positions: int, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(size=(2, positions, VOCABULARY)) * 3
    student, teacher = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    actual = topk_reverse_kl(
        top(student, student, teacher, k), top(teacher, student, teacher, k), strategy=strategy, weight_mode=weight_mode
    )
    expected = [oracle(s, t, k, strategy, weight_mode) for s, t in zip(student, teacher)]
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


def test_over_the_whole_vocabulary_it_is_the_divergence() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(VOCABULARY), size=(2, 1))
    actual = topk_reverse_kl(
        top(np.log(p), np.log(p), np.log(q), VOCABULARY), None, strategy="only-student", weight_mode="student_p"
    )
    assert actual[0] == pytest.approx((p * np.log(p / q)).sum())


def test_very_unlikely_candidates_are_still_compared() -> None:
    unlikely = Candidates(np.zeros((1, 1), int), np.full((1, 1), -900.0), np.full((1, 1), -903.0))
    assert topk_reverse_kl(unlikely, None, strategy="only-student", weight_mode="student_p").tolist() == [3.0]


def test_it_goes_into_the_advantages() -> None:
    batch = one_per_group([[1.0, 0.0]], lengths=2, teacher_kl=[np.asarray([0.5, 0.0]), np.asarray([0.0, 1.0])])
    estimate = compute_advantages(batch, AlgorithmConfig(advantage_estimator="dr_grpo", opd_kl_coef=0.1))
    assert np.allclose(estimate.advantages, [[0.45, 0.5], [-0.5, -0.6]])
    assert estimate.metrics["opd_reverse_kl"] == pytest.approx(1.5 / 4)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"unknown opd_top_k_strategy 'both' \(known: only-student"):
        topk_reverse_kl(None, None, strategy="both", weight_mode="none")
    with pytest.raises(ValueError, match="opd_top_k_strategy 'union' requires the student's candidates"):
        topk_reverse_kl(None, None, strategy="union", weight_mode="none")
