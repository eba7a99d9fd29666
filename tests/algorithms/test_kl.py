from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from miles_spmd.algorithms.kl import KINDS, kl_estimate


def oracle(x: float, y: float, kind: str, ratio: float = 1.0) -> float:
    r = min(max(x - y, -20), 20) if kind == "low_var_kl" else x - y
    estimate = ratio * {"k1": r, "k2": r * r / 2}.get(kind, math.exp(-r) - 1 + r)
    return min(max(estimate, -10), 10) if kind == "low_var_kl" else estimate


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [None, 0.5])
def test_numpy_and_torch_equal_the_formula(kind: str, ratio: float | None) -> None:
    x, y = np.linspace(-30, -1, 40), np.linspace(-2.3, -25, 40)
    ratios = None if ratio is None else np.full(40, ratio)
    expected = [oracle(a, b, kind, 1.0 if ratio is None else ratio) for a, b in zip(x, y)]
    np.testing.assert_allclose(kl_estimate(x, y, kind, ratios), expected, rtol=1e-9)
    torch_ratios = None if ratios is None else torch.from_numpy(ratios)
    actual = kl_estimate(torch.from_numpy(x), torch.from_numpy(y), kind, torch_ratios)
    np.testing.assert_allclose(actual, expected, rtol=1e-9)


def test_k3_keeps_its_digits_in_fp32_near_the_reference() -> None:
    r = 2.0**-10
    actual = kl_estimate(torch.tensor(-1.0 + r), torch.tensor(-1.0), "k3")
    assert float(actual) == pytest.approx(math.expm1(-r) + r, rel=1e-3)  # exp(-r) - 1 + r is wrong by a tenth here


def test_estimates_converge_to_the_divergence() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(10)), rng.dirichlet(np.ones(10) * 5)
    for kind in ("k1", "k3"):  # their expectation, exactly
        assert (p * kl_estimate(np.log(p), np.log(q), kind)).sum() == pytest.approx(
            (p * np.log(p / q)).sum(), rel=1e-12
        )


def test_the_unbiased_form_has_the_gradient_of_the_divergence() -> None:
    """Tokens sampled by an old policy, every one weighted by its probability: the expected gradient is KL's own."""
    rng = np.random.default_rng(1)
    old, ref = (torch.from_numpy(rng.dirichlet(np.ones(6))) for _ in range(2))
    logits = torch.from_numpy(rng.normal(size=6)).requires_grad_()
    now = logits.log_softmax(0)
    (wanted,) = torch.autograd.grad((now.exp() * (now - ref.log())).sum(), logits, retain_graph=True)
    ratio = (now - old.log()).exp()
    for kind in ("k1", "k3"):
        expectation = (old * kl_estimate(now, ref.log(), kind, ratio)).sum()
        (gradient,) = torch.autograd.grad(expectation, logits, retain_graph=True)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-9, atol=1e-12)
    (biased,) = torch.autograd.grad((old * kl_estimate(now, ref.log(), "k3")).sum(), logits)
    assert not np.allclose(biased, wanted, rtol=0.1)


def test_low_var_kl_survives_what_k3_does_not() -> None:
    x, y = torch.tensor(-200.0), torch.tensor(0.0)
    assert kl_estimate(x, y, "k3") == math.inf
    assert kl_estimate(x, y, "low_var_kl") == 10


def test_unknown() -> None:
    with pytest.raises(ValueError, match="unknown KL estimator 'k9'; known: k1, k2, k3, low_var_kl"):
        kl_estimate(np.zeros(1), np.zeros(1), "k9")
