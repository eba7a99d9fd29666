"""Checkpoints of models with tensors that no gradient updates: an optimizer has no state of them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from miles_spmd.controller.journal.ledger import LedgerRecorder
from miles_spmd.ledger.entries import LedgerError, Saved, digests


def test_an_optimizer_without_state_of_correction_biases() -> None:
    context = SimpleNamespace(tensors={"actor": ["a.e_score_correction_bias", "b.weight"]})
    weights, state = (digests(np.arange(count, dtype=np.uint64)) for count in (2, 1))
    saved = Saved(1, {"actor": weights}, {"actor": {"exp_avg": state}})
    LedgerRecorder._check(saved, saved, context)
    other = Saved(1, {"actor": weights}, {"actor": {"exp_avg": digests(np.array([7], np.uint64))}})
    with pytest.raises(LedgerError, match=r"exp_avg of the actor differ .* in 1 of 1 tensors, such as b.weight"):
        LedgerRecorder._check(saved, other, context)
