"""Rollouts that lag behind the newest weights, and a reference that follows them: a whole run, step by step."""

from __future__ import annotations

import json
from pathlib import Path

from tests import forked
from tests.worker.tiny_run import REFERENCE_ENGINE, write_checkpoint, write_config


def test_old_actor_and_reference_follow_at_their_own_pace(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        write_checkpoint(tmp_path / "model"),
        run={"num_rollout": 6},
        rollout={"engine": REFERENCE_ENGINE},
        refit={"update_weights_interval": 2},
        algorithm={"keep_old_actor": True, "kl_loss_coef": 0.1, "kl_loss_type": "k2", "ref_update_interval": 3},
        reward={"rm_type": "tests.worker.rewards:by_length"},
        megatron={"lr": 1e-2},
    )
    done = forked.run("-m", "miles_spmd", "train", config, "--nproc-per-node=1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "train/loss" in row]
    assert len(steps) == 6
    # new weights every second rollout, and the old actor's log-probs are always those of the engine's weights
    assert [i for i, row in enumerate(steps, 1) if "perf/refit_time" in row] == [2, 4, 6]
    assert all(row["train/train_rollout_logprob_abs_diff_max"] < 1e-4 for row in steps)
    # the newest weights have left those that generated only in the second rollout after a refit
    moved = [abs(row["train/ppo_kl"]) > 0 for row in steps]
    assert moved == [False, True] * 3
    # a fresh reference is the policy itself
    assert [row["train/kl_loss"] > 0 for row in steps] == [False, True, True] * 2
