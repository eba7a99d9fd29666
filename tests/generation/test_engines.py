"""Every engine against transformers, by the same checks (tests/generation/conformance.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.generation import conformance
from tests.ranks import Ranks


@pytest.mark.parametrize(("kind", "tp_size"), [("torch", 1), ("sglang", 1), ("sglang", 2)])
def test_engine(ranks: Ranks, folders: list[Path], kind: str, tp_size: int) -> None:
    first, *others = ranks.run(tp_size, conformance.check, kind, tp_size, folders)
    assert [*first] == [check.__name__ for check in conformance.CHECKS]
    for answers in others:
        for name, answer in answers.items():
            assert answer == first[name], name
