"""Cells on two nodes of a real Slurm between which packets are lost: each node has a network namespace of its own, in
which a firewall drops what comes and goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from miles_spmd.ledger.chain import verify
from miles_spmd.ledger.compare import compare
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
CELLS = {"resilience": {"cells": 2, "cell_restarts": 100, "cell_timeout": 4.0, "exchange_timeout": 20.0}}
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
        print(time.time(), "struck", number, flush=True)
        run.wait_for(LOST, lost + 1)
        print(time.time(), "lost", number, flush=True)
        lost = run.job.log().count(LOST)
        network.repair(1)
        wait_for(lambda: not psutil.pid_exists(victim), 60)  # noqa: B023
        print(time.time(), "gone", number, flush=True)
        if strike.command != "Commit":  # the next one strikes before the cell is back
            run.wait_for(BACK, number + 1 - (number == len(strikes) - 1))
        print(time.time(), "back", number, flush=True)
    print(run.finish(tmp_path, checkpoint))
