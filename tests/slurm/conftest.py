"""What jobs need: a cluster of two nodes, and a run that is small enough to be started many times."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import REPOSITORY, Cluster, Job, missing
from tests.worker.tiny_run import write_checkpoint, write_config

ENGINE = "tests.slurm.held_engine:HeldEngine"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if lacking := missing():
        pytest.skip(f"a cluster needs {', '.join(lacking)}; .ci/run installs it: slurm-wlm and munge")
    cluster = Cluster(nodes=2)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where all users can go, which they cannot in pytest's own folder."""
    with tempfile.TemporaryDirectory(prefix="job-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


def write_job(folder: Path, checkpoint: Path, /, **changes: dict[str, Any]) -> Path:
    """A configuration of four steps, each with a checkpoint."""
    own: dict[str, dict[str, Any]] = {
        "run": {"num_rollout": 4},
        "rollout": {"engine": ENGINE, "rollout_batch_size": 2},
        "determinism": {"parity": "off", "deterministic": True},
        "checkpoint": {"export_final": False, "save_interval": 1},
    }
    for table, settings in changes.items():
        own[table] = own.get(table, {}) | settings
    return write_config(folder, checkpoint, **own)


Submit = Callable[..., Job]


def submit_from(
    cluster: Cluster,
    folder: Path,
    config: Path,
    *arguments: str,
    nodes: int = 1,
    ranks: int = 1,
    script: Path = REPOSITORY / "slurm" / "grpo_qwen3.sh",
    options: tuple[str, ...] = (),
    **variables: str,
) -> Job:
    """Submit ``slurm/grpo_qwen3.sh`` or another script from ``folder``: nodes, ranks of each, options of sbatch,
    arguments of the script, and variables."""
    given = {"MILES_SPMD_ROOT": str(REPOSITORY), "CONFIG": str(config), "NPROC_PER_NODE": str(ranks)}
    given |= {"MILES_SPMD_PREFLIGHT": "off", "HOLD": str(folder / "hold")} | variables
    fixed = (f"--nodes={nodes}", "--gpus-per-node=0", f"--chdir={folder}", f"--output={folder}/%j.log", "--time=60")
    return cluster.submit(*fixed, *options, script, *arguments, **given)


@pytest.fixture
def submit(cluster: Cluster, folder: Path) -> Iterator[Submit]:
    """:func:`submit_from` the test's folder; the jobs end with the test."""
    jobs: list[Job] = []

    def start(*arguments: Any, **options: Any) -> Job:
        jobs.append(submit_from(cluster, folder, *arguments, **options))
        return jobs[-1]

    yield start
    for job in jobs:
        if not job.ended():
            cluster.command("scancel", job.id)
            job.wait()
    shutil.rmtree(folder / "runs", ignore_errors=True)
