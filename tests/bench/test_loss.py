from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from miles_spmd.bench.loss import CHUNKS, FULL, GIB, Shape, bench_loss, show


@pytest.mark.slow
def test_both_ways_are_measured_or_computed_and_shown() -> None:
    """2,048 x 20,000 logits are 0.15 GiB: less than one chunk, of which ours needs two copies and the other three."""
    shape = Shape(vocabulary=20_000, tokens=2_048, hidden=8, dtype="float32", top_p=1.0, top_k=-1)
    logits = 4 * shape.vocabulary * shape.tokens / GIB
    ours, full = bench_loss(shape)
    assert (ours.way, full.way) == (CHUNKS, FULL)
    assert 1.8 < ours.extra_gib / logits < 2.3
    assert 2.8 < full.extra_gib / logits < 3.3
    shown = io.StringIO()
    show(shape, [ours, full], Console(file=shown, width=200))
    *table, first, second = shown.getvalue().strip().splitlines()
    assert CHUNKS in "".join(table)
    assert json.loads(first)["extra_gib"] == ours.extra_gib
    assert json.loads(second)["seconds"] == full.seconds
