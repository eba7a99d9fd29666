from __future__ import annotations

from pathlib import Path

from miles_spmd.bench.endpoint import bench_endpoint
from tests.bench.test_parts import random_checkpoint


def test_every_turn_of_every_session_is_answered(tmp_path: Path) -> None:
    """Else the benchmark raises, also where the endpoint takes a turn for a branch."""
    folder = random_checkpoint("random:qwen3-0.6b", tmp_path)
    many, one = bench_endpoint(folder, sessions=5, turns=3, repeats=2)
    assert (many["sessions at a time"], one["sessions at a time"]) == (5, 1)
    assert all(row[name] > 0 for row in (many, one) for name in row)
