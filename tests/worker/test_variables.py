"""Numbers in the environment that are missing or are none: one error, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles_spmd.controller.attempts import slurm_job
from miles_spmd.types.variables import VariableError
from miles_spmd.worker.slurm_task import adopt
from tests import forked
from tests.worker.test_slurm_task import TASK

RANK = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("SLURM_STEP_NUM_TASKS", "abc"), ("SLURM_NODEID", ""), ("SLURM_LOCALID", "-1"), ("SLURM_STEP_TASKS_PER_NODE", "")],
)
def test_a_task_without_a_place(name: str, value: str) -> None:
    with pytest.raises(VariableError, match=name):
        adopt(TASK | {name: value})


def test_a_task_of_an_array_has_a_name_of_its_own() -> None:
    """The number of the last one is that of the whole array."""
    assert slurm_job({"SLURM_JOB_ID": "7"}) == "7"
    assert slurm_job({"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}) == "7_3"
    assert slurm_job({}) == ""


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_RESTART_COUNT": "1.5"}, "SLURM_RESTART_COUNT in the environment has to be a whole number, at least 0"),
        ({"SLURM_CPUS_ON_NODE": "16(x2)"}, "SLURM_CPUS_ON_NODE in the environment has to be a whole number"),
        ({"MILES_SPMD_JOB_END": "10:00"}, "MILES_SPMD_JOB_END in the environment has to be a finite number above 0"),
        ({"RANK": "3"}, "the environment has no WORLD_SIZE"),
        (RANK | {"MASTER_ADDR": ""}, "the environment has no MASTER_ADDR"),
        (RANK | {"RANK": "-1"}, "RANK in the environment has to be a whole number, at least 0, got '-1'; unset RANK"),
        (
            RANK | {"RANK": "2"},
            "RANK 2, WORLD_SIZE 2, LOCAL_RANK 0, which cannot be the place of a rank",
        ),
    ],
)
def test_one_error_before_anything_starts(tmp_path: Path, variables: dict[str, str], message: str) -> None:
    (tmp_path / "config.toml").touch()
    done = forked.run("-m", "miles_spmd", "train", tmp_path / "config.toml", folder=tmp_path, environment=variables)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
