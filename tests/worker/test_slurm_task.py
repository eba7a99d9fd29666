"""Where a task of srun stands, read from Slurm's variables."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest

from miles_spmd.worker.meeting import PREFIX, Place, _known_folder
from miles_spmd.worker.slurm_task import MEETING, SlurmTaskError, adopt, hosts, tasks_per_node

TASK = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu[03-05,11]",
    "SLURM_JOB_ID": "42",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_LAUNCHER_PORT": "39123",
}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node7", ["node7"]),
        ("a,b-1", ["a", "b-1"]),
        ("gpu[03-05,11]", ["gpu03", "gpu04", "gpu05", "gpu11"]),
        ("n[1-2],login,m[9-10]", ["n1", "n2", "login", "m9", "m10"]),
        ("rack[1-2]n[01-02]", ["rack1n01", "rack1n02", "rack2n01", "rack2n02"]),
        ("", []),
    ],
)
def test_names_of_nodes(text: str, names: list[str]) -> None:
    assert hosts(text) == names


def test_tasks_of_nodes() -> None:
    assert tasks_per_node("8") == [8]
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]


def test_a_task_becomes_a_rank() -> None:
    environment = dict(TASK)
    adopt(environment)
    rank = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", MEETING)
    assert [environment[name] for name in rank] == ["5", "7", "1", "2", "gpu03", "42_0_1_39123"]


@pytest.mark.parametrize(
    "changes",
    [{"RANK": "0"}, {"SLURM_STEP_NUM_TASKS": "1"}, dict.fromkeys(TASK, "")],
    ids=["torchrun", "alone", "none"],
)
def test_other_processes_stay_what_they_are(changes: dict[str, str]) -> None:
    environment = {name: value for name, value in (TASK | changes).items() if value}
    before = dict(environment)
    adopt(environment)
    assert environment == before


def test_tasks_that_go_round_the_nodes_are_refused() -> None:
    with pytest.raises(SlurmTaskError, match=r"task 5 of srun is number 1 on node 1: .* --distribution=block"):
        adopt(TASK | {"SLURM_NODEID": "1"})


def test_tasks_meet_in_a_folder_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    (tmp_path / "node").mkdir()
    for world_size, parent in ((2, tmp_path), (1, tmp_path / "node")):
        first, other = (Place(rank, world_size, 0, 1, "", "42_0_1") for rank in (0, 1))
        folder = _known_folder(first, tmp_path, time.monotonic() + 1)
        assert folder == parent / f"{PREFIX}42_0_1"
        assert folder.stat().st_mode & 0o777 == 0o700
        assert _known_folder(other, tmp_path, time.monotonic() + 1) == folder
        with pytest.raises(RuntimeError, match="which a run that was killed has left behind: remove it"):
            _known_folder(first, tmp_path, time.monotonic() + 1)
        folder.chmod(0o755)
        with pytest.raises(RuntimeError, match="is not this user's alone: remove it"):
            _known_folder(other, tmp_path, time.monotonic() + 1)
    assert os.environ.get(MEETING) is None
