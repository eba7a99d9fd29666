"""Cells on two nodes of a real Slurm between which packets are lost: each node has a network namespace of its own, in
which a firewall drops what comes and goes."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from miles_spmd.ledger.chain import verify
from miles_spmd.ledger.compare import compare
from miles_spmd.telemetry.json_lines import Lines
from tests import forked
from tests.slurm import network as networks
from tests.slurm.cluster import Cluster, Job, missing, wait_for
from tests.slurm.conftest import Submit, write_job
from tests.slurm.network import Network, cut
from tests.worker.strike import Strike, victims, write
from tests.worker.tiny_run import REFERENCE_ENGINE

STEPS = 200
SETTINGS = {
    "run": {"num_rollout": STEPS},
    "rollout": {"engine": REFERENCE_ENGINE},
    "reward": {"rm_type": "tests.worker.rewards:by_length_slowly"},
    "train": {"reduction_leaves": 4},
    "checkpoint": {"save_interval": 50},
}
CELLS = {"resilience": {"cells": 2, "cell_restarts": 100, "cell_timeout": 4.0}}
LONGEST = 15.0  # seconds of a step, on a busy machine
LOST, BACK = "the run goes on without cell 1", "cell 1 takes part again"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if lacking := networks.missing():
        pytest.skip(f"a network needs {', '.join(lacking)}; .ci/run installs the packages iproute2 and iptables")
    with networks.network(2) as made:
        yield made


@pytest.fixture(scope="module")
def cluster(network: Network) -> Iterator[Cluster]:
    if lacking := missing():
        pytest.skip(f"a cluster needs {', '.join(lacking)}; .ci/run installs it: slurm-wlm and munge")
    cluster = Cluster(nodes=2, network=network)
    yield cluster
    cluster.stop()


class Run:
    """A run of two cells, whose steps take a while until :meth:`finish`."""

    def __init__(self, submit: Submit, folder: Path, checkpoint: Path, *strikes: Strike) -> None:
        self._folder, self._slowly = folder, folder / "slowly"
        self._slowly.touch()
        config = write_job(folder, checkpoint, **SETTINGS, **CELLS)
        variables = write(folder, strikes) | {"SLOWLY": str(self._slowly)}
        self.job: Job = submit(config, nodes=2, ranks=1, options=("--no-kill",), **variables)

    def wait_for_strike(self, number: int) -> int:
        """The process that it has hit."""
        self.job.wait_for(lambda: len(victims(self._folder)) > number)
        return victims(self._folder)[number]

    def wait_for(self, text: str, count: int) -> None:
        """Wait until that was printed so often."""
        self.job.wait_for(lambda: self.job.log().count(text) >= count)

    def wait_for_steps(self, count: int) -> None:
        """Wait for so many more."""
        end = len(self.steps()) + count
        self.job.wait_for(lambda: len(self.steps()) >= end)

    def steps(self) -> list[dict[str, Any]]:
        """The metrics of the steps so far."""
        return Lines(self._folder / "runs" / "tiny" / "metrics.jsonl", dict[str, Any]).values

    def process(self, rank: int) -> int:
        log = (self._folder / "runs" / "tiny" / "logs" / "latest" / f"rank-{rank}.log").read_text()
        return int(re.findall(r"pid (\d+)", log)[0])

    def finish(self, folder: Path, checkpoint: Path) -> str:
        """Return what it has printed; its ledger is that of ranks of one world, whose packets all arrive."""
        self._slowly.unlink()
        assert self.job.wait() == "COMPLETED", self.job.log()
        whole = write_job(folder, checkpoint, **SETTINGS)
        done = forked.run("-m", "miles_spmd", "train", whole, "--nproc-per-node=2", folder=folder, timeout=600)
        assert done.returncode == 0, done.stderr
        found = compare(verify(self._folder / "runs" / "tiny"), verify(folder / "runs" / "tiny"))
        assert found.equal, found.difference
        assert len(found.steps) == STEPS
        return self.job.log()


MOMENTS = [
    Strike(1, "EngineStep", 40),
    Strike(1, "ComputePart", 3, 50),
    Strike(1, "Exchange", 3, 10),
    Strike(1, "Commit", 3),
    Strike(1, "ReceiveState", call=100),
]


def test_a_node_is_cut_off(network: Network, submit: Submit, folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    """In each phase of a step, and while its cell receives the state of the other one. It is lost; when packets arrive
    again it is back, and nothing of what was cut off is left."""
    strikes = [msgspec.structs.replace(one, start=None, shell=cut()) for one in MOMENTS]
    run = Run(submit, folder, checkpoint, *strikes)
    lost = 0
    for number, strike in enumerate(strikes):
        victim = run.wait_for_strike(number)
        run.wait_for(LOST, lost + 1)
        if strike.command != "ReceiveState":
            run.wait_for_steps(1)
        lost = run.job.log().count(LOST)
        network.repair(1)
        wait_for(lambda: not psutil.pid_exists(victim), 60)  # noqa: B023
        if strike.command != "Commit":  # the next one strikes before the cell is back
            run.wait_for(BACK, number + 1 - (number == len(strikes) - 1))
    assert max(step["perf/step_time"] for step in run.steps()[1:]) < LONGEST
    print(run.finish(tmp_path, checkpoint))


def test_packets_are_lost_for_a_moment(
    network: Network, submit: Submit, folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """No cell is lost, as long as it is shorter than `cell_timeout`."""
    run = Run(submit, folder, checkpoint)
    for share in (0.0, 0.3, 0.6):
        run.wait_for_steps(3)
        time.sleep(share)
        network.cut(1)
        time.sleep(2.0)
        network.repair(1)
    run.wait_for_steps(3)
    assert "the run goes on without" not in run.finish(tmp_path, checkpoint)


def test_cells_that_do_not_reach_each_other(
    network: Network, submit: Submit, folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Both reach the controller and the lighthouse. The run goes on without one of them."""
    run = Run(submit, folder, checkpoint)
    run.wait_for_steps(3)
    network.sever(1, run.process(0), run.process(1))
    run.wait_for("times to make an update: ", 1)
    network.repair(1)
    run.wait_for(BACK, 1)
    print(run.finish(tmp_path, checkpoint))
