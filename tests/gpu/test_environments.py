"""Several turns on GPUs: engine and trainer are bitwise equal on each, and a run repeats."""

from __future__ import annotations

from pathlib import Path

from miles_spmd.ledger.chain import verify
from miles_spmd.ledger.compare import compare
from tests.gpu import machine
from tests.gpu.test_grpo import grpo, series

EXACT = [
    "reward.rm_type=miles_spmd.bench.step:by_chance",
    "determinism.deterministic=true",
    "determinism.parity=bitwise",
    "model.dtype=bfloat16",
]
TURNS = [
    "environment.environment=miles_spmd.bench.turns:turns",
    "environment.environment_kwargs={turns = 4, new_tokens = 8, given = 5}",
    "rollout_max_response_len=47",
    *EXACT,
]


@machine.needs(1)
def test_turns_are_exact_and_repeat(warm: Path) -> None:
    once = grpo(warm, "turns", 1, 3, *TURNS, "environment.environment_workers=1")
    again = grpo(warm, "turns-again", 1, 3, *TURNS, "environment.environment_workers=3")
    for metrics in (once, again):
        assert min(series(metrics, "parity/tokens")) > 0
        assert max(series(metrics, "parity/mismatches")) == 0
        assert max(series(metrics, "rollout/turns")) == 4
    same = compare(verify(warm / "turns"), verify(warm / "turns-again"))
    assert same.equal, same.difference
    hits = series(once, "rollout/prefix_hit_rate")
    machine.measured("turns of the quickstart's model", {"prefix hits": hits[-1]})
    assert min(hits) > 0.6


@machine.needs(1)
def test_what_is_cut_is_continued(warm: Path) -> None:
    """Partial rollouts: tokens of the step's own weights are bitwise equal."""
    loose = [setting for setting in TURNS if "deterministic" not in setting]
    partial = ["over_sampling_batch_size=96", "partial_rollout=true", "acceptance=first_finished"]
    metrics = grpo(warm, "partial", 1, 5, *loose, *partial)
    assert min(series(metrics, "parity/tokens")) > 0
    assert max(series(metrics, "parity/mismatches")) == 0
