from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from miles_spmd.bench import quickstart


@pytest.mark.slow
def test_every_phase_of_a_step_is_measured_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "SIZES", quickstart.SIZES[:1])
    (row,) = quickstart.bench_quickstart(ranks=1, steps=3, trl_python=None)
    assert set(row.phases) >= {"rollout", "train", "refit"}
    assert 0 < sum(row.phases.values()) <= row.step * 1.5
    shown = io.StringIO()
    quickstart.show([row], Console(file=shown, width=120))
    *table, line = shown.getvalue().strip().splitlines()
    assert "0.2M" in "".join(table)
    assert json.loads(line)["step"] == row.step
