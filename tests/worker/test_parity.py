"""Whole runs in which engine and trainer compute the same bits."""

from __future__ import annotations

from pathlib import Path

from miles_spmd.config.checks import decide_parity
from miles_spmd.ledger.chain import verify
from miles_spmd.telemetry.trackers import METRICS_FILE, read_metrics
from tests.ledger.runs import STEPS, Recipe, replayed, train
from tests.ranks import Ranks
from tests.worker.tiny_run import REFERENCE_ENGINE

UPDATED = ("train/loss", "train/grad_norm", "train/ppo_kl", "train/pg_clipfrac")


def test_likeliest_tokens_are_compared_where_a_budget_asks(ranks: Ranks, tmp_path: Path) -> None:
    """A replay that takes recorded answers has none of the engine's, and compares none."""
    recipe, budget = Recipe(tmp_path), "mismatch_budget={top1_flips=0.01}"
    for name, engine in {"sglang": "sglang", "reference": REFERENCE_ENGINE}.items():
        folder = train(ranks, recipe.config(name, f"engine={engine}", "parity=off", budget))
        metrics = read_metrics(folder / METRICS_FILE)
        assert [metrics[step]["train/train_rollout_top1_flips"] for step in range(1, STEPS + 1)] == [0.0] * STEPS
    again, _ = replayed(ranks, folder, 1, "train")
    assert verify(again).steps[1].updates


def test_the_engines_log_probs_stand_for_the_trainers(ranks: Ranks, tmp_path: Path) -> None:
    """Two optimizer steps a rollout: the trainer's forward pass for the old policy may be left out, and not a bit of
    the training changes."""
    recipe, found = Recipe(tmp_path), {}
    for name in ("own", "engine"):
        settings = ["engine=sglang", f"use_rollout_logprobs={str(name == 'engine').lower()}"]
        config, reasons = decide_parity(recipe.config(name, *settings), set())
        assert reasons == []
        metrics = read_metrics(train(ranks, config) / METRICS_FILE)
        found[name] = [metrics[step] for step in range(1, STEPS + 1)]
    assert all(m["parity/mismatches"] == 0 < m["parity/tokens"] for of_run in found.values() for m in of_run)
    for own, engine in zip(found["own"], found["engine"], strict=True):
        assert {name: own[name] for name in UPDATED} == {name: engine[name] for name in UPDATED}
        assert own["train/grad_norm"] > 0
        assert own["parity/tokens"] > engine["parity/tokens"]  # whose first optimizer step is compared alone
