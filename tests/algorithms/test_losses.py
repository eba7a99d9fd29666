"""Value and gradient of every loss against float64 plain-loop formulas, with finite differences for the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles_spmd.algorithms.aggregation import loss_weights
from miles_spmd.algorithms.kl import kl_estimate
from miles_spmd.algorithms.losses import PolicyLoss, SupervisedLoss, TokenBatch
from miles_spmd.config.schema import Algorithm

log_prob = st.floats(-8, -0.01)
token = st.tuples(log_prob, log_prob, log_prob, st.floats(-3, 3), st.floats(0, 3))  # new, old, ref, advantage, entropy


def oracle_kl(x: float, y: float, kind: str) -> float:
    r = x - y
    return {"k1": r, "k2": r * r / 2, "k3": math.exp(-r) - 1 + r}[kind]


def oracle_policy(a: Algorithm, new: float, old: float, ref: float, advantage: float, entropy: float) -> float:
    ratio = math.exp(new - old)
    high = a.eps_clip if a.eps_clip_high is None else a.eps_clip_high
    loss = max(-ratio * advantage, -min(max(ratio, 1 - a.eps_clip), 1 + high) * advantage)
    if a.eps_clip_c is not None and advantage < 0:
        loss = min(loss, -a.eps_clip_c * advantage)
    return loss - a.entropy_coef * entropy + a.kl_loss_coef * oracle_kl(new, ref, a.kl_loss_type)


algorithms = st.builds(
    Algorithm,
    eps_clip=st.sampled_from([0.1, 0.2]),
    eps_clip_high=st.sampled_from([None, 0.28]),
    eps_clip_c=st.sampled_from([None, 3.0]),
    kl_loss_coef=st.sampled_from([0.0, 0.1]),
    kl_loss_type=st.sampled_from(["k1", "k2", "k3"]),
    entropy_coef=st.sampled_from([0.0, 0.01]),
)


@given(algorithms, st.lists(token, min_size=1, max_size=8))
def test_policy_loss_value_and_gradient(algorithm: Algorithm, rows: list[tuple[float, ...]]) -> None:
    new, old, ref, advantage, entropy = (torch.tensor(c, dtype=torch.float64) for c in zip(*rows))
    new.requires_grad_()
    batch = TokenBatch(torch.ones_like(old), advantages=advantage, old_log_probs=old, ref_log_probs=ref)
    loss, sums = PolicyLoss(algorithm)(new, entropy, batch)
    expected = [oracle_policy(algorithm, *row) for row in rows]
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-9, atol=1e-9)
    assert sums["tokens"] == len(rows)
    (gradient,) = torch.autograd.grad(loss.sum(), new)
    for i, row in enumerate(rows):
        if not _near_a_kink(algorithm, row):
            np.testing.assert_allclose(gradient[i], _slope(algorithm, row), rtol=1e-4, atol=1e-6)


def _slope(algorithm: Algorithm, row: tuple[float, ...], h: float = 1e-5) -> float:
    f: Callable[[float], float] = lambda x: oracle_policy(algorithm, x, *row[1:])  # noqa: E731
    return (f(row[0] + h) - f(row[0] - h)) / (2 * h)


def _near_a_kink(a: Algorithm, row: tuple[float, ...]) -> bool:
    ratio = math.exp(row[0] - row[1])
    edges = [1 - a.eps_clip, 1 + (a.eps_clip if a.eps_clip_high is None else a.eps_clip_high), a.eps_clip_c or 3.0]
    return any(abs(ratio - edge) < 1e-3 for edge in edges)


def test_without_old_log_probs_the_ratio_is_one_and_the_gradient_is_the_policy_gradient() -> None:
    new = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([0.5, -2.0], dtype=torch.float64)
    loss, sums = PolicyLoss(Algorithm())(new, torch.zeros(2), TokenBatch(torch.ones(2), advantages=advantages))
    assert torch.equal(loss.detach(), -advantages)
    assert sums["ppo_kl"] == 0
    assert torch.equal(torch.autograd.grad(loss.sum(), new)[0], -advantages)


def test_gradient_vanishes_where_ppo_clips() -> None:
    new = torch.tensor([0.0, 0.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.0, 1.0], dtype=torch.float64)  # ratios e and 1/e
    batch = TokenBatch(torch.ones(2), advantages=torch.tensor([1.0, -1.0], dtype=torch.float64), old_log_probs=old)
    loss, sums = PolicyLoss(Algorithm())(new, torch.zeros(2), batch)
    assert torch.equal(torch.autograd.grad(loss.sum(), new)[0], torch.zeros(2, dtype=torch.float64))
    assert sums["pg_clipfrac"] == 2


def test_extreme_ratio_stays_finite() -> None:
    new = torch.tensor([0.0, -300.0], requires_grad=True)
    batch = TokenBatch(torch.ones(2), advantages=torch.tensor([-1.0, 1.0]), old_log_probs=torch.tensor([-300.0, 0.0]))
    loss, _ = PolicyLoss(Algorithm())(new, torch.zeros(2), batch)
    (gradient,) = torch.autograd.grad(loss.sum(), new)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()


def test_supervised_loss_is_the_negative_log_likelihood() -> None:
    log_probs = torch.tensor([-1.5, -0.25])
    loss, sums = SupervisedLoss()(log_probs, torch.zeros(2), TokenBatch(torch.tensor([0.5, 0.0])))
    assert torch.equal(loss, -log_probs)
    assert sums["tokens"] == 1


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_same_on_numpy_and_torch(kind: str) -> None:
    x, y = np.linspace(-3, -1, 7), np.linspace(-2, -1.5, 7)
    expected = [oracle_kl(a, b, kind) for a, b in zip(x, y)]
    np.testing.assert_allclose(kl_estimate(x, y, kind), expected, rtol=1e-12)
    np.testing.assert_allclose(kl_estimate(torch.from_numpy(x), torch.from_numpy(y), kind), expected, rtol=1e-12)


def test_kl_estimates_converge_to_the_true_divergence() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(10)), rng.dirichlet(np.ones(10) * 5)
    drawn = rng.choice(10, size=400_000, p=p)
    true = float((p * np.log(p / q)).sum())
    for kind in ("k1", "k3"):
        assert kl_estimate(np.log(p[drawn]), np.log(q[drawn]), kind).mean() == pytest.approx(true, rel=0.02)


def test_unknown_kl() -> None:
    with pytest.raises(ValueError, match="unknown KL estimator 'k9'; known: k1, k2, k3"):
        kl_estimate(np.zeros(1), np.zeros(1), "k9")


masks = st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=7), min_size=1, max_size=6)


@given(masks)
def test_aggregation_weights_equal_the_means_they_stand_for(rows: list[list[float]]) -> None:
    arrays = [np.asarray(row, np.float32) for row in rows]
    values = [np.linspace(-1, 2, len(row)) for row in rows]
    per_sample = [float((m * v).sum()) for m, v in zip(arrays, values)]
    counts = [m.sum() for m in arrays]
    expected = {
        "rollout_mean": math.fsum(s / max(c, 1) for s, c in zip(per_sample, counts)) / len(rows),
        "token_mean": math.fsum(per_sample) / max(sum(counts), 1),
        "constant": math.fsum(per_sample) / (len(rows) * 50),
    }
    for kind, value in expected.items():
        weights = loss_weights(arrays, kind, max_response_len=50)
        actual = math.fsum(float((w * v).sum()) for w, v in zip(weights, values))
        assert actual == pytest.approx(value, rel=1e-5, abs=1e-6)
