"""Every engine against transformers, by the same checks (tests/generation/conformance.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.generation import conformance
from tests.ranks import Ranks


@pytest.mark.parametrize(("kind", "tp_size"), [("torch", 1), ("sglang", 1), ("sglang", 2)])
@pytest.mark.parametrize("number", range(len(conformance.CHECKS)), ids=lambda n: conformance.CHECKS[n].__name__)
def test_engine(ranks: Ranks, folders: list[Path], kind: str, tp_size: int, number: int) -> None:
    answers = ranks.run(tp_size, conformance.check, kind, tp_size, number, folders)
    assert all(answer == answers[0] for answer in answers)
