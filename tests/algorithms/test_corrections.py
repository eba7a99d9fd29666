"""TIS, IcePop, MIS and the mismatch metrics against plain loops over whole rollouts; cases by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_spmd.algorithms.corrections import CORRECTIONS, correct, mismatch_metrics
from miles_spmd.config import AlgorithmConfig
from miles_spmd.plugins.plug_point import PlugInError
from miles_spmd.types.rollout_batch import Correction, RolloutBatch
from tests.algorithms.rollout_cases import rollouts

# --- the formulas ----------------------------------------------------------------------------------------------------


def log_ratios(batch: RolloutBatch) -> list[list[float | None]]:
    """Of each token, None where masked."""
    return [
        [float(o) - float(e) if m else None for o, e, m in zip(old, engine, mask)]
        for old, engine, mask in zip(batch.old_log_probs, batch.rollout_log_probs, batch.masks)  # type: ignore[arg-type]
    ]


def bounded_exp(x: float) -> float:
    return math.exp(min(max(x, -20.0), 20.0))


def at_level(row: list[float | None], level: str) -> list[float]:
    """Importance ratio of every trained token of one sample."""
    d = [x for x in row if x is not None]
    if level == "sequence":
        return [bounded_exp(math.fsum(d))] * len(d)
    if level == "geometric":
        return [bounded_exp(math.fsum(d) / max(len(d), 1))] * len(d)
    return [bounded_exp(x) for x in d]


def oracle(a: AlgorithmConfig, batch: RolloutBatch) -> list[list[float]]:
    rows = log_ratios(batch)
    if a.tis_function == "tis":
        kept = [[min(max(w, a.tis_clip_low), a.tis_clip) for w in at_level(row, "token")] for row in rows]
    elif a.tis_function == "icepop":
        kept = [[w if a.tis_clip_low <= w <= a.tis_clip else 0.0 for w in at_level(row, "token")] for row in rows]
    else:
        kept = [mis_weights(a, row) for row in rows]
        if a.tis_batch_normalize:
            if a.tis_level == "token":
                counted = [w for row in kept for w in row if w]
            else:
                counted = [next(w for w in row if w) for row in kept if any(row)]
            mean = math.fsum(counted) / len(counted) if counted else 1.0
            kept = [[w / mean for w in row] for row in kept]
    out = []
    for row, weights in zip(rows, kept):
        left = iter(weights)
        out.append([0.0 if x is None else next(left) for x in row])
    return out


def mis_weights(a: AlgorithmConfig, row: list[float | None]) -> list[float]:
    upper = a.tis_upper_bound
    lower = 1 / upper if a.tis_lower_bound is None else a.tis_lower_bound
    weights = []
    tokens = at_level(row, "token")
    for w, rejected_by in zip(at_level(row, a.tis_level), at_level(row, a.rs_level)):
        if a.tis_mode == "truncate":
            bounded = min(w, upper)
        elif a.tis_mode == "clip":
            bounded = min(max(w, lower), upper)
        else:
            bounded = w if lower <= w <= upper else 0.0
        rs_lower = lower if a.rs_lower_bound is None else a.rs_lower_bound
        rs_upper = upper if a.rs_upper_bound is None else a.rs_upper_bound
        if a.use_rs and not rs_lower <= rejected_by <= rs_upper:
            bounded = 0.0
        if a.rs_veto_threshold is not None and min(tokens) < a.rs_veto_threshold:
            bounded = 0.0
        weights.append(bounded)
    return weights


levels = st.sampled_from(["token", "sequence", "geometric"])
corrections = st.builds(
    AlgorithmConfig,
    use_tis=st.just(True),
    tis_function=st.sampled_from([*CORRECTIONS.builtins, "mis", "mis"]),
    tis_clip=st.sampled_from([2.0, 1.1]),
    tis_clip_low=st.sampled_from([0.0, 0.9]),
    tis_level=levels,
    tis_mode=st.sampled_from(["truncate", "clip", "mask"]),
    tis_upper_bound=st.sampled_from([2.0, 1.05]),
    tis_lower_bound=st.sampled_from([None, 0.8]),
    tis_batch_normalize=st.booleans(),
    use_rs=st.booleans(),
    rs_level=levels,
    rs_lower_bound=st.sampled_from([None, 0.7]),
    rs_upper_bound=st.sampled_from([None, 1.2]),
    rs_veto_threshold=st.sampled_from([None, 1e-4, 0.9]),
)


@given(corrections, rollouts())
def test_weights_equal_plain_loops(algorithm: AlgorithmConfig, batch: RolloutBatch) -> None:
    correction = correct(batch, algorithm)
    assert correction is not None
    for actual, expected in zip(correction.policy_weights, oracle(algorithm, batch), strict=True):
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, np.asarray(expected).reshape(actual.shape), rtol=1e-6)


@given(rollouts())
def test_metrics_equal_plain_loops(batch: RolloutBatch) -> None:
    algorithm = AlgorithmConfig(use_tis=True, tis_function="icepop", tis_clip=1.1, tis_clip_low=0.9)
    correction = correct(batch, algorithm)
    assert correction is not None
    d = [x for row in log_ratios(batch) for x in row if x is not None]
    rho = [bounded_exp(x) for x in d]
    outside = [not 0.9 <= w <= 1.1 for w in rho]
    n = max(len(d), 1)
    expected = {
        "tis": math.fsum(rho) / n,
        "tis_abs": math.fsum(abs(w - 1) for w in rho) / n,
        "tis_clipfrac": sum(outside) / n,
        "tis_rejected": sum(outside) / n,
        "tis_weight": math.fsum(w for w, out in zip(rho, outside) if not out) / n,
        "extreme_ratios": sum(abs(x) > 20 for x in d),
    }
    assert correction.metrics == pytest.approx(expected, rel=1e-9)


def rollout(*log_ratio_rows: list[float]) -> RolloutBatch:
    n = len(log_ratio_rows)
    zeros = [np.zeros(len(row)) for row in log_ratio_rows]
    return RolloutBatch(
        np.zeros(n),
        np.zeros(n, int),
        [np.ones(len(row)) for row in log_ratio_rows],
        old_log_probs=[np.asarray(row) for row in log_ratio_rows],
        rollout_log_probs=zeros,
    )


def weights(batch: RolloutBatch, **settings: Any) -> list[list[float]]:
    correction = correct(batch, AlgorithmConfig(use_tis=True, **settings))
    assert correction is not None
    return [np.round(w.astype(np.float64), 6).tolist() for w in correction.policy_weights]


def test_by_hand() -> None:
    log2 = math.log(2)
    batch = rollout([2 * log2, -log2], [log2, 0.0])  # ratios 4, 1/2; 2, 1. Products 2; 2
    assert weights(batch) == [[2, 0.5], [2, 1]]
    assert weights(batch, tis_function="icepop", tis_clip_low=0.6) == [[0, 0], [2, 1]]
    plain = {"tis_function": "mis", "use_rs": False, "tis_batch_normalize": False}
    assert weights(batch, **plain, tis_level="sequence", tis_upper_bound=3.0) == [[2, 2], [2, 2]]
    assert weights(batch, **plain, tis_level="geometric") == [[1.414214] * 2] * 2
    assert weights(batch, **plain, tis_mode="clip", tis_lower_bound=1.0) == [[2, 1], [2, 1]]
    assert weights(batch, **plain, rs_veto_threshold=0.6) == [[0, 0], [2, 1]]  # also without use_rs


def test_normalised_weights_of_kept_tokens_have_mean_one_whatever_was_rejected() -> None:
    """The outlier's e^20 neither survives nor scales the others down."""
    batch = rollout([20.0, 0.0], [math.log(1.5), math.log(0.5)])
    settings = {"tis_function": "mis", "tis_mode": "mask", "rs_veto_threshold": None, "tis_upper_bound": 3.0}
    assert weights(batch, **settings) == [[0, 1], [1.5, 0.5]]


