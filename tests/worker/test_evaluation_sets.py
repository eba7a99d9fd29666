"""Evaluation sets and reward functions with settings of their own: a whole run, step by step."""

from __future__ import annotations

import json
from pathlib import Path

from tests import forked
from tests.worker.tiny_run import REFERENCE_ENGINE, write_checkpoint, write_config


def test_each_set_has_its_own_columns_reward_sampling_and_interval(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(3)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {
        "name": "own",
        "prompt_data": str(tmp_path / "own.jsonl"),
        "input_key": "question",
        "label_key": "answer",
        "metadata_key": "",
        "rm_type": "tests.worker.rewards:length_and_parity",
        "n_samples_per_eval_prompt": 4,
        "eval_temperature": 1.0,
        "eval_max_response_len": 5,
        "eval_interval": 2,
    }
    config = write_config(
        tmp_path,
        write_checkpoint(tmp_path / "model"),
        run={"num_rollout": 5},
        rollout={"engine": REFERENCE_ENGINE},
        reward={
            "rm_type": "tests.worker.rewards:by_length",
            "further": [{"rm_type": "exact", "reward_weight": 2.0}],
        },
        eval={"eval_interval": 3, "eval_prompt_data": {"plain": str(tmp_path / "data.jsonl")}, "sets": [own]},
    )
    done = forked.run("-m", "miles_spmd", "train", config, "--nproc-per-node=1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert {row["step"] for row in metrics if "eval/plain" in row} == {0, 3, 5}
    assert {row["step"] for row in metrics if "eval/own" in row} == {0, 2, 4, 5}
    first = next(row for row in metrics if "eval/own" in row)
    assert 0 < first["eval/own"] == first["eval/own-response_len"] <= 5  # its reward is the length of the response
    assert first["eval/own-pass@4"] == 1
    assert 0 <= first["eval/own-reward/odd/mean"] <= 1
    assert "eval/own-reward/exact/mean" not in first
    assert 5 < first["eval/plain-response_len"] <= 8
    assert first["eval/plain-reward/exact/mean"] == 0
    assert first["eval/plain"] == first["eval/plain-reward/by_length/mean"] > 0
    for row in metrics:
        if "rollout/raw_reward" in row:
            assert abs(row["rollout/raw_reward"] - row["rollout/reward/by_length/mean"]) < 1e-9
            assert row["rollout/reward/by_length/std"] > 0
            assert row["rollout/reward/exact/mean"] == 0
