from __future__ import annotations

import io
import json
import shutil

import pytest
from rich.console import Console

from miles_spmd.bench.sandbox import bench_sandbox, show


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_every_kind_of_test_is_measured() -> None:
    rows = bench_sandbox(jobs=2, tests=2, seconds=0.2)
    assert len(rows) == 4
    assert all(row["per s"] > 0 for row in rows)
    shown = io.StringIO()
    show(rows, Console(file=shown, width=200))
    assert [json.loads(line) for line in shown.getvalue().splitlines()[-4:]] == rows
