"""Cells as steps of a job of a real Slurm, on two nodes."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from miles_spmd.ledger.chain import verify
from miles_spmd.ledger.compare import compare
from tests import forked
from tests.slurm.cluster import Cluster, Job
from tests.slurm.conftest import Submit, write_job
from tests.worker.tiny_run import REFERENCE_ENGINE

STEPS = 400
SETTINGS = {
    "run": {"num_rollout": STEPS},
    "rollout": {"engine": REFERENCE_ENGINE},
    "train": {"reduction_leaves": 4},
    "checkpoint": {"save_interval": 50},
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def wait_for_step(job: Job, folder: Path, step: int) -> None:
    metrics = folder / "runs" / "tiny" / "metrics.jsonl"
    job.wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > step)


def test_a_node_dies_and_returns(
    cluster: Cluster, submit: Submit, folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    cells = {"resilience": {"cells": 2, "cell_restarts": 20, "cell_timeout": 15.0}}
    job = submit(write_job(folder, checkpoint, **SETTINGS, **cells), nodes=2, ranks=1, options=("--no-kill",))
    wait_for_step(job, folder, 3)
    log = (folder / "runs" / "tiny" / "logs" / "latest" / "rank-1.log").read_text()
    os.kill(int(re.findall(r"pid (\d+)", log)[0]), signal.SIGKILL)
    job.wait_for(lambda: job.log().count("cell 1 takes part again") == 1)
    cluster.kill_node(1)
    job.wait_for(lambda: job.log().count("the run goes on without cell 1 (node1)") == 2)
    cluster.start_node(1)
    job.wait_for(lambda: job.log().count("cell 1 takes part again") == 2)
    assert job.wait() == "COMPLETED", job.log()
    whole = write_job(tmp_path, checkpoint, **SETTINGS)
    done = forked.run("-m", "miles_spmd", "train", whole, "--nproc-per-node=2", folder=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    found = compare(verify(folder / "runs" / "tiny"), verify(tmp_path / "runs" / "tiny"))
    assert found.equal, found.difference
    assert len(found.steps) == STEPS


def test_what_slurm_cannot_do_with_cells_is_refused(submit: Submit, folder: Path, checkpoint: Path) -> None:
    config = write_job(folder, checkpoint, **SETTINGS, resilience={"cells": 1})
    job = submit(config, "resilience.cells=2", "train.reduction_leaves=4", ranks=2, MILES_SPMD_LAUNCH="tasks")
    assert job.wait() == "FAILED"
    assert "job.sh: error: resilience.cells: cells have launchers of their own: unset MILES_SPMD_LAUNCH" in job.log()
