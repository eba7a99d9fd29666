"""Runs of cells that are asked to stop, or whose controller or supervisor is lost, while all cells take part and while
one is built again: they end with one message, leave no process, and continue as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from miles_spmd.ledger.chain import verify
from miles_spmd.ledger.compare import compare
from miles_spmd.protocol.pipe import REQUEUE
from miles_spmd.supervisor import LEAVING
from miles_spmd.worker.meeting import made_by_launcher
from tests import forked
from tests.worker.launched import Launch, Launched
from tests.worker.test_run_of_cells import REWARD, pid_of, wait_for

SETTINGS: dict[str, Any] = {
    "run": {"num_rollout": 100000},
    "train": {"reduction_leaves": 4},
    "reward": {"rm_type": REWARD},
    "determinism": {"deterministic": True},
    "checkpoint": {"resume": True, "save_interval": 7, "export_final": False},
    "resilience": {"cells": 2, "cell_timeout": 3.0},
    "deadlines": {"heartbeat_timeout": 6.0},
}
SAVED = r"stopped by {} before step \d+: all is saved"


def send(number: signal.Signals, pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def launchers(run: Launched) -> list[int]:
    """Those of the cells that are built."""
    alive = [pid for rank in range(2) if psutil.pid_exists(pid := pid_of(run, rank))]
    return [psutil.Process(pid).ppid() for pid in alive]


def kill_launcher(run: Launched) -> None:
    """Kill it, and begin another run at once, which removes what killed launchers have left."""
    os.kill(run.launcher.pid, signal.SIGKILL)
    run.launcher.wait()
    with made_by_launcher():
        pass


def controller(run: Launched) -> int:
    found = run.controller()
    assert found is not None
    return found


Deed = Callable[[Launched], None]
ENDS: dict[str, tuple[Deed, str, int]] = {  # what is done, the message, the exit status
    "file": (lambda run: (run.run_dir / "stop").touch(), SAVED.format(".*/stop"), REQUEUE),
    "SIGUSR1": (lambda run: send(signal.SIGUSR1, [run.launcher.pid]), SAVED.format("SIGUSR1"), REQUEUE),
    "SIGTERM-to-all": (lambda run: send(signal.SIGTERM, run.processes()), SAVED.format("SIGTERM"), REQUEUE),
    "SIGTERM-to-steps": (  # as `scancel` of a job of Slurm does
        lambda run: send(signal.SIGTERM, launchers(run)),
        SAVED.format("SIGTERM"),
        REQUEUE,
    ),
    "Ctrl-C": (lambda run: send(signal.SIGINT, [run.launcher.pid]), r".*, step \d+: stopped by SIGINT", 130),
    "controller-killed": (
        lambda run: send(signal.SIGKILL, [controller(run)]),
        r"the controller \(pid \d+\) was killed by SIGKILL",
        1,
    ),
    "controller-suspended": (
        lambda run: send(signal.SIGSTOP, [controller(run)]),
        r"the controller \(pid \d+\) was silent, and was killed",
        1,
    ),
    "supervisor-killed": (
        kill_launcher,
        r".*, step \d+: the supervisor died",
        -signal.SIGKILL,
    ),
}


def go_on(run: Launched, ranks: int, *overrides: str) -> None:
    command = "-m", "miles_spmd", "train", run.folder / "config.toml", f"--nproc-per-node={ranks}", *overrides
    done = forked.run(*command, folder=run.folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, REQUEUE)], ids=["SIGINT", "SIGTERM"]
)
def test_a_run_that_has_not_begun_ends_at_once(launch: Launch, number: signal.Signals, status: int) -> None:
    """Its ranks have not connected yet, so they do not notice the end of the controller."""
    run = launch(ranks=1, preloaded=False, **SETTINGS)
    run.wait_for_process(0)
    began = time.monotonic()
    os.kill(run.launcher.pid, number)
    assert run.launcher.wait(60) == status, run.report()
    assert time.monotonic() - began < LEAVING / 2
    run.wait_for_end()
    assert re.fullmatch(f"miles-spmd: start: stopped by {number.name}.*\n", run.stderr()), run.report()


@pytest.mark.slow
@pytest.mark.parametrize("rebuilt", [False, True], ids=["all-there", "one-rebuilt"])
@pytest.mark.parametrize("end", ENDS)
def test_a_run_ends_and_continues(launch: Launch, end: str, rebuilt: bool) -> None:
    deed, message, status = ENDS[end]
    run = launch(ranks=1, **SETTINGS)
    run.wait_for_steps(9)
    if rebuilt:
        os.kill(pid_of(run, 1), signal.SIGKILL)
        wait_for(run, "which is started again")
    deed(run)
    assert run.launcher.wait(90) == status, run.report()
    run.wait_for_end(15)
    # A launcher that has just begun ends by the signal itself, perhaps before the controller knows why.
    *said, last = [line for line in run.stderr().splitlines() if "its launcher was killed by SIGTERM" not in line]
    assert re.fullmatch(f"miles-spmd: {message}", last), run.report()
    assert len(said) == rebuilt
    made = (run.run_dir / "metrics.jsonl").read_bytes().count(b"\n")
    steps = f"run.num_rollout={made + 2}"
    go_on(run, 1, steps)
    go_on(run, 2, steps, "run.name=undisturbed", "resilience.cells=1")
    comparison = compare(verify(run.run_dir), verify(run.run_dir.with_name("undisturbed")))
    assert comparison.equal, comparison.difference
