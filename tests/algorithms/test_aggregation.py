from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given

from miles_spmd.algorithms.aggregation import AGGREGATIONS, loss_weights
from miles_spmd.plugins.plug_point import PlugInError
from miles_spmd.types.rollout_batch import Arrays, RolloutBatch
from tests.algorithms.rollout_cases import rollouts


def oracle(kind: str, batch: RolloutBatch, losses: Arrays, max_response_len: int) -> float:
    """The one number, from per-token losses."""
    sums: dict[int, list[float]] = {}
    for rollout, mask, row in zip(batch.rollout_ids, batch.masks, losses):  # type: ignore[arg-type]
        sums.setdefault(rollout, []).extend(float(x) for x, m in zip(row, mask) if m)
    if kind == "rollout_mean":
        return math.fsum(math.fsum(s) / max(len(s), 1) for s in sums.values()) / max(len(sums), 1)
    everything = [x for s in sums.values() for x in s]
    if kind == "token_mean":
        return math.fsum(everything) / max(len(everything), 1)
    return math.fsum(everything) / (max(len(sums), 1) * max_response_len)


@pytest.mark.parametrize("kind", AGGREGATIONS.builtins)
@given(batch=rollouts())
def test_weights_stand_for_the_means(kind: str, batch: RolloutBatch) -> None:
    losses = [np.linspace(-1, 2, len(mask)) for mask in batch.masks]
    weights = loss_weights(batch.masks, kind, max_response_len=50, rollout_ids=batch.rollout_ids)
    assert all(w.dtype == np.float32 for w in weights)
    assert all(not w[m == 0].any() for w, m in zip(weights, batch.masks))
    actual = math.fsum(float(x) * loss for w, row in zip(weights, losses) for x, loss in zip(w, row))
    size = math.fsum(abs(float(x) * loss) for w, row in zip(weights, losses) for x, loss in zip(w, row))
    assert actual == pytest.approx(oracle(kind, batch, losses, 50), rel=1e-6, abs=1e-7 * size)


def test_by_hand() -> None:
    """Three tokens in one rollout's two samples, one in the other."""
    masks, siblings = [np.ones(1), np.ones(2), np.ones(1)], np.asarray([4, 4, 9])
    assert [w.tolist() for w in loss_weights(masks, "rollout_mean", max_response_len=8, rollout_ids=siblings)] == [
        pytest.approx([1 / 6]),
        pytest.approx([1 / 6, 1 / 6]),
        [1 / 2],
    ]
    assert loss_weights(masks, "rollout_mean", max_response_len=8)[1].tolist() == pytest.approx([1 / 6] * 2)
    assert loss_weights(masks, "token_mean", max_response_len=8, rollout_ids=siblings)[1].tolist() == [1 / 4] * 2
    assert loss_weights(masks, "constant", max_response_len=8, rollout_ids=siblings)[1].tolist() == [1 / 16] * 2


def test_a_pair_is_a_rollout() -> None:
    weights = loss_weights(
        [np.ones(3), np.ones(1)] * 5, "rollout_mean", max_response_len=1, rollout_ids=np.arange(10) // 2
    )
    assert [float(weights[i].sum() + weights[i + 1].sum()) for i in range(0, 10, 2)] == pytest.approx([1 / 5] * 5)


def everything(masks: Arrays, rollout_ids: np.ndarray, max_response_len: int) -> Arrays:
    return [np.ones(mask.shape) for mask in masks]


def summed(masks: Arrays, rollout_ids: np.ndarray, max_response_len: int) -> Arrays:
    return [mask.sum(keepdims=True) for mask in masks]


def test_a_users_aggregation_is_called_and_checked() -> None:
    masks = [np.ones(2)]
    assert loss_weights(masks, f"{__name__}:everything", max_response_len=1)[0].tolist() == [1, 1]
    with pytest.raises(PlugInError, match=r"test_aggregation:everything' returned .*0 where these are 0"):
        loss_weights([np.asarray([1.0, 0.0])], f"{__name__}:everything", max_response_len=1)
    with pytest.raises(PlugInError, match=r"test_aggregation:summed' returned .*shaped like the masks"):
        loss_weights(masks, f"{__name__}:summed", max_response_len=1)
