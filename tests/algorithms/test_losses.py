"""Value and gradient of every loss against plain loops, to log-probs and through log_softmax to logits; by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles_spmd.algorithms.losses import (
    PolicyLoss,
    PreferenceLoss,
    RewardModelLoss,
    SupervisedLoss,
    ValueLoss,
    make_loss,
)
from miles_spmd.config import AlgorithmConfig
from miles_spmd.types.token_batch import TokenBatch
from tests.algorithms import loss_cases as oracle
from tests.algorithms.dual import Dual, larger, total, variables
from tests.algorithms.loss_cases import Case, cases, compare, segment_sum

policies = st.builds(
    AlgorithmConfig,
    loss_type=st.sampled_from(["ppo", "gspo", "cispo"]),
    eps_clip=st.sampled_from([0.1, 0.2, 1.0]),
    eps_clip_high=st.sampled_from([None, 0.28, 4.0]),
    eps_clip_c=st.sampled_from([None, 3.0]),
    use_opsm=st.booleans(),
    opsm_delta=st.sampled_from([1e-4, 0.05]),
    kl_loss_coef=st.sampled_from([0.0, 0.1]),
    kl_loss_type=st.sampled_from(["k1", "k2", "k3", "low_var_kl"]),
    use_unbiased_kl=st.booleans(),
    entropy_coef=st.sampled_from([0.0, 0.01]),
)


@given(policies, cases())
def test_policy_loss(algorithm: AlgorithmConfig, case: Case) -> None:
    logits, log_probs, entropy = case.torch_log_probs()
    loss, _ = PolicyLoss(algorithm)(log_probs, entropy, case.tokens())
    compare(loss, oracle.policy_loss(algorithm, case, *case.plain_log_probs()), case, logits)

    leaf = log_probs.detach().requires_grad_()
    loss, _ = PolicyLoss(algorithm)(leaf, entropy.detach(), case.tokens())
    constant = [Dual(e) for e in entropy.tolist()]
    compare(loss, oracle.policy_loss(algorithm, case, variables(leaf.tolist()), constant), case, leaf)


@given(policies, cases())
def test_policy_metrics(algorithm: AlgorithmConfig, case: Case) -> None:
    _, log_probs, entropy = case.torch_log_probs()
    _, sums = PolicyLoss(algorithm)(log_probs, entropy, case.tokens())
    trained = case.weights != 0
    new = log_probs.detach().numpy()
    alone = AlgorithmConfig(**{**algorithm.model_dump(), "entropy_coef": 0.0, "kl_loss_coef": 0.0})
    plain = oracle.policy_loss(alone, case, [Dual(x) for x in new], [Dual(0.0)] * len(new))
    assert sums["tokens"] == trained.sum()
    expected = {
        "pg_loss": (case.weights * [p.value for p in plain]).sum(),
        "ppo_kl": (case.old - new)[trained].sum(),
        "entropy": entropy.detach().numpy()[trained].sum(),
    }
    for name, value in expected.items():
        assert float(sums[name]) == pytest.approx(value, rel=1e-9, abs=1e-12), name
    assert not any(value.requires_grad for value in sums.values())


@given(st.sampled_from(["dpo", "ipo", "simpo"]), st.sampled_from([0.1, 2.0]), cases(pairs=True))
def test_preference_loss(kind: str, beta: float, case: Case) -> None:
    algorithm = AlgorithmConfig(preference_loss=kind, dpo_beta=beta, simpo_gamma=0.5)  # type: ignore[arg-type]
    logits, log_probs, entropy = case.torch_log_probs()
    loss, _ = PreferenceLoss(algorithm)(log_probs, entropy, case.tokens())
    compare(loss, oracle.preference_loss(algorithm, case, case.plain_log_probs()[0]), case, logits)


@given(cases(), st.sampled_from([0.05, 0.2]))
def test_value_loss(case: Case, clip: float) -> None:
    old, returns = case.ref, case.advantages
    values = torch.from_numpy(old + 0.2 * case.logits[:, 0]).requires_grad_()
    tokens = TokenBatch(
        torch.from_numpy(case.weights), old_values=torch.from_numpy(old), returns=torch.from_numpy(returns)
    )
    loss, sums = ValueLoss(AlgorithmConfig(value_clip=clip))(values, tokens)
    compare(loss, oracle.value_loss(clip, variables(values.tolist()), old, returns), case, values)
    assert float(sums["value_loss"]) == pytest.approx(float((tokens.loss_weights * loss).sum().detach()))


@given(cases(pairs=True))
def test_reward_model_loss(case: Case) -> None:
    values = torch.from_numpy(case.advantages).requires_grad_()
    loss, _ = RewardModelLoss()(values, case.tokens())
    plain = variables(values.tolist())
    wanted = []
    for i in range(len(plain)):
        of_pair = [j for j in range(len(plain)) if case.sequence[j] // 2 == case.sequence[i] // 2 and case.weights[j]]
        wanted.append(oracle.softplus(total([plain[j] * (2.0 * (case.sequence[j] % 2) - 1) for j in of_pair])))
    compare(loss, wanted, case, values)


@given(cases())
def test_supervised_loss(case: Case) -> None:
    logits, log_probs, entropy = case.torch_log_probs()
    loss, _ = SupervisedLoss()(log_probs, entropy, case.tokens())
    compare(loss, [-x for x in case.plain_log_probs()[0]], case, logits)


# --- by hand ---------------------------------------------------------------------------------------------------------


def batch(weights: list[float], **columns: list[float]) -> TokenBatch:
    return TokenBatch(
        torch.tensor(weights, dtype=torch.float64),
        **{name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()},  # type: ignore[arg-type]
    )


def leaf(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def gradient(loss: torch.Tensor, x: torch.Tensor) -> list[float]:
    return torch.autograd.grad(loss.sum(), x)[0].tolist()


def test_without_old_log_probs_the_gradient_is_the_policy_gradient() -> None:
    new = leaf(-1.0, -2.0)
    for name in ("ppo", "cispo"):
        loss, sums = PolicyLoss(AlgorithmConfig(loss_type=name))(
            new, torch.zeros(2), batch([1, 1], advantages=[0.5, -2.0])
        )
        assert gradient(loss, new) == [-0.5, 2.0]
        assert sums["ppo_kl"] == sums["pg_clipfrac"] == 0


def test_cispo_keeps_the_gradient_where_ppo_clips() -> None:
    new = leaf(0.0, 0.0)
    tokens = batch([1, 1], advantages=[1.0, -1.0], old_log_probs=[-1.0, 1.0])  # ratios e and 1/e
    for name, wanted in (("ppo", [0.0, 0.0]), ("cispo", [-1.2, 0.8])):  # -clip(r) A
        loss, sums = PolicyLoss(AlgorithmConfig(loss_type=name))(new, torch.zeros(2), tokens)
        assert gradient(loss, new) == pytest.approx(wanted)
        assert sums["pg_clipfrac"] == 2


def test_gspo_ratio_is_the_geometric_mean_of_its_sequence() -> None:
    """Ratios 2 and 1/2 of one sequence make s = 1: PPO would clip both tokens, GSPO none. The other sequence's single
    token has ratio e, above the clip."""
    new = leaf(math.log(0.4), math.log(0.2), -1.0)
    old = [math.log(0.2), math.log(0.4), -2.0]
    tokens = TokenBatch(
        **vars(batch([1, 1, 1], advantages=[3.0, 3.0, 1.0], old_log_probs=old))
        | {"sequence_sum": segment_sum(torch.tensor([0, 0, 1]))}
    )
    loss, sums = PolicyLoss(AlgorithmConfig(advantage_estimator="gspo"))(new, torch.zeros(3), tokens)
    assert loss.tolist() == pytest.approx([-3.0, -3.0, -1.2])
    assert gradient(loss, new) == pytest.approx([-3.0, -3.0, 0.0])  # each of two losses, half by each token
    assert sums["pg_clipfrac"] == 1


def test_dual_clip_bounds_the_loss_of_a_bad_token_that_became_likely() -> None:
    new = leaf(0.0)
    tokens = batch([1], advantages=[-1.0], old_log_probs=[-3.0])
    loss, _ = PolicyLoss(AlgorithmConfig(eps_clip_c=3.0))(new, torch.zeros(1), tokens)
    assert (loss.tolist(), gradient(loss, new)) == ([3.0], [0.0])


def test_a_rejected_token_keeps_its_kl_and_entropy() -> None:
    new = leaf(-1.0)
    tokens = batch([1], advantages=[5.0], old_log_probs=[-1.0], ref_log_probs=[-1.5], policy_weights=[0.0])
    algorithm = AlgorithmConfig(kl_loss_coef=0.1, kl_loss_type="k1", entropy_coef=0.01)
    loss, sums = PolicyLoss(algorithm)(new, torch.ones(1), tokens)
    assert loss.tolist() == pytest.approx([0.1 * 0.5 - 0.01])
    assert sums["pg_loss"] == 0


def test_opsm_drops_only_bad_sequences_that_the_policy_left() -> None:
    """Two sequences that the policy left (mean log-ratio -1), one good, one bad; and a bad one that it came to."""
    new = leaf(-3.0, -1.0, -3.0, -1.0, -1.0)
    tokens = TokenBatch(
        **vars(batch([1] * 5, advantages=[1.0, 1.0, -1.0, -1.0, -1.0], old_log_probs=[-1.0, -1.0, -1.0, -1.0, -2.0]))
        | {"sequence_sum": segment_sum(torch.tensor([0, 0, 1, 1, 2]))}
    )
    loss, sums = PolicyLoss(AlgorithmConfig(use_opsm=True, opsm_delta=0.5))(new, torch.zeros(5), tokens)
    assert [x != 0 for x in loss.tolist()] == [True, True, False, False, True]
    assert sums["opsm_masked"] == 2


def test_dpo_by_hand() -> None:
    """Preferred: log-ratios 0.5 and 0.5; rejected: -1. beta 0.1: -log sigmoid(0.2), gradient +-beta sigmoid(-0.2)."""
    new = leaf(-1.0, -1.0, -3.0)
    tokens = TokenBatch(
        **vars(batch([1 / 3] * 3, ref_log_probs=[-1.5, -1.5, -2.0], pair_signs=[1.0, 1.0, -1.0]))
        | {"pair_sum": segment_sum(torch.tensor([0, 0, 0]))}
    )
    loss, sums = make_loss("dpo", AlgorithmConfig())(new, torch.zeros(3), tokens)
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-0.2))] * 3)
    slope = 0.1 / (1 + math.exp(0.2))
    assert gradient(loss / 3, new) == pytest.approx([-slope, -slope, slope])
    assert float(sums["reward_accuracy"]) == pytest.approx(1)
    assert float(sums["reward_chosen"]) == pytest.approx(0.1)
    assert float(sums["reward_rejected"]) == pytest.approx(-0.1)
    assert float(sums["reward_margin"]) == pytest.approx(0.2)


@pytest.mark.parametrize(("kind", "trained", "wanted"), [
    ("simpo", [1.0, 1.0, 1.0], math.log(1 + math.exp(-(2 * (-1.5 + 3) - 0.5)))),  # means -1.5 and -3
    ("simpo", [1.0, 1.0, 0.0], math.log(1 + math.exp(-(2 * (-1.5 - 0) - 0.5)))),  # a rejected answer without tokens
    ("ipo", [1.0, 1.0, 1.0], (2 - 1 / 4) ** 2),  # log-ratios sum to 1 and -1
])  # fmt: skip
def test_simpo_and_ipo_by_hand(kind: str, trained: list[float], wanted: float) -> None:
    new = leaf(-1.0, -2.0, -3.0)
    tokens = TokenBatch(
        **vars(batch(trained, ref_log_probs=[-1.5, -2.5, -2.0], pair_signs=[1.0, 1.0, -1.0]))
        | {"sequence_sum": segment_sum(torch.tensor([0, 0, 1])), "pair_sum": segment_sum(torch.tensor([0, 0, 0]))}
    )
    algorithm = AlgorithmConfig(preference_loss=kind, dpo_beta=2.0, simpo_gamma=0.5)  # type: ignore[arg-type]
    loss, _ = PreferenceLoss(algorithm)(new, torch.zeros(3), tokens)
    assert loss.tolist() == pytest.approx([wanted] * 3)
    assert np.isfinite(gradient(loss, new)).all()


def test_value_loss_by_hand() -> None:
    """Moving from 0 to 0.5 with clip 0.2: away from the return 0 costs 0.25, towards the return 1 costs (0.2 - 1)^2."""
    values = leaf(0.5, 0.5)
    loss, sums = ValueLoss(AlgorithmConfig())(values, batch([1, 1], old_values=[0.0, 0.0], returns=[0.0, 1.0]))
    assert loss.tolist() == pytest.approx([0.25, 0.64])
    assert gradient(loss, values) == pytest.approx([1.0, 0.0])
    assert sums["value_clipfrac"] == 1


def test_extreme_log_ratios_stay_finite_in_fp32() -> None:
    new = torch.tensor([0.0, -300.0], requires_grad=True)
    tokens = TokenBatch(
        torch.ones(2),
        advantages=torch.tensor([-1.0, 1.0]),
        old_log_probs=torch.tensor([-300.0, 0.0]),
        ref_log_probs=torch.tensor([-300.0, 0.0]),
        sequence_sum=segment_sum(torch.tensor([0, 1])),
    )
    for name in ("ppo", "gspo", "cispo"):
        algorithm = AlgorithmConfig(loss_type=name, kl_loss_coef=0.1, kl_loss_type="low_var_kl", use_unbiased_kl=True)
        loss, _ = PolicyLoss(algorithm)(new, torch.zeros(2), tokens)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(torch.autograd.grad(loss.sum(), new)[0]).all()


def test_not_a_number_is_never_masked() -> None:
    for name in ("ppo", "gspo", "cispo"):
        tokens = TokenBatch(
            torch.ones(2),
            advantages=torch.ones(2),
            old_log_probs=torch.tensor([math.nan, 0.0]),
            sequence_sum=segment_sum(torch.tensor([0, 0])),
        )
        loss, _ = PolicyLoss(AlgorithmConfig(loss_type=name))(torch.zeros(2), torch.zeros(2), tokens)
        assert torch.isnan(loss[0])


def test_what_a_loss_lacks_is_named() -> None:
    tokens = batch([1], advantages=[1.0])
    with pytest.raises(ValueError, match="this loss requires sequence_sum for every token"):
        PolicyLoss(AlgorithmConfig(loss_type="gspo"))(leaf(0.0), torch.zeros(1), tokens)
    with pytest.raises(ValueError, match="requires returns"):
        ValueLoss(AlgorithmConfig())(leaf(0.0), tokens)
    with pytest.raises(ValueError, match="requires ref_log_probs"):
        make_loss("dpo", AlgorithmConfig())(leaf(0.0), torch.zeros(1), tokens)
    with pytest.raises(ValueError, match="no loss for mode 'x'"):
        make_loss("x", AlgorithmConfig())


def test_larger_of_duals_is_a_maximum() -> None:
    """The oracle's own numbers: d/dx max(x^2, x) at 3 and at 0.5."""
    for x, slope in ((3.0, 6.0), (0.5, 1.0)):
        (v,) = variables([x])
        assert larger(v * v, v).slopes == (slope,)
    assert np.isclose(oracle.softplus(Dual(0.0)).value, math.log(2))
