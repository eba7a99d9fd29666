"""A run in which one rank is slow, from the rank's own clock to the report."""

from __future__ import annotations

import json
from pathlib import Path

from miles_spmd.telemetry.report import report_data
from tests import forked
from tests.worker.losses import SECONDS
from tests.worker.tiny_run import REFERENCE_ENGINE, write_checkpoint, write_config


def test_the_slow_rank_is_named_and_not_the_one_that_waits(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        write_checkpoint(tmp_path / "model"),
        run={"num_rollout": 4},
        rollout={"engine": REFERENCE_ENGINE},
        algorithm={"loss_type": "tests.worker.losses:sleeps_on_rank_1"},
    )
    done = forked.run("-m", "miles_spmd", "train", config, "--nproc-per-node=2", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    in_train = [line for line in done.stderr.splitlines() if "as slow as its peers in train" in line]
    assert len(in_train) == 1, done.stderr
    assert in_train[0].startswith("miles-spmd: warning: rank 1 (")
    folder = tmp_path / "runs" / "tiny"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(row.get("perf/train_slowest", 0) > 1.3 for row in rows) == 4
    (stage,) = report_data(folder)["stages"]
    trained = {row["ranks"][0]: row for row in stage["stragglers"]["rows"] if row["phase"] == "train"}
    assert trained[1]["slow"]
    assert not trained[0]["slow"]
    # rank 0 waited as long for the gradients of rank 1, and that is not its own time
    assert trained[1]["median"] > SECONDS > trained[1]["median"] - trained[0]["median"] - 0.2
    assert trained[0]["median"] < SECONDS