def test_the_rest_of_the_batch_does_not_change_a_token_unless_it_is_normalised() -> None:
    alone, together = rollout([0.3, -0.2]), rollout([0.3, -0.2], [0.5], [])
    settings = {"tis_function": "mis", "tis_level": "geometric"}
    assert weights(alone, **settings)[0] != weights(together, **settings)[0]
    assert (
        weights(alone, **settings, tis_batch_normalize=False)[0]
        == weights(together, **settings, tis_batch_normalize=False)[0]
    )


def test_vetoed_samples_and_rejected_tokens_are_counted() -> None:
    correction = correct(rollout([-10.0, 0.0], [0.1], [1.0]), AlgorithmConfig(use_tis=True, tis_function="mis"))
    assert correction is not None
    assert correction.metrics["rs_vetoed"] == pytest.approx(1 / 3)
    assert correction.metrics["rs_masked"] == pytest.approx(2 / 4)
    assert correction.metrics["tis_rejected"] == pytest.approx(3 / 4)


def too_short(batch: RolloutBatch, algorithm: AlgorithmConfig) -> Correction:
    return Correction([mask[1:] for mask in batch.masks])


def halves(batch: RolloutBatch, algorithm: AlgorithmConfig) -> Correction:
    return Correction([mask / 2 for mask in batch.masks], {"own": 1.0})


