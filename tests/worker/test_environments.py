"""Runs with several turns, branches, and environments that fail or are left in the middle: real processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from miles_spmd.controller.generation.durable import read
from miles_spmd.ledger import step_data
from miles_spmd.ledger.chain import verify
from miles_spmd.ledger.compare import compare
from miles_spmd.protocol.pipe import REQUEUE
from miles_spmd.types.run_files import TURNS, complete_checkpoints
from tests import forked
from tests.slurm.cluster import wait_for
from tests.worker.launched import Launch, Launched

REWARD = {"rm_type": "tests.recipe_run:coin"}


def environment(hold: Path, **settings: Any) -> dict[str, Any]:
    name = "tests.environments.samples:conversation"
    return {"environment": name, "environment_kwargs": {"hold": str(hold)}} | settings


def go_on(run: Launched, *overrides: str) -> str:
    done = forked.run(
        "-m", "miles_spmd", "train", run.folder / "config.toml", "--nproc-per-node=2", *overrides, folder=run.folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(run_dir: Path) -> list[dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "train/loss" in row]


def interrupted(launch: Launch, folder: Path, **changes: Any) -> Launched:
    """A run that was stopped in the middle of its first rollout, and has gone on to its end."""
    hold = folder / "hold"
    hold.touch()
    run = launch(
        environment=environment(hold, environment_workers=1, **changes),
        reward=REWARD,
        rollout={"rollout_max_response_len": 16, "engine": "sglang"},
        sglang={"max_running_requests": 16},
        determinism={"deterministic": True},
        checkpoint={"export_final": False, "resume": True},
        run={"num_rollout": 2},
    )
    wait_for(lambda: (folder / "hold.held").exists(), 60)
    os.kill(run.launcher.pid, signal.SIGTERM)
    message = run.finish(60)
    assert run.launcher.returncode == REQUEUE, run.report()
    found = re.fullmatch(r"stopped by SIGTERM in step 0: (\d+ complete and \d+ partial responses.*) are saved", message)
    assert found
    hold.unlink()
    assert f"step 0 continues {found[1]}" in go_on(run)
    return run


def test_several_turns_that_are_left_in_the_middle(launch: Launch, tmp_path: Path) -> None:
    """A run that is stopped while an environment is at work goes on with the turns that there are, and has the ledger
    of one that was not, whose environments share other processes, and fail now and then."""
    run = interrupted(launch, tmp_path)
    kinds = ["environment.environment_kwargs.fails=true", "environment.environment_workers=2", "run.name=undisturbed"]
    go_on(run, *kinds)
    undisturbed = run.run_dir.with_name("undisturbed")
    same = compare(verify(run.run_dir), verify(undisturbed))
    assert same.equal, same.difference
    assert same.steps == [0, 1]
    for of_step in rows(run.run_dir):
        assert of_step["parity/mismatches"] == 0
        assert of_step["rollout/turns"] == 2
        assert of_step["rollout/env/given"] == 3
    failed = [row.get(f"rollout/failed/{kind}", 0) for kind in ("raised", "died") for row in rows(undisturbed)]
    assert sorted(failed) == [0, 0, 1, 1]
    recorded = step_data.read(run.run_dir, 1)
    assert recorded is not None
    assert recorded.samples is not None
    assert len(recorded.samples.uids) == 16  # two siblings of each of eight samples


def test_agents_that_are_left_in_the_middle(launch: Launch, tmp_path: Path) -> None:
    """A run that is stopped while agents have sessions gives them the responses that they had, and goes on bitwise."""
    run = interrupted(launch, tmp_path, environment="tests.environments.agent_samples:texts")
    go_on(run, "environment.environment_workers=2", "run.name=undisturbed")
    same = compare(verify(run.run_dir), verify(run.run_dir.with_name("undisturbed")))
    assert same.equal, same.difference
    assert all(row["parity/mismatches"] == 0 for row in rows(run.run_dir))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("tests.environments.samples:conversation", marks=pytest.mark.slow),
        "tests.environments.agent_samples:texts",
    ],
)
def test_episodes_that_are_killed_go_on_behind_their_last_turn(launch: Launch, tmp_path: Path, name: str) -> None:
    """All processes of a run are killed while environments and agents are between two turns, some steps behind the last
    checkpoint. Finished turns come from disk, and the ledger is that of a run that nobody has disturbed."""
    hold = tmp_path / "hold"
    run = launch(
        environment=environment(hold, environment=name, environment_workers=1),
        reward=REWARD,
        rollout={"rollout_max_response_len": 16, "engine": "sglang", "durable": True},
        sglang={"max_running_requests": 16},
        determinism={"deterministic": True},
        checkpoint={"export_final": False, "resume": True, "save_interval": 3},
        run={"num_rollout": 12},
    )
    run.wait_for_steps(4)
    hold.touch()
    wait_for(lambda: (tmp_path / "hold.held").exists(), 60)
    time.sleep(1.0)  # those that are between two turns by now go on until they are held
    for pid in run.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.launcher.wait(60)
    first = max(complete_checkpoints(run.run_dir))
    numbered = {int(path.name.removeprefix("step_")): path for path in turns(run)}
    left = {step: len(read(path.read_bytes())[0]) for step, path in numbered.items() if step >= first}
    hold.unlink()
    said = go_on(run)
    assert turns(run) == []
    from_disk = {int(row["step"]) - 1: row["rollout/from_disk"] for row in rows(run.run_dir) if row["step"] > first}
    last = max(left)
    complete = [step for step in left if step < last]
    assert complete == [*range(first, last)]
    assert len({left[step] for step in complete}) <= 1
    assert all(0 < left[last] < left[step] for step in complete)
    assert from_disk == {step: left.get(step, 0) for step in range(first, 12)}
    assert f"step {last} has {left[last]} complete responses on disk" in said
    go_on(run, "environment.environment_workers=2", "run.name=undisturbed", "rollout.durable=false")
    same = compare(verify(run.run_dir), verify(run.run_dir.with_name("undisturbed")))
    assert same.equal, same.difference
    assert same.steps == [*range(12)]
    assert all(row["parity/mismatches"] == 0 for row in rows(run.run_dir))


def turns(run: Launched) -> list[Path]:
    """The files of durable turns."""
    return sorted((run.run_dir / TURNS).glob("*"))


@pytest.mark.slow
def test_what_a_step_leaves_is_continued(launch: Launch, tmp_path: Path) -> None:
    """Partial rollouts over a stop and a resume: every prompt of the data is trained on once, in order of its begin."""
    run = launch(
        environment=environment(tmp_path / "hold"),
        reward=REWARD,
        rollout={
            "rollout_max_response_len": 24,
            "over_sampling_batch_size": 6,
            "partial_rollout": True,
            "acceptance": "first_finished",
            "engine": "sglang",
        },
        sglang={"max_running_requests": 16},
        checkpoint={"export_final": False, "resume": True},
        run={"num_rollout": 100000},
    )
    run.wait_for_steps(3)
    (run.run_dir / "stop").touch()
    run.finish(60)
    assert run.launcher.returncode == REQUEUE, run.report()
    steps = len(rows(run.run_dir)) + 3
    go_on(run, f"run.num_rollout={steps}")
    trained: list[int] = []
    for step in range(steps):
        recorded = step_data.read(run.run_dir, step)
        assert recorded is not None
        assert recorded.samples is not None
        places = sorted({int(uid.rpartition("@")[2]) for uid in recorded.samples.uids})
        assert len(places) == 4
        trained += places
    assert len(set(trained)) == len(trained)
    assert max(trained) < 6 + 4 * steps  # begun are those that were trained, and those that wait
    assert all(row["parity/mismatches"] == 0 for row in rows(run.run_dir))
