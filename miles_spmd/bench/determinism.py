"""The cost of determinism, ledger and bitwise parity: the same GRPO steps without and with them."""

from __future__ import annotations

import sys
from typing import Any

from miles_spmd.bench.result import Row
from miles_spmd.bench.step import bench_step

EXACT = ["determinism.deterministic=true", "determinism.ledger=true"]
RUNS = {
    "none": ["determinism.deterministic=false", "determinism.ledger=false", "determinism.parity=off"],
    "deterministic, ledger": [*EXACT, "determinism.parity=off"],
    "deterministic, ledger, parity": [*EXACT, "determinism.parity=bitwise"],
}
PHASES = ("rollout", "train", "step")


def bench_determinism(overrides: list[str], **options: Any) -> list[Row]:
    """Return the seconds of each phase, and in percent the increase over the run without any. ``options`` are the other
    arguments of bench_step. Each row is printed to stderr when it is measured, which takes a minute and more."""
    rows: list[Row] = []
    for run, settings in RUNS.items():
        (seconds,) = bench_step(overrides=[*overrides, *settings], **options)
        row = {"run": run, **{f"{phase} s": seconds[f"{phase} s"] for phase in PHASES}}
        plain = rows[0] if rows else row
        rows.append(row | {f"{phase} %": 100 * (row[f"{phase} s"] / plain[f"{phase} s"] - 1) for phase in PHASES})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows
