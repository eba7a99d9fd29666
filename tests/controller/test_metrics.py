from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from miles_spmd.controller.journal.metrics import environment_metrics, mismatch_metrics, pass_at_k, reward_metrics
from miles_spmd.telemetry.metrics import describe, is_score
from miles_spmd.types.sample import Prompt, Sample
from miles_spmd.types.train_sequence import TrainSequence
from miles_spmd.types.trajectory import Segment, Trajectory
from tests.samples import sample_of


@pytest.mark.parametrize("n", [1, 2, 5])
def test_pass_at_k_is_the_share_of_choices_with_a_success(n: int) -> None:
    for k in range(1, n + 1):
        for successes in range(n + 1):
            choices = list(combinations([i < successes for i in range(n)], k))
            assert pass_at_k([successes], n, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_mismatch_counts_trained_tokens_only_and_names_the_largest() -> None:
    sequence = TrainSequence(
        np.arange(4, dtype=np.int32),
        loss_weights=np.asarray([0, 0, 0.5, 0.5], np.float32),
        rollout_log_probs=np.asarray([9, 9, -1.0, -2.0], np.float32),
    )
    metrics = mismatch_metrics([sequence], [np.asarray([0, 0, -1.0, -2.25], np.float32)])
    assert metrics["train/train_rollout_logprob_abs_diff"] == 0.125
    assert metrics["train/train_rollout_logprob_abs_diff_max"] == 0.25
    assert metrics["train/train_rollout_kl"] == pytest.approx((np.exp(-0.25) - 1 + 0.25) / 2, rel=1e-6)


def test_numbers_of_rewards_have_mean_and_standard_deviation() -> None:
    details: list[dict[str, float]] = [{"words": 2.0, "rare": 5.0}, {"words": 4.0}, {"words": float("nan")}]
    groups = [[sample_of(Prompt("a:1", "", []), i, [], reward_detail=detail) for i, detail in enumerate(details)]]
    expected = {"words/mean": 3.0, "words/std": 1.0, "rare/mean": 5.0, "rare/std": 0.0}
    assert reward_metrics("rollout/", groups) == {f"rollout/reward/{name}": value for name, value in expected.items()}
    assert reward_metrics("eval/a-b-", [[sample_of(Prompt("a:1", "", []), 0, [])]]) == {}
    for name in reward_metrics("eval/a-b-", groups):
        assert describe(name).meaning.endswith("which a reward function returned on a-b")
        assert not is_score(name)


def test_rewards_of_turns_have_a_mean_for_each_turn() -> None:
    groups = []
    for rewards in ([1.0, None], [0.0, -1.0], []):
        segments = [Segment([5], reward=reward) for reward in rewards or (None,)]
        groups.append([Sample(Prompt("a:1", "", []), 0, Trajectory([1], segments), 0.0)])
    metrics = environment_metrics("eval/a-b-", groups)
    assert metrics == {
        "eval/a-b-turns": pytest.approx(5 / 3),
        "eval/a-b-turn_reward/0": 0.5,
        "eval/a-b-turn_reward/1": -1.0,
    }
    assert (
        describe("eval/a-b-turn_reward/1").meaning
        == "Mean reward of turn 1 of the trajectories that have one for it on a-b"
    )
    assert not any(map(is_score, metrics))
