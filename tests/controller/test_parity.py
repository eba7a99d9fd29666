from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from miles_spmd.config import DeterminismConfig
from miles_spmd.controller.journal.parity import Parity, ParityError
from miles_spmd.types.sample import Prompt
from miles_spmd.types.train_sequence import TrainSequence
from tests.samples import sample_of

ENGINE = [[-1.0, -2.0, -3.0], [-0.5, -0.25, -4.0]]
TRAINER = [[-1.0, -2.0, -3.0], [-0.5, -0.25 - 2**-24, -4.5]]  # the second sample's last two tokens differ


def check(trainer: list[list[float]] = TRAINER, **settings: Any) -> tuple[dict[str, float], list[TrainSequence]]:
    return check_with(Parity(DeterminismConfig(**settings)), trainer)


def check_with(parity: Parity, trainer: list[list[float]] = TRAINER) -> tuple[dict[str, float], list[TrainSequence]]:
    """Two samples of a prompt of one token each, with responses of three trained tokens."""
    samples = [sample_of(Prompt(f"data:{i}", "", [7]), i + 4, [10 * i, 10 * i + 1, 10 * i + 2]) for i in range(2)]
    sequences = [
        TrainSequence(
            np.asarray(sample.sequence, np.int32),
            np.asarray([0, 1, 1, 1], np.float32),
            rollout_log_probs=np.asarray([0, *log_probs], np.float32),
        )
        for sample, log_probs in zip(samples, ENGINE)
    ]
    parity.begin_step(samples, sequences)
    log_probs = [np.asarray([0, *own], np.float32) for own in trainer]
    return parity.check(3, sequences, log_probs), sequences


def test_every_bit_counts() -> None:
    metrics, _ = check()
    assert metrics["parity/tokens"] == 6
    assert metrics["parity/mismatches"] == 2
    assert metrics["parity/max_abs_diff"] == 0.5
    assert check(ENGINE)[0]["parity/mismatches"] == 0
    assert check(ENGINE)[0]["parity/max_abs_diff"] == 0


def flips(**settings: Any) -> tuple[dict[str, float], list[TrainSequence]]:
    """Two responses of three tokens. The trainer's top-1 token differs from the engine's at the prompt and at the last
    token of both, of which the first is not trained."""
    parity = Parity(DeterminismConfig(**settings))
    samples = [sample_of(Prompt(f"data:{i}", "", [7]), 0, [1, 2, 3], top1_ids=[1, 4, 5]) for i in range(2)]
    weights = np.asarray([[0, 1, 1, 0], [0, 1, 1, 1]], np.float32)
    sequences = [TrainSequence(np.asarray(s.sequence, np.int32), w) for s, w in zip(samples, weights)]
    parity.begin_step(samples, sequences)
    return parity.check_top1(3, sequences, [np.asarray([[0], [1], [4], [6]], np.int32)] * 2), sequences


def test_top1_tokens_have_a_budget() -> None:
    metrics, _ = flips(mismatch_budget={"top1_flips": 0.25})
    assert metrics == {"train/train_rollout_top1_flips": 0.2}
    with pytest.raises(ParityError) as error:
        flips(mismatch_budget={"top1_flips": 0.15})
    assert "the top-1 tokens of engine and trainer differ at 0.2 of 5 tokens" in str(error.value)
    assert "allowed 0.15; first: prompt data:1, sample 0, token 2 of the response: engine 5, trainer 6" in str(
        error.value
    )
    _, sequences = flips(mismatch_budget={"top1_flips": 0.15, "max": 1.0}, parity_gate="mask")
    assert [s.loss_weights.tolist() for s in sequences] == [[0, 1, 1, 0], [0, 1, 1, 0]]


def test_stop_names_the_first_token() -> None:
    with pytest.raises(ParityError) as error:
        check(parity="bitwise")
    assert "step 3" in str(error.value)
    assert "differ on 2 of 6 tokens (max abs diff 0.5)" in str(error.value)
    assert "first: prompt data:1, sample 5, token 1 of the response (id 11)" in str(error.value)
    assert "engine -0.25, trainer -0.25000006" in str(error.value)
    check(ENGINE, parity="bitwise")


def test_mask_removes_what_differs_from_the_loss() -> None:
    _, sequences = check(parity="bitwise", parity_gate="mask")
    assert [s.loss_weights.tolist() for s in sequences] == [[0, 1, 1, 1], [0, 1, 0, 0]]
    _, sequences = check(mismatch_budget={"max": 0.1}, parity_gate="mask")
    assert [s.loss_weights.tolist() for s in sequences] == [[0, 1, 1, 1], [0, 1, 1, 0]]


def test_warn_reports_once_and_continues_to_count(caplog: pytest.LogCaptureFixture) -> None:
    parity = Parity(DeterminismConfig(parity="bitwise", parity_gate="warn"))
    for _ in range(2):
        metrics, sequences = check_with(parity)
        assert [s.loss_weights.sum() for s in sequences] == [3, 3]
        assert metrics["parity/mismatches"] == 2
    assert caplog.text.count("data:1") == 1


@pytest.mark.parametrize(
    ("kind", "found"), [("mean", 0.5 / 6), ("max", 0.5), ("k3", (np.exp(-0.5) - 0.5) / 6), ("p999", 0.49)]
)
def test_budgets(kind: str, found: float) -> None:
    check(mismatch_budget={kind: found * 1.1})
    with pytest.raises(ParityError, match=f"{kind} is .*largest: prompt data:1, sample 5, token 2 of the response"):
        check(mismatch_budget={kind: found * 0.9})