def test_a_users_correction_is_called_and_checked() -> None:
    batch = rollout([0.0, 0.0])
    assert weights(batch, tis_function=f"{__name__}:halves") == [[0.5, 0.5]]
    with pytest.raises(PlugInError, match=r"test_corrections:too_short' returned .*shaped like the masks"):
        weights(batch, tis_function=f"{__name__}:too_short")


def test_bad_settings() -> None:
    batch = rollout([0.0])
    assert correct(batch, AlgorithmConfig()) is None
    assert weights(
        rollout([1.0]), tis_function="mis", tis_upper_bound=1.0, use_rs=False, tis_batch_normalize=False
    ) == [[1.0]]
    with pytest.raises(ValueError, match=r"lower bound 3.0 of importance ratios is not below the upper bound 2.0"):
        weights(batch, tis_function="icepop", tis_clip_low=3.0)
    with pytest.raises(ValueError, match="use_tis has nothing to correct with use_rollout_logprobs"):
        weights(batch, use_rollout_logprobs=True)
    with pytest.raises(ValueError, match="use_tis requires old_log_probs of every sample"):
        weights(RolloutBatch(np.zeros(1), np.zeros(1, int), [np.ones(1)]))


# --- mismatch --------------------------------------------------------------------------------------------------------


@given(rollouts())
def test_mismatch_metrics_equal_plain_loops(batch: RolloutBatch) -> None:
    actual = mismatch_metrics(batch.old_log_probs, batch.rollout_log_probs, batch.masks)  # type: ignore[arg-type]
    rows = [[x for x in row if x is not None] for row in log_ratios(batch)]
    rows = [row for row in rows if row]
    if not rows:
        assert actual == {}
        return
    d = [x for row in rows for x in row]
    rho = [[bounded_exp(x) for x in row] for row in rows]
    n, m = len(d), len(rows)
    expected = {
        "train_rollout_logprob_abs_diff": math.fsum(map(abs, d)) / n,
        "train_rollout_logprob_abs_diff_p999": float(np.quantile(np.abs(d), 0.999)),
        "train_rollout_logprob_abs_diff_max": max(map(abs, d)),
        "train_rollout_kl": math.fsum(bounded_exp(x) - 1 - x for x in d) / n,
        "train_rollout_chi2_token": math.fsum(bounded_exp(x) ** 2 - 1 for x in d) / n,
        "train_rollout_chi2_seq": math.fsum(bounded_exp(math.fsum(row)) ** 2 - 1 for row in rows) / m,
        "train_rollout_ess": math.fsum(math.fsum(w) ** 2 / (len(w) * math.fsum(x * x for x in w)) for w in rho) / m,
        "train_rollout_ppl_ratio": math.fsum(bounded_exp(-math.fsum(row) / len(row)) for row in rows) / m,
        "extreme_ratios": sum(abs(x) > 20 for x in d),
    }
    assert actual == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_no_mismatch() -> None:
    log_probs = [np.asarray([-1.0, -2.0])]
    metrics = mismatch_metrics(log_probs, log_probs, [np.ones(2)])
    assert metrics.pop("train_rollout_ess") == metrics.pop("train_rollout_ppl_ratio") == 1
    assert len(metrics) > 5
    assert not any(metrics.values())


def test_mismatch_of_nan_names_the_sample() -> None:
    with pytest.raises(ValueError, match=r"log-probs of samples \[1\] are not finite"):
        mismatch_metrics([np.zeros(1), np.asarray([math.nan])], [np.zeros(1)] * 2, [np.ones(1)] * 2)
