"""A run of which a process dies: one clear line names it, a status of not 0, no process left, no long wait. A
run is held in a known phase by tests/worker/held.py, or by a reward that hangs, and then hurt."""

from __future__ import annotations

import os
import signal
import time

import pytest

from miles_spmd.types.phase import Phase
from tests.worker.launched import START_SECONDS, Launch


@pytest.mark.parametrize(
    ("phase", "rank", "place"),
    [
        (Phase.START, 1, "start"),
        (Phase.ROLLOUT, 1, "rollout, step 0"),
        (Phase.TRAIN, 0, "train, step 0"),
        (Phase.TRAIN, 1, "train, step 0"),
        (Phase.REFIT, 1, "refit, step 0"),
    ],
)
def test_a_killed_worker_is_named(launch: Launch, phase: Phase, rank: int, place: str) -> None:
    run = launch(phase, rank, "hang")
    pid = run.wait_until_held()
    time.sleep(1)  # until it has sent a heartbeat
    os.kill(pid, signal.SIGKILL)
    message = run.finish()
    assert message.startswith(f"rank {rank} ")
    assert f"died: {place}" in message


@pytest.mark.parametrize(
    ("phase", "rank", "place"),
    [
        (Phase.TRAIN, 0, "train, step 0"),  # while the engine is idle
        (Phase.REFIT, 0, "refit, step 0"),
        (Phase.REFIT, 1, "refit, step 0"),  # while the trainer sends to it
    ],
)
def test_a_killed_rank_of_either_side_is_named(launch: Launch, phase: Phase, rank: int, place: str) -> None:
    run = launch(phase, rank, "hang", rollout={"rollout_num_gpus": 1})
    pid = run.wait_until_held()
    time.sleep(1)  # until it has sent a heartbeat
    os.kill(pid, signal.SIGKILL)
    message = run.finish()
    assert message.startswith(f"rank {rank} ")
    assert f"died: {place}" in message


def test_an_engine_that_cannot_start_is_named(launch: Launch) -> None:
    """Its trainers, which wait for it to meet in a refit, end too."""
    run = launch(Phase.START, 1, "raise", rollout={"rollout_num_gpus": 1})
    assert "start: RuntimeError: the deed is done" in run.finish(START_SECONDS)


def test_a_worker_killed_before_it_could_connect(launch: Launch) -> None:
    run = launch(preloaded=False)  # with imports, it is long before it connects
    os.kill(run.wait_for_ranks()[1], signal.SIGKILL)
    message = run.finish()
    assert message.startswith("start: stopped by SIGTERM; rank ")
    assert message.endswith("1 had not connected")


def test_a_worker_killed_while_all_wait_for_a_reward(launch: Launch) -> None:
    """The controller hears of it from rank 0, which the launcher stops; the reward's process ends as well."""
    run = launch(reward={"rm_type": "tests.worker.rewards:hangs", "reward_workers": 1})
    run.wait_until_held()
    os.kill(run.wait_for_ranks()[1], signal.SIGKILL)
    message = run.finish()
    assert message.startswith("rank 1 (")
    assert "died: rollout, step 0" in message


def test_a_killed_controller_is_named(launch: Launch) -> None:
    run = launch(Phase.TRAIN, 1, "hang")
    run.wait_until_held()
    controller = run.controller()
    assert controller is not None
    os.kill(controller, signal.SIGKILL)
    message = run.finish()
    assert message.startswith("rank 0 (")
    assert message.endswith(f"train, step 0: the controller (pid {controller}) was killed by SIGKILL")


@pytest.mark.slow
def test_a_suspended_controller_is_killed_with_its_rewards(launch: Launch) -> None:
    """Its end of the pipe stays open, and it would stay behind."""
    run = launch(
        ranks=1, run={"num_rollout": 10_000}, reward={"rm_type": "tests.worker.rewards:constant"},
        deadlines={"heartbeat_timeout": 5.0},
    )  # fmt: skip
    run.wait_for_steps(1)
    pid = run.controller()
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    message = run.finish()
    assert message.endswith(f": the controller (pid {pid}) was silent, and was killed")


def test_a_killed_launcher_leaves_nothing_behind(launch: Launch) -> None:
    run = launch(Phase.TRAIN, 1, "hang")
    run.wait_until_held()
    run.launcher.kill()
    assert run.finish() == "train, step 0: the launcher died"


@pytest.mark.parametrize(
    ("rank", "ranks", "says"),
    [
        (None, 1, "start: the controller (pid {pid}) was killed by SIGKILL"),
        (0, 1, "rank 0 (pid {pid}) was killed by SIGKILL, and no process of the run said why"),
        pytest.param(1, 2, "rank 1 (pid {pid}) was killed by SIGKILL, ", marks=pytest.mark.slow),
    ],
)
def test_a_process_killed_while_it_imports_is_named(launch: Launch, rank: int | None, ranks: int, says: str) -> None:
    run = launch(preloaded=False, ranks=ranks)
    pid = run.wait_for_process(rank)
    os.kill(pid, signal.SIGKILL)
    assert says.format(pid=pid) in run.finish(START_SECONDS)
