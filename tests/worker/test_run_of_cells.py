"""Runs whose ranks are divided into cells, with real processes: whichever of them is hurt, the run is the same."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from miles_spmd.ledger.chain import verify
from miles_spmd.ledger.compare import compare
from tests.worker.launched import START_SECONDS, Launch, Launched

STEPS = 60
END_SECONDS = 180
EXACT: dict[str, Any] = {"run": {"num_rollout": STEPS, "overwrite": True}, "train": {"reduction_leaves": 4}}
CELLS: dict[str, Any] = EXACT | {"resilience": {"cells": 2, "cell_timeout": 3.0}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of the run that the others are compared with, as soon as a test has made it."""
    return {}


def finished(run: Launched, seconds: float = END_SECONDS) -> Launched:
    assert run.launcher.wait(seconds) == 0, run.report()
    assert not run.processes()
    return run


def same_as_one_world(run: Launched, launch: Launch) -> None:
    """The ledger of a run is that of ranks that were never divided, nor hurt."""
    kept = run.run_dir.rename(run.run_dir.with_name("of_cells"))
    whole = finished(launch(**EXACT))
    comparison = compare(verify(kept), verify(whole.run_dir))
    assert comparison.equal, comparison.difference
    assert len(comparison.steps) == STEPS


def pid_of(run: Launched, rank: int) -> int:
    log = (run.run_dir / "logs" / "latest" / f"rank-{rank}.log").read_text()
    return int(re.findall(r"pid (\d+)", log)[0])


def warnings(run: Launched) -> list[str]:
    return [line.removeprefix("miles-spmd: ") for line in run.stderr().splitlines() if line.startswith("miles-spmd: ")]


def wait_for(run: Launched, text: str, count: int = 1) -> None:
    end = time.monotonic() + START_SECONDS
    while run.stderr().count(text) < count:
        assert time.monotonic() < end, run.report()
        assert run.launcher.poll() is None, run.report()
        time.sleep(0.05)


def test_a_rank_of_each_cell_dies(launch: Launch) -> None:
    run = launch(ranks=1, **CELLS)
    run.wait_for_steps(3)
    os.kill(pid_of(run, 1), signal.SIGKILL)
    wait_for(run, "cell 1 takes part again")
    os.kill(pid_of(run, 0), signal.SIGKILL)
    wait_for(run, "cell 0 takes part again")
    finished(run)
    lost, back, other, again = warnings(run)
    assert re.search(r"rank 1 \(.+ died: .*; the run goes on without cell 1 \(.+\), which is started again", lost)
    assert re.search(r"step \d+: cell 1 takes part again", back)
    assert "rank 0" in other
    assert "cell 0 takes part again" in again
    logs = {path.name for path in (run.run_dir / "logs" / "latest").glob("rank-*.log")}
    assert logs == {"rank-0.log", "rank-0.1.log", "rank-1.log", "rank-1.1.log"}
    same_as_one_world(run, launch)
