"""Every estimator against plain loops in float64, over random rollouts; cases by hand; what bad input gets."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_spmd.algorithms.advantages import ESTIMATORS, compute_advantages, whiten
from miles_spmd.config import AlgorithmConfig
from miles_spmd.plugins.plug_point import PlugInError
from miles_spmd.types.rollout_batch import Estimate, RolloutBatch
from tests.algorithms.rollout_cases import one_per_group, rollouts

Rows = list[list[float]]

# --- the formulas ----------------------------------------------------------------------------------------------------


def kl(a: AlgorithmConfig, batch: RolloutBatch, i: int, t: int) -> float:
    if not a.kl_coef:
        return 0.0
    r = float(batch.old_log_probs[i][t]) - float(batch.ref_log_probs[i][t])  # type: ignore[index]
    if a.kl_loss_type == "low_var_kl":
        r = min(max(r, -20.0), 20.0)
        return a.kl_coef * min(max(math.exp(-r) - 1 + r, -10.0), 10.0)
    return a.kl_coef * {"k1": r, "k2": r * r / 2}[a.kl_loss_type]


def trained(batch: RolloutBatch, i: int) -> list[int]:
    return [t for t, m in enumerate(batch.masks[i]) if m]


def compare_in_group(name: str, a: AlgorithmConfig, batch: RolloutBatch) -> dict[int, float]:
    """Rollout id -> advantage."""
    rewards: dict[int, float] = {}
    groups: dict[int, list[int]] = {}
    for i, rollout in enumerate(batch.rollout_ids):  # type: ignore[arg-type]
        if rollout not in rewards:
            rewards[rollout] = float(batch.rewards[i])
            groups.setdefault(int(batch.group_ids[i]), []).append(rollout)
        if name != "reinforce_plus_plus_baseline":
            rewards[rollout] -= math.fsum(kl(a, batch, i, t) for t in trained(batch, i))
    out = {}
    for members in groups.values():
        values = [rewards[m] for m in members]
        mean = math.fsum(values) / len(values)
        for m in members:
            if max(values) == min(values):
                out[m] = 0.0
            elif name == "rloo":
                out[m] = rewards[m] - math.fsum(rewards[o] for o in members if o != m) / (len(values) - 1)
            elif name in ("grpo", "gspo", "cispo") and a.grpo_std_normalization:
                variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
                out[m] = (rewards[m] - mean) / (math.sqrt(variance) + 1e-6)
            else:
                out[m] = rewards[m] - mean
    return out


def moving_averages(a: AlgorithmConfig, batch: RolloutBatch) -> tuple[dict[int, float], dict[tuple[str, str], float]]:
    """Rollout id -> advantage, and what is left as the baseline of each game and role."""
    baselines = {(game, role): b for game, roles in batch.baselines.items() for role, b in roles.items()}
    out: dict[int, float] = {}
    for i, rollout in enumerate(batch.rollout_ids):  # type: ignore[arg-type]
        if rollout in out:
            continue
        siblings = [j for j, other in enumerate(batch.rollout_ids) if other == rollout]  # type: ignore[arg-type]
        reward = float(batch.rewards[i]) - math.fsum(kl(a, batch, j, t) for j in siblings for t in trained(batch, j))
        player = batch.players[i]  # type: ignore[index]
        baselines[player] = a.rae_decay * baselines.get(player, 0.0) + (1 - a.rae_decay) * reward
        out[rollout] = reward - baselines[player]
    return out, baselines


def token_level(name: str, a: AlgorithmConfig, batch: RolloutBatch, i: int) -> tuple[list[float], list[float]]:
    """Advantages and returns of sample i: A_t = sum over later trained tokens of (gamma lambda)^k delta."""
    places = trained(batch, i)
    lambd = a.lambd if name == "ppo" else 1.0
    value = [float(batch.values[i][t]) if name == "ppo" else 0.0 for t in places] + [0.0]  # type: ignore[index]
    reward = [-kl(a, batch, i, t) for t in places]
    if places:
        reward[-1] += float(batch.rewards[i])
    for end, of_turn in enumerate([] if batch.turn_rewards is None else batch.turn_rewards[i]):
        if places:
            reward[-1] -= float(of_turn)  # the turns' are parts of the whole reward
        if before := [k for k, t in enumerate(places) if t <= end]:
            reward[before[-1]] += float(of_turn)
    delta = [reward[k] + a.gamma * value[k + 1] - value[k] for k in range(len(places))]
    advantages = [0.0] * len(batch.masks[i])
    returns = [0.0] * len(batch.masks[i])
    for k, t in enumerate(places):
        advantages[t] = math.fsum((a.gamma * lambd) ** (j - k) * delta[j] for j in range(k, len(places)))
        returns[t] = advantages[t] + value[k]
    return advantages, returns


def oracle(a: AlgorithmConfig, batch: RolloutBatch) -> Rows:
    name = a.advantage_estimator
    if name in ("ppo", "reinforce_plus_plus"):
        rows = [token_level(name, a, batch, i)[0] for i in range(len(batch.masks))]
    else:
        per_rollout = moving_averages(a, batch)[0] if name == "rae" else compare_in_group(name, a, batch)
        rows = [[per_rollout[r] if m else 0.0 for m in mask] for r, mask in zip(batch.rollout_ids, batch.masks)]  # type: ignore[arg-type]
        if name == "reinforce_plus_plus_baseline":
            for i, row in enumerate(rows):
                for t in trained(batch, i):
                    row[t] -= kl(a, batch, i, t)
    for i, row in enumerate(rows):
        for t in trained(batch, i):
            student, teacher = batch.old_log_probs[i][t], batch.teacher_log_probs[i][t]  # type: ignore[index]
            row[t] -= a.opd_kl_coef * (float(student) - float(teacher))
    whitens = "reinforce" in name if a.normalize_advantages is None else a.normalize_advantages
    return oracle_whiten(rows, batch.masks) if whitens else rows


def oracle_whiten(rows: Rows, masks: list[np.ndarray]) -> Rows:
    kept = [v for row, mask in zip(rows, masks) for v, m in zip(row, mask) if m]
    mean = math.fsum(kept) / len(kept) if kept else 0.0
    scale = 1.0
    if len(kept) > 1:
        scale = 1 / math.sqrt(math.fsum((v - mean) ** 2 for v in kept) / (len(kept) - 1) + 1e-8)
    return [[(v - mean) * scale if m else 0.0 for v, m in zip(row, mask)] for row, mask in zip(rows, masks)]


def assert_rows(actual: list[np.ndarray], expected: Rows) -> None:
    assert len(actual) == len(expected)
    size = max([1.0, *(abs(v) for row in expected for v in row)])
    for one, other in zip(actual, expected):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, np.asarray(other).reshape(one.shape), rtol=1e-6, atol=1e-9 * size)


# --- estimators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ESTIMATORS.builtins)
@given(data=st.data(), batch=rollouts())
def test_estimator_equals_plain_loops(name: str, data: st.DataObject, batch: RolloutBatch) -> None:
    algorithm = AlgorithmConfig(
        advantage_estimator=name,
        grpo_std_normalization=data.draw(st.booleans()),
        kl_coef=data.draw(st.sampled_from([0.0, 0.1])),
        kl_loss_type=data.draw(st.sampled_from(["k1", "k2", "low_var_kl"])),
        gamma=data.draw(st.sampled_from([1.0, 0.9])),
        lambd=data.draw(st.sampled_from([1.0, 0.95, 0.0])),
        rae_decay=data.draw(st.sampled_from([1.0, 0.95, 0.0])),
        normalize_advantages=data.draw(st.sampled_from([None, True, False])),
        opd_kl_coef=data.draw(st.sampled_from([0.0, 0.5])),
    )
    estimate = compute_advantages(batch, algorithm)
    assert_rows(estimate.advantages, oracle(algorithm, batch))
    if name == "rae":
        found = {(game, role): b for game, roles in estimate.baselines.items() for role, b in roles.items()}
        assert found == pytest.approx(moving_averages(algorithm, batch)[1])
    if name == "ppo":
        assert estimate.returns is not None
        assert_rows(estimate.returns, [token_level("ppo", algorithm, batch, i)[1] for i in range(len(batch.masks))])


def advantages(name: str, batch: RolloutBatch, **settings: object) -> list[list[float]]:
    algorithm = AlgorithmConfig(advantage_estimator=name, **{"normalize_advantages": False, **settings})  # type: ignore[arg-type]
    return [a.tolist() for a in compute_advantages(batch, algorithm).advantages]


def test_grpo_by_hand() -> None:
    # mean 1/2, unbiased std sqrt(1/3): +-sqrt(3)/2
    half = math.sqrt(3) / 2
    batch = one_per_group([[1.0, 0.0, 0.0, 1.0]], lengths=2)
    for name in ("grpo", "gspo", "cispo"):
        assert np.allclose(advantages(name, batch), [[half] * 2, [-half] * 2, [-half] * 2, [half] * 2], rtol=1e-5)
    assert advantages("grpo", batch, grpo_std_normalization=False) == [[0.5] * 2, [-0.5] * 2, [-0.5] * 2, [0.5] * 2]
    assert advantages("dr_grpo", batch) == [[0.5] * 2, [-0.5] * 2, [-0.5] * 2, [0.5] * 2]


def test_rloo_by_hand() -> None:
    # 1 against the mean of (0, 0, 1); 0 against the mean of (1, 0, 1); and a group of another size beside it
    batch = one_per_group([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0]])
    assert np.allclose(advantages("rloo", batch), [[2 / 3], [-2 / 3], [-2 / 3], [2 / 3], [2.0], [-2.0]])


def test_gae_by_hand() -> None:
    """Two decisions around a tool's two tokens; V = 1 and 3, reward 4, gamma 1/2, lambda 1/2.

    delta_2 = 4 - 3 = 1;  delta_1 = 1/2 x 3 - 1 = 1/2;  A_1 = 1/2 + 1/4 = 3/4. The gap neither decays nor counts.
    """
    batch = RolloutBatch(
        np.asarray([4.0]), np.zeros(1, int), [np.asarray([1.0, 0, 0, 1])], values=[np.asarray([1.0, 50, 50, 3])]
    )
    estimate = compute_advantages(batch, AlgorithmConfig(advantage_estimator="ppo", gamma=0.5, lambd=0.5))
    assert estimate.advantages[0].tolist() == [0.75, 0, 0, 1]
    assert estimate.returns is not None
    assert estimate.returns[0].tolist() == [1.75, 0, 0, 4]


def test_turn_rewards_by_hand() -> None:
    """Two turns of two tokens around a tool's one: rewards 1 and 3, of 6 in all; V = 1, 2, 3, 4, gamma 1/2, lambda 1.

    G_t = r_t + 1/2 G_{t+1} over the trained tokens: 3 + 2 = 5, 2.5, 1 + 1.25 = 2.25, 1.125; and A = G - V.
    """
    batch = RolloutBatch(
        np.asarray([6.0]),
        np.zeros(1, int),
        [np.asarray([1.0, 1, 0, 1, 1])],
        values=[np.asarray([1.0, 2, 9, 3, 4])],
        turn_rewards=[np.asarray([0.0, 1, 0, 0, 3])],
    )
    estimate = compute_advantages(batch, AlgorithmConfig(advantage_estimator="ppo", gamma=0.5, lambd=1.0))
    assert estimate.returns is not None
    assert estimate.returns[0].tolist() == [2.25 / 2, 2.25, 0, 2.5, 5]
    assert estimate.advantages[0].tolist() == [0.125, 0.25, 0, -0.5, 1]


def test_reinforce_plus_plus_by_hand() -> None:
    """Reward 4 on the last token, KL 1 at each of three, coefficient 1, gamma 1/2: 3, 1/2 x 3 - 1, 1/2 x 1/2 - 1."""
    zero = [np.zeros(3)]
    batch = RolloutBatch(
        np.asarray([4.0]), np.zeros(1, int), [np.ones(3)], old_log_probs=zero, ref_log_probs=[np.full(3, -1.0)]
    )
    settings = {"gamma": 0.5, "kl_coef": 1.0, "kl_loss_type": "k1"}
    assert advantages("reinforce_plus_plus", batch, **settings) == [[-0.75, 0.5, 3.0]]


def test_siblings_count_once_and_share_the_advantage() -> None:
    """Rollouts of reward 1 (three samples), 0 and 0: the mean is 1/3, not 3/5."""
    batch = RolloutBatch(
        np.asarray([1.0, 1, 1, 0, 0]), np.zeros(5, int), [np.ones(1)] * 5, rollout_ids=np.asarray([7, 7, 7, 8, 9])
    )
    assert np.allclose(advantages("dr_grpo", batch), [[2 / 3]] * 3 + [[-1 / 3]] * 2)


def test_a_fully_masked_sample_counts_in_the_baseline_and_gets_nothing() -> None:
    batch = RolloutBatch(np.asarray([1.0, 0.0]), np.zeros(2, int), [np.ones(2), np.zeros(2)])
    estimate = compute_advantages(batch, AlgorithmConfig(advantage_estimator="dr_grpo"))
    assert [a.tolist() for a in estimate.advantages] == [[0.5, 0.5], [0, 0]]
    assert estimate.metrics == {"zero_std_groups": 0.0, "fully_masked_samples": 1.0}


def test_groups_without_variance_get_exact_zeros_and_are_counted() -> None:
    batch = one_per_group([[0.1] * 7, [0.3], [1.0, 0.0]])  # the mean of seven 0.1 is not 0.1
    for name in ("grpo", "rloo", "dr_grpo", "reinforce_plus_plus_baseline"):
        estimate = compute_advantages(batch, AlgorithmConfig(advantage_estimator=name, normalize_advantages=False))
        assert not np.concatenate(estimate.advantages[:8]).any()
        assert np.concatenate(estimate.advantages[8:]).all()
        assert estimate.metrics["zero_std_groups"] == 2


def test_a_critic_that_knows_the_returns_explains_their_variance() -> None:
    batch = one_per_group([[1.0, 0.0]], lengths=2, values=[np.ones(2), np.zeros(2)])
    assert (
        compute_advantages(batch, AlgorithmConfig(advantage_estimator="ppo")).metrics["value_explained_variance"] == 1
    )


# --- whitening -------------------------------------------------------------------------------------------------------


@given(rollouts())
def test_whitening_equals_plain_loops(batch: RolloutBatch) -> None:
    values = [np.where(m > 0, v, 1e9) for v, m in zip(batch.values, batch.masks)]  # type: ignore[arg-type]
    assert_rows(whiten(values, batch.masks), oracle_whiten([v.tolist() for v in values], batch.masks))


def test_whitening_far_from_zero_keeps_its_digits() -> None:
    """E[x^2] - E[x]^2 would have lost them all."""
    (actual,) = whiten([np.asarray([1e9 - 1, 1e9, 1e9 + 1])], [np.ones(3)])
    np.testing.assert_allclose(actual, [-1, 0, 1], atol=1e-6)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_nothing_left_to_train_on() -> None:
    batch = RolloutBatch(np.zeros(0), np.zeros(0, int), [])
    for name in ("grpo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"):
        assert compute_advantages(batch, AlgorithmConfig(advantage_estimator=name)).advantages == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": np.asarray([1.0, math.nan, math.inf])}, r"rewards of samples \[1, 2\] are not finite"),
        ({"rollout_ids": np.asarray([5, 5, 6])}, r"siblings differ in rewards: rollouts \[5\]"),
        ({"rewards": np.ones(3), "rollout_ids": np.asarray([5, 6, 5])}, r"differ in group_ids: rollouts \[5\]"),
        ({"group_ids": np.zeros(2, int)}, "group_ids has 2 entries for 3 rewards"),
        (
            {"old_log_probs": [np.zeros(2), np.zeros(3), np.zeros(2)]},
            r"old_log_probs of samples \[1\] have other shapes",
        ),
        ({"values": [np.zeros(2), np.zeros(2), np.asarray([0, math.nan])]}, r"values of samples \[2\] are not finite"),
        ({"turn_rewards": [np.zeros(2), np.zeros(1), np.zeros(2)]}, r"turn_rewards of samples \[1\] have other shapes"),
        (
            {"masks": [np.zeros(2)] * 3, "turn_rewards": [*np.zeros((2, 2)), np.asarray([0, math.inf])]},
            r"turn_rewards of samples \[2\] are not finite",
        ),
    ],
)
def test_bad_batches_name_their_samples(change: dict[str, object], message: str) -> None:
    fields = {"rewards": np.asarray([1.0, 0, 0]), "group_ids": np.asarray([0, 0, 1]), "masks": [np.ones(2)] * 3}
    with pytest.raises(ValueError, match=message):
        compute_advantages(RolloutBatch(**{**fields, **change}), AlgorithmConfig())  # type: ignore[arg-type]


def test_what_an_algorithm_lacks_is_named() -> None:
    batch = one_per_group([[1.0, 0.0]])
    for settings, message in [
        ({"advantage_estimator": "ppo"}, "advantage_estimator ppo requires values"),
        ({"kl_coef": 0.1}, "kl_coef requires old_log_probs"),
        ({"opd_kl_coef": 0.1}, "opd_kl_coef requires old_log_probs"),
    ]:
        with pytest.raises(ValueError, match=message):
            compute_advantages(batch, AlgorithmConfig(**settings))  # type: ignore[arg-type]


def one_for_all(batch: RolloutBatch, algorithm: AlgorithmConfig) -> Estimate:
    return Estimate([mask * algorithm.gamma for mask in batch.masks])


def with_prompt(batch: RolloutBatch, algorithm: AlgorithmConfig) -> Estimate:
    return Estimate([np.zeros(len(mask) + 1) for mask in batch.masks])


def not_a_number(batch: RolloutBatch, algorithm: AlgorithmConfig) -> Estimate:
    return Estimate([np.full(mask.shape, math.nan) for mask in batch.masks])


def test_a_users_estimator_is_called_and_checked() -> None:
    batch = one_per_group([[1.0, 0.0]])
    assert advantages(f"{__name__}:one_for_all", batch, gamma=0.5) == [[0.5], [0.5]]
    with pytest.raises(PlugInError, match=r"test_advantages:with_prompt' returned .*shaped like the masks"):
        advantages(f"{__name__}:with_prompt", batch)
    with pytest.raises(PlugInError, match=r"test_advantages:not_a_number' returned .*nan.* finite"):
        advantages(f"{__name__}:not_a_number", batch)


def test_the_controllers_side_imports_no_torch() -> None:
    modules = "advantages, aggregation, corrections, distillation, rewards"
    code = f"import sys; from miles_spmd.algorithms import {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
